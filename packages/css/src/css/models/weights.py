"""Put weights into a module without a silent miss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polymodal.errors import UserError
from torch import Tensor, nn

__all__ = ["fill"]


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
