"""Small towers with random weights: for tests, and to be trained on the spot and then frozen (pretrain.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from missing_modal.backbones.audio import AudioTower
from missing_modal.backbones.image import ImageTower, PatchTower
from missing_modal.backbones.tabular import TabularTower
from missing_modal.backbones.text import TextTower
from missing_modal.draws import Draws

__all__ = ["small_audio", "small_image", "small_patches", "small_tabular", "small_text"]


def _weights(draw: Draws, width: int, depth: int, features: int | None) -> dict[str, Tensor]:
    """Blocks and output with the standard deviations of CLIP's text transformer, norms 1/0, biases 0."""
    weights: dict[str, Tensor] = {}
    shrink = (2 * depth) ** -0.5
    for index in range(depth):
        here = f"block.{index}"
        shapes = {
            "attention_in": (3 * width, width, width**-0.5),
            "attention_out": (width, width, width**-0.5 * shrink),
            "mlp_in": (4 * width, width, (2 * width) ** -0.5),
            "mlp_out": (width, 4 * width, width**-0.5 * shrink),
        }
        for name, (rows, columns, std) in shapes.items():
            weights[f"{here}.{name}.weight"] = draw.normal(f"{here}.{name}", rows, columns, std=std)
            weights[f"{here}.{name}.bias"] = torch.zeros(rows)
        for name in ("norm_1", "norm_2"):
            weights[f"{here}.{name}.weight"], weights[f"{here}.{name}.bias"] = torch.ones(width), torch.zeros(width)
    weights["out.norm.weight"], weights["out.norm.bias"] = torch.ones(width), torch.zeros(width)
    if features is not None:
        weights["out.projection"] = draw.normal("projection", width, features, std=width**-0.5)
    return weights


def _positions(draw: Draws, width: int, tokens: int) -> dict[str, Tensor]:
    return {
        "class_embedding": draw.normal("class", width, std=width**-0.5),
        "position": draw.normal("position", tokens + 1, width, std=width**-0.5),
    }


def _first_norm(width: int) -> dict[str, Tensor]:
    return {"norm_pre.weight": torch.ones(width), "norm_pre.bias": torch.zeros(width)}


def small_image(
    size: int = 32,
    patch: int = 8,
    channels: int = 3,
    *,
    width: int = 32,
    depth: int = 3,
    heads: int = 2,
    features: int | None = 16,
    seed: int = 0,
    name: str = "image",
) -> ImageTower:
    """A small ViT on (b, channels, size, size) pixels in patches of ``patch`` pixels.

    Args:
        size: of the images, in pixels.
        patch: in pixels, a divisor of ``size``.
        channels: of the images.
        width: d.
        depth: blocks.
        heads: H, a divisor of d.
        features: e (None: no projection, e = d).
        seed: of the weights.
        name: modality.
    """
    draw = Draws(seed, "small", name)
    weights = (
        _weights(draw, width, depth, features) | _positions(draw, width, (size // patch) ** 2) | _first_norm(width)
    )
    weights["patch.weight"] = draw.normal(
        "patch", width, channels, patch, patch, std=(channels * patch * patch) ** -0.5
    )
    return ImageTower(
        name,
        weights,
        heads=heads,
        identity=f"small:{name}-{width}x{depth}",
        size=(size, size),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        train_projection=True,
    )


def small_patches(
    patches: int = 8,
    channels: int = 4,
    *,
    width: int = 32,
    depth: int = 3,
    heads: int = 2,
    features: int | None = 16,
    seed: int = 0,
    name: str = "image",
) -> PatchTower:
    """A small ViT on (b, patches, channels); the rest as in ``small_image``."""
    draw = Draws(seed, "small", name)
    weights = _weights(draw, width, depth, features) | _positions(draw, width, patches) | _first_norm(width)
    weights["patch.weight"] = draw.normal("patch", width, channels, std=channels**-0.5)
    identity = f"small:{name}-{width}x{depth}"
    return PatchTower(name, weights, heads=heads, identity=identity, train_projection=True)


def small_text(
    vocabulary: int = 32,
    context: int = 5,
    *,
    width: int = 32,
    depth: int = 3,
    heads: int = 2,
    features: int | None = 16,
    seed: int = 0,
    name: str = "text",
    start: int | None = None,
) -> TextTower:
    """A small causal text transformer; its end of text is the last id of the vocabulary.

    Args:
        vocabulary: V, number of ids.
        context: S, positions.
        width: d.
        depth: blocks.
        heads: H, a divisor of d.
        features: e (None: no projection, e = d).
        seed: of the weights.
        name: modality.
        start: id of the start of text, for placeholders (default: V - 2).
    """
    draw = Draws(seed, "small", name)
    weights = _weights(draw, width, depth, features)
    weights["token.weight"] = draw.normal("token", vocabulary, width, std=width**-0.5)
    weights["position"] = draw.normal("position", context, width, std=width**-0.5 / 2)
    return TextTower(name, weights, heads=heads, identity=f"small:{name}-{width}x{depth}", start=start)


def small_audio(
    mels: int = 32,
    frames: int = 64,
    patch: tuple[int, int] = (16, 16),
    *,
    width: int = 32,
    depth: int = 3,
    heads: int = 2,
    features: int | None = 16,
    seed: int = 0,
    name: str = "audio",
) -> AudioTower:
    """A small ViT on spectrograms of ``mels`` bands and up to ``frames`` frames, in patches (bands, frames)."""
    draw = Draws(seed, "small", name)
    tokens = (mels // patch[0]) * (frames // patch[1])
    weights = _weights(draw, width, depth, features) | _positions(draw, width, tokens) | _first_norm(width)
    weights["patch.weight"] = draw.normal("patch", width, 1, *patch, std=(patch[0] * patch[1]) ** -0.5)
    identity = f"small:{name}-{width}x{depth}"
    return AudioTower(name, weights, heads=heads, identity=identity, mels=mels, train_projection=True)


def small_tabular(
    inputs: int = 10,
    group: int = 1,
    *,
    width: int = 32,
    depth: int = 3,
    heads: int = 2,
    features: int | None = 16,
    seed: int = 0,
    name: str = "tabular",
) -> TabularTower:
    """A small transformer on rows of ``inputs`` numbers, ``group`` of them a token."""
    draw = Draws(seed, "small", name)
    tokens = math.ceil(inputs / group)
    weights: dict[str, Tensor] = _weights(draw, width, depth, features)
    weights["class_embedding"] = draw.normal("class", width, std=width**-0.5)
    weights["token.weight"] = draw.normal("token", tokens, group, width, std=(group * width) ** -0.5)
    weights["token.bias"] = draw.normal("token.bias", tokens, width, std=width**-0.5)
    identity = f"small:{name}-{width}x{depth}"
    return TabularTower(name, weights, heads=heads, identity=identity, inputs=inputs, train_projection=True)
