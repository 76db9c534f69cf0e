"""Where adapters start: a QR split of the weight, or Kaiming's random A with B = 0; the layer's function stays."""

from __future__ import annotations

import math

import torch
from polymodal.errors import UserError
from torch import Tensor

__all__ = ["RankError", "check_rank", "computing", "kaiming_init", "leading_qr", "qr_init"]


class RankError(UserError, ValueError):
    """A rank that the layer cannot have."""


def check_rank(rank: int, out_features: int, in_features: int, layer: str = "") -> None:
    """Raise RankError unless ``1 <= rank <= min(out_features, in_features)``."""
    most = min(out_features, in_features)
    if not 1 <= rank <= most:
        where = f" of layer {layer}" if layer else ""
        raise RankError(
            f"rank {rank}{where} with a weight of {out_features}x{in_features}; expected 1 <= rank <= {most}: "
            "give a smaller rank or leave the layer out of the targets"
        )


def computing(tensor: Tensor) -> torch.dtype:
    """The number format to factor in: the tensor's own, but float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def leading_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of a reduced QR factorisation without pivoting, diag(R) >= 0.

    Householder's first ``rank`` reflections depend on the first ``rank`` columns alone, so that only those are
    factored; the other columns of R are products.

    Args:
        matrix: (m, n).
        rank: r, at most min(m, n).

    Returns:
        Q (m, r) with orthonormal columns, also where the matrix has a lower rank, and R (r, n).
    """
    q, r = torch.linalg.qr(matrix[:, :rank])
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    q, r = q * sign, r * sign.unsqueeze(1)
    return q, torch.cat([r, q.mT @ matrix[:, rank:]], dim=1)


@torch.no_grad()
def qr_init(weight: Tensor, rank: int, scaling: float = 1.0, rms: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into ``base + scaling B A`` by QR, nested over ranks and the same on every machine.

    Args:
        weight: (d, k), as in ``nn.Linear``.
        rank: r, 1 to min(d, k).
        scaling: s of the layer.
        rms: root mean square entry that B A is scaled to (the method's default is 1e-4); None: plain split.

    Returns:
        Base (d, k), A (r, k) and B (d, r) in the weight's number format; computed in float32 or more. Unscaled, B has
        orthonormal columns and the first r columns of B A are the weight's.

    Raises:
        RankError: rank out of its range.
        UserError: the weight is no finite matrix.

    Source: ILoRA (arXiv 2511.16069) 5.1; the split is OLoRA's (arXiv 2406.01775), the scaling the authors' script's.
    Two deviations: exactly ``scaling B A`` is taken from the base, where the script leaves out alpha / r; signs are
    such that diag(R) >= 0. A weight of zeros has B A = 0, which no factor scales: B stays orthonormal.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(f"weight of shape {tuple(weight.shape)}, {weight.dtype}; expected a matrix of floating point")
    check_rank(rank, *weight.shape)
    matrix = weight.detach().to(computing(weight))
    if not bool(torch.isfinite(matrix).all()):
        raise UserError("the weight holds values that are not finite; load its checkpoint again")
    b, a = leading_qr(matrix, rank)
    size = float(torch.linalg.matrix_norm(a))  # that of B A, since B's columns are orthonormal
    if rms is not None and size > 0:
        factor = math.sqrt(rms * math.sqrt(matrix.numel()) / size)
        a, b = a * factor, b * factor
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    base = torch.addmm(matrix, b.to(matrix), a.to(matrix), alpha=-scaling)  # of A and B as rounded
    return base.to(weight.dtype), a, b


def kaiming_init(
    rank: int, in_features: int, out_features: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """LoRA's own start: A uniform in +-1 / sqrt(in_features), B zero. Nested: a smaller rank has the first rows.

    Args:
        rank: r.
        in_features: k.
        out_features: d.
        generator: of the draws (default: torch's global one).

    Returns:
        A (r, k) and B (d, r), float32 on the CPU.

    Raises:
        RankError: rank out of its range.

    Source: LoRA (arXiv 2106.09685), as PEFT has it: ``kaiming_uniform_(a=sqrt(5))``.
    """
    check_rank(rank, out_features, in_features)
    bound = 1 / math.sqrt(in_features)
    rows = [torch.empty(in_features).uniform_(-bound, bound, generator=generator) for _ in range(rank)]
    return torch.stack(rows), torch.zeros(out_features, rank)
