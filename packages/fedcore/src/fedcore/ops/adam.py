"""One step of Adam on flat vectors, in one pass over memory."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["adam_step_", "capped_adam_step_", "moment_dtype"]


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Number format of m and v: at least float32, since in bfloat16 ``b2 = 0.999`` changes nothing."""
    return torch.promote_types(dtype, torch.float32)


def adam_step_(
    params: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    rate: float,
    b1: float,
    b2: float,
    eps: float,
    c1: float = 1.0,
    c2: float = 1.0,
    decay: float = 0.0,
) -> None:
    """Move ``params`` and both moments in place.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``params <- (1 - decay) params - rate (m / c1) / (sqrt(v / c2) + eps)``.

    The kernel is that of ``torch.optim.AdamW(fused=True)``: one pass over four vectors where separate operations take
    seven. It knows one step counter for both corrections; ours differ, so its counter is infinite, which makes its own
    corrections exactly 1, and ours are folded into rate and eps.

    Args:
        params: (..., P).
        grad: (..., P), may be changed.
        m: (..., P) in ``moment_dtype``; may be ``grad`` itself where ``b1`` is 0.
        v: (..., P) in ``moment_dtype``.
        rate: step length, more than 0.
        b1: share of the old m.
        b2: share of the old v.
        eps: added to the root.
        c1: bias correction of m, e.g. ``1 - b1^k``.
        c2: bias correction of v.
        decay: share of the parameters that is lost, ``lr * weight_decay``.
    """
    root = math.sqrt(c2)
    lr = rate * root / c1
    work = params if params.dtype == m.dtype and params.is_contiguous() else params.to(m.dtype).contiguous()
    torch._fused_adamw_(
        [work],
        [grad if grad.dtype == m.dtype and grad.is_contiguous() else grad.to(m.dtype).contiguous()],
        [m],
        [v],
        [],
        [_never(params.device)],
        lr=lr,
        beta1=b1,
        beta2=b2,
        weight_decay=decay / lr,
        eps=eps * root,
        amsgrad=False,
        maximize=False,
    )
    if work is not params:
        params.copy_(work)


@cache
def _never(device: torch.device) -> Tensor:
    """A step counter at infinity."""
    return torch.full((), math.inf, device=device)


def capped_adam_step_(
    params: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    rate: float,
    b1: float,
    b2: float,
    eps: float,
    c1: float = 1.0,
    c2: float = 1.0,
    decay: float = 0.0,
    cap: float = 1.0,
) -> None:
    """``adam_step_`` with ``(m / c1) / (sqrt(v / c2) + eps)`` held within ``-cap`` and ``cap``."""
    grad = grad.to(m.dtype)
    m.lerp_(grad, 1.0 - b1)
    v.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
    move = m.div(c1).div_(v.div(c2).sqrt_().add_(eps)).clamp_(-cap, cap)
    params.mul_(1.0 - decay).sub_(move, alpha=rate)
