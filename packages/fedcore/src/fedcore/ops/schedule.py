"""Learning rates inside a round, and steps along a gradient with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["descend", "local_rate", "rate_sum"]


def local_rate(lr: float, k: int, steps: float | Tensor, rho: float) -> float | Tensor:
    """Rate of a local step under a linear decay from ``lr`` towards ``rho * lr``.

    ``lr * (1 - (k / K) * (1 - rho))``: the first step uses ``lr``, ``rho * lr`` would come at k = K. Written so that
    ``rho = 1`` is ``lr`` to the last bit.

    Args:
        lr: rate of the first step.
        k: index of the step about to be taken, from 0.
        steps: K, steps of the round; (clients, 1) where clients differ.
        rho: rate at the end over rate at the start, 0..1.

    Returns:
        A number, or (clients, 1) in the number format of ``steps`` (float64 where that holds integers).

    Source: FedSWA, arXiv 2507.20016, eq. 3.
    """
    if isinstance(steps, Tensor):
        return _narrow(lr * (1.0 - (k / steps.double()) * (1.0 - rho)), steps)
    return lr * (1.0 - (k / steps) * (1.0 - rho))


def rate_sum(lr: float, steps: float | Tensor, rho: float) -> float | Tensor:
    """Exact sum of ``local_rate`` over the steps of a round: ``lr * (K (1 + rho) + (1 - rho)) / 2``.

    Args:
        lr: rate of the first step.
        steps: K; (clients, 1) where clients differ.
        rho: rate at the end over rate at the start, 0..1.

    Returns:
        A number, or (clients, 1) like ``local_rate``.
    """
    if isinstance(steps, Tensor):
        return _narrow(lr * (steps.double() * (1.0 + rho) + (1.0 - rho)) / 2.0, steps)
    return lr * (steps * (1.0 + rho) + (1.0 - rho)) / 2.0


def descend(params: Tensor, direction: Tensor, rate: float | Tensor) -> Tensor:
    """``params - rate * direction`` in place; ``direction`` may be used up.

    Args:
        params: (..., P).
        direction: (..., P).
        rate: a number, or (clients, 1).

    Returns:
        ``params``.
    """
    if isinstance(rate, Tensor):
        return params.sub_(direction.mul_(rate.to(direction.dtype)))
    return params.sub_(direction, alpha=rate)


def _narrow(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the number format of ``like``, unless that holds integers."""
    return value.to(like.dtype) if like.is_floating_point() else value.to(torch.float64)
