"""Laplacian smoothing of vectors: an implicit step of one-dimensional diffusion, computed by FFT."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["smooth", "smooth_spans"]


def smooth(values: Tensor, strength: float) -> Tensor:
    """``(I - s L)^{-1} values`` over the last dimension, with L the periodic second difference.

    In the Fourier domain frequency j is divided by ``1 + 2 s (1 - cos(2 pi j / d))``: the mean stays, neighbours come
    closer, the norm never grows. ``s = 0`` is the identity, bit for bit. (An explicit step ``values + s L values`` can
    blow up where s > 1/2, and with the sign of the authors' script for matrices it sharpens.)

    Args:
        values: (..., d); half precision is computed in single.
        strength: s, 0 or more.

    Returns:
        (..., d) in the number format of ``values``.

    Source: Osher et al. 2018, arXiv 1806.06317; for private training Liang et al. 2020, arXiv 2005.00218.
    """
    size = values.shape[-1]
    if not strength or size < 2:
        return values
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64, device=values.device).mul_(2 * math.pi / size)
    divisor = 1 + 2 * strength * (1 - frequencies.cos())
    found: Tensor = torch.fft.irfft(torch.fft.rfft(values.to(wide)) / divisor.to(wide), n=size)
    return found.to(values.dtype)


def smooth_spans(flat: Tensor, spans: Iterable[tuple[int, int]], strength: float) -> Tensor:
    """``smooth`` of each span of a flat vector by itself: tensors of a model, row by row.

    Args:
        flat: (..., P); not changed.
        spans: first index and one past the last, together all of the vector, in order.
        strength: s, 0 or more.
    """
    if not strength:
        return flat
    return torch.cat([smooth(flat[..., start:stop], strength) for start, stop in spans], dim=-1)
