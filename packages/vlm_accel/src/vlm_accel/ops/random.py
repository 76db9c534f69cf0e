"""Seeded draws on any device without a generator: a function of names and numbers, never of call order."""

from __future__ import annotations

import torch
from polymodal.seeding import derive
from torch import Tensor

__all__ = ["uniform"]

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the signed number that torch's int64 has."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (public domain, Steele et al. 2014); int64 products wrap, on CPU and CUDA."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def uniform(
    seed: int,
    stage: str,
    layer: int,
    span: Tensor | None,
    samples: int,
    tokens: int,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform draws in [0, 1), 24 bits each, the same on every device.

    Args:
        seed: root seed.
        stage: of the draw, e.g. ``vision``.
        layer: of the draw.
        span: (samples,) int64 number of each sample within its model call; None: 0, 1, ...
        samples: S.
        tokens: N.
        device: of the result.

    Returns:
        (S, N) float32. A sample's draws depend on its own number only, so a batch draws what its samples draw alone.
    """
    if span is None:
        span = torch.arange(samples, device=device)
    key = _mix(span.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + derive(seed, "draw", stage, layer))
    columns = torch.arange(tokens, device=span.device) * _signed(0xD1B54A32D192ED03)
    return _shift(_mix(key[:, None] + columns), 40).float() * 2.0**-24
