"""When cache entries go, and which (LightVLM 3.6): hooks around the attention of each decoder layer.

After the prefill of a layer its cache is cut to the budget, and again each time it is ``interval`` entries over it. The
scores come from the method; what is fixed here: padding goes first, protected entries stay, the rest by score. Keys
keep the rotation they were made with, positions stay logical (``TrackedLayer``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.llm.cache import TrackedLayer
from vlm_accel.llm.choose import choose, choose_across_heads, protected_entries
from vlm_accel.llm.positions import head_counts, rotated_queries
from vlm_accel.llm.ring import LayerNote, Part, Ring
from vlm_accel.methods.base import CacheView

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from vlm_accel.budget import KVBudget
    from vlm_accel.llm.locate import Decoder
    from vlm_accel.methods.base import CacheMethod
    from vlm_accel.session import Session

__all__ = ["Evictor", "evictable", "install_eviction", "kept_entries"]

#: key of a layer's note in ``TrackedLayer.state``
NOTE = "eviction"
_NEVER = 1 << 62
#: rows of room added at a time where a cache grows without end
_SPARE = 128


def install_eviction(session: Session, decoder: Decoder) -> Evictor:
    """Hook the attention modules of ``decoder`` for ``session.plan.kv``; undone with the session.

    Args:
        session: its plan has ``cache`` (the method) and ``kv`` (the budget).
        decoder: its layers; their caches must be ``TrackedLayer`` (others are left alone).

    Raises:
        UserError: masks per head with FlashAttention, which has no such masks.
    """
    evictor = Evictor(session, decoder)
    session.hook(decoder.module.register_forward_pre_hook(evictor.enter, with_kwargs=True))
    session.on_exit(evictor.leave)
    for number in evictor.numbers:
        attention: Any = decoder.layers[number].self_attn
        if evictor.across_heads:
            before = functools.partial(evictor.before, number)
            session.hook(attention.register_forward_pre_hook(before, with_kwargs=True))
        session.replace(attention, "forward", evictor.counting(number, attention))
    return evictor


@dataclass
class _Call:
    """One call of an attention module, as its hook sees it."""

    number: int
    module: nn.Module
    layer: TrackedLayer
    note: LayerNote
    hidden: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def fresh(self) -> int:
        """Rows of this forward."""
        return int(self.hidden.shape[1])


class Evictor:
    """Decides at each attention call whether entries go, and takes them out.

    Layers with a sliding window are left alone where others have none: they hold little, and their window lives in
    the mask (LightVLM 7.1.5). Where **all** layers have one (Mistral 7B v0.1) leaving them alone would be to do
    nothing, so they are compressed; entries that fell out of the window go first.

    Args:
        session: the acceleration.
        decoder: whose attention modules are hooked.
    """

    def __init__(self, session: Session, decoder: Decoder) -> None:
        assert session.plan.cache is not None
        assert session.plan.kv is not None
        self.session = session
        self.decoder = decoder
        self.method: CacheMethod = session.plan.cache
        self.budget: KVBudget = self.method.adapt(session.plan.kv)
        self.across_heads = self.budget.kind == "ada"
        implementation = str(getattr(decoder.config, "_attn_implementation", ""))
        if self.across_heads and "flash" in implementation:
            raise UserError("AdaKV masks entries head by head, which FlashAttention cannot; load the model with SDPA")
        self.depth = len(decoder.layers)
        self.windows = [_window_of(decoder.config, number) for number in range(self.depth)]
        self.numbers = evictable(decoder)
        if len(self.numbers) < self.depth:
            left = self.depth - len(self.numbers)
            session.notes.append(f"KV budget: {left} layers with a sliding window keep what they hold")
        wanted = max(self.budget.window, int(getattr(self.method, "window", 1)))
        self.width = max(wanted, self.budget.interval) if self.method.observes else wanted
        self.limit = _NEVER if self.method.once else 1 if self.method.every_step else self.budget.interval
        self.passing: list[Any] = []

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: a prefill gets a hook after each attention, a decoding step does not.

        The hook comes after the engine's own, which read the keys of the layer before they go.
        """
        self.leave()
        rows = kwargs.get("inputs_embeds")
        if rows is None:
            rows = args[0] if args else kwargs["input_ids"]
        cache = _cache(kwargs)
        if rows.shape[1] == 1 and cache is not None and cache.get_seq_length():
            return
        for number in self.numbers:
            attention: Any = self.decoder.layers[number].self_attn
            after = functools.partial(self.after, number)
            self.passing.append(attention.register_forward_hook(after, with_kwargs=True))

    def leave(self) -> None:
        """Take the hooks of the last prefill away."""
        for handle in self.passing:
            handle.remove()
        self.passing.clear()

    def counting(self, number: int, module: nn.Module) -> Callable[..., Any]:
        """The module's forward, which counts decoding steps and keeps their inputs.

        A forward of the instance instead of a hook: a decoding step on a GPU waits for Python, and hooks cost several
        times as much as these few lines.
        """
        original, keep = module.forward, self.method.needs_queries

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            cache = kwargs.get("cache")
            if cache is None:
                cache = kwargs.get("past_key_values")
                if cache is None:
                    return output
            layer = cache.layers[number]
            note = layer.state.get(NOTE) if isinstance(layer, TrackedLayer) else None
            if note is None:
                return output
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if hidden.shape[1] == 1:
                note.steps += 1
                if keep:
                    note.ring.loose.append((hidden, kwargs.get("position_embeddings")))
                if note.steps >= note.due:
                    self._decode(_Call(number, module, layer, note, hidden, kwargs))
            return output

        return forward

    def before(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the entries that heads no longer see into the mask (AdaKV)."""
        layer = self._layer(number, kwargs)
        note = layer.state.get(NOTE) if layer is not None else None
        if layer is None or note is None or note.masked is None:
            return None
        fresh = _hidden(args, kwargs).shape[1]
        heads, kv_heads, _ = head_counts(module)
        blind = torch.nn.functional.pad(note.masked, (0, layer.physical + fresh - note.masked.shape[-1]))
        blind = blind.repeat_interleave(heads // kv_heads, 1)[:, :, None]
        mask = kwargs.get("attention_mask")
        hidden = _hidden(args, kwargs)
        if mask is None and getattr(self.decoder.config, "_attn_implementation", "sdpa") == "eager":
            mask = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        if mask is None:
            mask = ~blind
        elif mask.dtype == torch.bool:
            mask = mask & ~blind
        else:
            mask = torch.where(blind, torch.finfo(mask.dtype).min, mask)
        return args, {**kwargs, "attention_mask": mask}

    def after(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """After the attention of a prefill: take note of its rows, and evict when there are too many."""
        layer = self._layer(number, kwargs)
        if layer is None:
            return
        note = layer.state.get(NOTE)
        if note is None:
            note = layer.state[NOTE] = LayerNote(Ring(self.width))
        self._prefill(_Call(number, module, layer, note, _hidden(args, kwargs), kwargs))

    def _layer(self, number: int, kwargs: dict[str, Any]) -> TrackedLayer | None:
        cache = _cache(kwargs)
        layer = cache.layers[number] if cache is not None else None
        return layer if isinstance(layer, TrackedLayer) else None

    # -- when ----------------------------------------------------------------------------------------------------------

    def _prefill(self, call: _Call) -> None:
        """Rows of a prompt (or of a later turn) came."""
        note, layer = call.note, call.layer
        note.settle()
        if note.unseen and self.method.observes:
            self._observe(call, note.ring.last(note.unseen))
        index, valid = layer.index[..., -call.fresh :], layer.valid[..., -call.fresh :]
        if index.dim() == 3:
            index, valid = index[:, 0], valid[:, 0]
        positions = torch.where(valid, index, -1)
        note.length += call.fresh
        note.generated = 0
        note.entries = self._entries(call)
        if self.method.needs_queries:
            note.ring.push(Part(call.hidden, call.kwargs.get("position_embeddings"), positions), layer.logical)
        if self.method.observes:
            self._observe(call, Part(call.hidden, call.kwargs.get("position_embeddings"), positions))
        note.shared |= _flat_mask(call.kwargs)
        if self.budget.scope != "all":
            self._scope(note, layer)
        note.visible += call.fresh
        if note.visible > self._least(note):
            self._evict(call, prefill=True)
        # the next row then goes into a buffer; without it the whole cache is copied at every step
        note.room = max(layer.physical, self._least(note)) + max(self.budget.interval, _SPARE * self.method.once)
        layer.reserve(note.room)
        note.due = self._due(note, layer)

    def _decode(self, call: _Call) -> None:
        """Some steps were made and one of the things that ``_due`` foresaw may have come."""
        note, layer = call.note, call.layer
        note.settle()
        note.ring.absorb()
        if note.visible - self._least(note) >= self.limit:
            self._evict(call, prefill=False)
        elif self.method.observes and note.unseen >= self.width:
            self._observe(call, note.ring.last(note.unseen))
        if layer.physical >= note.room:
            note.room += _SPARE
            layer.reserve(note.room)
        note.due = self._due(note, layer)

    def _due(self, note: LayerNote, layer: TrackedLayer) -> int:
        """Steps that can pass before entries may have to go, sums to be added up, or room to be made."""
        over = note.visible - self._least(note)
        steps = min(self.limit - over, note.room - layer.physical, max(16, self.width))
        if self.method.observes:
            steps = min(steps, self.width - note.unseen)
        return max(1, steps)

    def _entries(self, call: _Call) -> int:
        """How many entries this layer keeps, from the rows that prefills brought to it and to the first layer.

        Later layers have not run yet; they only get shorter, and a budget looks at its own layer and the longest one.
        """
        cache = _cache(call.kwargs)
        first = cache.layers[self.numbers[0]].state.get(NOTE, call.note)
        lengths = [first.length] + [call.note.length] * (self.depth - 1)
        return self.budget.entries(lengths)[call.number]

    def _least(self, note: LayerNote) -> int:
        """Entries to keep: b, or what the scope protects where that is more. No more than a sum of known counts."""
        floor = 0
        if self.budget.scope == "image":
            floor = note.fixed + note.generated
        elif self.budget.scope == "no_system":
            floor = note.fixed + min(note.generated, self.budget.recent)
        return max(note.entries, floor)

    def _scope(self, note: LayerNote, layer: TrackedLayer) -> None:
        """Find what the scope protects; the count is fetched to the host, once a prefill and only with a scope."""
        image, valid, index = layer.image & layer.valid, layer.valid, layer.index
        if self.budget.scope == "no_system" and note.first_image is None:
            first = torch.where(image, index, _NEVER).flatten(1).amin(1, keepdim=True)
            note.first_image = torch.where(first == _NEVER, -1, first)
        valid, index, image = layer.per_head(valid), layer.per_head(index), layer.per_head(image)
        stay = protected_entries(self.budget, valid, index, image, note.first_image)
        note.fixed = int((stay & valid).sum(-1).amax())

    # -- which ---------------------------------------------------------------------------------------------------------

    def _evict(self, call: _Call, prefill: bool) -> None:
        note, layer = call.note, call.layer
        if self.method.observes and note.unseen:
            self._observe(call, note.ring.last(note.unseen))
        view = self._view(call, prefill)
        keep = min(view.entries, note.visible)
        scores = self.method.entry_scores(view)
        alive = view.valid
        window = self.windows[call.number]
        if window is not None:
            alive = alive & (view.index > layer.logical - window)
        stay = protected_entries(self.budget, alive, view.index, view.image, note.first_image)
        note.visible = keep
        if self.across_heads:
            # what was masked before stays so: it is not alive
            note.masked = ~choose_across_heads(scores, alive, stay, keep) & layer.per_head(layer.valid)
            return
        if self.method.same_for_heads or note.shared or not self.budget.per_head or view.keys.shape[1] == 1:
            scores, alive, stay = scores.mean(1), alive[:, 0], stay[:, 0]
        rows = choose(scores, alive, stay, keep)
        _follow(layer.state, rows, view.valid.shape)
        layer.take(rows, plain=self.budget.recent)
        self.method.moved(view, rows, layer)

    def _view(self, call: _Call, prefill: bool) -> CacheView:
        """The layer as the method sees it."""
        layer, note = call.layer, call.note
        keys, values = layer.stored()
        valid = layer.per_head(layer.valid)
        if note.masked is not None:
            valid = valid & ~torch.nn.functional.pad(note.masked, (0, valid.shape[-1] - note.masked.shape[-1]))
        part = None
        if self.method.needs_queries:
            part = note.ring.last(self.width)
        kwargs = dict(call.kwargs)
        kwargs |= {"rotary_emb": getattr(self.decoder.module, "rotary_emb", None), "logical": layer.logical}
        hidden = call.hidden
        if not prefill and part is not None:
            hidden = part.hidden
            kwargs["position_embeddings"] = part.rope
        return CacheView(
            layer=call.number, depth=self.depth, keys=keys, values=values,
            queries=self._queries(call, part), query_index=None if part is None else part.positions(),
            valid=valid, index=layer.per_head_index(), image=layer.per_head(layer.image),
            scaling=_scaling(call.module), softcap=getattr(call.module, "attn_logit_softcapping", None),
            budget=self.budget, entries=self._least(note), state=layer.state, module=call.module,
            hidden=hidden, kwargs=kwargs, prefill=prefill, seed=self.session.seed,
        )  # fmt: skip

    def _queries(self, call: _Call, part: Part | None) -> Tensor:
        if part is None:
            heads, _, size = head_counts(call.module)
            return call.hidden.new_zeros(call.hidden.shape[0], heads, 0, size)
        return rotated_queries(call.module, part.hidden, part.rope)

    def _observe(self, call: _Call, part: Part, chunk: int = 128) -> None:
        """Tell the method of all queries of ``part``, ``chunk`` at a time."""
        view = self._view(call, False)
        positions = part.positions()
        for start in range(0, positions.shape[1], chunk):
            rows = slice(start, start + chunk)
            rope = None if part.rope is None else (part.rope[0][..., rows, :], part.rope[1][..., rows, :])
            some = Part(part.hidden[:, rows], rope, positions[:, rows])
            self.method.observe(
                replace(view, queries=self._queries(call, some), query_index=some.positions(), hidden=some.hidden)
            )
        call.note.unseen = 0


def evictable(decoder: Decoder) -> list[int]:
    """Layers whose entries may go: those without a sliding window; all where each has one."""
    every = list(range(len(decoder.layers)))
    return [number for number in every if _window_of(decoder.config, number) is None] or every


def kept_entries(layer: TrackedLayer) -> int:
    """Entries that a head of ``layer`` sees (AdaKV only masks: fewer than the rows that are stored)."""
    note = layer.state.get(NOTE)
    return layer.physical if note is None else min(note.visible + note.steps, layer.physical)


def _cache(kwargs: dict[str, Any]) -> Any:
    """The cache argument: ``cache`` since transformers 5.20 or so, ``past_key_values`` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _flat_mask(kwargs: dict[str, Any]) -> bool:
    """Whether the attention gets a mask (B, n), as FlashAttention does with padding: it has no place for heads."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2


def _scaling(attention: Any) -> float:
    scaling = getattr(attention, "scaling", None)
    return float(head_counts(attention)[2] ** -0.5 if scaling is None else scaling)


def _window_of(config: Any, number: int) -> int | None:
    """Sliding window of decoder layer ``number``; None: it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return int(window) if kinds[number] == "sliding_attention" and window else None
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _follow(state: dict[str, Any], rows: Tensor, shape: torch.Size) -> None:
    """Gather a method's tensors (B, K, n) with the entries."""
    heads = rows if rows.dim() == 3 else rows[:, None].expand(-1, shape[1], -1)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = value.gather(-1, heads)
