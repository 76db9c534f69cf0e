"""Patterns: which modalities a sample has. Inside, a bit mask over the order of modalities; outside, codes or sets.

With the two modalities image and text the codes of the field are used (DCP 3.1): 0 complete, 1 text missing (image
only), 2 image missing (text only). Beyond two, a pattern is the set of the names that are present (DCP 3.7). Nothing
here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

from polymodal.errors import UserError, did_you_mean

__all__ = ["IMAGE_TEXT", "Pattern", "all_masks", "from_mask", "mask_name", "to_mask"]

Pattern: TypeAlias = int | frozenset[str]
IMAGE_TEXT = ("image", "text")
_CODES = {0: 0b11, 1: 0b01, 2: 0b10}


def all_masks(modalities: Sequence[str]) -> list[int]:
    """All non-empty patterns, the complete one first, then by falling number of modalities, then by value."""
    masks = range(1, 2 ** len(modalities))
    return sorted(masks, key=lambda mask: (-mask.bit_count(), mask))


def to_mask(pattern: int | str | Collection[str], modalities: Sequence[str] = IMAGE_TEXT) -> int:
    """Bit mask of a pattern: bit i is set when ``modalities[i]`` is present.

    Args:
        pattern: a code (two modalities), names joined by ``+``, ``complete``, or a collection of names.
        modalities: in the order of the model.

    Raises:
        UserError: an unknown code or name, or nothing present.
    """
    if isinstance(pattern, int):
        if tuple(modalities) != IMAGE_TEXT or pattern not in _CODES:
            raise UserError(f"pattern {pattern}: codes 0, 1, 2 stand for image and text only; name what is present")
        return _CODES[pattern]
    if pattern == "complete":
        return (1 << len(modalities)) - 1
    names = pattern.split("+") if isinstance(pattern, str) else list(pattern)
    for name in names:
        if name not in modalities:
            raise UserError(
                f"unknown modality {name!r} in pattern {pattern!r}; {did_you_mean(name, modalities)}known: "
                f"{', '.join(modalities)}"
            )
    if not names:
        raise UserError("a sample without any modality cannot be classified; leave it out")
    return sum(1 << modalities.index(name) for name in set(names))


def from_mask(mask: int, modalities: Sequence[str] = IMAGE_TEXT) -> Pattern:
    """Code (image and text) or set of names that ``mask`` stands for."""
    if tuple(modalities) == IMAGE_TEXT:
        return {value: code for code, value in _CODES.items()}[mask]
    return frozenset(name for i, name in enumerate(modalities) if mask >> i & 1)


def mask_name(mask: int, modalities: Sequence[str] = IMAGE_TEXT) -> str:
    """Name for tables and metrics: ``complete``, ``image``, ``image+audio``."""
    if mask == 2 ** len(modalities) - 1:
        return "complete"
    return "+".join(name for i, name in enumerate(modalities) if mask >> i & 1)
