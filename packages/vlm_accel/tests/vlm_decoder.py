"""Help for tests of the decoder engine: accelerate the decoder alone, and run a shortened prefill by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import vlm_tiny as tiny
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from vlm_accel import methods
from vlm_accel.llm.engine import install_decoder
from vlm_accel.schedule import Step
from vlm_accel.session import Plan, Session

#: what transformers calls the cache, among arguments and outputs
CACHE = (
    "cache"
    if "cache" in inspect.signature(inspect.unwrap(LlavaForConditionalGeneration.forward)).parameters
    else "past_key_values"
)


@functools.cache
def model(name: str, attn: str = "sdpa", double: bool = False, **options: Any) -> Any:
    """One tiny model of each kind for a whole test process."""
    net = tiny.build(name, attn, **options)
    return net.double() if double else net


def steps(*pairs: tuple[int, float]) -> tuple[Step, ...]:
    """LLM steps (layer, share kept)."""
    return tuple(Step("llm", layer, ratio=ratio) for layer, ratio in pairs)


@contextmanager
def decoder(
    net: Any,
    method: Any,
    schedule: Sequence[Step] = (),
    image_rows: dict[str, Tensor] | None = None,
    segments: dict[str, list[int]] | None = None,
    trace: bool = False,
    kv: Any = None,
    **options: Any,
) -> Iterator[Session]:
    """The decoder engine alone, without an encoder adapter."""
    method = methods.create(method) if isinstance(method, str) else method
    cache = methods.create("window_kv") if kv is not None else None
    plan = Plan(llm=method if schedule else None, llm_steps=tuple(schedule), cache=cache, kv=kv, options=options)
    session = Session(net, plan, trace=trace)
    try:
        install_decoder(session, net)
        session.image_rows = dict(image_rows or {})
        session.segments = dict(segments or {})
        with torch.no_grad():
            yield session
    finally:
        session.close()


def plain(net: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """The model alone: logits."""
    with torch.no_grad():
        return net(**batch, **options)


def generate(net: Any, batch: dict[str, Tensor], tokens: int = 3, **options: Any) -> Any:
    """New tokens of greedy (or other) generation, without the prompt."""
    with torch.no_grad():
        ids = net.generate(**batch, max_new_tokens=tokens, **{"do_sample": False, **options})
    return ids[:, batch["input_ids"].shape[1] :] if "input_ids" in batch else ids


def prompt_embeds(net: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """What enters the decoder of the untouched model: embeddings, position ids as it gets them, keyword arguments."""
    seen: list[Any] = []
    text = net.model.language_model if hasattr(net.model, "language_model") else net.model.text_model
    handle = text.register_forward_pre_hook(lambda m, a, kw: seen.append(kw), with_kwargs=True)
    plain(net, batch)
    handle.remove()
    return seen[0]["inputs_embeds"], seen[0]["position_ids"], text


def sample(batch: dict[str, Tensor], at: int, pad: int = 0, of: int = 2) -> dict[str, Tensor]:
    """Sample ``at`` of a batch of ``of`` with as many images each, ``pad`` columns of padding taken off."""
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {key: value.chunk(of)[at][:, pad:] if key in text else value.chunk(of)[at] for key, value in batch.items()}


def by_hand(
    net: Any, batch: dict[str, Tensor], drops: dict[int, float], left_out: Tensor | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """One sample through an eager model, layer by layer, image tokens dropped by the last token's attention.

    Written against LightVLM 3.2 to 3.5 alone: positions are selected before the rotary tables are made, masks are made
    anew, attention comes from the eager layer's own weights.

    Returns:
        logits (1, t, V) and {layer: columns (t,) that entered it}.
    """
    x, positions, text = prompt_embeds(net, batch)
    spans = [batch["input_ids"][0] == token for token in (tiny.IMAGE, tiny.VIDEO)]
    image = spans[0] | spans[1]
    run = torch.cumsum(torch.cat([image.new_ones(1), image[1:] != image[:-1]]), 0)
    columns = torch.arange(x.shape[1])
    if left_out is not None:
        columns = columns[~left_out]
    if positions is None:
        positions = torch.arange(x.shape[1])[None]
    if positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[1:]
    deep = _deep_features(net, batch)
    x, entered, attention = x[:, columns], {}, None
    with torch.no_grad():
        for number, layer in enumerate(text.layers):
            if number in drops:
                assert attention is not None
                stay = _stay(attention.mean(1)[0, -1], image[columns], run[columns], drops[number])
                x, columns = x[:, stay], columns[stay]
            entered[number] = columns
            rope = text.rotary_emb(x, positions[..., columns])
            mask = torch.full((len(columns),) * 2, torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
            seen: list[Tensor] = []
            handle = layer.self_attn.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[1]))
            x = layer(x, attention_mask=mask, position_embeddings=rope)
            x = x[0] if isinstance(x, tuple) else x  # transformers 5.3
            handle.remove()
            attention = seen[0]
            if number < len(deep):
                full = x.new_zeros(1, len(image), x.shape[-1])
                full[0, image] = deep[number]
                x = x + full[:, columns]
        return net.lm_head(text.norm(x)), entered


def _stay(scores: Tensor, image: Tensor, run: Tensor, ratio: float) -> Tensor:
    stay = ~image
    for number in run[image].unique():
        mine = (image & (run == number)).nonzero().flatten()
        keep = len(mine) - round(len(mine) * (1 - ratio))
        best = sorted(range(len(mine)), key=lambda j, mine=mine: (-float(scores[mine[j]]), j))[:keep]
        stay[mine[torch.tensor(best)]] = True
    return stay.nonzero().flatten()


def _deep_features(net: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    if not hasattr(net.model, "language_model") or not hasattr(net.model.language_model, "_deepstack_process"):
        return []
    seen: list[Any] = []
    handle = net.model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw), with_kwargs=True)
    plain(net, batch)
    handle.remove()
    return list(seen[0]["deepstack_visual_embeds"])
