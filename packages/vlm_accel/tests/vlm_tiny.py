"""Tiny random models of every supported family, and inputs for them as their processors would make.

import vlm_tiny as tiny
model = tiny.build("llava")
batch = tiny.inputs("llava", model, batch=2, images=1)
model.generate(**batch, max_new_tokens=4, do_sample=False)
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

IMAGE, VIDEO, START, END, PAD, EOS = 90, 91, 92, 93, 0, 1
VLMS = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3",
)  # fmt: skip
ENCODERS = ("clip", "siglip", "dinov2", "dinov2_registers")
LANGUAGE = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")


def build(name: str, attn: str = "sdpa", seed: int = 0, **text_options: Any) -> nn.Module:
    """The model called ``name``, in eval mode; weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = _MAKERS[name](text_options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.set_attn_implementation(attn)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
    return model.eval()


def inputs(
    name: str,
    model: nn.Module,
    batch: int = 1,
    images: int = 1,
    text: int = 5,
    pad: int = 0,
    video: int = 0,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Prompt ``text, image, text, image, ..., text`` for each of ``batch`` samples.

    Args:
        name: family.
        model: from ``build``.
        batch: samples, all of one length.
        images: images per sample (0: text only).
        text: tokens of each piece of text.
        pad: left padding added to every sample but the last (attention_mask is 0 there).
        video: temporal slices of one video per sample after the images (Qwen2-VL and 2.5, LLaVA-OneVision), 0: none.
        seed: of tokens and pixels.
    """
    draw = torch.Generator().manual_seed(seed)
    if name in LANGUAGE:
        ids = torch.randint(2, 80, (batch, text), generator=draw)
        return _padded({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pad)
    if name in ENCODERS:
        return {"pixel_values": torch.randn(batch, 3, _SIDE[name], _SIDE[name], generator=draw)}
    pixels = _pixels(name, batch * images, draw, batch)
    run = _image_run(name, draw)
    rows = []
    for _ in range(batch):
        pieces = [torch.randint(2, 80, (text,), generator=draw)]
        for _ in range(images):
            pieces += [run, torch.randint(2, 80, (text,), generator=draw)]
        if video:
            pieces += [_video_run(name, video), torch.randint(2, 80, (text,), generator=draw)]
        rows.append(torch.cat(pieces))
    ids = torch.stack(rows)
    made: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(pixels if images else {})}
    if video:
        made |= _video_pixels(name, batch, video, draw)
    if name.startswith("qwen"):
        kinds = torch.zeros_like(ids)
        kinds[ids == IMAGE] = 1
        kinds[ids == VIDEO] = 2
        made["mm_token_type_ids"] = kinds
    return _padded(made, pad)


def image_tokens(name: str) -> int:
    """Placeholder tokens of one image of ``inputs``."""
    return int((_image_run(name, torch.Generator()) == IMAGE).sum())


_SIDE = {"clip": 56, "siglip": 56, "dinov2": 56, "dinov2_registers": 56}
_QWEN_GRID = {"qwen2_vl": (1, 8, 8), "qwen2_5_vl": (1, 8, 8), "qwen3_vl": (1, 8, 8)}


def _padded(made: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Every sample but the last is moved ``pad`` to the right; the last keeps its full length by ``pad`` more text."""
    if not pad:
        return made
    batch = len(made["input_ids"])
    for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if key in made:
            extra = made[key].new_full((batch, pad), fill)
            if batch > 1:
                extra[-1] = {"input_ids": 7, "attention_mask": 1, "mm_token_type_ids": 0}[key]
            made[key] = torch.cat([extra, made[key]], 1)
    return made


def _image_run(name: str, draw: torch.Generator) -> Tensor:
    one = torch.tensor([IMAGE])
    if name == "llava":
        return one.repeat(16)
    if name in ("llava_next", "llava_onevision"):
        return one.repeat(_anyres_tokens(name))
    if name in _QWEN_GRID:
        t, h, w = _QWEN_GRID[name]
        return torch.cat([torch.tensor([START]), one.repeat(t * h * w // 4), torch.tensor([END])])
    if name == "internvl":
        return torch.cat([torch.tensor([START]), one.repeat(16), torch.tensor([END])])
    # SmolVLM, Idefics3: two tiles of 4 tokens with a text token before each
    return torch.cat(
        [torch.tensor([START]), one.repeat(16), torch.tensor([START]), one.repeat(16), torch.tensor([END])]
    )


def _anyres_tokens(name: str) -> int:
    """Tokens of an image of 56 x 112 with tiles of 56 and 14 x 14 patches: base + 1 x 2 tiles + one newline a row."""
    return 16 + 4 * 8 + 4


def _video_run(name: str, slices: int) -> Tensor:
    one = torch.tensor([VIDEO])
    if name == "llava_onevision":
        return one.repeat(slices * 4 + 1)  # 4 x 4 patches pooled to 2 x 2 a frame, one newline
    if name in ("qwen2_vl", "qwen2_5_vl"):
        return torch.cat([torch.tensor([START]), one.repeat(slices * 16), torch.tensor([END])])
    raise ValueError(f"no video for {name}")


def _pixels(name: str, images: int, draw: torch.Generator, batch: int) -> dict[str, Tensor]:
    if name == "llava":
        return {"pixel_values": torch.randn(images, 3, 56, 56, generator=draw)}
    if name in ("llava_next", "llava_onevision"):
        made = {
            "pixel_values": torch.randn(images, 3, 3, 56, 56, generator=draw),
            "image_sizes": torch.tensor([[56, 112]] * images),
        }
        if name == "llava_onevision":
            made["batch_num_images"] = torch.ones(images, dtype=torch.long)
        return made
    if name in _QWEN_GRID:
        t, h, w = _QWEN_GRID[name]
        size = 16 if name == "qwen3_vl" else 14
        return {
            "pixel_values": torch.randn(images * t * h * w, 3 * 2 * size * size, generator=draw),
            "image_grid_thw": torch.tensor([[t, h, w]] * images),
        }
    if name == "internvl":
        return {"pixel_values": torch.randn(images, 3, 112, 112, generator=draw)}
    tiles = 2 * (images // batch) if images else 0
    return {
        "pixel_values": torch.randn(batch, tiles, 3, 112, 112, generator=draw),
        "pixel_attention_mask": torch.ones(batch, tiles, 112, 112, dtype=torch.bool),
    }


def _video_pixels(name: str, batch: int, slices: int, draw: torch.Generator) -> dict[str, Tensor]:
    if name == "llava_onevision":
        return {"pixel_values_videos": torch.randn(batch, slices, 3, 56, 56, generator=draw)}
    return {
        "pixel_values_videos": torch.randn(batch * slices * 64, 3 * 2 * 14 * 14, generator=draw),
        "video_grid_thw": torch.tensor([[slices, 8, 8]] * batch),
    }


# ---- models


def _text(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model_type": kind, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD,
        "bos_token_id": None, "eos_token_id": EOS, "tie_word_embeddings": False,
    }  # fmt: skip
    return base | options


def _clip_vision(**options: Any) -> dict[str, Any]:
    base = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14, "projection_dim": 24,
    }  # fmt: skip
    return base | options


def _llava(options: dict[str, Any]) -> nn.Module:
    config = tf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_clip_vision()}, text_config=_text("qwen2", options),
        image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    config.image_token_id = IMAGE
    return tf.LlavaForConditionalGeneration(config)


def _llava_next(options: dict[str, Any]) -> nn.Module:
    config = tf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_clip_vision()}, text_config=_text("qwen2", options),
        image_token_index=IMAGE, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]], vision_feature_layer=-2,
    )  # fmt: skip
    config.image_token_id = IMAGE
    return tf.LlavaNextForConditionalGeneration(config)


def _llava_onevision(options: dict[str, Any]) -> nn.Module:
    config = tf.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_clip_vision(vision_use_head=False)},
        text_config=_text("qwen2", options), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _mrope(options: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}} | options


_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip


def _qwen2_vl(options: dict[str, Any]) -> nn.Module:
    config = tf.Qwen2VLConfig(
        vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2},
        text_config=_text("qwen2_vl_text", _mrope(options)), **_QWEN_IDS,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(options: dict[str, Any]) -> nn.Module:
    vision = {
        "depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=_text("qwen2_5_vl_text", _mrope(options)), **_QWEN_IDS
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(options: dict[str, Any]) -> nn.Module:
    vision = {
        "depth": 5, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "patch_size": 16,
        "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64,
    }  # fmt: skip
    config = tf.Qwen3VLConfig(
        vision_config=vision, text_config=_text("qwen3_vl_text", _mrope({"head_dim": 16} | options)), **_QWEN_IDS
    )
    return tf.Qwen3VLForConditionalGeneration(config)


def _internvl(options: dict[str, Any]) -> nn.Module:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": [112, 112], "patch_size": [14, 14], "use_mean_pooling": False,
    }  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision, text_config=_text("qwen2", options), image_token_id=IMAGE, image_seq_length=16,
        downsample_ratio=0.5, vision_feature_layer=-1,
    )  # fmt: skip
    return tf.InternVLForConditionalGeneration(config)


def _idefics(vision_type: str, config_class: Any, model_class: Any, options: dict[str, Any]) -> nn.Module:
    vision = {
        "model_type": vision_type, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 112, "patch_size": 14,
    }  # fmt: skip
    config = config_class(
        vision_config=vision,
        text_config=_text("llama", options),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return model_class(config)


def _smolvlm(options: dict[str, Any]) -> nn.Module:
    return _idefics("smolvlm_vision", tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, options)


def _idefics3(options: dict[str, Any]) -> nn.Module:
    return _idefics("idefics3_vision", tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, options)


def _language(kind: str, options: dict[str, Any]) -> nn.Module:
    more = {"phi3": {"original_max_position_embeddings": 512}, "gemma3_text": {"sliding_window": 8, "head_dim": 16}}
    config = tf.AutoConfig.for_model(
        kind, **{k: v for k, v in _text(kind, options | more.get(kind, {})).items() if k != "model_type"}
    )
    return tf.AutoModelForCausalLM.from_config(config)


_MAKERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "clip": lambda options: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**_clip_vision())),
    "siglip": lambda options: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_clip_vision())),
    "dinov2": lambda options: tf.Dinov2Model(
        tf.Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=14
        )
    ),
    "dinov2_registers": lambda options: tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=14,
            num_register_tokens=2,
        )
    ),
    **{kind: (lambda options, kind=kind: _language(kind, options)) for kind in LANGUAGE},
}  # fmt: skip
