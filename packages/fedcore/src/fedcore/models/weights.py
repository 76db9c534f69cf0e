"""Tensors of a local file, which is not trusted."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.paths import require_files
from safetensors import SafetensorError
from torch import Tensor

__all__ = ["load_tensors"]

_FAULTS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or one of torch; no code of the file is run.

    Raises:
        UserError: missing, broken, or no tensors by name.
    """
    path = Path(path).expanduser()
    require_files(path.parent, [path.name], "weights", "give the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        # torch explains at length how to run the code in the file
        refused = "weights_only" in str(error)
        reason = "it holds objects beside tensors" if refused else (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"weights {path} cannot be read ({reason}); save model.state_dict() again") from error
    for level in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(level), dict):
            loaded = loaded[level]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"weights {path} hold no tensors by name; save model.state_dict()")
    return dict(loaded)
