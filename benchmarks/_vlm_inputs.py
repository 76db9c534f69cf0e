"""Random-weight models and prompts for the benchmark of vlm_accel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 3


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder, and the side of the square image grid."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    key_heads: int = 4
    mlp: int = 1408
    side: int = 32
    vocab: int = 1024


SMALL = Size(layers=4, width=64, heads=4, key_heads=2, mlp=128, side=8)
QWEN7B = Size(layers=28, width=3584, heads=28, key_heads=4, mlp=18944, vocab=152064)


def vision_language_model(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A LLaVA with a vision tower so small that it does not count (2 blocks of width 64)."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 14 * size.side, "patch_size": 14,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": size.vocab, "hidden_size": size.width, "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.key_heads,
        "max_position_embeddings": 16384, "tie_word_embeddings": False,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=size.side**2,
        vision_feature_layer=-2,
    )
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(
    size: Size, batch: int, device: str, dtype: torch.dtype, text: int = 64, images: int = 1
) -> dict[str, Tensor]:
    """``text`` tokens around ``images`` images of side ** 2 tokens."""
    draw = torch.Generator().manual_seed(1)
    half = torch.randint(4, size.vocab, (batch, text // 2), generator=draw)
    rest = torch.randint(4, size.vocab, (batch, text - text // 2), generator=draw)
    ids = torch.cat([half, torch.full((batch, images * size.side**2), IMAGE), rest], 1).to(device)
    side = 14 * size.side
    pixels = torch.randn(batch * images, 3, side, side, generator=draw).to(device=device, dtype=dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def decode_seconds(
    model: nn.Module, inputs: dict[str, Tensor], steps: int, sync: Any, static: bool = False
) -> tuple[float, float]:
    """Prefill, then ``steps`` greedy steps: seconds of the steps alone, on the wall and of this process.

    ``static`` uses a preallocated cache instead of DynamicCache.
    """
    from transformers import StaticCache

    length = inputs["input_ids"].shape[1]
    given: dict[str, Any] = {"use_cache": True}
    if static:
        given["cache"] = StaticCache(config=model.config.get_text_config(), max_cache_len=length + steps + 8)
    with torch.inference_mode():
        out = model(**inputs, **given, logits_to_keep=1)
        cache = out.cache if hasattr(out, "cache") else out.past_key_values
        token = out.logits[:, -1:].argmax(-1)
        mask = inputs["attention_mask"]
        ones = mask.new_ones(len(mask), 1)
        sync()
        start, cpu = 0.0, 0.0
        for step in range(steps + 4):
            if step == 4:  # warm
                sync()
                start, cpu = time.perf_counter(), time.process_time()
            mask = torch.cat([mask, ones], 1)
            position = torch.full((len(mask), 1), length + step, device=mask.device)
            out = model(input_ids=token, attention_mask=mask, cache=cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        sync()
        return time.perf_counter() - start, time.process_time() - cpu
