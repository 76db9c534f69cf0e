"""How many cache entries each decoder layer may keep (LightVLM 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from polymodal.errors import UserError

__all__ = ["KVBudget"]


@dataclass(frozen=True)
class KVBudget:
    """Budget of the key/value cache; made by ``uniform``, ``ratio``, ``pyramid``, ``ada`` or ``parse``.

    Args:
        kind: how entries are shared over layers (and, for ``ada``, over heads).
        value: entries (``uniform``) or share of each layer's prefill length (the others).
        sink: first valid entries that always stay.
        recent: last entries that always stay.
        window: last queries whose attention gives the score.
        interval: entries over the budget before the cache is compressed again during decoding.
        pool: kernel of the average pooling of scores; 1: none.
        scope: ``all`` entries compete; ``image``: only image entries may go; ``no_system``: entries before the first
            image stay.
        per_head: each key/value head keeps its own entries; False: one set for all heads of a layer.

    Raises:
        UserError: a value out of range.
    """

    kind: Literal["uniform", "ratio", "pyramid", "ada"]
    value: float
    sink: int = 4
    recent: int = 32
    window: int = 32
    interval: int = 32
    pool: int = 1
    scope: Literal["all", "image", "no_system"] = "all"
    per_head: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "ratio", "pyramid", "ada"):
            raise UserError(f"KV budget of kind {self.kind!r}; known: uniform, ratio, pyramid, ada")
        if self.kind == "uniform" and not (self.value >= 1 and self.value == int(self.value)):
            raise UserError(f"KV budget of {self.value} entries; expected a whole number from 1")
        if self.kind != "uniform" and not 0 < self.value <= 1:
            raise UserError(f"KV budget {self.kind}:{self.value}; expected a share kept in (0, 1]")
        if self.scope not in ("all", "image", "no_system"):
            raise UserError(f"KV scope {self.scope!r}; known: all, image, no_system")
        if min(self.sink, self.recent) < 0 or min(self.window, self.interval, self.pool) < 1 or self.pool % 2 == 0:
            raise UserError("KV budget: sink and recent from 0, window and interval from 1, pool odd")
        if self.kind == "uniform" and self.value < self.sink + self.recent:
            raise UserError(
                f"KV budget of {self.value:g} entries is below sink + recent = {self.sink + self.recent}; raise it or "
                "lower sink and recent"
            )

    @classmethod
    def uniform(cls, entries: int, **options: Any) -> KVBudget:
        """``entries`` per layer and head."""
        return cls("uniform", entries, **options)

    @classmethod
    def ratio(cls, share: float, **options: Any) -> KVBudget:
        """``share`` of that layer's prefill length, at least sink + recent + window (caches follow the pyramid)."""
        return cls("ratio", share, **options)

    @classmethod
    def pyramid(cls, share: float, **options: Any) -> KVBudget:
        """PyramidKV: early layers keep more than late ones, ``share`` on average (LightVLM 5)."""
        return cls("pyramid", share, **options)

    @classmethod
    def ada(cls, share: float, **options: Any) -> KVBudget:
        """AdaKV: heads of a layer compete for ``share`` of its entries (LightVLM 5); entries are masked, not freed."""
        return cls("ada", share, **options)

    @classmethod
    def parse(cls, text: str) -> KVBudget:
        """From text such as ``ratio:0.5``, ``uniform:512`` or ``ratio:0.5,recent=16,scope=image``.

        Raises:
            UserError: anything else.
        """
        head, *options = text.split(",")
        kind, _, value = head.strip().partition(":")
        known = [field.name for field in fields(cls)][2:]
        try:
            pairs = [(name.strip(), given.strip()) for name, _, given in (option.partition("=") for option in options)]
            if not {name for name, _ in pairs} <= set(known):
                raise KeyError
            return cls(kind, float(value), **{n: _convert(n, given) for n, given in pairs})  # type: ignore[arg-type]
        except (ValueError, KeyError, OverflowError):
            raise UserError(
                f"KV budget {text!r}; expected e.g. ratio:0.5, uniform:512, ratio:0.5,scope=image "
                f"(options: {', '.join(known)})"
            ) from None

    def text(self) -> str:
        """What ``parse`` reads: kind, value, and the options that are not at their default."""
        given = [f for f in fields(self)[2:] if getattr(self, f.name) != f.default]
        options = "".join(f",{f.name}={str(getattr(self, f.name)).lower()}" for f in given)
        return f"{self.kind}:{self.value:g}{options}"

    def entries(self, lengths: Sequence[int]) -> list[int]:
        """Entries each layer keeps, given the prefill length of each layer.

        ``ratio`` and ``ada`` keep at least sink + recent + window entries; ``pyramid`` follows PyramidKV as in
        LightVLM 5, from the longest layer, at least sink + recent, and no layer more than it has.

        Args:
            lengths: rows that the prefill brought to each layer, first layer first.

        Returns:
            one number a layer; ``uniform`` may exceed a layer's length (nothing goes until it is reached).
        """
        if self.kind == "uniform":
            return [int(self.value)] * len(lengths)
        floor = self.sink + self.recent + self.window
        if self.kind in ("ratio", "ada"):
            return [min(n, max(floor, round(n * self.value))) for n in lengths]
        protected = self.sink + self.recent
        return [
            min(length, max(protected, entries))
            for length, entries in zip(lengths, _pyramid_entries(lengths, self.value, self.window), strict=True)
        ]


def _convert(name: str, text: str) -> Any:
    if name == "scope":
        return text
    return {"true": True, "false": False}[text.lower()] if name == "per_head" else int(text)


def _pyramid_entries(lengths: Sequence[int], share: float, window: int, beta: float = 20.0) -> list[int]:
    """PyramidKV's linear budgets (LightVLM 5); falls back to ``round(n * share)`` where they do not fit."""
    n, depth = max(lengths), len(lengths)
    cap = window + n * share
    low = (cap - window) / beta
    high = 2 * (cap - window) - low
    if high >= n - window:
        high = n - window
        low = 2 * (cap - window) - high
    if depth < 2 or not n >= high >= low >= window:
        return [max(1, round(length * share)) for length in lengths]
    return [round(high - layer * (high - low) / (depth - 1)) for layer in range(depth)]
