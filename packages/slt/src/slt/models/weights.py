"""Weights and configuration from a local model folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.weights import load_tensors
from torch import Tensor

__all__ = ["load_folder", "read_config"]


def load_folder(folder: str | Path) -> dict[str, Tensor]:
    """Weights of a transformers model folder: one file or several with an index.

    Raises:
        UserError: no weights file in the folder, a damaged index, or a file of weights that cannot be read.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return load_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            by_tensor = _read_object(index).get("weight_map")
            if not isinstance(by_tensor, dict):
                raise UserError(f"{index} has no weight_map (tensor -> file); fetch the checkpoint again")
            files = sorted(set(by_tensor.values()))
            if any(Path(part).name != part for part in files):
                raise UserError(f"{index} names files outside its folder; fetch the checkpoint again")
            return {key: value for part in files for key, value in load_tensors(folder / part).items()}
    raise UserError(f"no model.safetensors or pytorch_model.bin in {folder}; give the folder of an mBART checkpoint")


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    return _read_object(Path(folder) / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the folder of an mBART checkpoint") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch the checkpoint again")
    return value
