"""A clip is a folder of pictures or one video file: its length (indexed, since counting is slow) and its frames."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.data import indexed
from polymodal.errors import UserError

from slt.data.frames import count_frames, load_frames
from slt.data.video import count_video_frames, is_video, load_video

if TYPE_CHECKING:
    import numpy as np

__all__ = ["clip_length", "clip_lengths", "load_clip"]

_log = logging.getLogger(__name__)


def clip_length(path: Path | str) -> int:
    """Frames of one clip.

    Raises:
        UserError: the file or folder is missing, empty or unreadable.
    """
    if is_video(path):
        return count_video_frames(path)
    count = count_frames(path)
    if count < 1:
        state = "has no PNG or JPEG frames" if Path(path).is_dir() else "is missing"
        raise UserError(f"clip {path} {state}; copy it again or remove its row from the annotation")
    return count


def clip_lengths(
    identity: str, paths: Mapping[str, Path], length: Callable[[Path], int] = clip_length
) -> dict[str, int]:
    """Frames of many clips, counted once and kept in the user's cache until a clip changes on disk.

    Args:
        identity: names the index, e.g. ``"csl_daily train /data/csl"``.
        paths: clip by id.
        length: counts one clip.

    Raises:
        UserError: the first clip that is missing or unreadable, and how many are missing.
    """
    digest, missing = hashlib.sha256(), []
    for name, path in paths.items():
        try:
            stat = path.stat()
        except OSError:
            missing.append(path)
            continue
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    if missing:
        raise UserError(
            f"clip {missing[0]} is missing ({len(missing)} of {len(paths)} clips); unpack the data again or remove "
            f"the rows from the annotation"
        )

    def build() -> dict[str, int]:
        if len(paths) > 1000:
            _log.info("counting the frames of %d clips, once", len(paths))
        return {name: length(path) for name, path in paths.items()}

    return {name: int(count) for name, count in indexed(identity, digest.hexdigest(), build).items()}


def load_clip(path: Path | str, indices: Sequence[int]) -> np.ndarray:
    """Frames ``(T, H, W, 3)`` uint8 of a frame folder or video file.

    Args:
        path: the clip.
        indices: frame numbers from 0, sorted.

    Raises:
        UserError: a missing or broken file, by name.
    """
    return load_video(path, indices) if is_video(path) else load_frames(path, indices)
