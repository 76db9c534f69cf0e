"""Density clustering of a few tokens, with a number of clusters that is known beforehand.

Sources: SparseVLM's DPC-kNN (LightVLM 5), PACT's DBDPC (iLLaVA 5). All rows of a batch get the same number of clusters,
so nothing is read back from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_accel.ops._select import ranked, wide

__all__ = ["cosine_distance", "density_centres", "dpc_knn"]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of every row of a (S, n, D) with every row of b (S, m, D), at least 0: (S, n, m), float32 or wider."""
    a, b = (torch.nn.functional.normalize(wide(t), dim=-1, eps=1e-12) for t in (a, b))
    return (1 - a @ b.transpose(1, 2)).clamp(min=0)


def dpc_knn(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peaks with k nearest neighbours, k = ``clusters`` (LightVLM 5, SparseVLM).

    Distances are L2 / sqrt(D); density rho_i = exp(-mean of the k smallest squared distances), its own 0 among them;
    delta_i = distance to the nearest denser point, for the densest the largest distance of all; centres are the top of
    rho * delta, all others join the nearest centre. Of equal densities the lower index counts as denser (the official
    code adds random noise of 1e-6 instead).

    Args:
        x: (S, R, D).
        clusters: C, within [1, R].

    Returns:
        centres (S, C) int64, ascending; owner (S, R) int64 in [0, C), each centre its own.
    """
    x = wide(x)
    distance = _distances(x) / x.shape[-1] ** 0.5
    rho = torch.exp(-(distance**2).topk(clusters, dim=-1, largest=False).values.mean(-1))
    place = _places(rho)
    denser = place[:, None, :] < place[:, :, None]
    far = distance.amax((1, 2))[:, None]
    delta = torch.where(denser, distance, torch.inf).amin(-1)
    delta = torch.where(place == 0, far, delta)
    centres = _places(rho * delta).argsort(-1)[:, :clusters].sort(-1).values
    to_centres = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1))
    owner = to_centres.argmin(-1)
    own = torch.arange(clusters, device=x.device).expand_as(centres)
    return centres, owner.scatter(1, centres, own)


def density_centres(distance: Tensor, count: int, cutoff: float, spread: float = 2.0) -> Tensor:
    """Exactly ``count`` centres in the order in which PACT's DBDPC finds them (iLLaVA 5).

    Density rho_i = sum_j exp(-(d_ij / spread)^2). Again and again the densest token that is farther than ``cutoff``
    from every centre becomes one. DBDPC ends when no such token is left; here it ends at ``count`` centres, and where
    tokens run out before, the one farthest from its nearest centre goes on. Ties: the lower index.

    Args:
        distance: (S, P, P), 0 on the diagonal.
        count: centres, within [1, P].
        cutoff: distance within which a token belongs to a centre.
        spread: width of the density kernel, in units of the distance.

    Returns:
        (S, count) int64, ascending.
    """
    tokens = distance.shape[1]
    rho = torch.exp(-((distance / spread) ** 2)).sum(-1)
    # ranks, not densities: exact, and above every distance (cosine distances end at 2)
    rank = (tokens - _places(rho)).to(distance.dtype) + distance.amax((1, 2))[:, None]
    # a centre is infinitely near itself, so that it is never picked again
    own = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    distance = distance.masked_fill(own, -torch.inf)
    nearest = torch.full_like(rho, torch.inf)
    centres = []
    for _ in range(count):
        pick = torch.where(nearest > cutoff, rank, nearest).argmax(-1, keepdim=True)
        centres.append(pick)
        nearest = torch.minimum(nearest, distance.gather(1, pick[..., None].expand(-1, -1, tokens)).squeeze(1))
    return torch.cat(centres, 1).sort(-1).values


def _distances(x: Tensor) -> Tensor:
    """(S, R, R) L2 distances by one product, of rows about their mean so that little cancels; 0 on the diagonal."""
    x = x - x.mean(1, keepdim=True)
    squares = (x * x).sum(-1)
    squared = squares[:, :, None] + squares[:, None, :] - 2 * x @ x.transpose(1, 2)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared.clamp(min=0).masked_fill(own, 0).sqrt()


def _places(values: Tensor) -> Tensor:
    """(S, n) -> (S, n) place of each value in descending order, 0 for the largest, the lower index first on ties."""
    return ranked(values).argsort(-1)
