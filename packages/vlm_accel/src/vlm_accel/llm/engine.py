"""The decoder engine: hooks that shorten the prefill, and the cache that the model believes to be full (LightVLM 7.2).

Hooks stand on the outer model (image tokens, labels), the decoder (cache, plan of this prefill) and its first layer.
The other layers are hooked during a prefill only, and during a decoding step that has a mask to gather; a plain
decoding step runs unhooked layers. A cache that was shortened inside the ``with`` block goes on inside it: the plain
model would make masks for all its logical tokens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.llm import guards
from vlm_accel.llm.cache import Rows, TrackedLayer
from vlm_accel.llm.locate import (
    Decoder,
    cache_name,
    check_backend,
    deepstack_levels,
    find_decoder,
    image_token_ids,
    inner_model,
)
from vlm_accel.llm.masks import layer_mask
from vlm_accel.llm.positions import head_counts, rotated_keys
from vlm_accel.llm.reduce import reduce_rows
from vlm_accel.llm.scores import LayerView
from vlm_accel.llm.spans import StepPlan, plan_steps, read_prompt
from vlm_accel.llm.stage import Stage
from vlm_accel.llm.trace import Tracer
from vlm_accel.session import PrefillRecord

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.session import Session

__all__ = ["Engine", "install_decoder"]


def install_decoder(session: Session, model: nn.Module) -> None:
    """Hook the decoder of ``model`` for ``session.plan``; everything is undone with the session.

    Raises:
        UserError: an attention implementation, or a step among DeepStack's layers, that cannot work.
    """
    decoder = find_decoder(model)
    engine = Engine(session, model, decoder)
    engine.install()
    if session.plan.kv is not None:
        from vlm_accel.llm.evict import install_eviction

        install_eviction(session, decoder)


class Engine:
    """One accelerated decoder."""

    def __init__(self, session: Session, model: nn.Module, decoder: Decoder) -> None:
        plan = session.plan
        self.session = session
        self.model = model
        self.decoder = decoder
        self.shortens = bool(plan.llm_steps or plan.vision_steps or plan.features is not None)
        self.tracks_sliding = self.shortens or (plan.kv is not None and _slides_everywhere(decoder))
        self.log_size = bool(plan.options.get("log_size"))
        self.backend = check_backend(decoder, self.log_size)
        self.flash = "flash" in self.backend
        # SDPA has no mask in plain decoding; eager has one, and sliding layers may where layer 0 has none
        self.masked = self.backend != "sdpa" or getattr(decoder.config, "sliding_window", None) is not None
        self.cache_name = cache_name(decoder.module)
        self.token_ids = image_token_ids(model)
        self.multimodal = inner_model(model) is not decoder.module and decoder.module is not model
        self.levels = deepstack_levels(model)
        guards.check_steps(plan.llm_steps, self.levels)
        first: Any = decoder.layers[0]
        self.heads = head_counts(first.self_attn)[0]
        # of the call that is running
        self.given: dict[str, Any] = {}
        self.stage: Stage | None = None
        self.entry: StepPlan | None = None
        self.steps: dict[int, StepPlan] = {}
        self.tail = 1
        self.cache: Any = None
        self.past = 0
        self.probe: dict[int, dict[str, Any]] = {}
        self.embeds: dict[str, Tensor] | None = None
        self.tracer: Tracer | None = None
        self.record: PrefillRecord | None = None
        self.masks: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.passing: list[Any] = []

    # -- hooks -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register what stays for the whole session."""
        session = self.session
        inner = inner_model(self.model)
        for module in dict.fromkeys((self.model, inner)):
            if module is not self.decoder.module:
                session.hook(module.register_forward_pre_hook(self._outer, with_kwargs=True))
        session.hook(self.decoder.module.register_forward_pre_hook(self._before, with_kwargs=True))
        session.hook(self.decoder.module.register_forward_hook(self._after, always_call=True))
        session.hook(self.decoder.layers[0].register_forward_pre_hook(self._first_layer, with_kwargs=True))
        session.on_exit(self._drop_passing)
        guards.guard_generate(session, self.model, bool(session.plan.llm_steps))
        if self.levels and hasattr(self.decoder.module, "_deepstack_process"):
            original = self.decoder.module._deepstack_process
            session.replace(self.decoder.module, "_deepstack_process", functools.partial(self._deepstack, original))

    def _outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take note of the token ids; take ``image_mask`` out."""
        if kwargs.get("labels") is not None and self.shortens:
            raise UserError("labels need logits for every token; leave the accelerate block to compute a loss")
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            self.given = {"ids": ids, "mask": self.given.get("mask")}
        elif kwargs.get("inputs_embeds") is not None:
            self.given = {"ids": None, "mask": self.given.get("mask"), "embeds": self._placeholders(kwargs)}
        if "image_mask" not in kwargs:
            return None
        kwargs = dict(kwargs)
        self.given["mask"] = kwargs.pop("image_mask")
        return args, kwargs

    def _placeholders(self, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
        """Placeholder rows by their embedding, as the models themselves find them where there are no ids."""
        pixels = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        if not any(kwargs.get(name) is not None for name in pixels):
            return None
        table = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return {kind: (kwargs["inputs_embeds"] == table[number]).all(-1) for kind, number in self.token_ids.items()}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: swap the cache's layers, plan the prefill."""
        given, self.given = self.given, {}
        kwargs = dict(kwargs)
        if "image_mask" in kwargs:
            given["mask"] = kwargs.pop("image_mask")
        ids: Any = args[0] if args else kwargs.get("input_ids")
        rows: Tensor = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if rows is None:
            return None  # the model itself says what is missing
        self._drop_passing()
        self.stage = None
        self.cache = kwargs.get(self.cache_name)
        if self.cache is None and self._uses_cache(kwargs):
            self.cache = kwargs[self.cache_name] = guards.new_cache(self.decoder.config)
        if self.cache is not None and self.cache is not self.session.cache:
            guards.track(self.cache, self.decoder, self.tracks_sliding)
        self.past = self.cache.get_seq_length() if self.cache is not None else 0
        if rows.shape[1] == 1 and self.past:
            self._begin_decode()
        else:
            self._begin_prefill(given, ids, rows, kwargs)
        return args, kwargs

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.decoder.config, "use_cache", True) if wanted is None else wanted)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the decoder, also when it failed."""
        self._drop_passing()
        if self.record is not None and output is not None:
            self.session.prefills.append(self.record)
            if self.tracer is not None:
                self.tracer.done(self.session)
        self.stage = self.record = self.tracer = self.embeds = None
        self.masks.clear()
        self.probe.clear()

    def _drop_passing(self) -> None:
        for handle in self.passing:
            handle.remove()
        self.passing.clear()

    def _pass(self, handle: Any) -> None:
        self.passing.append(handle)

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _begin_decode(self) -> None:
        """Hook the layers whose mask has to be gathered whatever the model's mask is."""
        if self.masked or any(_marked(layer) for layer in self.cache.layers):
            self._hook_decode()

    def _hook_decode(self) -> None:
        for number, layer in enumerate(self.decoder.layers):
            if number and not _dense(self.cache.layers[number]):
                hook = functools.partial(self._decode_layer, number)
                self._pass(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _decode_layer(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        layer = self.cache.layers[number]
        mask = kwargs.get("attention_mask")
        if _dense(layer) or (mask is None and not _marked(layer)):
            return None
        x = _hidden(args, kwargs)
        keys = layer.rows.tail(layer.logical, x.shape[1])
        return args, {**kwargs, "attention_mask": self._mask(mask, keys, None, x.dtype)}

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _begin_prefill(self, given: dict[str, Any], ids: Any, rows: Tensor, kwargs: dict[str, Any]) -> None:
        guards.check_call(self.decoder.module, rows, bool(self.session.plan.options.get("allow_grad")))
        session, plan = self.session, self.session.plan
        shape = (rows.shape[0], rows.shape[1])
        masks = self._image_masks(given, ids, shape)
        valid = _valid(kwargs.get("attention_mask"), shape, rows.device)
        image_rows, session.image_rows = dict(session.image_rows), {}
        segments, session.segments = dict(session.segments), {}
        prompt = read_prompt(masks, valid, image_rows, segments, shape)
        scope, ragged = plan.options.get("budget", "span"), plan.options.get("ragged", "pad")
        self.entry, self.steps, left = plan_steps(prompt, plan.llm_steps, plan.llm, scope, ragged, rows.device)
        image = functools.reduce(torch.logical_or, masks.values()) if masks else None
        self.stage = Stage(prompt, self.past, image, valid, rows.device)
        self.tail = max([1, *prompt.tail()])
        self.tracer = Tracer(session, prompt) if session.trace else None
        session.cache = self.cache if self.cache is not None else session.cache
        most = max([0, *((prompt.span >= 0).sum(1).tolist())])
        self.record = PrefillRecord(prompt.batch, prompt.length, max(prompt.text()), most)
        self.survivors = max([0, *left])
        for number, layer in enumerate(self.decoder.layers):
            if number:
                hook = functools.partial(self._prefill_layer, number)
                self._pass(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self._hook_scores()

    def _image_masks(self, given: dict[str, Any], ids: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
        mask = given.get("mask")
        if mask is not None and mask.shape[1] >= shape[1]:
            return {"image": mask[:, -shape[1] :].bool()}
        if given.get("embeds") is not None:
            return given["embeds"]  # type: ignore[no-any-return]
        ids = given.get("ids") if self.multimodal else ids
        if ids is not None and ids.shape[1] == shape[1] and self.token_ids:
            return {kind: ids == number for kind, number in self.token_ids.items()}
        if self.session.plan.llm_steps and (ids is None or not self.token_ids):
            raise UserError(
                "it is not known which tokens are image tokens; give input_ids with placeholders, or inputs_embeds and "
                "image_mask (batch, tokens)"
            )
        return {}

    def _hook_scores(self) -> None:
        """Keep what the layer before each step was called with, and its keys, until the step."""
        if self.steps and _view_of(self.session.plan.llm) == "before":
            for number in self.steps:
                hook = functools.partial(self._keep, number - 1)
                attention: Any = self.decoder.layers[number - 1].self_attn
                self._pass(attention.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def _keep(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # the tensor itself: eviction, which comes next, makes a new one
        keys = None if self.cache is None else self.cache.layers[number].keys
        self.probe[number] = {
            "module": module, "hidden": _hidden(args, kwargs), "rope": kwargs.get("position_embeddings"),
            "mask": kwargs.get("attention_mask"), "cached": keys,
        }  # fmt: skip

    def _first_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.stage is not None:
            return self._prefill_layer(0, module, args, kwargs)
        if self.cache is None:
            return None
        if kwargs.get("attention_mask") is None and not _marked(self.cache.layers[0]):
            return None
        if not self.passing:
            self._hook_decode()
        return self._decode_layer(0, module, args, kwargs)

    def _prefill_layer(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Shorten what enters the layer, and say to its cache what comes."""
        stage = self.stage
        assert stage is not None
        x = _hidden(args, kwargs)
        if number == 0:
            x = self._enter(stage, x)
        if number in self.steps:
            x = self._step(number, module, x, kwargs)
        if self.record is not None:
            self.record.rows.append(stage.count)
            self.record.survivors.append(self.survivors)
        layer = self.cache.layers[number] if self.cache is not None else None
        keys = new = stage.rows()
        if isinstance(layer, TrackedLayer):
            layer.begin(stage.length, new, stage.plain)
            keys = layer.rows.extend(new) if layer.physical else new
        if stage.columns is None and _dense(layer):
            return None
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), keys, new, x.dtype)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = stage.rope(kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = stage.ids(kwargs["position_ids"])
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def _enter(self, stage: Stage, x: Tensor) -> Tensor:
        if self.entry is not None:
            x = stage.leave_out(x, self.entry)
        method = self.session.plan.llm
        if method is not None and method.own_llm_scores and self.steps:
            at = torch.arange(stage.count, device=x.device).expand(x.shape[0], -1)
            first = stage.columns if stage.columns is not None else at
            self.embeds = {"x": x, "image": stage.image, "visible": stage.valid, "columns": first}
        return x

    def _step(self, number: int, module: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        plan, method = self.steps[number], self.session.plan.llm
        assert method is not None
        assert self.stage is not None
        view = self._view(number, module, x, kwargs)
        x = reduce_rows(self.stage, plan, method, x, view, self.session.seed, self.log_size, self.tracer)
        self.probe.pop(number - 1, None)
        self.survivors = plan.survivors
        return x

    def _view(self, number: int, module: Any, x: Tensor, kwargs: dict[str, Any]) -> LayerView | None:
        """The layer that the step's scores come from."""
        stage = self.stage
        assert stage is not None
        wanted = _view_of(self.session.plan.llm)
        if wanted is None:
            return None
        kept = self.probe[number - 1] if wanted == "before" else self._own(number, module, x, kwargs, stage)
        view = LayerView(x=x, visible=stage.valid, image=stage.image, span=stage.span, tail=self.tail, **kept)
        if self.embeds is not None:
            first = self.embeds
            view.embeds, view.embeds_image, view.embeds_visible = first["x"], first["image"], first["visible"]
            view.origin = _locate(first["columns"], stage)
        return view

    def _own(self, number: int, module: Any, x: Tensor, kwargs: dict[str, Any], stage: Stage) -> dict[str, Any]:
        """The step's own layer, as it would run on the rows before the step (score ``self``)."""
        norm = getattr(module, "input_layernorm", None)
        hidden = x if norm is None else norm(x)
        attention = module.self_attn
        rope = stage.rope(kwargs["position_embeddings"])
        layer = self.cache.layers[number] if self.cache is not None else None
        keys, cached = stage.rows(), None
        if isinstance(layer, TrackedLayer) and layer.physical:
            cached = torch.cat([layer.stored()[0], rotated_keys(attention, hidden, rope)], 2)
            keys = layer.rows.extend(keys)
        mask = kwargs.get("attention_mask")
        if stage.columns is not None or not _dense(layer):
            mask = layer_mask(mask, keys, stage.rows(), self.past, self.flash, self.heads, x.dtype)
        return {"module": attention, "hidden": hidden, "rope": rope, "mask": mask, "cached": cached}

    def _mask(self, mask: Any, keys: Rows, queries: Rows | None, dtype: torch.dtype) -> Any:
        """Gathered once for all layers that share rows."""
        known = self.masks.get((id(mask), id(keys)))
        if known is None:
            made = layer_mask(mask, keys, queries, self.past, self.flash, self.heads, dtype)
            known = self.masks[(id(mask), id(keys))] = (made, mask, keys)
        return known[0]

    def _deepstack(self, original: Any, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
        """Add the features of the rows left (Qwen3-VL's own does so by a mask of the full length)."""
        stage = self.stage
        if stage is None or stage.columns is None:
            return original(hidden, where, features)  # type: ignore[no-any-return]
        where = where.to(hidden.device)
        full = torch.zeros(*where.shape, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        full = full.masked_scatter(where[..., None], features.to(hidden.device, hidden.dtype))
        rows = stage.columns.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        added = full.gather(1, rows)
        return hidden + (added.masked_fill(~stage.image[..., None], 0) if stage.holes else added)


def _slides_everywhere(decoder: Decoder) -> bool:
    """Whether no layer sees the whole prompt (Mistral v0.1): then eviction works on sliding layers."""
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is None:
        return getattr(decoder.config, "sliding_window", None) is not None
    return "full_attention" not in kinds


def _view_of(method: Any) -> str | None:
    """Layer that a method's scores and keys come from: the one ``before`` the step, the step's ``own``, or none.

    ``own_llm_scores`` with the kind ``self`` (PACT) asks for the step's own layer, with ``none`` (SparseVLM) for the
    one before.
    """
    if method is None:
        return None
    kind = method.score("llm")
    if kind == "self":
        return "own"
    return "before" if kind != "none" or method.own_llm_scores or method.needs_keys else None


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _dense(layer: Any) -> bool:
    """Whether masks fit a cache layer as they are; layers that are not tracked, and no cache, hold all rows."""
    return not isinstance(layer, TrackedLayer) or layer.is_dense


def _marked(layer: Any) -> bool:
    """Whether a layer needs an explicit mask even where the model's is None."""
    rows = getattr(layer, "_rows", None)
    return rows is not None and (rows.holes or rows.bias is not None)


def _valid(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """(B, T) bool of the new tokens; None: all valid, or a mask that does not say."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < shape[1]:
        return None
    return mask[:, -shape[1] :].to(device=device, dtype=torch.bool)


def _locate(first: Tensor, stage: Stage) -> Tensor:
    """(B, t) row in layer 0's input of each row left; -1: padding."""
    if stage.columns is None:
        return torch.arange(stage.count, device=first.device).expand_as(stage.span)
    place = torch.full((first.shape[0], stage.length), -1, dtype=torch.long, device=first.device)
    at = torch.arange(first.shape[1], device=first.device).expand_as(first)
    place = place.scatter(1, first.clamp(min=0), torch.where(first < 0, -1, at))
    rows = place.gather(1, stage.columns.clamp(min=0))
    return rows.masked_fill(stage.columns < 0, -1)
