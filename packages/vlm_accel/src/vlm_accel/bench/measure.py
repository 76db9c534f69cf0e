"""One row measured: costs from the handle, times of the unmodified model and the method in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vlm_accel.handle import Watch
from vlm_accel.schedule import Step

__all__ = ["PARTS", "combined", "costs_of", "plain_costs", "times_of"]

PARTS = ("vision", "prefill", "token")
_COSTS = ("tokens/", "macs/", "kv/", "ideal/")

Enter = Callable[[], AbstractContextManager[Any]]


def plain_costs(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, float]:
    """Counts, MACs and bytes of the unmodified model: the figures of a run whose steps keep everything."""
    from vlm_accel.accelerate import accelerate

    found = costs_of(lambda: accelerate(model, "drop", schedule=_identity(model)), model, inputs, tokens)
    return {name: value for name, value in found.items() if not name.startswith("ideal/")}


def _identity(model: Any) -> list[Step]:
    from vlm_accel.accelerate import _first_layer
    from vlm_accel.families import family_of, load_encoder

    encoder = load_encoder(family_of(model), model)
    allowed = list(encoder.allowed) if encoder is not None and encoder.allowed is not None else [0]
    steps = [Step("llm", _first_layer(model), ratio=1.0)]
    return [Step("vision", allowed[0], ratio=1.0), *steps] if encoder is not None else steps


def costs_of(enter: Enter, model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, float]:
    """Counts, MACs, bytes and ideal speed-ups of one turn of exactly ``tokens`` tokens inside ``enter()``."""
    with enter() as handle:
        _turn(model, inputs, tokens)
        stats = handle.stats
    return {name: float(value) for name, value in stats.items() if name.startswith(_COSTS)}


def combined(costs: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """Costs of a row with what its method leaves alone taken from the unmodified model; totals and ideal speed-ups."""
    full = {name: value for name, value in plain.items() if not name.endswith(("_plain", "_ratio"))}
    found = {**full, **{name: value for name, value in costs.items() if not name.startswith("ideal/")}}
    for name in ("macs/vision", "macs/prefill", "kv/bytes"):
        if name in full:
            found[f"{name}_plain"] = full[name]
    parts = [name for name in ("macs/vision", "macs/prefill") if name in full]
    found["macs/total"] = sum(found[name] for name in parts)
    found["macs/total_plain"] = sum(full[name] for name in parts)
    for part in ("vision", "prefill", "total"):
        if found.get(f"macs/{part}"):
            found[f"ideal/{part}_speedup"] = found[f"macs/{part}_plain"] / found[f"macs/{part}"]
    weights = found.get("kv/weight_bytes", 0.0)
    if weights and "kv/bytes" in full:
        found["ideal/token_speedup"] = (weights + full["kv/bytes"]) / (weights + found["kv/bytes"])
    return found


def times_of(
    enter: Enter, model: Any, inputs: dict[str, Tensor], tokens: int, warmup: int, repeats: int
) -> dict[str, float]:
    """Medians in ms of vision, prefill and a token, of the unmodified model (``_plain``) and inside ``enter()``.

    The two take turns in one process, so that what else the machine does meets both.

    Source: LightVLM 4 (warm-up, medians, interleaved, device-synchronised).
    """
    ours: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for turn in range(warmup + repeats):
        for found, context in ((plain, Watch(model)), (ours, enter())):
            with context as handle:
                _turn(model, inputs, tokens)
                stats = handle.stats
            for part in PARTS:
                if turn >= warmup and f"time/{part}_ms" in stats:
                    found.setdefault(part, []).append(stats[f"time/{part}_ms"])
    result: dict[str, float] = {}
    for part in PARTS:
        if ours.get(part) and plain.get(part):
            before, now = statistics.median(plain[part]), statistics.median(ours[part])
            result |= {f"time/{part}_ms": now, f"time/{part}_ms_plain": before, f"speedup/{part}": before / now}
    return result


def efficiency(times: dict[str, float], costs: dict[str, float]) -> dict[str, float]:
    """Measured / ideal speed-up of each part, where the method shortens it."""
    found = {}
    for part in PARTS:
        ideal, measured = costs.get(f"ideal/{part}_speedup"), times.get(f"speedup/{part}")
        if ideal and measured and ideal > 1.001:
            found[f"efficiency/{part}"] = measured / ideal
    return found


def _turn(model: Any, inputs: dict[str, Tensor], tokens: int) -> None:
    pad = model.generation_config.pad_token_id
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1, temperature=None,
            top_p=None, top_k=None, pad_token_id=0 if pad is None else pad,
        )  # fmt: skip
