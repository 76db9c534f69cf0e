"""Read weights from files that a user names, and put them into a module without a silent miss."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["fill", "load_tensors"]

_LEVELS = ("state_dict", "model")


def load_tensors(path: str | Path, safe: Iterable[Callable[..., Any]] = ()) -> dict[str, Tensor]:
    """Read a state dict on the CPU; no code from the file is run.

    Args:
        path: ``.safetensors`` or a torch file; the latter is read with ``weights_only=True``.
        safe: further types that a torch file may hold beside its tensors.

    Returns:
        Tensors by name; a ``state_dict`` or ``model`` level around them, and a ``module.`` before every name, are
        removed.

    Raises:
        UserError: the file is missing, unreadable, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist; give the path of a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(list(safe)):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if "weights_only" in str(error):  # torch explains at length how to run the code in the file
            reason = "it holds Python objects beside tensors, or is damaged"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read weights from {path}: {reason}; save model.state_dict() anew") from error
    for level in _LEVELS:
        if isinstance(loaded, dict) and isinstance(loaded.get(level), dict):
            loaded = loaded[level]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} does not hold a plain dictionary of tensors; save model.state_dict()")
    if all(name.startswith("module.") for name in loaded):
        return {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def fill(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, what: str, *, skip: tuple[str, ...] = ()
) -> None:
    """Load all tensors of a module; nothing may be missing, left over, or of another shape.

    Args:
        module: what is filled.
        tensors: state dict.
        source: where it comes from, for the message.
        what: what the file should be, for the message, e.g. ``"a torchvision resnet50"``.
        skip: beginnings of names that are left out of the file, such as a classifier's.

    Raises:
        UserError: the first names and shapes that do not fit.
    """
    own = module.state_dict()
    wanted = {name for name in own if not name.startswith(skip)} if skip else set(own)
    given = {name: value for name, value in tensors.items() if not (skip and name.startswith(skip))}
    # Counters of batches matter only for a norm without momentum, and old files lack them.
    missing = [n for n in own if n in wanted and n not in given and not n.endswith("num_batches_tracked")]
    extra = [name for name in given if name not in own]
    wrong = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in given.items()
        if name in own and value.shape != own[name].shape
    ]
    found = {"missing": missing, "unknown": extra, "of another shape": wrong}
    problems = [f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in found.items() if names]
    if problems:
        raise UserError(f"{source} is not {what}: {'; '.join(problems)}; give the file of that network")
    module.load_state_dict(given, strict=False)
