"""Where commands compute that take ``--device``."""

from __future__ import annotations

from collections.abc import Sequence

from polymodal.errors import UserError

__all__ = ["pick_device"]


def pick_device(name: str, auto: Sequence[str] = ("cuda", "mps", "cpu")) -> str:
    """The device to compute on.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``mps``, or one of several, such as ``cuda:1``.
        auto: what ``auto`` takes, the first that is there; ``cpu`` is always there.

    Raises:
        UserError: torch does not find that device.
    """
    import torch

    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in auto if found[device])
    if not found.get(name.partition(":")[0], False):
        raise UserError(f"--device {name}: torch finds none here; use auto or cpu")
    return name
