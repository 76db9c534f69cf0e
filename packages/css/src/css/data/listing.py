"""Shared by the readers of folders: what a folder holds, and the share held out for validation. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from polymodal.errors import UserError
from polymodal.paths import require_dir

from css.data.base import Item
from css.data.scenarios import held_out

__all__ = ["IMAGE_SUFFIXES", "check_share", "names_in", "need", "with_share"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")


def names_in(folder: Path, what: str, remedy: str) -> frozenset[str]:
    """Names in a folder, one look for all: asking for each of 20,000 files is slow on a network drive.

    Raises:
        UserError: no such folder.
    """
    return frozenset(os.listdir(require_dir(folder, what, remedy)))  # noqa: PTH208 (names only)


def need(path: Path, what: str, remedy: str, known: dict[Path, frozenset[str]]) -> None:
    """Whether a file is there.

    Args:
        path: the file.
        what: where it is named, for the message.
        remedy: what to do.
        known: folders looked at so far, filled in.

    Raises:
        UserError: it is missing.
    """
    if path.parent not in known:
        known[path.parent] = names_in(path.parent, what, remedy)
    if path.name not in known[path.parent]:
        raise UserError(f"{what}: {path} is missing; {remedy}")


def check_share(share: float) -> None:
    """Whether a share is one.

    Raises:
        UserError: not 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.val_share={share}; expected 0 <= val_share < 1, the share of training pictures held out")


def with_share(train: Sequence[Item], share: float, split: str) -> list[Item]:
    """Training pictures without, or validation pictures with, what is held out.

    Args:
        train: all training pictures.
        share: held-out share, 0..1.
        split: ``train`` or ``val``.
    """
    return [item for item in train if held_out(item.id, share) == (split == "val")]
