"""CLIP models of open_clip: their ViT and text transformer as towers (needs ``polymodal-missing-modal[open_clip]``).

Weights are read by name, so that the order of axes inside the library (sequence first up to 2.24, a flag from 2.26 on,
batch first since 4) makes no difference; 2.26 and newer are supported (DCP 3.8). The tests of this adapter passed with
2.26.1, 2.30.0, 2.32.0, 3.0.0 and 3.3.0, the flag set both ways.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from polymodal.errors import UserError, did_you_mean
from torch import Tensor, nn

from missing_modal.backbones.image import CLIP_MEAN, CLIP_STD, ImageTower
from missing_modal.backbones.text import TextTower
from missing_modal.backbones.weights import file_hash, is_torchscript, read_weights
from missing_modal.data.tokenize import CLIP_VOCABULARY

__all__ = ["load_open_clip", "read_open_clip"]

_BLOCK = {
    "norm_1": "ln_1",
    "attention_out": "attn.out_proj",
    "norm_2": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_QUICK_GELU_TAGS = ("openai", "metaclip_400m", "metaclip_fullcc", "dfn2b", "dfn5b")
"""with QuickGELU, in releases that do not say so"""
_EXTRA = ("input_resolution", "context_length", "vocab_size", "logit_bias", "attn_mask")


def load_open_clip(name: str, weights: Path | str, seed: int = 0) -> tuple[ImageTower, TextTower]:
    """Towers of a built-in model of open_clip.

    Args:
        name: as in ``open_clip.list_models()``, such as ``ViT-B-16-quickgelu``.
        weights: a file (safetensors, a state dict, or OpenAI's own archive), a pretrained tag of the library
            (downloaded by it), or ``random``.
        seed: of random weights.

    Raises:
        UserError: no such model, a model that is no plain CLIP with a ViT, weights of another model, weights that were
            trained with QuickGELU in a model without it or the other way round.
    """
    library = _library()
    config = library.get_model_config(name)
    if config is None:
        raise UserError(f"open_clip has no model {name!r}; {did_you_mean(name, library.list_models())}try another name")
    _check_config(name, config)
    quick = bool(config.get("quick_gelu", False))
    identity = f"open_clip:{name}"
    if str(weights) == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return read_open_clip(library.CLIP(**config), f"{identity}:random-{seed}")
    file, found = _file(library, name, weights)
    _check_gelu(name, quick, found)
    state = {key: value for key, value in read_weights(file).items() if key not in _EXTRA}
    if any(key.startswith("vision_model.") for key in state):
        raise UserError(f"{file} holds a CLIP of Hugging Face; use --backbone hf_clip:FOLDER with its folder")
    with torch.device("meta"):
        model = library.CLIP(**config)
    try:
        model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()[:160]
        raise UserError(f"{file} does not belong to {name} ({reason}); name the model it was trained for") from error
    return read_open_clip(model, identity)


def read_open_clip(model: nn.Module, identity: str) -> tuple[ImageTower, TextTower]:
    """Image and text tower of an ``open_clip.CLIP``; the weights are shared with the model, not copied.

    Args:
        model: with a ``VisionTransformer`` and a text transformer at the top level.
        identity: name for messages and exports.

    Raises:
        UserError: anything that this transformer is not: another pooling, layer scale, attention with further norms.
    """
    visual: Any = getattr(model, "visual", None)
    text: Any = model
    _refuse(
        identity, "its image encoder is no plain ViT", not hasattr(getattr(visual, "transformer", None), "resblocks")
    )
    _refuse(identity, "its text encoder is no plain transformer", not hasattr(model, "token_embedding"))
    _refuse(identity, "its image encoder does not read the class row", getattr(visual, "pool_type", "tok") != "tok")
    _refuse(identity, "its image encoder pools by attention", getattr(visual, "attn_pool", None) is not None)
    _refuse(identity, "its text is not read at its end", getattr(model, "text_pool_type", "argmax") != "argmax")
    _refuse(identity, "its text encoder is not causal", text.attn_mask is None)
    weights = _blocks(identity, visual.transformer.resblocks)
    weights |= {"patch.weight": visual.conv1.weight, "class_embedding": visual.class_embedding}
    weights |= {"position": visual.positional_embedding} | _pair("out.norm", visual.ln_post)
    if not isinstance(visual.ln_pre, nn.Identity):
        weights |= _pair("norm_pre", visual.ln_pre)
    weights |= _projection(identity, visual.proj)
    first = visual.transformer.resblocks[0]
    options = {"heads": first.attn.num_heads, "activation": _activation(identity, first)}
    prepared = getattr(visual, "preprocess_cfg", {})
    size = tuple(visual.image_size) if isinstance(visual.image_size, tuple | list) else (visual.image_size,) * 2
    image = ImageTower(
        "image",
        weights,
        identity=identity,
        eps=_eps(identity, visual),
        size=size,
        mean=prepared.get("mean", CLIP_MEAN),
        std=prepared.get("std", CLIP_STD),
        train_projection=True,
        **options,
    )
    weights = _blocks(identity, text.transformer.resblocks) | _pair("out.norm", text.ln_final)
    weights |= {"token.weight": text.token_embedding.weight, "position": text.positional_embedding}
    weights |= _projection(identity, text.text_projection)
    first = text.transformer.resblocks[0]
    options = {"heads": first.attn.num_heads, "activation": _activation(identity, first)}
    source = "clip" if len(text.token_embedding.weight) == CLIP_VOCABULARY else None
    eps = _eps(identity, text.transformer)
    return image, TextTower("text", weights, identity=identity, eps=eps, tokenizer=source, **options)


def _library() -> ModuleType:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise UserError(
            "backbone open_clip needs a package; install it: pip install 'polymodal-missing-modal[open_clip]'"
        ) from error
    library: ModuleType = open_clip
    return library


def _check_config(name: str, config: dict[str, Any]) -> None:
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    plain = not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list | tuple)
    if not plain or text.get("hf_model_name") or config.get("custom_text") or "multimodal_cfg" in config:
        raise UserError(f"open_clip:{name} is no plain CLIP with a ViT; choose one such as ViT-B-16-quickgelu")


def _file(library: ModuleType, name: str, weights: Path | str) -> tuple[Path, bool | None]:
    """The file, and whether its weights want QuickGELU (None: unknown)."""
    tag = library.pretrained.get_pretrained_cfg(name, str(weights))
    if tag:
        wanted = _tag_wants_quick_gelu(library, str(weights), tag)
        _check_gelu(name, bool(library.get_model_config(name).get("quick_gelu", False)), wanted)
        try:
            return Path(library.pretrained.download_pretrained(tag)), wanted
        except Exception as error:  # network, hub, disk: whatever the library lets through
            raise UserError(f"weights {weights!r} of {name} cannot be downloaded; give a file instead") from error
    file = Path(weights).expanduser()
    if not file.is_file():
        tags = ", ".join(library.pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"weights {weights}: neither a file nor a tag of {name} (tags: {tags}); correct the path")
    beside = file.with_name("open_clip_config.json")
    if is_torchscript(file):
        if file_hash(file) not in str(_openai_urls(library)):
            raise UserError(f"{file} is a TorchScript archive that OpenAI did not publish; give its state dict instead")
        return file, True
    if beside.is_file():
        stated = json.loads(beside.read_text(encoding="utf-8"))
        return file, bool(stated.get("model_cfg", stated).get("quick_gelu", False))
    return file, True if "openai" in file.name.lower() else None


def _tag_wants_quick_gelu(library: ModuleType, tag: str, facts: dict[str, Any]) -> bool:
    """Whether weights of the library were trained with QuickGELU.

    2.30 marks those that were. 2.26 marks none; there it is told by their names, which for all of its 142 entries gives
    the later mark.
    """
    marked = library.pretrained.get_pretrained_cfg("ViT-B-32-quickgelu", "openai") or {}
    if "quick_gelu" in marked:
        return bool(facts.get("quick_gelu"))
    return tag in _QUICK_GELU_TAGS or "quickgelu" in facts.get("url", "")


def _openai_urls(library: ModuleType) -> list[str]:
    models = library.list_openai_models()
    return [library.get_pretrained_url(model, "openai") for model in models]


def _check_gelu(name: str, quick: bool, wanted: bool | None) -> None:
    """QuickGELU in the model and in training must agree: results are worse otherwise, without any error (DCP 3.8)."""
    if wanted is None or wanted == quick:
        return
    plain = name.removesuffix("-quickgelu")
    right = f"{plain}-quickgelu" if wanted else plain
    trained, has = ("with", "does not have it") if wanted else ("without", "has it")
    raise UserError(f"these weights were trained {trained} QuickGELU and {name} {has}; use open_clip:{right}")


def _refuse(identity: str, why: str, wrong: bool) -> None:
    if wrong:
        raise UserError(f"{identity}: {why}; choose a CLIP such as open_clip:ViT-B-16-quickgelu")


def _pair(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _blocks(identity: str, blocks: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        plain = all(
            isinstance(getattr(block, name, nn.Identity()), nn.Identity) for name in ("ls_1", "ls_2", "ln_attn")
        )
        plain &= all(isinstance(getattr(block.attn, name, nn.Identity()), nn.Identity) for name in ("ln_q", "ln_inner"))
        plain &= getattr(block.attn, "logit_scale", None) is None and getattr(block.attn, "head_scale", None) is None
        _refuse(identity, "its blocks are not the plain ones of CLIP", not plain)
        here = f"block.{index}"
        weights[f"{here}.attention_in.weight"] = block.attn.in_proj_weight
        weights[f"{here}.attention_in.bias"] = block.attn.in_proj_bias
        for ours, theirs in _BLOCK.items():
            weights |= _pair(f"{here}.{ours}", block.get_submodule(theirs))
    return weights


def _projection(identity: str, projection: Any) -> dict[str, Tensor]:
    if projection is None:
        return {}
    if isinstance(projection, nn.Linear):
        _refuse(identity, "its projection has a bias", projection.bias is not None)
        return {"out.projection": projection.weight.T.contiguous()}
    return {"out.projection": projection}


def _activation(identity: str, block: Any) -> str:
    gelu = block.mlp.gelu
    if type(gelu).__name__ == "QuickGELU":
        return "quick_gelu"
    _refuse(identity, f"its activation is {gelu}", not isinstance(gelu, nn.GELU) or gelu.approximate != "none")
    return "gelu"


def _eps(identity: str, module: nn.Module) -> float:
    found = {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}
    _refuse(identity, f"its norms have several epsilons {found}", len(found) != 1)
    return float(found.pop())
