"""Ascent steps of sharpness-aware minimisation on flat vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adaptive_perturbation", "perturbation", "scale_to"]


def scale_to(vector: Tensor, length: float) -> Tensor:
    """``length * vector / ||vector||`` (..., P), in place; a zero vector stays zero.

    Args:
        vector: (..., P); the norm goes over all P entries, so over all tensors of a model.
        length: norm of the result.
    """
    norm = vector.norm(dim=-1, keepdim=True)
    return vector.mul_((length / norm).masked_fill_(norm == 0, 0.0))


def perturbation(grad: Tensor, r: float) -> Tensor:
    """Ascent ``r * grad / ||grad||`` (..., P), written over ``grad``; zero where the gradient is zero.

    Args:
        grad: (..., P) gradient of the loss without decay; overwritten.
        r: radius.

    Source: Foret et al. 2021, SAM, arXiv 2010.01412, equation 2.
    """
    return scale_to(grad, r)


def adaptive_perturbation(params: Tensor, grad: Tensor, r: float, a: float) -> Tensor:
    """Ascent ``r * T^2 grad / ||T grad||`` (..., P) with ``T = |params| + a``, written over ``grad``.

    Args:
        params: (..., P); left as it is.
        grad: (..., P) gradient of the loss without decay; overwritten.
        r: radius, in units of the parameters' own sizes.
        a: what a parameter of size zero may still move; in the limit of ``a`` much larger than all parameters it is
            ``perturbation`` with radius ``r * a``.

    Source: Kwon et al. 2021, ASAM, arXiv 2102.11600, equation 6.
    """
    size = params.abs().add_(a)
    return scale_to(grad.mul_(size), r).mul_(size)
