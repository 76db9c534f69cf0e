"""One step on the image tokens of a prefill: scores in, shorter rows out (LightVLM 3.3 to 3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_accel.llm.positions import gather_hidden
from vlm_accel.llm.scores import SCORES, LayerView
from vlm_accel.methods.base import Tokens

if TYPE_CHECKING:
    from vlm_accel.llm.spans import Group, StepPlan
    from vlm_accel.llm.stage import Stage
    from vlm_accel.llm.trace import Tracer
    from vlm_accel.methods.base import Reduced, TokenMethod

__all__ = ["reduce_rows"]


def reduce_rows(
    stage: Stage,
    plan: StepPlan,
    method: TokenMethod,
    x: Tensor,
    view: LayerView | None,
    seed: int = 0,
    log_size: bool = False,
    tracer: Tracer | None = None,
) -> Tensor:
    """Apply one step to the hidden states that enter its layer.

    Args:
        stage: rows and what they stand for; moves on to the rows left.
        plan: which spans go from how many to how many rows.
        method: shortens the spans; text is never given to it.
        x: (B, t, D).
        view: the layer that scores come from; None where the method wants no score.
        seed: of random controls.
        log_size: give the layers after this one log sizes as a bias of their keys.
        tracer: takes note of where tokens went.

    Returns:
        (B, t', D).
    """
    scores = _scores(method, view)
    keys = view.keys() if view is not None and method.needs_keys else None
    queries = view.queries() if view is not None and method.needs_keys else None
    order = stage.order()
    keep = stage.text()
    done: list[tuple[Group, Tensor, Reduced]] = []
    for group in plan.groups:
        rows = stage.group_rows(order, group)
        sample = group.sample[:, None]
        if group.after >= group.before:
            keep[sample, rows] = True
            continue
        tokens = Tokens(
            x=gather_hidden(x, rows, sample), stage="llm", layer=plan.step.layer if plan.step else 0,
            scores=None if scores is None else scores[sample, rows], sizes=stage.sizes[sample, rows],
            index=stage.origin[sample, rows], keys=_heads(keys, sample, rows), queries=_heads(queries, sample, rows),
            seed=seed, span=group.number, trace=tracer is not None,
        )  # fmt: skip
        reduced = method.reduce(tokens, group.after)
        keep[sample, rows.gather(1, reduced.kept)] = True
        done.append((group, rows, reduced))
        if tracer is not None:
            tracer.step(plan, group, stage.span[sample, rows], reduced, tokens.scores)
    places = stage.new_places(keep, plan.rows)
    x = stage.shorten(x, keep, plan)
    if stage.bias is None and (log_size or any(reduced.key_bias is not None for _, _, reduced in done)):
        stage.bias = torch.zeros_like(stage.sizes)
    for group, rows, reduced in done:
        _write(stage, x, group.sample[:, None], places, rows, reduced)
    return x


def _write(stage: Stage, x: Tensor, sample: Tensor, places: Tensor, rows: Tensor, reduced: Reduced) -> None:
    """Put a group's new rows, and what they stand for, where its kept rows (S, m) now are."""
    at = places[sample, rows.gather(1, reduced.kept)]
    x[sample, at] = reduced.x.to(x.dtype)
    if reduced.sizes is not None:
        stage.sizes[sample, at] = reduced.sizes.to(stage.sizes.dtype)
    if stage.bias is not None:
        bias = reduced.key_bias if reduced.key_bias is not None else stage.sizes[sample, at].log()
        stage.bias[sample, at] = bias.to(stage.bias.dtype)


def _scores(method: TokenMethod, view: LayerView | None) -> Tensor | None:
    if view is None:
        return None
    if method.own_llm_scores:
        return method.llm_scores(view)
    kind = method.score("llm")
    return None if kind == "none" else SCORES[kind](view)


def _heads(states: Tensor | None, sample: Tensor, rows: Tensor) -> Any:
    """(B, H, t, d) -> (S, n, H, d) of the spans."""
    return None if states is None else states.transpose(1, 2)[sample, rows]
