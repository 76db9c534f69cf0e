"""Frame folders: which pictures belong to a clip, and decoding some of them into one array."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from polymodal.errors import UserError
from polymodal.paths import natural_key

__all__ = ["count_frames", "frame_names", "load_frames", "load_image"]

_SUFFIXES = (".png", ".jpg", ".jpeg")


def _is_frame(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")  # "._x.png": droppings of macOS archives


def count_frames(folder: Path | str) -> int:
    """Number of PNG and JPEG files in ``folder``; 0 when it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return sum(_is_frame(entry.name) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def frame_names(folder: Path | str) -> list[str]:
    """Names of the frames in natural order: ``images2.png`` before ``images10.png``."""
    try:
        return sorted(filter(_is_frame, os.listdir(folder)), key=natural_key)  # noqa: PTH208 (names only)
    except (FileNotFoundError, NotADirectoryError):
        return []


def load_image(path: Path | str) -> np.ndarray:
    """Decode one picture.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        UserError: missing, truncated or not a picture; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"frame {path} is missing; copy the clip's folder again") from error
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        size = Path(path).stat().st_size
        raise UserError(
            f"frame {path} ({size} bytes) cannot be decoded: {error or 'broken file'}; copy or extract it again"
        ) from error


def load_frames(folder: Path | str, indices: Sequence[int], names: Sequence[str] | None = None) -> np.ndarray:
    """Decode frames of a folder.

    Args:
        folder: the clip.
        indices: frame numbers from 0 in natural order of the names.
        names: the names, where the caller listed them already.

    Returns:
        ``(len(indices), H, W, 3)`` uint8.

    Raises:
        UserError: a frame is missing or broken, or has another size than the clip's first one.
    """
    names = frame_names(folder) if names is None else names
    out: np.ndarray | None = None
    for row, index in enumerate(indices):
        if not 0 <= index < len(names):
            raise UserError(f"clip {folder} has {len(names)} frames, number {index} was asked for; copy the clip again")
        image = load_image(os.path.join(folder, names[index]))  # noqa: PTH118 (as text: once a frame and epoch)
        if out is None:
            out = np.empty((len(indices), *image.shape), dtype=np.uint8)
        elif image.shape != out.shape[1:]:
            raise UserError(
                f"frame {Path(folder) / names[index]} is {image.shape[1]}x{image.shape[0]}, the clip's first frame is "
                f"{out.shape[2]}x{out.shape[1]}; all frames of a clip must have one size"
            )
        out[row] = image
    if out is None:
        raise UserError(f"clip {folder}: no frame was asked for; a clip needs at least one")
    return out
