"""Weights from files that a user names: safetensors, or torch files without code in them. Imports torch."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polymodal.errors import UserError

__all__ = ["has_weights", "load_tensors", "quiet_transformers"]

_LEVELS = ("state_dict", "model")
_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_FAULTS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError)


def load_tensors(
    path: str | Path,
    safe: Iterable[Callable[..., Any]] = (),
    strip: str = "module.",
    remedy: str = "save model.state_dict() anew",
) -> dict[str, Tensor]:
    """Read a state dict on the CPU; no code from the file is run.

    Args:
        path: ``.safetensors`` or a torch file; the latter is read with ``weights_only=True``.
        safe: further types that a torch file may hold beside its tensors.
        strip: removed before every name where all have it, as those of a model that ran in parallel.
        remedy: what the user is to do about a broken file.

    Returns:
        Tensors by name; a ``state_dict`` or ``model`` level around them is removed.

    Raises:
        UserError: the file is missing, unreadable, or holds something else than tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist; give the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(list(safe)):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        if "weights_only" in str(error):  # torch explains at length how to run the code in the file
            reason = "it holds Python objects beside tensors, or is damaged"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read weights from {path}: {reason}; {remedy}") from error
    for level in _LEVELS:
        if isinstance(loaded, dict) and isinstance(loaded.get(level), dict):
            loaded = loaded[level]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} does not hold a plain dictionary of tensors; {remedy}")
    shared = strip if all(name.startswith(strip) for name in loaded) else ""
    return {name.removeprefix(shared): value for name, value in loaded.items()}


def has_weights(folder: Path) -> bool:
    """Whether a model folder of transformers holds weights, in one file or several."""
    return any((folder / name).is_file() for name in _FOLDER)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While transformers loads a model, no progress bar and no report of its: misses are errors of ours."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
