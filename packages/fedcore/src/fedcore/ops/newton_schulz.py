"""Orthogonalisation of matrices: Newton-Schulz iterations and the exact polar factor, for many matrices at once."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["POLAR_EXPRESS", "QUINTIC", "NsDtype", "NsForm", "Orth", "iteration_dtype", "orthogonalise", "polar_factors"]

Orth = Literal["quintic", "polar_express", "svd"]
NsDtype = Literal["auto", "bfloat16", "float32", "float64"]
NsForm = Literal["auto", "standard", "gram"]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Steepest at zero, at the price of singular values that wobble about 1 (K. Jordan, Muon)."""
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""One triple a step; the last one repeats beyond five steps."""
GRAM_STEPS = 5
"""More steps amplify the rounding errors of the small eigenvalues of X X^T until the Gram form diverges in float32."""


def orthogonalise(
    matrices: Tensor,
    orth: Orth = "quintic",
    *,
    steps: int = 5,
    eps: float = 1e-7,
    ns_dtype: NsDtype = "auto",
    ns_form: NsForm = "auto",
) -> Tensor:
    """Replace every matrix by (nearly) its polar factor ``U V^T``; all-zero matrices stay zero.

    The iterations map the singular values ``s`` of ``X / ||X||_F`` through an odd polynomial whose values lie near 1:
    within [0.682, 1.134] (quintic) where ``s >= 0.01``, [0.859, 1.141] (polar_express) where ``s >= 0.003``. Singular
    vectors stay as they are.

    Args:
        matrices: (..., m, n), any strides; not changed.
        orth: ``quintic``, ``polar_express`` or ``svd`` (exact; singular values that are zero to rounding stay zero).
        steps: of the iteration.
        eps: added to the Frobenius norm of the quintic (polar_express: ``1.02 * norm + 1e-6``, as published).
        ns_dtype: number format of the iteration; ``auto`` as in ``iteration_dtype``.
        ns_form: ``gram`` iterates on ``X X^T`` (m x m) and multiplies once at the end, which is the same map with less
            arithmetic where n > 1.5 m; ``auto`` uses it where n >= 2 m, up to five steps, never in bfloat16. In
            float32 the forms differ by at most some 3e-3 (nearly singular matrices), in float64 by 1e-12.

    Returns:
        (..., m, n) in the number format of ``matrices``.

    Raises:
        ValueError: an unknown ``orth``, ``ns_dtype`` or ``ns_form``.

    Source: arXiv 2510.27403 (quintic: KellerJordan/Muon; Polar Express: arXiv 2505.16932).
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT, orth, steps=steps, eps=eps, ns_dtype=ns_dtype, ns_form=ns_form).mT
    left, right = polar_factors(matrices.clone(), orth, steps=steps, eps=eps, ns_dtype=ns_dtype, ns_form=ns_form)
    return (left @ right).to(matrices.dtype)


def polar_factors(
    matrices: Tensor,
    orth: Orth = "quintic",
    *,
    steps: int = 5,
    eps: float = 1e-7,
    ns_dtype: NsDtype = "auto",
    ns_form: NsForm = "auto",
) -> tuple[Tensor, Tensor]:
    """``orthogonalise`` without its last product, which an optimiser can add to the parameters in the same operation.

    Args:
        matrices: (..., m, n) with m <= n, any strides; may be overwritten, and the right factor may share its memory.
        orth: see ``orthogonalise``, as all further options.
        steps: of the iteration.
        eps: added to the norm.
        ns_dtype: number format of the iteration and of the factors (``svd``: of the matrices, at least float32).
        ns_form: of the iteration.

    Returns:
        ``left`` (..., m, m) and ``right`` (..., m, n), whose product is the orthogonalised matrix.

    Raises:
        ValueError: an unknown ``orth``, ``ns_dtype`` or ``ns_form``, or more rows than columns.
    """
    for name, given, kind in (("orth", orth, Orth), ("ns_form", ns_form, NsForm)):
        if given not in get_args(kind):
            raise ValueError(f"{name}={given!r}; expected one of {', '.join(get_args(kind))}")
    *lead, rows, cols = matrices.shape
    if rows > cols:
        raise ValueError(f"matrices are {rows} x {cols}; expected no more rows than columns, transpose them")
    if orth == "svd":
        return _svd_factors(matrices)
    x = matrices.to(iteration_dtype(matrices, ns_dtype)).reshape(-1, rows, cols)
    # One matrix as 2-D: plain matrix products are faster than batches of one.
    x = x[0] if len(x) == 1 else x
    gram = ns_form == "gram" or (
        ns_form == "auto" and cols >= 2 * rows and steps <= GRAM_STEPS and x.dtype != torch.bfloat16
    )
    coefficients = [QUINTIC if orth == "quintic" else POLAR_EXPRESS[min(k, 4)] for k in range(steps)]
    widen, least = (1.0, eps) if orth == "quintic" else (1.02, 1e-6)
    left, right = (_gram if gram else _standard)(x, coefficients, widen, least)
    return left.reshape(*lead, rows, rows), right.reshape(*lead, rows, cols)


def iteration_dtype(matrices: Tensor, ns_dtype: NsDtype = "auto") -> torch.dtype:
    """Number format of the iteration: ``auto`` is bfloat16 on an accelerator, except for float64; else their own.

    Half precision on the CPU is computed in float32.
    """
    if ns_dtype not in get_args(NsDtype):
        raise ValueError(f"ns_dtype={ns_dtype!r}; expected one of {', '.join(get_args(NsDtype))}")
    if ns_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[ns_dtype]
    if matrices.dtype == torch.float64:
        return torch.float64
    return torch.float32 if matrices.device.type == "cpu" else torch.bfloat16


def _standard(
    x: Tensor, coefficients: list[tuple[float, float, float]], widen: float, least: float
) -> tuple[Tensor, Tensor]:
    """``X <- a X + (b A + c A A) X`` with ``A = X X^T``, for x (m, n) or (batch, m, n); in the last step as factors."""
    product = torch.baddbmm if x.ndim == 3 else torch.addmm
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(x.dtype))
    x = x.div_((widen * norm + least).to(x.dtype))
    for k, (a, b, c) in enumerate(coefficients):
        square = x @ x.mT
        part = product(square, square, square, beta=b, alpha=c)
        if k < len(coefficients) - 1:
            x = product(x, part, x, beta=a)
    part.diagonal(dim1=-2, dim2=-1).add_(a)
    return part, x


def _gram(
    x: Tensor, coefficients: list[tuple[float, float, float]], widen: float, least: float
) -> tuple[Tensor, Tensor]:
    """The same map on ``G = X X^T``: with ``P = a I + b G + c G G``, ``Q <- P Q`` and ``G <- P G P``; ``Q X`` at last.

    All of these are polynomials of one matrix and commute. X itself is read twice and never written: its norm is the
    root of the trace of G, and Q takes the division.
    """
    product = torch.baddbmm if x.ndim == 3 else torch.addmm
    gram = x @ x.mT
    scale = widen * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()[..., None, None] + least
    gram.div_(scale).div_(scale)  # the square of a small scale may vanish
    total = gram
    for k, (a, b, c) in enumerate(coefficients):
        part = product(gram, gram, gram, beta=b, alpha=c)  # P without its identity
        if k < len(coefficients) - 1:
            half = product(gram, gram, part, beta=a)
            gram = product(half, half, part, beta=a)
        if k:
            total = product(total, total, part, beta=a)
        else:
            total = part.clone()
            total.diagonal(dim1=-2, dim2=-1).add_(a)
    return total.div_(scale), x


def _svd_factors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """U (..., m, m) without the directions whose singular value is zero to rounding, and V^T (..., m, n)."""
    wide = matrices.to(_wide(matrices.dtype))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    least = max(matrices.shape[-2:]) * torch.finfo(wide.dtype).eps * values[..., :1]
    return left * (values > least).to(wide.dtype).unsqueeze(-2), right


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Format for norms and decompositions."""
    return torch.float64 if dtype == torch.float64 else torch.float32
