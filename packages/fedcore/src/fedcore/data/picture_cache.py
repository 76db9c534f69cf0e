"""Picture files decoded once into the user's cache, as bytes of one size. No torch: it is part of the CLI."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import UserError
from polymodal.paths import cache_dir

if TYPE_CHECKING:
    import numpy as np

__all__ = ["cached_pictures", "check_memory", "decode", "open_picture"]

_MAX_WORKERS = 16
_PAUSE = 10.0
_log = logging.getLogger(__name__)


def cached_pictures(
    name: str,
    split: str,
    files: Sequence[Path],
    labels: Sequence[int],
    side: int,
    picture: Callable[[Path], np.ndarray],
    remedy: str,
) -> np.ndarray:
    """(N, 3, side, side) uint8, from the cache where the files are those it was made of.

    Args:
        name: of the data set, for messages and the folder.
        split: of it.
        files: the pictures.
        labels: their classes, a part of the cache's name.
        side: pixels.
        picture: ``picture(file) -> (side, side, 3) uint8``.
        remedy: what to do when a file is missing.

    Raises:
        UserError: a missing or broken file.
    """
    import numpy as np
    from polymodal.arrays import ArrayCache, ArrayCacheWriter

    stamp = _stamp(name, files, labels, side, remedy)
    folder = cache_dir("fedcore", name, f"{split}-{stamp[:16]}")
    if not (folder / "index.json").is_file():
        start = time.monotonic()
        _log.info("decoding %d pictures of %s %s into %s", len(files), name, split, folder)
        with ArrayCacheWriter(folder, {"stamp": stamp}, overwrite=True) as writer:
            writer.add("pictures", decode(files, side, picture))
        _log.info("%s %s decoded in %.1f s", name, split, time.monotonic() - start)
    return np.array(ArrayCache(folder)["pictures"])


def decode(files: Sequence[Path], side: int, picture: Callable[[Path], np.ndarray]) -> np.ndarray:
    """(N, 3, side, side) uint8. Threads: decoding happens outside the interpreter's lock."""
    import numpy as np

    pictures = np.empty((len(files), 3, side, side), dtype=np.uint8)
    shown = start = time.monotonic()
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for done, pixels in enumerate(pool.map(picture, files)):
            pictures[done] = pixels.transpose(2, 0, 1)
            if (now := time.monotonic()) - shown > _PAUSE:
                shown, left = now, (len(files) - done) * (now - start) / max(1, done)
                _log.info("%d of %d pictures decoded, %.0f s left", done, len(files), left)
    return pictures


def open_picture(file: Path, name: str, size: int = 0) -> np.ndarray:
    """(H, W, 3) uint8; grey pictures, of which there are some, become RGB.

    Args:
        file: the picture.
        name: of the data set, for messages.
        size: resize the shorter side to this and cut the centre square, as is usual for pretrained models; 0: as
            stored.

    Raises:
        UserError: it cannot be decoded.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as opened:
            if size:
                # Large JPEG files are decoded at a fraction of their size, at least twice what is needed.
                opened.draft("RGB", (2 * size, 2 * size))
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: {file} cannot be decoded ({error}); unpack it again") from error
    if size:
        width, height = picture.size
        short = min(width, height)
        wide, high = max(size, width * size // short), max(size, height * size // short)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        resized = picture.resize((wide, high), Image.Resampling.BILINEAR)
        picture = resized.crop((left, top, left + size, top + size))
    return np.asarray(picture)


def check_memory(name: str, count: int, side: int, remedy: str) -> None:
    """Refuse pictures that this machine cannot hold.

    Raises:
        UserError: they need more than its memory.
    """
    try:
        known = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not said on this system
        return
    needed = count * 3 * side * side
    if needed > known:
        gib = 2**30
        raise UserError(
            f"{name}: {count} pictures of {side}x{side} need {needed / gib:.0f} GiB of memory, this machine has"
            f" {known / gib:.0f}; {remedy}"
        )


def _stamp(name: str, files: Sequence[Path], labels: Sequence[int], side: int, remedy: str) -> str:
    """Digest of names, sizes, time stamps and labels: one look at each file, none is opened."""
    digest = hashlib.sha256(repr((side, list(labels))).encode())
    for file in files:
        try:
            found = os.stat(file)  # noqa: PTH116 (a third of the time of Path.stat in a hundred thousand)
        except OSError as error:
            raise UserError(f"{name} pictures: {file} is missing; {remedy}") from error
        digest.update(b"%s %d %d " % (os.fsencode(file), found.st_size, found.st_mtime_ns))
    return digest.hexdigest()
