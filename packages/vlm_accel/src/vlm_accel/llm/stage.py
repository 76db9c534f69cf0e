"""The rows of a prefill on their way through the layers: gathered, never renumbered (LightVLM 3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_accel.llm.cache import Rows
from vlm_accel.llm.positions import Rope, gather_hidden, gather_ids, gather_rope

if TYPE_CHECKING:
    from vlm_accel.llm.spans import Group, Prompt, StepPlan

__all__ = ["Stage"]


class Stage:
    """State of one prefill: which of its T rows are left, and what they stand for.

    Attributes:
        length: T. past: logical tokens before this forward.
        columns: (B, t) int64 row of this forward that each row left is; -1: a row that pads a ragged batch; None while
            all T rows are there.
        span: (B, t) int64; -1: text. valid, image: (B, t) bool.
        origin: (B, t) int64 place of an image row within its span's first tokens (0 for text).
        sizes: (B, t) float32 tokens that a row stands for, of those that entered layer 0 (LightVLM 3.1: all 1 there,
            whatever an encoder merged before).
        bias: (B, t) float32 added to the attention logits of the row's key, or None.
        holes: whether some row pads.
    """

    def __init__(self, prompt: Prompt, past: int, image: Tensor | None, valid: Tensor | None, device: Any) -> None:
        self.length = prompt.length
        self.past = past
        self.columns: Tensor | None = None
        self.holes = False
        self.bias: Tensor | None = None
        shape = (prompt.batch, prompt.length)
        self.valid = valid if valid is not None else torch.ones(shape, dtype=torch.bool, device=device)
        self.image = image if image is not None else torch.zeros(shape, dtype=torch.bool, device=device)
        self.span = torch.from_numpy(prompt.span).to(device) if prompt.samples else self.image.long() - 1
        self.alive = None if prompt.alive.all() else torch.from_numpy(prompt.alive).to(device)
        self.sizes = torch.ones(shape, device=device)
        self.origin = _places(self.span)
        self._plain = prompt.plain()
        self._rows: Rows | None = None
        self._gathered: dict[int, tuple[Any, Any]] = {}

    @property
    def count(self) -> int:
        """Rows left, t."""
        return self.span.shape[1]

    @property
    def plain(self) -> int:
        """Last rows that are the last logical tokens, one for one, and valid."""
        return self.length if self.columns is None else self._plain

    def rows(self) -> Rows:
        """What these rows are in a cache layer; one object for all layers until the next step."""
        if self._rows is None:
            batch, device = self.span.shape[0], self.span.device
            if self.columns is None:
                index = torch.arange(self.past, self.past + self.length, device=device).expand(batch, -1)
            else:
                index = torch.where(self.columns < 0, -1, self.columns + self.past)
            self._rows = Rows(index, self.valid, self.image, self.holes, self.bias)
        return self._rows

    # -- what layers are given ---------------------------------------------------------------------------------------

    def rope(self, rope: Rope) -> Rope:
        """Rotary tables of the rows left."""
        if self.columns is None:
            return rope
        return self._once(rope[0], lambda: gather_rope(rope, self._safe().to(rope[0].device)))  # type: ignore[no-any-return]

    def ids(self, positions: Tensor | None) -> Tensor | None:
        """Position ids of the rows left."""
        if self.columns is None or positions is None:
            return positions
        return self._once(positions, lambda: gather_ids(positions, self._safe().to(positions.device)))  # type: ignore[no-any-return]

    def _safe(self) -> Tensor:
        assert self.columns is not None
        return self.columns.clamp(min=0) if self.holes else self.columns

    def _once(self, key: Any, build: Any) -> Any:
        known = self._gathered.get(id(key))
        if known is None or known[0] is not key:
            known = self._gathered[id(key)] = (key, build())
        return known[1]

    # -- shortening --------------------------------------------------------------------------------------------------

    def leave_out(self, x: Tensor, plan: StepPlan) -> Tensor:
        """Take out placeholder rows without a feature, and padding, before layer 0."""
        assert self.alive is not None
        return self.shorten(x, (self.valid & self.alive), plan)

    def order(self) -> Tensor:
        """(B, t) int64 rows: text and padding first, then span by span, each in order."""
        return self.span.argsort(dim=1, stable=True)

    def group_rows(self, order: Tensor, group: Group) -> Tensor:
        """(S, n) int64 rows of the spans of ``group``."""
        inside = torch.arange(group.before, device=order.device)
        return order[group.sample[:, None], group.offset[:, None] + inside]

    def text(self) -> Tensor:
        """(B, t) bool: valid rows that are no image tokens."""
        return self.valid & (self.span < 0)

    def shorten(self, x: Tensor, keep: Tensor, plan: StepPlan) -> Tensor:
        """Keep the rows ``keep`` (B, t) bool, ``plan.rows`` at most in each sample; shorter samples get rows in front.

        Args:
            x: (B, t, D).
            keep: as many True as the plan counted.
            plan: of this step.

        Returns:
            (B, t', D); rows that pad are 0.
        """
        rows = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - plan.rows :]
        hole = ~keep.gather(1, rows) if plan.holes else None
        pick = lambda t: t.gather(1, rows)  # noqa: E731
        self.columns = rows if self.columns is None else pick(self.columns)
        self.span, self.valid, self.image, self.origin = map(pick, (self.span, self.valid, self.image, self.origin))
        self.sizes = pick(self.sizes)
        self.bias = None if self.bias is None else pick(self.bias)
        x = gather_hidden(x, rows)
        self.holes = plan.holes
        if hole is not None:
            self.columns = self.columns.masked_fill(hole, -1)
            self.span = self.span.masked_fill(hole, -1)
            self.valid = self.valid & ~hole
            self.image = self.image & ~hole
            x = x.masked_fill(hole[..., None], 0)
        self._rows = None
        self._gathered.clear()
        return x

    def new_places(self, keep: Tensor, count: int) -> Tensor:
        """(B, t) int64: where each kept row will stand among ``count`` rows."""
        rank = keep.cumsum(1)
        return rank - 1 + (count - rank[:, -1:])


def _places(span: Tensor) -> Tensor:
    """(B, t) place of each row within its span, in order; 0 for text."""
    order = span.argsort(dim=1, stable=True)
    ordered = span.gather(1, order)
    at = torch.arange(span.shape[1], device=span.device).expand_as(span)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = torch.where(new, at, 0).cummax(1).values
    place = torch.zeros_like(span).scatter(1, order, at - start)
    return place.masked_fill(span < 0, 0)
