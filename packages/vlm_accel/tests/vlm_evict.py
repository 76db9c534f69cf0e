"""Runs of tiny models with and without eviction, and a plain model that sees only what eviction left."""

import functools

import torch
import vlm_tiny as tiny
from vlm_accel import KVBudget, accelerate
from vlm_accel.llm.evict import NOTE
from vlm_accel.llm.locate import find_decoder

_build = functools.cache(tiny.build)
#: LightVLM 8: budget 10, sink 2, recent 4, window 4; short intervals, so that several compressions fall into ten steps
SMALL = KVBudget.uniform(10, sink=2, recent=4, window=4, interval=3)


def build(name, attn="sdpa"):
    """The tiny model, one object for each pair of arguments."""
    return _build(name, attn)


@functools.cache
def prompt(name, pad=0, text=13, images=1):
    """One sample; ``pad`` columns of padding in front of the same tokens."""
    made = tiny.inputs(name, build(name), text=text, images=images)
    if not pad:
        return made
    made = dict(made)
    for key, fill in (("input_ids", tiny.PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if key in made:
            made[key] = torch.cat([made[key].new_full((1, pad), fill), made[key]], 1)
    return made


class Force:
    """A logits processor that lets nothing but the given tokens (B, steps) happen."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, ids.shape[1] - self.start, None], 0.0)


def run(model, inputs, steps=11, tokens=None, **options):
    """(logits (steps, B, V), new tokens) of greedy decoding, or along ``tokens``."""
    start = inputs["input_ids"].shape[1]
    if tokens is not None:
        options["logits_processor"] = [Force(tokens, start)]
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    return torch.stack(out.logits), out.sequences[:, start:]


def close(a, b, tolerance=1e-6):
    """Equal to ``tolerance`` of the largest logit."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def attentions(model):
    return [layer.self_attn for layer in find_decoder(model).layers]


def seen(layer):
    """Per head, the logical positions that a layer's next query may see: list over samples of list over heads."""
    index, valid = layer.per_head_index(), layer.per_head(layer.valid)
    note = layer.state.get(NOTE)
    if note is not None and note.masked is not None:
        valid = valid & ~torch.nn.functional.pad(note.masked, (0, valid.shape[-1] - note.masked.shape[-1]))
    return [[row[keep].tolist() for row, keep in zip(*pair, strict=True)] for pair in zip(index, valid, strict=True)]


class Watch:
    """Notes before each attention call what its cache holds; use as a context manager."""

    def __init__(self, model):
        self.modules, self.calls, self.counts = attentions(model), [], []

    def __enter__(self):
        self.handles = [
            module.register_forward_pre_hook(functools.partial(self.note, number), with_kwargs=True)
            for number, module in enumerate(self.modules)
        ]
        return self

    def note(self, number, module, args, kwargs):
        if number == 0:
            self.calls.append([])
        cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs["past_key_values"]
        self.cache, layer = cache, cache.layers[number]
        self.calls[-1].append(seen(layer) if NOTE in getattr(layer, "state", {}) else None)
        self.counts.append(getattr(layer, "physical", 0))

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


class Blinkers(Watch):
    """Gives a plain model, at each attention call, a mask that allows only what ``calls`` say."""

    def __init__(self, model, calls):
        super().__init__(model)
        self.given, self.at = calls, -1

    def note(self, number, module, args, kwargs):
        if number == 0:
            self.at += 1
        allowed = self.given[self.at][number]
        if allowed is None:
            return None
        cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs["past_key_values"]
        past, fresh = cache.get_seq_length(number), kwargs["hidden_states"].shape[1]
        heads, kv_heads = module.config.num_attention_heads, len(allowed[0])
        mask = torch.zeros(len(allowed), kv_heads, fresh, past + fresh, dtype=torch.bool)
        for sample, rows in enumerate(allowed):
            for head, columns in enumerate(rows):
                mask[sample, head, :, columns] = True
        mask[..., past:] = torch.ones(fresh, fresh, dtype=torch.bool).tril()
        return args, {**kwargs, "attention_mask": mask.repeat_interleave(heads // kv_heads, 1)}


def accelerated(name, method, budget=SMALL, steps=11, pad=0, tokens=None, attn="sdpa", inputs=None, **options):
    """(logits, tokens, watch, cache) of a run with eviction."""
    model = build(name, attn)
    given = prompt(name, pad) if inputs is None else inputs
    with accelerate(model, method, kv=budget), Watch(model) as watch:
        logits, made = run(model, given, steps, tokens, **options)
    return logits, made, watch, watch.cache
