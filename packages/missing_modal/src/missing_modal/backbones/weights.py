"""Files of weights: reading those of others without running code from them, keeping towers in one of our own."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.files import atomic_write
from torch import Tensor

from missing_modal.backbones.audio import AudioTower
from missing_modal.backbones.base import Tower
from missing_modal.backbones.image import ImageTower, PatchTower
from missing_modal.backbones.tabular import TabularTower
from missing_modal.backbones.text import TextTower
from missing_modal.backbones.transformer import TransformerTower

__all__ = ["file_hash", "is_torchscript", "read_towers", "read_weights", "save_towers"]

VERSION = 1
_KINDS: dict[str, type[TransformerTower]] = {
    tower.kind: tower for tower in (ImageTower, PatchTower, TextTower, AudioTower, TabularTower)
}


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is an archive of compiled code (as OpenAI published its weights)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as bundle:
        return any(name.endswith("/constants.pkl") for name in bundle.namelist())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, a state dict, or an archive of TorchScript (check its origin before).

    Raises:
        UserError: missing, broken, or no mapping from names to tensors.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file; correct the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        elif is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out; these files stay
                found = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise nearly anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"weights {path}: cannot be read ({reason}); download the file again") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"weights {path}: no mapping from names to tensors; give a state dict")
    return {key.removeprefix("module."): value for key, value in found.items()}


def save_towers(path: Path, towers: Sequence[TransformerTower], about: Mapping[str, Any] | None = None) -> None:
    """Write towers (small ones, trained on the spot) into one safetensors file; its folder must exist.

    Args:
        path: file to write, atomically.
        towers: in the order of the modalities.
        about: plain values kept with them, such as how they were trained.
    """
    from safetensors.torch import save

    tensors = {
        f"{tower.spec.name}/{key}": value.detach().cpu().contiguous()
        for tower in towers
        for key, value in tower.state().items()
    }
    configs = [{"kind": tower.kind, **tower.config()} for tower in towers]
    meta = {"format": "missing_modal.towers", "version": VERSION, "towers": configs, "about": dict(about or {})}
    content = save(tensors, {"missing_modal": json.dumps(meta)})
    atomic_write(path, lambda handle: handle.write(content))


def read_towers(path: Path) -> tuple[tuple[Tower, ...], dict[str, Any]]:
    """Towers of a file of ``save_towers``, and what was kept about them.

    Raises:
        UserError: missing, broken, of another kind, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"towers {path}: no such file; correct the path")
    try:
        with safe_open(path, "pt") as handle:
            meta = json.loads((handle.metadata() or {}).get("missing_modal", "{}"))
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"towers {path}: cannot be read ({str(error)[:120]}); make the file again") from error
    if meta.get("format") != "missing_modal.towers":
        raise UserError(f"towers {path}: not a file of towers; give one that this package has written")
    if meta["version"] > VERSION:
        raise UserError(f"towers {path}: written by a newer version of this package; update it")
    towers = []
    for config in meta["towers"]:
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        kind, name = config.pop("kind"), config.pop("name")
        held = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        towers.append(_KINDS[kind](name, held, **config))
    return tuple(towers), meta["about"]
