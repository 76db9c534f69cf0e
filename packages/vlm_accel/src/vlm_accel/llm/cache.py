"""Cache layers that answer in logical tokens and store what is left of them (LightVLM 7.2).

The model believes in the full prompt: ``get_seq_length`` and ``get_mask_sizes`` count logical tokens (prompt and
generated). What is stored is shorter; ``TrackedLayer.index`` says which logical token each row is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Rows", "TrackedLayer", "gather_rows"]


class Rows:
    """What the rows of a cache layer stand for. Immutable; layers with equal rows share one object.

    Results of the last call of each kind are kept, so that L layers which share rows pay once for a reorder.

    Args:
        index: (B, n) or (B, K, n) int64 logical position of each row; -1: a row that pads a ragged batch.
        valid: likewise bool, False for padding.
        image: likewise bool, rows of image tokens.
        holes: whether a row may have index -1 (known without looking at the tensor).
        bias: likewise float32, added to the attention logits of the key (log sizes); None: nothing.
    """

    def __init__(
        self, index: Tensor, valid: Tensor, image: Tensor, holes: bool = False, bias: Tensor | None = None
    ) -> None:
        self.index = index
        self.valid = valid
        self.image = image
        self.holes = holes
        self.bias = bias
        self._memo: dict[str, tuple[Any, Rows]] = {}

    @classmethod
    def dense(cls, batch: int, count: int, device: torch.device, start: int = 0) -> Rows:
        """Rows ``start .. start + count - 1`` of valid text."""
        index = torch.arange(start, start + count, device=device).expand(batch, count)
        valid = torch.ones((), dtype=torch.bool, device=device).expand(batch, count)
        return cls(index, valid, ~valid)

    @property
    def count(self) -> int:
        """Number of rows, n."""
        return self.index.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """The same function on all tensors."""
        bias = None if self.bias is None else function(self.bias)
        return Rows(function(self.index), function(self.valid), function(self.image), self.holes, bias)

    def select(self, rows: Tensor) -> Rows:
        """Samples ``rows`` (B',) of the batch."""
        return self._once("select", rows, lambda: self.map(lambda t: t.index_select(0, rows.to(t.device))))

    def repeat(self, times: int) -> Rows:
        """Each sample ``times`` times in a row."""
        return self._once("repeat", times, lambda: self.map(lambda t: t.repeat_interleave(times, dim=0)))

    def crop(self, count: int) -> Rows:
        """Without the last ``count`` rows."""
        return self._once("crop", count, lambda: self.map(lambda t: t[..., : t.shape[-1] - count]))

    def take(self, rows: Tensor) -> Rows:
        """Rows (B, m), or (B, K, m) where each key/value head keeps its own."""

        def pick(t: Tensor) -> Tensor:
            if rows.dim() > t.dim():
                t = t[:, None].expand(-1, rows.shape[1], -1)
            return t.gather(-1, rows if rows.dim() == t.dim() else rows[:, None].expand(-1, t.shape[1], -1))

        return self.map(pick)

    def extend(self, more: Rows) -> Rows:
        """Followed by the rows of ``more``."""

        def build() -> Rows:
            parts = [(self.index, more.index), (self.valid, more.valid), (self.image, more.image)]
            if self.bias is not None or more.bias is not None:
                parts.append((self.log_sizes(), more.log_sizes()))
            joined = [torch.cat([old, _like(new, old)], dim=-1) for old, new in parts]
            bias = joined[3] if len(joined) > 3 else None
            return Rows(joined[0], joined[1], joined[2], self.holes or more.holes, bias)

        return self._once("extend", more, build)

    def log_sizes(self) -> Tensor:
        """``bias``, zeros where there is none."""
        return torch.zeros_like(self.index, dtype=torch.float32) if self.bias is None else self.bias

    def tail(self, start: int, count: int) -> Rows:
        """Followed by ``count`` rows of valid text from the logical position ``start`` on."""

        def build() -> Rows:
            return self.extend(Rows.dense(self.index.shape[0], count, self.index.device, start))

        return self._once("tail", (start, count), build)

    def _once(self, name: str, key: Any, build: Callable[[], Rows]) -> Rows:
        known = self._memo.get(name)
        if known is not None and _same(known[0], key):
            return known[1]
        made = build()
        self._memo[name] = (key, made)
        return made


class TrackedLayer(DynamicLayer):
    """A growing cache layer whose rows are a subset of the logical tokens.

    Rows appended by a plain decoding step cost nothing beyond ``DynamicLayer``: they are counted, and written into
    ``index`` only when someone asks.

    Attributes:
        keys, values: (B, K, n, d) as cached (rotated).
        logical: tokens that the model has seen, prompt and generated.
        state: a method's notes on this layer. Tensors with B in front follow the beams; so do objects with
            ``select(rows)``, given the (B',) old sample of each new one and returning their successor. Objects with
            ``crop(count)`` hear of tokens taken back.
        plain: last rows that are certainly the last logical tokens, one for one; only these can be cropped.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.logical = 0
        self.plain = 0
        self.state: dict[str, Any] = {}
        self._rows: Rows | None = None
        self._pending = 0
        self._next: tuple[int, Rows | None, int] | None = None
        self._room = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._filled = 0
        self._view: Tensor | None = None

    # -- what the rows are -------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        """Index, valid and image of all n rows."""
        keys = self.stored()[0]
        if self._rows is None:
            self._rows = Rows.dense(keys.shape[0], keys.shape[-2], keys.device)
        elif self._pending:
            self._rows = self._rows.tail(self.logical - self._pending, self._pending)
        self._pending = 0
        return self._rows

    @property
    def index(self) -> Tensor:
        """(B, n) or (B, K, n) int64 logical position of each row; -1: a row that pads a ragged batch.

        Rows of the prompt's own padding keep their column and have ``valid`` False.
        """
        return self.rows.index

    @property
    def valid(self) -> Tensor:
        """Bool like ``index``: False for padding."""
        return self.rows.valid

    @property
    def image(self) -> Tensor:
        """Bool like ``index``: rows of image tokens."""
        return self.rows.image

    @property
    def is_dense(self) -> bool:
        """Row j is logical token j in every sample: masks need no gathering."""
        return self._rows is None or (self.physical == self.logical and not self._rows.holes)

    @property
    def physical(self) -> int:
        """Rows stored, n."""
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, n, d).

        Raises:
            UserError: nothing is stored.
        """
        if self.keys is None or self.values is None:
            raise UserError("the cache layer is empty; run a prefill first")
        return self.keys, self.values

    def per_head_index(self) -> Tensor:
        """(B, K, n) int64."""
        return self.per_head(self.index)

    def per_head(self, rows: Tensor) -> Tensor:
        """(B, n) or (B, K, n) -> (B, K, n)."""
        return rows if rows.dim() == 3 else rows[:, None].expand(-1, self.stored()[0].shape[1], -1)

    # -- growing and shrinking ---------------------------------------------------------------------------------------

    def begin(self, model_length: int, rows: Rows | None = None, plain: int | None = None) -> None:
        """Say what the rows of the next ``update`` are; without it they are the next logical tokens, one for one.

        Args:
            model_length: logical tokens of this forward.
            rows: the rows that will be appended (B, n_new); None: the next logical tokens, all valid text.
            plain: how many of them at the end are the last logical tokens, one for one; None: all.
        """
        self._next = (model_length, rows, model_length if plain is None else plain)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows; the logical length grows by what ``begin`` said, else by the number of rows."""
        new = key_states.shape[-2]
        if self._next is None:
            self.logical += new
            self.plain += new
            if self._rows is not None:
                self._pending += new
            return self._append(key_states, value_states)
        length, rows, plain = self._next
        self._next = None
        old = self.rows if self.physical else None
        if rows is None:
            rows = Rows.dense(key_states.shape[0], new, key_states.device, self.logical)
        result = self._append(key_states, value_states)
        self._rows = rows if old is None else old.extend(rows)
        self.plain = self.plain + plain if plain == length == new else plain
        self.logical += length
        return result

    def reserve(self, rows: int) -> None:
        """Room for ``rows`` rows in all: until it is full, ``update`` writes into it instead of copying the cache."""
        self._room = rows

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self._room:
            return super().update(keys, values)  # type: ignore[no-any-return]
        new = keys.shape[-2]
        if self._buffers is None or self._view is not self.keys or self._filled + new > self._buffers[0].shape[-2]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            self._filled = self.physical
            if self._filled + new > self._room:
                return super().update(keys, values)  # type: ignore[no-any-return]
            self._buffers = self._room_for(keys, 0, self._filled), self._room_for(values, 1, self._filled)
        # narrow and not an index expression: each decoding step of each layer comes here
        for buffer, rows in zip(self._buffers, (keys, values), strict=True):
            buffer.narrow(-2, self._filled, new).copy_(rows)
        self._filled += new
        self._view = self.keys = self._buffers[0].narrow(-2, 0, self._filled)
        self.values = self._buffers[1].narrow(-2, 0, self._filled)
        return self.keys, self.values

    def _room_for(self, new: Tensor, which: int, count: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], self._room, new.shape[-1])
        if count:
            buffer[..., :count, :] = self.stored()[which]
        return buffer

    def take(self, rows: Tensor, plain: int = 0) -> None:
        """Keep ``rows`` only.

        Args:
            rows: (B, m) for all heads, or (B, K, m) per head; int64, ascending.
            plain: last rows that are certainly kept, whole and in order (the recent ones).
        """
        known = self.rows
        self.keys, self.values = (gather_rows(t, rows) for t in self.stored())
        self._rows = known.take(rows)
        self.plain = min(self.plain, plain)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (assisted decoding).

        Raises:
            UserError: beyond the rows that are stored one for one.
        """
        count = abs(int(tokens_to_remove))
        if tokens_to_remove > 0:
            count = max(0, self.logical - tokens_to_remove)
        if count == 0 or not self.physical:
            return
        if count > self.plain:
            raise UserError(
                "the cache would be cropped into tokens that were merged or evicted; use no assisted decoding with "
                "this acceleration"
            )
        self._rows = self.rows.crop(count)
        self.keys, self.values = (t[..., :-count, :] for t in self.stored())
        self.logical -= count
        self.plain -= count
        for value in self.state.values():
            if hasattr(value, "crop"):
                value.crop(count)

    # -- what transformers asks --------------------------------------------------------------------------------------

    def get_seq_length(self, *args: Any) -> int:
        """Logical tokens."""
        return self.logical

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Logical keys after this forward, offset 0 (older transformers give the positions, not their number)."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.logical + count, 0

    def reset(self) -> None:
        """Forget everything."""
        self.logical = self.plain = self._pending = 0
        self._rows = self._next = self._buffers = self._view = None
        self.state = {}
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep samples ``indices`` (B',) int64, or (B,) bool."""
        if not self.physical:
            return
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        rows = rows.to(self.stored()[0].device)
        self._batch(rows, lambda known: known.select(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample ``repeats`` times in a row."""
        if self.physical:
            keys = self.stored()[0]
            rows = torch.arange(keys.shape[0], device=keys.device).repeat_interleave(repeats)
            self._batch(rows, lambda known: known.repeat(repeats))

    def _batch(self, rows: Tensor, follow: Callable[[Rows], Rows]) -> None:
        batch = self.stored()[0].shape[0]
        self.keys, self.values = (t.index_select(0, rows) for t in self.stored())
        if self._rows is not None:
            self._rows = follow(self._rows)
        for name, value in self.state.items():
            if isinstance(value, Tensor):
                if value.dim() and value.shape[0] == batch:
                    self.state[name] = value.index_select(0, rows)
            elif hasattr(value, "select"):
                self.state[name] = value.select(rows)


def gather_rows(cached: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, m) or (B, K, m) of keys or values (B, K, n, d) -> (B, K, m, d)."""
    batch, heads, count, size = cached.shape
    if rows.dim() == 2:
        rows = rows[:, None].expand(-1, heads, -1)
    step = cached.stride(1)
    if cached.stride(2) != size or cached.stride(3) != 1 or cached.stride(0) != heads * step or step % size:
        return cached.gather(2, rows[..., None].expand(-1, -1, -1, size))
    # whole rows of one long table: on a CPU several times faster than gather, which looks at single numbers
    table = cached.as_strided(((batch * heads - 1) * (step // size) + count, size), (size, 1))
    start = torch.arange(batch * heads, device=cached.device).view(batch, heads, 1) * (step // size)
    return table.index_select(0, (rows + start).flatten()).view(batch, heads, -1, size)


def _like(new: Tensor, old: Tensor) -> Tensor:
    """(B, m) -> (B, K, m) where the old rows are per head; on one device."""
    new = new.to(old.device)
    return new[:, None].expand(-1, old.shape[1], -1) if old.dim() > new.dim() else new


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor | Rows) else a == b
