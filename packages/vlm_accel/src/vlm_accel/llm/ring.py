"""What eviction remembers of a layer: its last inputs, from which queries are made when wanted, and counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["LayerNote", "Part", "Ring"]

#: cos and sin, (B or 1, q, d) each, or (3, B, q, d)
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """Rows of one forward.

    Args:
        hidden: (B, q, D) input of the attention.
        rope: its cos and sin; None: the model rotates nothing.
        index: (B, q) int64 logical positions, -1 for padding; a number where one row has it in every sample.
    """

    hidden: Tensor
    rope: Rope | None
    index: Tensor | int

    def positions(self) -> Tensor:
        """(B, q) int64."""
        if isinstance(self.index, Tensor):
            return self.index
        batch, count, _ = self.hidden.shape
        return torch.full((batch, count), self.index, dtype=torch.int64, device=self.hidden.device)

    def last(self, count: int) -> Part:
        """The last ``count`` rows, as copies: a view would keep the whole prompt's activations alive."""
        if count >= self.hidden.shape[1]:
            return self
        rope = (
            None
            if self.rope is None
            else (self.rope[0][..., -count:, :].clone(), self.rope[1][..., -count:, :].clone())
        )
        index = self.index if isinstance(self.index, int) else self.index[:, -count:].clone()
        return Part(self.hidden[:, -count:].clone(), rope, index)


@dataclass
class Ring:
    """Keeps at least the last ``width`` rows (as far as there are so many).

    Inputs are kept rather than queries: a decoding step then costs a reference, and the projection to queries is done
    once per compression on all rows together. In decoding that is D^2 weights read once in ``interval`` steps instead
    of at each one, which alone would cost 5 % of a step.

    Args:
        width: rows that may be asked for.
        parts: oldest first.
        count: rows in all parts.
        end: logical position of the next row.
        loose: (hidden (B, 1, D), rope) of decoding steps since the last call of any method; the caller appends. A
            decoding step has no time for more than that.
    """

    width: int
    parts: list[Part] = field(default_factory=list)
    count: int = 0
    end: int = 0
    loose: list[tuple[Tensor, Rope | None]] = field(default_factory=list)

    def absorb(self) -> None:
        """Give the loose rows their positions."""
        first, rows = self.end, self.loose
        self.end, self.loose = first + len(rows), []
        for number in range(max(0, len(rows) - self.width), len(rows)):
            self._append(Part(*rows[number], first + number))

    def push(self, part: Part, end: int) -> None:
        """Append rows of a prefill; ``end`` is the logical position after the last one."""
        self.absorb()
        self._append(part.last(self.width))
        self.end = end

    def _append(self, part: Part) -> None:
        self.parts.append(part)
        self.count += part.hidden.shape[1]
        while self.count - self.parts[0].hidden.shape[1] >= self.width:
            self.count -= self.parts.pop(0).hidden.shape[1]

    def last(self, count: int) -> Part:
        """The last ``count`` rows (fewer where there are not so many) as one part."""
        self.absorb()
        self._join()
        return self.parts[0].last(count)

    def select(self, rows: Tensor) -> Ring:
        """The same for samples ``rows`` (B',) int64 of the batch (beams)."""
        self.absorb()
        if not self.parts:
            return Ring(self.width, end=self.end)
        self._join()
        part = self.parts[0]
        rows = rows.to(part.hidden.device)

        def table(t: Tensor) -> Tensor:
            return t if t.shape[-3] == 1 else t.index_select(t.dim() - 3, rows.to(t.device))

        rope = None if part.rope is None else (table(part.rope[0]), table(part.rope[1]))
        chosen = Part(part.hidden.index_select(0, rows), rope, part.positions().index_select(0, rows))
        return Ring(self.width, [chosen], self.count, self.end)

    def crop(self, count: int) -> None:
        """Forget the last ``count`` rows."""
        self.absorb()
        self.end -= count
        if count >= self.count:
            self.parts, self.count = [], 0
            return
        self._join()
        part, left = self.parts[0], self.count - count
        rope = None if part.rope is None else (part.rope[0][..., :left, :], part.rope[1][..., :left, :])
        self.parts = [Part(part.hidden[:, :left], rope, part.positions()[:, :left])]
        self.count = left

    def _join(self) -> None:
        """Make the parts one."""
        if len(self.parts) < 2:
            return
        hidden = torch.cat([part.hidden for part in self.parts], 1)
        index = torch.cat([part.positions() for part in self.parts], 1)
        ropes = [part.rope for part in self.parts]
        rope = None
        if all(one is not None for one in ropes):
            rope = _join_tables([one[0] for one in ropes if one]), _join_tables([one[1] for one in ropes if one])
        self.parts = [Part(hidden, rope, index)]


def _join_tables(tables: list[Tensor]) -> Tensor:
    """Along the rows; a table with one sample serves all where others have B."""
    batch = max(table.shape[-3] for table in tables)
    return torch.cat([t.expand(*t.shape[:-3], batch, *t.shape[-2:]) for t in tables], -2)


@dataclass
class LayerNote:
    """What eviction keeps about one cache layer, as long as that cache lives.

    Args:
        ring: last inputs of the attention.
        length: rows that prefills brought; shares of the budget are shares of this.
        entries: b, for that length.
        steps: decoding steps that the counts below do not have yet (``settle`` adds them).
        due: steps after which something may have to be done.
        generated: rows since the last prefill, one a step.
        visible: entries that a head sees (the mean over heads where they differ).
        unseen: last rows that ``observe`` has not been told of.
        room: rows that the layer's buffer holds.
        fixed: entries that the scope protects, of the sample that has most, at the last prefill.
        first_image: (B, 1) int64 logical position of the first image entry, -1: none; only for ``no_system``.
        masked: (B, K, m) bool, entries among the first m that heads no longer see (AdaKV); None: none.
        shared: one set for all heads, whatever the budget says (FlashAttention with padding).
    """

    ring: Ring
    length: int = 0
    entries: int = 0
    steps: int = 0
    due: int = 1
    generated: int = 0
    visible: int = 0
    unseen: int = 0
    room: int = 0
    fixed: int = 0
    first_image: Tensor | None = None
    masked: Tensor | None = None
    shared: bool = False

    def settle(self) -> None:
        """Count the steps since the last time."""
        self.generated += self.steps
        self.visible += self.steps
        self.unseen += self.steps
        self.steps = 0

    def select(self, rows: Tensor) -> LayerNote:
        """The note for samples ``rows`` (B',) of the batch (beams)."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, rows.to(t.device))

        return replace(self, ring=self.ring.select(rows), first_image=pick(self.first_image), masked=pick(self.masked))

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        self.settle()
        self.ring.crop(count)
        self.generated = max(0, self.generated - count)
        self.visible = max(0, self.visible - count)
        self.unseen = max(0, self.unseen - count)
        self.due = 1
