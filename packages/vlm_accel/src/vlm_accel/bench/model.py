"""The built-in model: LLaVA of transformers from a small configuration, with the processor that belongs to it.

A CLIP tower with a CLS row (4 blocks, of which LLaVA reads the third), a projector, a Qwen2 decoder of 6 layers with
grouped heads: every method of this package finds what it needs. Saved as any checkpoint is, so that ``vlm-generate``
and ``vlm-show`` take its folder too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from polymodal.seeding import derive
from torch import Tensor, nn

from vlm_accel.bench import world
from vlm_accel.bench.world import Samples

__all__ = ["VISION_WIDTH", "build_vlm", "inputs_of", "make_processor", "pixels_of", "save_vlm"]

WIDTH, DEPTH, HEADS, KV_HEADS, MLP = 64, 6, 4, 2, 128
VISION_WIDTH, VISION_DEPTH, VISION_MLP = 48, 4, 96
MEAN = STD = 0.5
CHAT = (
    "{{ bos_token }}{% for turn in messages %}{% if turn['content'] is string %} {{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def build_vlm(seed: int = 0, attn: str = "sdpa") -> Any:
    """``LlavaForConditionalGeneration`` with random weights, 0.3 M parameters.

    Args:
        seed: of the weights.
        attn: attention implementation.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=VISION_MLP, num_hidden_layers=VISION_DEPTH,
        num_attention_heads=HEADS, image_size=world.SIDE, patch_size=world.PATCH,
        projection_dim=VISION_WIDTH,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(world.VOCABULARY), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=world.BOS, eos_token_id=world.EOS, pad_token_id=world.PAD,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=world.IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=world.TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        model = LlavaForConditionalGeneration(config)
        _start(model)
    for name in ("pad", "eos", "bos"):
        setattr(model.generation_config, f"{name}_token_id", getattr(world, name.upper()))
    return model.eval()


def _start(model: nn.Module) -> None:
    """Weights for a small width: matrices with variance 1 / fan-in, embeddings of the size that norms give.

    The families' own deviation of 0.02 is meant for widths of thousands: here it makes image features so faint that
    the decoder does not begin to read them within the budget (measured).
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        embedding = "embed" in name and "patch" not in name
        nn.init.normal_(parameter, std=0.5 if embedding else parameter[0].numel() ** -0.5)


def pixels_of(canvas: np.ndarray) -> Tensor:
    """(n, 16, 16) uint8 -> (n, 3, 16, 16) float32 as the model's image processor makes them."""
    grey = (torch.from_numpy(canvas).to(torch.float32) / 255 - MEAN) / STD
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()


def inputs_of(samples: Samples) -> dict[str, Tensor]:
    """Arguments of ``model.generate`` for samples."""
    prompt = torch.from_numpy(samples.prompt)
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels_of(samples.canvas)}


def save_vlm(model: Any, folder: Path) -> None:
    """Write weights, configuration and processor as a checkpoint folder of transformers."""
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)


def make_processor() -> Any:
    """``LlavaProcessor`` with a word-level tokenizer of the world's 20 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(world.IDS), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    side = {"height": world.SIDE, "width": world.SIDE}
    images = CLIPImageProcessor(
        do_resize=True, size=side, do_center_crop=False, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=world.PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip
