"""Corrupting a text for the restoration task: some units become ``<mask>``, the length stays.

Units are blank-separated words, or characters for languages written without blanks. The module loads without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "LEVELS", "MASK", "check_level", "corrupt", "omit", "omit_last", "span", "split_units"]

MASK = "<mask>"
LEVELS = ("word", "char")
KINDS = ("omit_last", "omit", "span")


def check_level(level: str) -> None:
    """Refuse a level of text units that is not one of ``LEVELS``.

    Raises:
        UserError: unknown level.
    """
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}; known: {', '.join(LEVELS)} (char for Chinese)")


def split_units(text: str, level: str) -> list[str]:
    """Units of a text.

    Args:
        text: the text.
        level: ``word`` (split at blanks) or ``char`` (characters, blanks dropped).

    Returns:
        List of units without blanks; empty for a blank text.

    Raises:
        UserError: unknown level.
    """
    check_level(level)
    return text.split() if level == "word" else [c for c in text if not c.isspace()]


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"rate={rate}; expected 0 <= rate <= 1; 0.15 masks up to 15 % of the units")


def omit_last(words: Sequence[str], rate: float, u: float) -> list[str]:
    """Replace the last k = ceil(n u) units by ``<mask>``.

    Args:
        words: n units.
        rate: upper end of the draw; 0.15 in the specification.
        u: the draw itself, uniform in [0, rate]; 0 outside training, which changes nothing.

    Returns:
        n units: the first n - k unchanged, then k masks.

    Raises:
        UserError: ``rate`` outside [0, 1], or ``u`` outside [0, rate].

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.6; the restoration task of GFSLT-VLP.
    """
    _check_rate(rate)
    if not 0.0 <= u <= rate:
        raise UserError(f"u={u}; expected the draw itself, uniform in [0, rate={rate}]")
    kept = len(words) - math.ceil(len(words) * u)
    return [*words[:kept], *[MASK] * (len(words) - kept)]


def _draw_count(n: int, rate: float, generator: torch.Generator) -> int:
    """K = ceil(n u) with u uniform in [0, rate)."""
    import torch

    _check_rate(rate)
    return math.ceil(n * rate * torch.rand((), generator=generator, dtype=torch.float64).item())


def omit(words: Sequence[str], rate: float, generator: torch.Generator) -> list[str]:
    """Replace k = ceil(n u) units at random positions by ``<mask>``, u uniform in [0, rate).

    Args:
        words: n units.
        rate: upper end of the draw, 0..1.
        generator: CPU generator of the draw.

    Returns:
        n units, k of them masks.

    Raises:
        UserError: ``rate`` outside [0, 1].
    """
    import torch

    count = _draw_count(len(words), rate, generator)
    chosen = set(torch.randperm(len(words), generator=generator)[:count].tolist())
    return [MASK if i in chosen else word for i, word in enumerate(words)]


def span(words: Sequence[str], rate: float, generator: torch.Generator) -> list[str]:
    """Replace k = ceil(n u) neighbouring units by ``<mask>``, u uniform in [0, rate), the start uniform too.

    Args:
        words: n units.
        rate: upper end of the draw, 0..1.
        generator: CPU generator of the draw.

    Returns:
        n units, k neighbouring ones of them masks.

    Raises:
        UserError: ``rate`` outside [0, 1].
    """
    import torch

    count = _draw_count(len(words), rate, generator)
    start = int(torch.randint(len(words) - count + 1, (), generator=generator))
    return [*words[:start], *[MASK] * count, *words[start + count :]]


def corrupt(words: Sequence[str], kind: str, rate: float, generator: torch.Generator | None) -> list[str]:
    """Corrupt by name, all draws from one generator.

    Args:
        words: n units.
        kind: ``omit_last``, ``omit`` or ``span``.
        rate: upper end of the draw, 0..1.
        generator: CPU generator; ``None`` is evaluation and changes nothing.

    Returns:
        n units.

    Raises:
        UserError: unknown kind, or ``rate`` outside [0, 1].
    """
    if kind not in KINDS:
        raise UserError(f"unknown corruption {kind!r}; known: {', '.join(KINDS)}")
    _check_rate(rate)
    if generator is None:
        return list(words)
    if kind == "omit_last":
        import torch

        return omit_last(words, rate, rate * torch.rand((), generator=generator, dtype=torch.float64).item())
    return omit(words, rate, generator) if kind == "omit" else span(words, rate, generator)
