"""Contrastive alignment of two feature sets, gathering of features over processes, and the question triplet loss."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from slt.ops.precision import at_least_float32

__all__ = [
    "INITIAL_LOGIT_SCALE",
    "MAX_LOGIT_SCALE",
    "VARIANTS",
    "contrastive_loss",
    "gather_with_gradient",
    "masked_mean",
    "question_triplet_loss",
]

VARIANTS = ("infonce", "gfslt", "multi")
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Logarithm of the initial scale 14.2857142857."""
MAX_LOGIT_SCALE = math.log(100.0)
"""The logarithm is clamped here, so that the scale is at most 100."""


def _targets(count: int, variant: str, ids: Tensor | Sequence[Hashable] | None, like: Tensor) -> Tensor:
    """Row-stochastic target matrix (N, N) of a variant."""
    eye = torch.eye(count, dtype=like.dtype, device=like.device)
    if variant == "infonce":
        return eye
    if variant == "gfslt":
        return torch.softmax(10.0 * eye, dim=1)
    if ids is None:
        raise ValueError("variant='multi' needs ids: one id per row, equal where rows are positives of each other")
    if not isinstance(ids, Tensor):
        numbers: dict[Hashable, int] = {}
        ids = torch.tensor([numbers.setdefault(i, len(numbers)) for i in ids])
    if ids.shape != (count,):
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected ({count},), one id per row")
    ids = ids.to(like.device)
    same = (ids[:, None] == ids[None, :]).to(like.dtype)
    return same / same.sum(dim=1, keepdim=True)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    variant: str = "infonce",
    ids: Tensor | Sequence[Hashable] | None = None,
) -> Tensor:
    """Symmetric contrastive loss between paired features: the mean of a row and a column loss.

    Features are L2-normalised; logits = exp(min(logit_scale, ln 100)) * a b^T. With targets t (rows sum to 1):

    - ``infonce``: t is the identity; cross-entropy. One row gives 0, equal features give ln N.
    - ``gfslt``: t = softmax(10 I); KL(t || softmax(logits)), summed over columns, divided by N. Close to
      ``infonce``; the loss of the GFSLT-VLP code, for parity.
    - ``multi``: t_ij = [id_i = id_j] / count_i; cross-entropy, no entropy subtracted. Equals ``infonce`` when all ids
      differ. Takes of one sentence are then positives of each other instead of false negatives.

    Args:
        a: (N, d) features, N >= 1.
        b: (N, d) features; row i belongs to row i of ``a``.
        logit_scale: scalar, the logarithm of the scale; no gradient reaches it above ln 100.
        variant: ``infonce``, ``gfslt`` or ``multi``.
        ids: (N,) integers or N hashables; read by ``multi`` only.

    Returns:
        Scalar in float32 or float64.

    Raises:
        ValueError: unknown variant, shapes that do not pair up, no row, or ``multi`` without ids.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.5.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown contrastive variant {variant!r}; known: {', '.join(VARIANTS)}")
    if a.ndim != 2 or a.shape != b.shape or a.shape[0] == 0:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}; expected both (N, d) with N >= 1")
    with torch.autocast(device_type=a.device.type, enabled=False):
        a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
        scale = torch.as_tensor(logit_scale, dtype=a.dtype, device=a.device).clamp(max=MAX_LOGIT_SCALE).exp()
        logits = scale * (a @ b.T)
        targets = _targets(a.shape[0], variant, ids, logits)
        cross_entropy = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        if variant == "gfslt":
            return cross_entropy + (targets * targets.log()).sum(dim=1).mean()
        return cross_entropy


class _Gather(torch.autograd.Function):
    """All rows of all ranks, in rank order; the backward pass sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = torch.tensor([x.shape[0]], device=x.device)
        sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        counts = [int(s) for s in sizes]
        # Collectives want equal shapes: pad to the largest rank, cut off again after the exchange.
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.start, ctx.rows = sum(counts[: dist.get_rank()]), x.shape[0]
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes, with a gradient for the rows of this one.

    Every rank then computes the same loss on the global batch. The backward pass *sums* the gradients of all ranks;
    averaged over ranks, as DistributedDataParallel does, parameter gradients equal those of one process on the whole
    batch. Ranks may bring different numbers of rows (none, too). All ranks have to call it, forward and backward.

    Args:
        x: (n, ...) rows of this rank; integer tensors are gathered without gradient.

    Returns:
        (N, ...) rows in rank order; ``x`` itself when no process group is initialised or it has one rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid time steps; 0 for a row without any.

    Args:
        x: (B, L, d); padded content does not matter.
        mask: (B, L) bool, True = valid.

    Returns:
        (B, d) in the type of ``x``.
    """
    total = at_least_float32(x).masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


def question_triplet_loss(anchor: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Draw a clip towards its own question and away from two others: -log softmax(cosines)[0], no temperature.

    Args:
        anchor: (B, d) time-mean features of the clips (``masked_mean``).
        positive: (B, d) time-mean features of their questions.
        negatives: (B, K, d) features of other questions. ``None`` takes the questions of the next two samples of the
            batch (as many as there are; a batch of one gives 0): which negatives the authors' code takes is not known.

    Returns:
        Scalar, the mean over the batch, in float32 or float64.

    Raises:
        ValueError: shapes that do not pair up.

    Source:
        GBT-style baseline, SSL-SSAW (arXiv 2509.14036), our reading, section 5.
    """
    if anchor.ndim != 2 or anchor.shape != positive.shape or anchor.shape[0] == 0:
        raise ValueError(
            f"anchor {tuple(anchor.shape)} and positive {tuple(positive.shape)}; expected both (B, d), B >= 1"
        )
    if negatives is None:
        shifts = range(1, min(2, anchor.shape[0] - 1) + 1)
        rolled = [positive.roll(-shift, dims=0)[:, None] for shift in shifts]
        negatives = torch.cat([positive[:, None][:, :0], *rolled], dim=1)
    if negatives.ndim != 3 or negatives.shape[::2] != anchor.shape:
        raise ValueError(
            f"negatives {tuple(negatives.shape)}; expected (B, K, d) to go with anchor {tuple(anchor.shape)}"
        )
    with torch.autocast(device_type=anchor.device.type, enabled=False):
        others = torch.cat([at_least_float32(positive)[:, None], at_least_float32(negatives)], dim=1)
        cosines = (F.normalize(at_least_float32(anchor), dim=-1)[:, None] * F.normalize(others, dim=-1)).sum(dim=-1)
        return -cosines.log_softmax(dim=1)[:, 0].mean()
