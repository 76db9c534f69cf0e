"""Raw values of samples to rows that towers take. Small picklable objects: loader workers hold no tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower

__all__ = ["ArrayInput", "AudioInput", "ByteTokens", "ImageInput", "TabularInput", "TextInput", "input_transforms"]

_HOP, _RATE = 160, 16_000
"""of ``log_mel`` and of sounds: 100 frames a second"""


class ArrayInput:
    """Arrays and tensors as they are; what else comes goes to ``decode``."""

    def __call__(self, value: Any) -> Tensor:
        """The value as a tensor on the CPU."""
        if isinstance(value, Tensor):
            return value
        if hasattr(value, "__array__"):
            return torch.as_tensor(value)
        return self.decode(value)

    def decode(self, value: Any) -> Tensor:
        """A value that is no array yet."""
        kind = "text" if isinstance(value, str) else "file" if isinstance(value, Path) else type(value).__name__
        raise UserError(f"a {kind} where this encoder takes arrays of numbers; give such as it was trained on")


class ImageInput(ArrayInput):
    """A picture, resized and centre-cropped, then normalised as the tower was trained (DCP 3.6).

    Paths, bytes, ``PIL.Image`` and arrays (H, W, 3) of uint8 are pictures; float arrays (C, H, W) pass as they are.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)

    def __call__(self, value: Any) -> Tensor:
        """(3, H, W) float32."""
        return value if isinstance(value, Tensor) else self.decode(value)

    def decode(self, value: Any) -> Tensor:
        """(3, H, W) float32."""
        from missing_modal.data.images import image_tensor

        return image_tensor(value, self.size[0], self.mean, self.std)  # type: ignore[arg-type]  # three channels


class TextInput(ArrayInput):
    """A text as token ids (S,), zeros behind its end."""

    def __init__(self, tokenizer: Callable[[Sequence[str]], Tensor]) -> None:
        self.tokenizer = tokenizer

    def decode(self, value: Any) -> Tensor:
        """(S,) int64."""
        if not isinstance(value, str):
            raise UserError(f"a text of type {type(value).__name__}; expected a string")
        return self.tokenizer([value])[0]


class ByteTokens:
    """Texts as bytes, for small encoders that no vocabulary was made for: start, bytes + 1, end, zeros.

    Args:
        context: ids of a row; longer texts are cut, their last id is the end.
    """

    vocabulary = 259
    start, end = 257, 258

    def __init__(self, context: int) -> None:
        self.context = context

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, context) int64."""
        ids = torch.zeros(len(texts), self.context, dtype=torch.long)
        for row, text in enumerate(texts):
            held = [self.start, *(value + 1 for value in text.encode("utf-8", "replace")), self.end][: self.context]
            held[-1] = self.end
            ids[row, : len(held)] = torch.tensor(held)
        return ids


class AudioInput(ArrayInput):
    """A sound as a log-mel spectrogram of the tower's length; arrays (mels, frames) are spectrograms already."""

    def __init__(self, mels: int, frames: int) -> None:
        self.mels, self.frames = mels, frames

    def __call__(self, value: Any) -> Tensor:
        """(mels, frames) float32."""
        return super().__call__(value) if getattr(value, "ndim", 1) == 2 else self.decode(value)

    def decode(self, value: Any) -> Tensor:
        """(mels, frames) float32."""
        from missing_modal.backbones.audio import log_mel
        from missing_modal.data.arrays import waveform

        samples = torch.as_tensor(waveform(value, (self.frames - 1) * _HOP / _RATE))
        return log_mel(samples, _RATE, self.mels)[:, : self.frames]


class TabularInput(ArrayInput):
    """A row of numbers: a list, an array or a ``.npy`` file."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __call__(self, value: Any) -> Tensor:
        """(F,) float32."""
        from missing_modal.data.arrays import numbers

        return value if isinstance(value, Tensor) else torch.from_numpy(numbers(value, self.length))


def input_transforms(towers: Sequence[Tower], kinds: Mapping[str, str]) -> dict[str, ArrayInput]:
    """How each modality's raw values become rows of its tower; a text for a tower without a tokenizer is refused later.

    Args:
        towers: one a modality.
        kinds: modality -> image, text, audio or tabular (``MMData.kinds``).
    """
    found: dict[str, ArrayInput] = {}
    for tower in towers:
        name = tower.spec.name
        kind, held = kinds.get(name, ""), vars(tower)
        if kind == "image" and "mean" in held:
            found[name] = ImageInput(held["size"], held["mean"], held["std"])
        elif kind == "text" and held.get("tokenizer") is not None:
            found[name] = TextInput(held["tokenizer"])
        elif kind == "audio" and "mels" in held:
            found[name] = AudioInput(held["mels"], tower.placeholder(1).shape[-1])
        elif kind == "tabular":
            found[name] = TabularInput(held.get("inputs"))
        else:
            found[name] = ArrayInput()
    return found
