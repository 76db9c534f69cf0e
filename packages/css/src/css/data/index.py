"""Which classes each picture has, found in one parallel pass over the masks and kept in the user's cache. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.data import indexed
from polymodal.errors import UserError

from css.data.files import mask_ids

if TYPE_CHECKING:
    from css.data.base import Item, SegData

__all__ = ["class_sets"]

_MOST_WORKERS = 16


def class_sets(reader: SegData, split: str, workers: int | None = None) -> list[tuple[int, ...]]:
    """Raw class ids in each picture of a split, in the order of ``reader.items(split)``.

    The first call decodes every mask; later ones read one JSON file from the user's cache, unless a mask was changed,
    added or taken away (size and time stamp of each file are compared) or the number of classes is another. A reader
    looks once: what it found holds for its whole life, so that a run keeps the pictures it began with.

    Args:
        reader: the data set.
        split: ``train``, ``val`` or ``test``.
        workers: threads that decode; default: one a core.

    Returns:
        For each picture its ids, 1..K, sorted; () where all is background or ignored.

    Raises:
        UserError: a missing or broken mask, or one with an unknown id; names the file.
    """
    known: dict[str, list[tuple[int, ...]]] = reader.__dict__.setdefault("_class_sets", {})
    if split not in known:
        known[split] = _find(reader, split, workers)
    return known[split]


def _find(reader: SegData, split: str, workers: int | None) -> list[tuple[int, ...]]:
    items = reader.items(split)
    if not items:
        return []
    paths = [item.mask for item in items]
    listed = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:24]
    stored = indexed(
        f"css classes {reader.name} {_folder(paths)} {split} {listed}",
        [reader.num_classes, _stamp(paths)],
        lambda: _scan(reader, items, workers),
    )
    return [tuple(ids) for ids in stored]


def _folder(paths: Sequence[Path]) -> Path:
    return paths[0].parent.absolute()


def _stamp(paths: Sequence[Path]) -> str:
    """Digest of sizes and time stamps: one look at each file, none is opened."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116 (a third of the time of Path.stat in tens of thousands)
        except OSError as error:
            raise UserError(f"mask {path} is missing; copy it again from the data set") from error
        digest.update(b"%d %d " % (found.st_size, found.st_mtime_ns))
    return digest.hexdigest()


def _scan(reader: SegData, items: Sequence[Item], workers: int | None) -> list[list[int]]:
    """One pass over the masks. Threads: decoding and counting happen outside the interpreter's lock."""

    def look(item: Item) -> list[int]:
        return list(mask_ids(reader.load_mask(item)))

    count = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=count) as pool:
        try:
            return list(pool.map(look, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first broken mask ends the pass
            raise
