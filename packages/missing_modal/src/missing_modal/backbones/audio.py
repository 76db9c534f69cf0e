"""Audio: a ViT on patches of a log-mel spectrogram, and the spectrogram."""

from __future__ import annotations

import math
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from torch.nn import functional

from missing_modal.backbones.transformer import ClassTower

__all__ = ["AudioTower", "log_mel"]


class AudioTower(ClassTower):
    """A ViT with a class row on spectrograms (b, mels, frames), in patches of p_m mels x p_f frames (DCP 3.7).

    Shorter clips have fewer tokens: positions run along time first, so that patch (band, time) is row
    1 + time * bands + band whatever the length. Further weights: ``patch.weight`` (d, 1, p_m, p_f), ``patch.bias``
    (may lack).

    Args:
        mels: bands of the spectrogram, divisible by p_m.
        options: of ``TransformerTower``.
    """

    kind = "audio"

    def __init__(self, *args: Any, mels: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mels = mels
        weight = self._need("patch.weight")
        if mels % weight.shape[2]:
            raise UserError(f"{self.identity}: {mels} mel bands in patches of {weight.shape[2]}; choose a multiple")

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor besides the weights."""
        return super().config() | {"mels": self.mels}

    def embed(self, x: Tensor) -> Tensor:
        """(b, mels, frames) -> (b, 1 + patches, d); frames that fill no patch are left out."""
        weight = self._weights["patch.weight"]
        if x.shape[1] != self.mels or x.shape[2] < weight.shape[3]:
            raise UserError(
                f"{self.identity}: a spectrogram of {tuple(x.shape[1:])}; expected {self.mels} mel bands and at least "
                f"{weight.shape[3]} frames"
            )
        patches = functional.conv2d(
            x.to(weight.dtype)[:, None], weight, self._weights.get("patch.bias"), weight.shape[2:]
        )
        return self._tokens(patches.transpose(2, 3).flatten(2).transpose(1, 2))

    def placeholder(self, count: int) -> Tensor:
        """Zeros: the mean of a normalised spectrogram, over all positions there are."""
        weight = self._weights["patch.weight"]
        bands = self.mels // weight.shape[2]
        frames = (len(self._weights["position"]) - 1) // bands * weight.shape[3]
        return torch.zeros(count, self.mels, frames, dtype=weight.dtype, device=weight.device)


def log_mel(wave: Tensor, rate: int, mels: int = 64, window: int = 400, hop: int = 160, top_db: float = 80.0) -> Tensor:
    """Log-mel spectrogram, normalised per clip.

    Args:
        wave: (..., samples) in [-1, 1].
        rate: samples per second.
        mels: bands, HTK mel scale from 0 to rate / 2, triangles of height 1.
        window: Hann window and FFT size in samples (400 at 16 kHz: 25 ms).
        hop: samples between frames.
        top_db: what lies more than this below the loudest value is raised to it.

    Returns:
        (..., mels, 1 + samples // hop), zero mean and unit deviation over each clip (silence: zeros).

    Raises:
        UserError: a clip shorter than half a window, or samples that are not finite.
    """
    if wave.shape[-1] <= window // 2:
        raise UserError(f"a clip of {wave.shape[-1]} samples; expected more than {window // 2} (half a window)")
    if not bool(torch.isfinite(wave).all()):
        raise UserError("a clip holds values that are not finite; check how it was decoded")
    shape = torch.hann_window(window, dtype=wave.dtype, device=wave.device)
    lead = wave.shape[:-1]
    spectrum = torch.stft(wave.reshape(-1, wave.shape[-1]), window, hop, window=shape, return_complex=True)
    power = _filters(rate, mels, window).to(wave) @ spectrum.abs().square()
    level = 10 * torch.log10(power.clamp_min(1e-10))
    level = torch.maximum(level, level.amax(dim=(-2, -1), keepdim=True) - top_db)
    centred = level - level.mean(dim=(-2, -1), keepdim=True)
    deviation = centred.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return (centred / deviation.clamp_min(1e-5)).reshape(*lead, mels, -1)


def _filters(rate: int, mels: int, window: int) -> Tensor:
    """(mels, window // 2 + 1) float64 triangles, equally wide on the mel scale."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0)
