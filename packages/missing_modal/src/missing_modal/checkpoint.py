"""A model from whatever mm-train left behind: run folder, Lightning checkpoint, or exported file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from missing_modal.calibration import Temperatures
from missing_modal.export import Model, check_towers, load, read
from missing_modal.fused import build_classifier
from missing_modal.job import CALIBRATION_FILE, CALIBRATION_VERSION, TOWERS_FILE
from missing_modal.methods import METHODS
from missing_modal.module import META_VERSION, MMModule
from missing_modal.settings import BackboneConfig, OptimConfig

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower
    from missing_modal.eval_settings import BackboneChoice

__all__ = ["Trained", "find_towers", "load_trained", "weights_file"]


@dataclass
class Trained:
    """A trained model.

    Args:
        model: in eval mode, on the CPU.
        meta: what the file says of itself: method, options, modalities, task, class names, kinds, encoders.
        temperatures: by pattern; None where it was not calibrated.
        calibrated_on: validation samples that they were fitted on.
        path: the file it came from.
    """

    model: Model
    meta: dict[str, Any]
    temperatures: Temperatures | None
    calibrated_on: int
    path: Path

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the bits of a pattern."""
        return self.model.context.modalities

    def module(self, rows: Mapping[str, str] | None = None) -> MMModule:
        """The model as ``predict_records`` takes it.

        Args:
            rows: sample id -> row, where the probabilities of a row's samples are averaged.
        """
        return MMModule(self.model, OptimConfig(), task=self.meta["task"], meta=self.meta, rows=rows)


def load_trained(path: Path, backbone: BackboneChoice | None = None) -> Trained:
    """Read a model with its encoders.

    Args:
        path: run folder (its best weights, else the last), a ``.ckpt`` file, or an exported ``.safetensors`` file.
        backbone: encoders that are elsewhere than the training run had them.

    Raises:
        UserError: nothing there, a damaged or foreign file, one of a newer version, or other encoders.
    """
    file = weights_file(Path(path).expanduser())
    if file.suffix != ".ckpt":
        about, _ = read(file)
        loaded = load(file, find_towers(about, file, backbone))
        held = loaded.temperatures if about.get("temperatures") is not None else None
        return Trained(loaded.model, about, held, int(about.get("calibrated_on") or 0), file)
    from polymodal.callbacks import load_checkpoint

    checkpoint = load_checkpoint(file)
    meta = checkpoint.get("missing_modal")
    if not meta:
        raise UserError(f"{file} is no checkpoint of mm-train; give a run folder or a file of its checkpoints/")
    if meta.get("schema_version", 1) > META_VERSION:
        raise UserError(
            f"{file}: schema version {meta['schema_version']} is newer than {META_VERSION}; update missing_modal"
        )
    towers = find_towers(meta, file, backbone)
    check_towers(meta, towers, file)
    model = _model_of(meta, towers, checkpoint["state_dict"], file)
    temperatures, rows = _calibration(_run_folder(file), model.context.modalities)
    return Trained(model, meta, temperatures, rows, file)


def weights_file(path: Path) -> Path:
    """The file with the weights that a path means.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    for name in ("checkpoints/best.ckpt", "checkpoints/stage0.ckpt", "checkpoints/last.ckpt", "baked.safetensors"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: no checkpoint there; give a run folder of mm-train, or an exported .safetensors file")


def _run_folder(file: Path) -> Path:
    """The run folder that a file lies in: files are in checkpoints/ and export/; else its own folder."""
    return file.parent.parent if file.parent.name in ("checkpoints", "export") else file.parent


def _model_of(meta: Mapping[str, Any], towers: Sequence[Tower], state: Mapping[str, Any], file: Path) -> Model:
    method = METHODS.create(meta["method"], **meta["method_options"])
    model = build_classifier(towers, method, len(meta["class_names"]))
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    if any(name.startswith("head.") and value.dtype == torch.float64 for name, value in weights.items()):
        model.double()  # trained with precision 64-true, encoders and all
        for tower in towers:
            tower.to("cpu", torch.float64)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: weights do not fit the method they name; take another file ({what})") from error
    return model.eval()


def _calibration(folder: Path, modalities: Sequence[str]) -> tuple[Temperatures | None, int]:
    """Temperatures beside a run's weights, and on how many samples they were fitted."""
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return None, 0
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        version, rows, values = stored["schema_version"], int(stored["rows"]), stored["temperatures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to go without calibration") from error
    if version > CALIBRATION_VERSION:
        raise UserError(f"{file}: schema version {version} is newer than {CALIBRATION_VERSION}; update missing_modal")
    return Temperatures.from_json(values, modalities), rows


def find_towers(meta: Mapping[str, Any], file: Path, backbone: BackboneChoice | None = None) -> tuple[Tower, ...]:
    """The encoders that a model names: small ones from the run folder, published ones from where the run had them.

    Args:
        meta: what the model says of itself.
        file: its file.
        backbone: name or weights that take the place of the run's.

    Returns:
        One a modality, on the CPU in the number format they were read in.

    Raises:
        UserError: encoders that cannot be found or read.
    """
    from missing_modal.backbones.weights import read_towers

    known = {field.name for field in dataclasses.fields(BackboneConfig)}
    stored = {key: value for key, value in (meta.get("backbone_config") or {}).items() if key in known}
    given = {k: v for k, v in dataclasses.asdict(backbone).items() if v is not None} if backbone else {}
    if "name" in given and given["name"] != stored.get("name"):
        stored["weights"] = None  # those of another model
    config = BackboneConfig(**{**stored, **given})
    found: dict[str, Tower] = {}
    if config.name != "small":
        from missing_modal.backbones.load import load_towers

        loaded = load_towers(config.name, config.weights, config.seed, config.context or None)
        found = {tower.spec.name: tower for tower in loaded}
    beside = _run_folder(file) / TOWERS_FILE
    small = config.weights if config.name == "small" and config.weights is not None else beside
    if small.is_file() and any(name not in found for name in meta["modalities"]):
        found = {tower.spec.name: tower for tower in read_towers(small)[0]} | found
    rest = [name for name in meta["modalities"] if name not in found]
    if rest:
        raise UserError(
            f"{file}: the small encoders of {', '.join(rest)} are not in {small}; give --backbone.weights FILE, the "
            f"{TOWERS_FILE} of its run, or --backbone NAME and its weights"
        )
    towers = tuple(found[name] for name in meta["modalities"])
    for tower in towers:
        _give_tokenizer(tower, (meta.get("kinds") or {}).get(tower.spec.name, ""))
    return towers


def _give_tokenizer(tower: Tower, kind: str) -> None:
    """Small text encoders read bytes, but their file has no tokenizer."""
    from missing_modal.backbones.text import TextTower
    from missing_modal.inputs import ByteTokens

    bare = kind == "text" and isinstance(tower, TextTower) and tower.tokenizer is None
    if bare and len(tower.state()["token.weight"]) == ByteTokens.vocabulary:
        assert isinstance(tower, TextTower)  # as said by ``bare``
        tower.tokenizer = ByteTokens(tower.context)
