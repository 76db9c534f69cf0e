"""What methods after the encoder get to see, and what they leave (iLLaVA 5: VisionZip, PruMerge, HiRED, FasterVLM ...).

The blocks that a method names are watched; attention of the class row is kept, not maps. Where vision steps have
shortened the rows too, everything is gathered to the rows that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlm_accel.encoders.scores import Watch, attention_map, joined, logits, watch
from vlm_accel.methods.base import Features

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.encoders.surgery import BatchedCall, Parts
    from vlm_accel.methods.base import FeatureMethod, Reduced
    from vlm_accel.session import Session

__all__ = ["Collector", "Survivors"]


@dataclass
class FeatureWatch(Watch):
    """Keeps what ``Features`` holds of one block; see there for the shapes."""

    attention: Tensor | None = None
    own_query: Tensor | None = None
    own_key: Tensor | None = None
    patch_keys: Tensor | None = None
    patch_queries: Tensor | None = None

    @torch.no_grad()
    def see(self, query: Tensor, key: Tensor, scaling: float, bias: Tensor | None, key_bias: Tensor | None) -> None:
        """Note one kernel call."""
        prefix, row = self.prefix, self.cls_row
        bias = joined(bias, key_bias, prefix)
        if row is None:
            self.attention = attention_map(query, key, scaling, bias)[:, :, prefix:]
        else:
            own = query[:, :, row : row + 1]
            self.attention = logits(own, key, scaling, bias).softmax(-1)[:, :, 0, prefix:].float()
        if self.keys:
            self.patch_keys = key[:, :, prefix:].transpose(1, 2)
            self.patch_queries = query[:, :, prefix:].transpose(1, 2)
        self.own_query = query.mean(2) if row is None else query[:, :, row]
        self.own_key = None if row is None else key[:, :, row]


class Collector:
    """Watches the blocks that a method wants and makes ``Features`` of one encoder call.

    Args:
        session: with ``plan.features``. blocks: of the encoder. used: block whose output the model reads.
        parts: of a block. prefix: rows in front of the patches. cls_row: row of the class token; None: none.
    """

    def __init__(
        self,
        session: Session,
        blocks: Sequence[nn.Module],
        used: int,
        parts: Callable[[nn.Module], Parts],
        prefix: int,
        cls_row: int | None,
    ) -> None:
        method = session.plan.features
        assert method is not None
        self.session = session
        self.method: FeatureMethod = method
        self.has_cls = cls_row is not None
        self.watches: dict[int, FeatureWatch] = {}
        for block in sorted(set(method.blocks(len(blocks), used))):
            wanted = FeatureWatch("cls", prefix, cls_row, keys=method.needs_keys)
            watch(session, parts(blocks[block]).attention, wanted)
            self.watches[block] = wanted

    def select(
        self,
        call: BatchedCall,
        x: Tensor,
        groups: list[tuple[int, list[int], tuple[int, int]]] | None,
        trace: bool,
    ) -> list[Reduced]:
        """What the method leaves of the rows x (I, m, D), one answer an image.

        Args:
            call: the encoder call that has ended.
            x: features of the patches that are left.
            groups: rows of each picture, as in ``Features``.
            trace: whether the method is to say where rows went.
        """
        made = Features(
            x=x,
            grid=call.state.grid if not call.trail else None,
            groups=groups,
            has_cls=self.has_cls,
            seed=self.session.seed,
            trace=trace,
        )
        for block, seen in self.watches.items():
            assert seen.attention is not None
            assert seen.own_query is not None
            rows = call.rows_now(block) if call.trail else None
            made.cls_attention[block] = _gather(seen.attention.transpose(1, 2), rows).transpose(1, 2)
            if seen.patch_keys is not None and seen.patch_queries is not None:
                made.keys[block] = _gather(seen.patch_keys, rows)
                made.queries[block] = _gather(seen.patch_queries, rows)
            made.cls_query[block] = seen.own_query
            if seen.own_key is not None:
                made.cls_key[block] = seen.own_key
            seen.attention = seen.own_query = seen.own_key = seen.patch_keys = seen.patch_queries = None
        return self.method.select(made)


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of (I, n, ...) that are left: (I, m, ...)."""
    if rows is None:
        return x
    index = rows.reshape(*rows.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


@dataclass
class Survivors:
    """Which patches of S images are left after vision steps and methods after the encoder.

    Args:
        counts: patches left of each image.
        index: (S, m) int64 patch of each one that is left, or a list of (m_i,) where counts differ.
        owner: (S, N) int64 which survivor of its image each patch ended in, -1: none; None: not known.
        score: (S, N) float32 score of the last step at the survivors' patches, 0 elsewhere; None: no scores.
        features: what a method after the encoder left of each image (trace), or None.
    """

    counts: list[int]
    index: Tensor | list[Tensor]
    owner: Tensor | None = None
    score: Tensor | None = None
    features: list[Reduced] | None = None

    @property
    def even(self) -> bool:
        """Whether all images keep the same number."""
        return isinstance(self.index, torch.Tensor)

    def flat(self, patches: int) -> Tensor:
        """(sum of counts,) int64: image * patches + patch, in order."""
        if isinstance(self.index, torch.Tensor):
            start = torch.arange(len(self.index), device=self.index.device)[:, None] * patches
            return (self.index + start).flatten()
        return torch.cat([index + number * patches for number, index in enumerate(self.index)])

    @classmethod
    def of(cls, call: BatchedCall) -> Survivors:
        """After the vision steps of ``call``."""
        state = call.state
        score = None
        if call.score is not None:
            score = call.score.new_zeros(state.images, call.patches).scatter(1, state.index, call.score)
        return cls([state.cells] * state.images, state.index, call.owner, score)

    def then(self, reduced: list[Reduced], trace: bool) -> Survivors:
        """After a method that left ``reduced`` of them (each with S = 1)."""
        counts = [one.kept.shape[1] for one in reduced]
        index: Tensor | list[Tensor]
        if len(set(counts)) == 1 and isinstance(self.index, torch.Tensor):
            index = self.index.gather(1, torch.cat([one.kept for one in reduced]))
        else:
            index = [self.index[i].gather(0, one.kept[0]) for i, one in enumerate(reduced)]
        return Survivors(counts, index, self._moved(reduced), None, reduced if trace else None)

    def _moved(self, reduced: list[Reduced]) -> Tensor | None:
        """``owner`` after the method, where both sides are known."""
        went = [one.assign for one in reduced if one.assign is not None]
        if len(went) != len(reduced):
            return None
        assign = torch.cat(went)
        if self.owner is None:
            full = isinstance(self.index, torch.Tensor) and assign.shape[1] == self.index.shape[1]
            return assign if full else None
        moved = assign.gather(1, self.owner.clamp(min=0))
        return torch.where(self.owner < 0, self.owner, moved)
