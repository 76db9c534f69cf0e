"""A trained model from its run folder: configuration, tokenizer and weights. Importing this module loads no torch."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.devices import pick_device
from polymodal.errors import UserError

from slt.data import READERS
from slt.data.base import SLTData
from slt.eval_settings import RunData
from slt.settings import SLTConfig

if TYPE_CHECKING:
    from slt.module import SLTModule

__all__ = ["Trained", "load_trained", "locate", "read_run_config"]

TASK = "slt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained model and where it came from.

    Args:
        folder: the run folder.
        file: the checkpoint in it.
        config: the run's configuration, with other data where some were given.
        manifest: the run's manifest.
        module: model in evaluation mode, on its device; ``module.tokenizer`` is the run's.
    """

    folder: Path
    file: Path
    config: SLTConfig
    manifest: dict[str, Any]
    module: SLTModule


def locate(path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Run folder, checkpoint and manifest that a user means by a run folder or a checkpoint file.

    A folder means its ``best.ckpt``, or ``last.ckpt`` in a run that was not validated yet.

    Raises:
        UserError: nothing there, no run folder around it, a run of another task, or no training run.
    """
    from polymodal.run import read_manifest

    path = path.expanduser()
    if path.is_file():
        folder = next((p for p in (path.parent.parent, path.parent) if (p / "config.yaml").is_file()), None)
        if folder is None:
            raise UserError(
                f"{path}: no config.yaml in {path.parent.parent} or {path.parent}; keep checkpoints in their run "
                "folder (config.yaml, manifest.json, tokenizer/, checkpoints/)"
            )
    elif path.is_dir():
        folder = path
    else:
        raise UserError(f"{path} does not exist; give a run folder of slt-train or a checkpoint in one")
    manifest = read_manifest(folder)
    if manifest.get("task") != TASK:
        raise UserError(f"{folder} is a run of task {manifest.get('task')!r}; give a run folder of slt-train")
    if manifest.get("job_type") != "train":
        trained = manifest.get("checkpoint")
        hint = f"give the run it evaluated: {trained}" if trained else "give a run folder of slt-train"
        raise UserError(f"{folder} is an evaluation, it holds no model; {hint}")
    if path.is_file():
        return folder, path, manifest
    for name in ("best", "last"):
        file = folder / "checkpoints" / f"{name}.ckpt"
        if file.is_file():
            if name == "last":
                _log.info("%s has no best.ckpt (no validation yet); using last.ckpt", folder)
            return folder, file, manifest
    raise UserError(f"{folder}/checkpoints has neither best.ckpt nor last.ckpt; the run stopped before its first epoch")


def read_run_config(folder: Path) -> SLTConfig:
    """The configuration of a training run.

    Raises:
        UserError: ``config.yaml`` is missing, damaged, or has options that this version does not know.
    """
    from polymodal.cli import parse_config

    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file} is missing; copy the whole run folder")
    try:
        config = parse_config(SLTConfig, ["--config", str(file)], presets="slt", choices={"data": READERS})
    except UserError as error:
        raise UserError(f"{file}: {error}; was the run written by another version of polymodal-slt?") from error
    assert isinstance(config, SLTConfig)  # None only with --print_config
    return config


def load_trained(path: Path, data: SLTData | None = None, device: str = "auto") -> Trained:
    """Rebuild a trained model; its weights are read without running code from the file.

    Arithmetic is float32 whatever the training precision was, so that the result does not depend on the device.

    Args:
        path: run folder or checkpoint file.
        data: reader in place of the run's, or :class:`RunData`.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UserError: see :func:`locate` and :func:`read_run_config`; a damaged checkpoint, one of stage 1, of another
            vocabulary or of another network; data that the model cannot look at; no such device.
    """
    folder, file, manifest = locate(path)
    config = read_run_config(folder)
    if isinstance(data, RunData):
        data = data.resolve(config.data)
    if data is not None:
        _check_modality(config, data, folder)
        config = _with_data(config, data)

    from polymodal.callbacks import load_checkpoint  # torch from here on: mistakes above are told at once

    from slt.module import CHECKPOINT_VERSION, check_vocabulary
    from slt.tokenizer import Tokenizer

    target = pick_device(device)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    checkpoint = load_checkpoint(file)
    stored = checkpoint.get(TASK)
    if not isinstance(stored, dict):
        raise UserError(f"{file} is not a checkpoint of slt-train")
    if stored.get("schema_version", 1) > CHECKPOINT_VERSION:
        raise UserError(f"{file} was written by a newer version; update polymodal-slt")
    check_vocabulary(checkpoint, tokenizer, str(file))
    if stored.get("stage") != 2:
        raise UserError(
            f"{file} is a checkpoint of stage 1 (alignment), which does not translate; train stage 2: "
            f"slt-train --config {folder} --stage 2 --stage1_checkpoint {file}"
        )
    module = _build(config, tokenizer, stored.get("max_new_tokens", 0))
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(f"{file} does not fit {folder / 'config.yaml'}: {reason[:200]}; mixed run folders?") from error
    module.eval().to(target)
    return Trained(folder, file, config, manifest, module)


def _check_modality(config: SLTConfig, data: SLTData, folder: Path) -> None:
    if data.modality != config.data.modality:
        raise UserError(
            f"{folder} was trained on {config.data.modality} ({config.data.name}), --data {data.name} gives "
            f"{data.modality}; choose a reader of the same kind"
        )


def _with_data(config: SLTConfig, data: SLTData) -> SLTConfig:
    """Other data, or the run's; a cache of decoded frames only where it is there and of these very data."""
    loader = config.loader
    if loader.frame_cache is not None and (data != config.data or not loader.frame_cache.is_dir()):
        _log.info("frames are decoded anew: the frame cache %s is missing or of other data", loader.frame_cache)
        loader = dataclasses.replace(loader, frame_cache=None)
    return dataclasses.replace(config, data=data, loader=loader)


def _build(config: SLTConfig, tokenizer: Any, max_new_tokens: int) -> SLTModule:
    """The network without the files that its training started from: the checkpoint has every weight."""
    from slt.train import build_module

    model = dataclasses.replace(config.model, pretrained_text=None, pretrained_translator=None, backbone_weights=None)
    decode = dataclasses.replace(config.decode, max_new_tokens=max_new_tokens or config.decode.max_new_tokens)
    return build_module(dataclasses.replace(config, model=model, decode=decode), tokenizer, stage=2)
