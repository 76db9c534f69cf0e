"""Merge maps of decoder steps; only with ``trace=True``, which brings the selection to the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_accel.merge_map import MergeMap, MergeStep, csr

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.llm.spans import Group, Prompt, StepPlan
    from vlm_accel.methods.base import Reduced
    from vlm_accel.session import Session

__all__ = ["Tracer"]


class Tracer:
    """Writes the steps of one prefill into the session's maps, one map a span.

    Maps that the encoder began are in ``session.pending``, one for each span of the samples before beam expansion; the
    copies of a sample are not traced.
    """

    def __init__(self, session: Session, prompt: Prompt) -> None:
        self.maps: dict[int, MergeMap] = {}
        pending = list(session.pending)
        session.pending.clear()
        counts = prompt.counts()
        kept = [number for number, sample in enumerate(prompt.samples) if sample % prompt.repeats == 0]
        if len(pending) != len(kept):
            pending = [MergeMap(grid=_grid(counts[number])) for number in kept]
        self.maps = dict(zip(kept, pending, strict=True))
        self.left = {number: counts[number] for number in kept}

    def step(self, plan: StepPlan, group: Group, spans: Tensor, reduced: Reduced, scores: Tensor | None) -> None:
        """Take note of one call: ``spans`` (S, n) number of the span of each row that went in."""
        layer = plan.step.layer if plan.step else 0
        kept, assign, weight = (_host(t) for t in (reduced.kept, reduced.assign, reduced.weight))
        score, number = _host(scores), _host(spans)
        for at in range(kept.shape[0]):
            for span in np.unique(number[at]):
                if int(span) in self.maps:
                    inside = np.flatnonzero(number[at] == span)
                    parts = (kept[at], _at(assign, at), _at(weight, at), _at(score, at))
                    self.maps[int(span)].steps.append(_part(layer, inside, *parts))

    def done(self, session: Session) -> None:
        """Hand the maps over."""
        session.maps.extend(self.maps.values())


def _part(layer: int, inside: Any, kept: Any, assign: Any, weight: Any, score: Any) -> MergeStep:
    """The step of the rows ``inside`` of those that were ranked together."""
    outputs = np.flatnonzero(np.isin(kept, inside))
    own = np.searchsorted(inside, kept[outputs])
    to = np.full(len(inside), -1)
    if assign is None:
        to[own] = np.arange(len(outputs))
    else:
        place = np.full(len(kept) + 1, -1)
        place[outputs] = np.arange(len(outputs))
        to = place[assign[inside]]
    matrix = None if weight is None else csr(weight[np.ix_(outputs, inside)])
    return MergeStep(
        stage="llm", layer=layer, n_in=len(inside), n_out=len(outputs), kept=own.astype(np.int32),
        assign=to.astype(np.int32), weight=matrix, score=None if score is None else score[inside].astype(np.float32),
    )  # fmt: skip


def _host(values: Tensor | None) -> Any:
    return None if values is None else values.detach().cpu().numpy()


def _at(values: Any, at: int) -> Any:
    return None if values is None else values[at]


def _grid(count: int) -> tuple[int, int, int]:
    """A square where the count is one, else one line: the decoder does not know the picture's shape."""
    side = math.isqrt(count)
    return (1, side, side) if side * side == count else (1, 1, count)
