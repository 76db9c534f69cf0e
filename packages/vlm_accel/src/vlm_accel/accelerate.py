"""``with accelerate(model, method, ...) as handle:`` shortens a model's tokens and cache inside the block only."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from polymodal.errors import UserError

from vlm_accel import methods as table
from vlm_accel.budget import KVBudget
from vlm_accel.families import Family, family_of, load_encoder
from vlm_accel.handle import Handle, time_calls
from vlm_accel.methods.base import CacheMethod, FeatureMethod, Method, TokenMethod
from vlm_accel.presets import find_preset
from vlm_accel.schedule import Schedule, Taper, expand, pyramid
from vlm_accel.session import Plan, Session

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.encoders.base import EncoderAdapter

__all__ = ["accelerate"]

_ACTIVE: weakref.WeakSet[Any] = weakref.WeakSet()
_LOCK = threading.Lock()


@contextmanager
def accelerate(
    model: nn.Module,
    method: str | Method | Sequence[str | Method] | Any = "lightvlm",
    *,
    schedule: str | Schedule | None = None,
    ratio: float | None = None,
    kv: str | KVBudget | None = None,
    trace: bool = False,
    seed: int = 0,
    layout: Literal["auto", "scatter", "pseudo_grid"] = "auto",
    budget: Literal["span", "global"] = "span",
    ragged: Literal["pad", "error"] = "pad",
    log_size: bool = False,
    allow_grad: bool = False,
    size_weighted_pool: bool = False,
) -> Iterator[Handle]:
    """Accelerate ``model`` inside the ``with`` block; afterwards it is bit for bit what it was, even after an error.

    Args:
        model: a transformers vision-language model or encoder, a timm or open_clip encoder, in eval mode.
        method: name, several joined by ``+``, a method object, a list of those, or an object with a kvpress-like
            ``score``. Each stage (vision, features, llm, cache) is done by the last one named that can do it.
        schedule: steps, pyramids, or the name of a preset; None: the method's own, or from ``ratio``.
        ratio: share of the image tokens left at the end; encoders: four steps from a quarter of the depth; models
            with a decoder: ``pyramid(ratio)`` where the method works there; methods with a ratio of their own (after
            the encoder, FastV, PyramidDrop, ...): theirs, at their own layers. A method after the encoder joined with
            one inside the decoder: the square root each.
        kv: cache budget or its text (``"ratio:0.5"``); without a cache method LightVLM's window rule is used.
        trace: record which patch ended in which token (``handle.maps``).
        seed: of random controls.
        layout: what consumers of the encoder's grid get (iLLaVA 3.6).
        budget: ``span`` ranks each image by itself, ``global`` all images of a sample together.
        ragged: samples of a batch that keep different counts are padded on the left, or refused.
        log_size: add log sizes to the decoder's attention logits of merged tokens (needs SDPA or eager).
        allow_grad: values stay differentiable, selection does not; otherwise gradients are refused.
        size_weighted_pool: average pooling of encoders weights survivors by the patches they stand for.

    Yields:
        Handle with ``stats``, ``report()`` and ``maps``.

    Raises:
        UserError: unknown model, method or preset; training mode; a schedule that does not fit; nesting.
    """
    options = {
        "layout": layout, "budget": budget, "ragged": ragged, "log_size": log_size, "allow_grad": allow_grad,
        "size_weighted_pool": size_weighted_pool,
    }  # fmt: skip
    _check_options(options)
    family = family_of(model)
    if model.training:
        raise UserError(f"{type(model).__name__} is in training mode; call model.eval() before accelerate")
    encoder = load_encoder(family, model)
    plan = _plan(family, model, encoder, method, schedule, ratio, kv, options)
    modules = list(model.modules())
    with _LOCK:
        if any(module in _ACTIVE for module in modules):
            raise UserError(f"{type(model).__name__} is accelerated already; leave the first with-block, nothing nests")
        _ACTIVE.update(modules)
    session = Session(model, plan, trace=trace, seed=seed)
    try:
        if encoder is not None:
            encoder.install(session)
        if family.decoder:
            from vlm_accel.llm.engine import install_decoder

            install_decoder(session, model)
        time_calls(session, family, encoder)
        yield Handle(session, family, encoder)
    finally:
        session.close()
        with _LOCK:
            for module in modules:
                _ACTIVE.discard(module)


def _plan(
    family: Family,
    model: nn.Module,
    encoder: EncoderAdapter | None,
    method: Any,
    schedule: str | Schedule | None,
    ratio: float | None,
    kv: str | KVBudget | None,
    options: dict[str, Any],
) -> Plan:
    parts = _parts(method)
    if isinstance(schedule, str):
        preset = find_preset(schedule)
        schedule = preset.schedule
        kv = kv if kv is not None else preset.kv
    if ratio is not None:
        if schedule is not None:
            raise UserError("give schedule or ratio, not both")
        schedule, parts = _from_ratio(ratio, family, parts)
    stages = {stage: _last(parts, stage) for stage in ("vision", "features", "llm", "cache")}
    if isinstance(kv, str):
        kv = KVBudget.parse(kv)
    if kv is None:
        kv = next((budget for part in reversed(parts) if (budget := part.kv()) is not None), None)
    elif stages["cache"] is None:
        stages["cache"] = table.create("lightvlm")
    if schedule is None:
        # A language model has no image tokens: what a method would do with them is left out, its cache rule stays.
        cache_only = family.decoder and family.encoder is None and kv is not None
        schedule = [] if cache_only else [step for part in parts for step in part.schedule()]
    depth = _decoder_depth(model) if family.decoder else 0
    used = encoder.used if encoder is not None else 0
    allowed = encoder.allowed if encoder is not None else None
    vision_steps, llm_steps = expand(schedule, used, depth, allowed, _first_layer(model))
    for stage, steps in (("vision", vision_steps), ("llm", llm_steps)):
        if steps and stages[stage] is None:
            raise UserError(
                f"the schedule has {stage} steps, but {_names(parts)} cannot work there; name a method that can"
            )
    plan = Plan(
        vision=stages["vision"] if vision_steps else None,
        features=stages["features"],
        llm=stages["llm"] if llm_steps else None,
        cache=stages["cache"] if kv is not None else None,
        vision_steps=tuple(vision_steps),
        llm_steps=tuple(llm_steps),
        kv=kv,
        options=options,
    )
    _check_plan(plan, family, encoder, _names(parts))
    return plan


def _check_plan(plan: Plan, family: Family, encoder: EncoderAdapter | None, names: str) -> None:
    """Refuse a plan whose parts the model lacks, or that does nothing."""
    if plan.kv is not None and not family.decoder:
        raise UserError(f"a cache budget needs a decoder; {family.name} models have none")
    if plan.features is not None and encoder is None:
        raise UserError(f"{names} works after the image encoder; {family.name} have none")
    if not plan.vision_steps and not plan.llm_steps and plan.kv is None and plan.features is None:
        raise UserError(f"{names}: nothing to do; give a schedule, a ratio or a cache budget")


def _parts(method: Any) -> list[Method]:
    given = list(method) if isinstance(method, list | tuple) else [method]
    parts: list[Method] = []
    for one in given:
        if isinstance(one, str):
            parts += [table.create(name.strip()) for name in one.split("+")]
        elif isinstance(one, Method):
            parts.append(one)
        elif callable(getattr(one, "score", None)):
            from vlm_accel.integrations.kvpress import ScorerMethod

            parts.append(ScorerMethod(one))
        else:
            raise UserError(f"method {one!r}; expected a name, a method object, or an object with a kvpress-like score")
    if not parts:
        raise UserError(f"no method given; known: {', '.join(table.METHODS.names())}")
    return parts


def _last(parts: list[Method], stage: str) -> Any:
    """The last method that works at ``stage``."""
    kind = {"features": FeatureMethod, "cache": CacheMethod}.get(stage, TokenMethod)
    able = [part for part in parts if isinstance(part, kind) and stage in part.stages]
    return able[-1] if able else None


def _from_ratio(ratio: float, family: Family, parts: list[Method]) -> tuple[Schedule, list[Method]]:
    """Schedule (and methods with a ratio of their own) that leave ``ratio`` of the image tokens.

    A method after the encoder and one behind it share the work: each keeps the square root.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio}; expected a share kept in (0, 1]")
    stage = "llm" if family.decoder and _last(parts, "llm") is not None else "vision"
    shorteners = [part for part in (_last(parts, "features"), _last(parts, stage)) if part is not None]
    if not shorteners:
        remedy = "give kv instead of ratio" if family.decoder else "name one that works in encoders, such as recycle"
        raise UserError(f"{_names(parts)} shortens no image tokens on {family.name}; {remedy}")
    share = ratio ** (1 / len(shorteners))
    done: list[Method] = []
    for part in parts:
        if _has_ratio(part):
            done.append(dataclasses.replace(part, ratio=share))  # type: ignore[type-var]
        elif isinstance(part, FeatureMethod):
            raise UserError(f"{type(part).__name__} has no ratio; give its own options instead")
        else:
            done.append(part)
    last = _last(done, stage)
    if last is None:
        return [], done
    if stage == "llm":
        # FastV, PyramidDrop and their like have layers of their own
        return last.schedule() if _has_ratio(last) else pyramid(share), done
    return [Taper(share)], done


def _has_ratio(part: Method) -> bool:
    return any(field.name == "ratio" for field in dataclasses.fields(part))  # type: ignore[arg-type]


def _decoder_depth(model: nn.Module) -> int:
    from vlm_accel.llm.locate import find_decoder

    return len(find_decoder(model).layers)


def _first_layer(model: nn.Module) -> int:
    """First decoder layer that may be shortened: after the last one that gets image features added (DeepStack)."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    return max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))


def _names(parts: list[Method]) -> str:
    return " + ".join(type(part).__name__ for part in parts)


def _check_options(options: dict[str, Any]) -> None:
    allowed = {"layout": ("auto", "scatter", "pseudo_grid"), "budget": ("span", "global"), "ragged": ("pad", "error")}
    for name, values in allowed.items():
        if options[name] not in values:
            raise UserError(f"{name}={options[name]!r}; use one of {', '.join(values)}")
