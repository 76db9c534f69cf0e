"""The frozen encoders that a configuration asks for: published ones by name, small ones made for the data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from polymodal.paths import cache_dir
from torch import Tensor

from missing_modal.data.base import MMData, Sample
from missing_modal.inputs import ByteTokens, input_transforms
from missing_modal.settings import BackboneConfig

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower
    from missing_modal.backbones.transformer import TransformerTower

__all__ = ["build_towers", "small_towers", "train_small"]

log = logging.getLogger(__name__)
_PAIRS = 16_000
"""most complete rows that small encoders are trained on: 250 batches of 64"""
_IMAGE_SIDE, _PATCHES_A_SIDE, _MELS, _COLUMNS, _CONTEXT = 32, 4, 32, 16, 77


def build_towers(config: BackboneConfig, reader: MMData, *, train: bool = True) -> tuple[Tower, ...]:
    """Frozen encoders in the order of the reader's modalities, on the CPU.

    Args:
        config: which ones; ``small`` makes them for the data, any other name is ``backbones.load``'s, with small ones
            beside it for modalities that it has not (audio, tabular).
        reader: its modalities and kinds, and for small encoders the shapes of its samples.
        train: false leaves small encoders with their random weights (to look at what would be trained).

    Raises:
        UserError: an unknown name, weights that are missing or do not fit, a modality without an encoder.
    """
    if config.name == "small":
        if config.weights is not None:
            from missing_modal.backbones.weights import read_towers

            return _in_order(read_towers(config.weights)[0], reader)
        towers = small_towers(config, reader, reader.modalities)
        if train:
            return train_small(config, reader, towers)
        _check_pairs(config, reader)
        return towers
    from missing_modal.backbones.load import load_towers

    if config.name.startswith("open_clip:") and config.weights is None:
        raise UserError(
            f"backbone {config.name} needs weights; give --backbone.weights FILE (open_clip's), or --backbone small "
            "for encoders that are trained on your rows"
        )
    loaded = load_towers(config.name, config.weights, config.seed, config.context or None)
    known = {tower.spec.name for tower in loaded}
    # Encoders of modalities that the data lacks stay away; those that the published model lacks are small and random.
    others = [name for name in reader.modalities if name not in known]
    refused = [name for name in others if reader.kinds[name] in ("image", "text")]
    if refused:
        raise UserError(
            f"backbone {config.name} encodes {', '.join(sorted(known))}, the data has {', '.join(refused)}; name the "
            "modalities image and text, or use --backbone small"
        )
    if others:
        log.warning("%s: small encoders with random weights, as %s has none", ", ".join(others), config.name)
    return _in_order((*loaded, *small_towers(config, reader, others)), reader)


def _in_order(towers: Sequence[Tower], reader: MMData) -> tuple[Tower, ...]:
    by_name = {tower.spec.name: tower for tower in towers}
    lacking = [name for name in reader.modalities if name not in by_name]
    if lacking:
        raise UserError(f"no encoder for {', '.join(lacking)} (there are: {', '.join(by_name)}); give other weights")
    return tuple(by_name[name] for name in reader.modalities)


def small_towers(config: BackboneConfig, reader: MMData, names: Sequence[str]) -> tuple[TransformerTower, ...]:
    """Small encoders with random weights, of the shapes that the samples have.

    Raises:
        UserError: a modality that no training sample has.
    """
    return tuple(_small(config, reader.kinds[name], name, _values(reader, name)) for name in names)


def _values(reader: MMData, name: str) -> list[Any]:
    """What there is of a modality in the training samples."""
    found = [sample.inputs[name] for sample in reader.samples("train") if sample.inputs.get(name) is not None]
    if not found:
        raise UserError(f"{reader.name}: no training sample has {name}; leave it out of the modalities")
    return found


def _small(config: BackboneConfig, kind: str, name: str, values: list[Any]) -> TransformerTower:
    from missing_modal.backbones import small

    sizes: dict[str, Any] = {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "features": config.features,
        "seed": config.seed,
        "name": name,
    }
    first = values[0]
    shape = tuple(getattr(first, "shape", ()))
    if kind == "text":
        if shape:  # ids already; the end of text is the largest
            return small.small_text(max(int(value.max()) for value in values) + 1, shape[-1], **sizes)
        longest = max(len(value.encode("utf-8", "replace")) for value in values)
        context = max(3, min(config.context or _CONTEXT, longest + 2))
        tower = small.small_text(ByteTokens.vocabulary, context, **sizes)
        tower.tokenizer = ByteTokens(context)
        return tower
    if kind == "tabular":
        from missing_modal.data.arrays import numbers

        length = len(numbers(first))
        return small.small_tabular(length, -(-length // 16), **sizes)
    if kind == "audio":
        if len(shape) == 2:
            return small.small_audio(shape[0], shape[1], (_divisor(shape[0]), _divisor(shape[1])), **sizes)
        frames = max(1, round(100 * config.seconds) // _COLUMNS) * _COLUMNS
        return small.small_audio(_MELS, frames, (_MELS // 2, _COLUMNS), **sizes)
    if len(shape) == 2:
        return small.small_patches(shape[0], shape[1], **sizes)
    if len(shape) == 3 and "float" in str(first.dtype):  # else a picture (H, W, 3), which will be resized
        return small.small_image(shape[1], max(1, shape[1] // _PATCHES_A_SIDE), shape[0], **sizes)
    return small.small_image(_IMAGE_SIDE, _IMAGE_SIDE // _PATCHES_A_SIDE, 3, **sizes)


def _divisor(length: int) -> int:
    """The largest divisor up to 16: side of a patch."""
    return next(side for side in range(min(16, length), 0, -1) if length % side == 0)


def train_small(
    config: BackboneConfig, reader: MMData, towers: Sequence[TransformerTower], cache: Path | None = None
) -> tuple[TransformerTower, ...]:
    """Small encoders after contrastive training on complete rows, from the cache where they were trained before.

    What is trained on is told by ``reader.pairs(count)`` where the reader has it (fresh samples of a world), else it is
    the training samples that really have all modalities, without their labels.

    Args:
        config: number of steps and seed.
        reader: the data.
        towers: with random weights.
        cache: file; by default in the user's cache (``$POLYMODAL_CACHE``).

    Raises:
        UserError: too few complete rows.
    """
    if not config.steps or len(towers) < 2:
        return tuple(towers)
    from missing_modal.backbones.pretrain import pretrain

    _check_pairs(config, reader)
    inputs = _pairs(reader, towers)
    rows = len(next(iter(inputs.values())))
    settings = {**asdict(config), "weights": None, "dtype": None}
    key = hashlib.sha256(json.dumps([settings, reader.describe()], sort_keys=True, default=str).encode()).hexdigest()
    path = cache or cache_dir("missing_modal", "towers") / f"{reader.name}-{key[:16]}.safetensors"
    if not path.is_file():
        log.info("training the small encoders for %d steps, once; kept in %s", config.steps, path)
    trained = pretrain(towers, inputs, steps=config.steps, batch_size=min(64, rows), seed=config.seed, cache=path)
    for before, after in zip(towers, trained, strict=True):
        if "tokenizer" in vars(before):
            vars(after)["tokenizer"] = vars(before)["tokenizer"]  # a file of weights has none
    return trained


def _pairs(reader: MMData, towers: Sequence[Tower]) -> dict[str, Tensor]:
    """Per modality (N, ...): row i of all of them one complete sample."""
    make = getattr(reader, "pairs", None)
    if make is not None:
        found: Mapping[str, Any] = make(_PAIRS)
        return {name: torch.as_tensor(value) for name, value in found.items()}
    transforms = input_transforms(towers, reader.kinds)
    complete = _complete(reader)[:_PAIRS]
    return {
        name: torch.stack([transforms[name](sample.inputs[name]) for sample in complete]) for name in reader.modalities
    }


def _complete(reader: MMData) -> list[Sample]:
    """Training samples that really have all modalities."""
    names = reader.modalities
    return [s for s in reader.samples("train") if all(s.inputs.get(name) is not None for name in names)]


def _check_pairs(config: BackboneConfig, reader: MMData) -> None:
    """Whether there is something to train small encoders on, told before anything is decoded.

    Raises:
        UserError: fewer than two complete rows.
    """
    if not config.steps or len(reader.modalities) < 2 or hasattr(reader, "pairs"):
        return
    rows = len(_complete(reader))
    if rows < 2:
        raise UserError(f"{reader.name}: {rows} training samples have all modalities; expected 2 (or backbone.steps=0)")
