"""``CLIPModel`` of Hugging Face transformers as towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.backbones.image import CLIP_MEAN, CLIP_STD, ImageTower
from missing_modal.backbones.text import TextTower
from missing_modal.data.tokenize import CLIP_VOCABULARY

__all__ = ["load_hf_clip", "read_hf_clip"]

_BLOCK = {
    "norm_1": "layer_norm1",
    "attention_out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}


def load_hf_clip(folder: Path | str, weights: Path | str, seed: int = 0) -> tuple[ImageTower, TextTower]:
    """Towers of a CLIP folder in the layout of Hugging Face.

    Args:
        folder: with ``config.json`` (or the name of the model, for messages, when ``weights`` is the folder).
        weights: the folder with ``config.json`` and ``model.safetensors``, or ``random``.
        seed: of random weights.

    Raises:
        UserError: no such folder, another kind of model, broken weights.
    """
    from transformers import CLIPConfig, CLIPModel

    identity = f"hf_clip:{Path(folder).name if Path(folder).is_dir() else folder}"
    place = Path(folder if str(weights) == "random" else weights).expanduser()
    place = place.parent if place.is_file() else place
    if not (place / "config.json").is_file():
        raise UserError(f"{identity}: no config.json in {place}; give --backbone.weights the folder of the model")
    try:
        config: Any = CLIPConfig.from_pretrained(place, local_files_only=True)
        if str(weights) == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                tokenizer = _tokenizer(place, config.text_config.vocab_size)
                return read_hf_clip(CLIPModel(config), f"{identity}:random-{seed}", tokenizer)
        model = CLIPModel.from_pretrained(place, local_files_only=True, weights_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{identity}: {place} cannot be read ({reason}); give the folder of a CLIPModel") from error
    return read_hf_clip(model, identity, _tokenizer(place, config.text_config.vocab_size))


def read_hf_clip(model: nn.Module, identity: str, tokenizer: str | None = None) -> tuple[ImageTower, TextTower]:
    """Image and text tower of a ``CLIPModel``; weights are shared where the layout allows it.

    Args:
        model: a ``CLIPModel``.
        identity: name for messages and exports.
        tokenizer: source of the text tower's, see ``Tokenizer``.

    Raises:
        UserError: an activation that is neither gelu nor quick_gelu.
    """
    any_model: Any = model
    vision, text = any_model.config.vision_config, any_model.config.text_config
    state = model.state_dict()
    prefix = "vision_model"
    weights = _blocks(state, prefix, vision.num_hidden_layers)
    weights |= _pair(state, "norm_pre", f"{prefix}.pre_layrnorm") | _pair(state, "out.norm", f"{prefix}.post_layernorm")
    weights |= {
        "patch.weight": state[f"{prefix}.embeddings.patch_embedding.weight"],
        "class_embedding": state[f"{prefix}.embeddings.class_embedding"],
        "position": state[f"{prefix}.embeddings.position_embedding.weight"],
        "out.projection": state["visual_projection.weight"].T.contiguous(),
    }
    image = ImageTower(
        "image",
        weights,
        heads=vision.num_attention_heads,
        identity=identity,
        activation=vision.hidden_act,
        eps=vision.layer_norm_eps,
        size=(vision.image_size, vision.image_size),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        train_projection=True,
    )
    prefix = "text_model"
    weights = _blocks(state, prefix, text.num_hidden_layers) | _pair(state, "out.norm", f"{prefix}.final_layer_norm")
    weights |= {
        "token.weight": state[f"{prefix}.embeddings.token_embedding.weight"],
        "position": state[f"{prefix}.embeddings.position_embedding.weight"],
        "out.projection": state["text_projection.weight"].T.contiguous(),
    }
    tower = TextTower(
        "text",
        weights,
        heads=text.num_attention_heads,
        identity=identity,
        activation=text.hidden_act,
        eps=text.layer_norm_eps,
        eos=_eos(text),
        tokenizer=tokenizer,
    )
    return image, tower


def _eos(config: Any) -> int | None:
    """Old configs state 2, which is wrong; where the end of text is the last id, the largest id is read (DCP 3.8)."""
    return None if config.eos_token_id in (2, config.vocab_size - 1, None) else int(config.eos_token_id)


def _pair(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _blocks(state: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for index in range(depth):
        here, there = f"block.{index}", f"{prefix}.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            parts = [state[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{here}.attention_in.{kind}"] = torch.cat(parts)
        for ours, theirs in _BLOCK.items():
            weights |= _pair(state, f"{here}.{ours}", f"{there}.{theirs}")
    return weights


def _tokenizer(folder: Path, vocabulary: int) -> str | None:
    """Source of the tokenizer: the model's folder, or CLIP's own vocabulary; None: neither fits."""
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
        return str(folder)
    return "clip" if vocabulary == CLIP_VOCABULARY else None
