"""Making the memory of a step: candidates, the sampler's choice, and the folder. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

from css.memory.components import admissible
from css.memory.folder import SCHEMA_VERSION, describe_task, replace_folder
from css.memory.images import ImageEntry, ImageMemory
from css.memory.store import InstanceEntry, InstanceMemory, cut
from css.task import BACKGROUND, IGNORE

if TYPE_CHECKING:
    import numpy as np

    from css.data.base import Item, SegData
    from css.task import Task

__all__ = ["Key", "build_images", "build_memory", "load_memory", "make_memory"]

Kind = Literal["instances", "images"]
Key = tuple[int, str]
"""Step and picture id of a candidate."""


def load_memory(kind: Kind, folder: Path, *, reader: SegData, task: Task, fingerprint: str) -> Any:
    """The memory of a method: ``InstanceMemory`` or ``ImageMemory``; see their ``load``."""
    if kind == "images":
        return ImageMemory.load(folder, reader=reader, task=task, fingerprint=fingerprint)
    return InstanceMemory.load(folder, task=task, fingerprint=fingerprint)


def make_memory(
    kind: Kind,
    folder: Path,
    *,
    reader: SegData,
    task: Task,
    fingerprint: str,
    step: int,
    setting: str,
    previous: Any,
    budget: int,
    seed: int,
    split_seed: int,
    connectivity: int = 4,
) -> Any:
    """Build the memory that ``step`` replays, from the pictures of the step before and that step's memory.

    Args:
        kind: ``instances`` or ``images``.
        folder: of the memory, made or replaced.
        reader: the data set.
        task: classes by step.
        fingerprint: of the data set.
        step: continual step that will replay it, at least 1.
        setting: which pictures a step has.
        previous: memory of step - 1; None at step 1.
        budget: most entries over all classes.
        seed: of the choice.
        split_seed: seed of the run, for the setting ``partitioned``.
        connectivity: neighbours that make pixels one object, 4 or 8.

    Returns:
        The memory, as read from the folder.

    Raises:
        UserError: a broken picture, or a folder that cannot be written; an older memory is left as it was.
    """
    from css.data.split_files import step_indices

    items, sets = reader.items("train"), reader.class_sets("train")
    chosen = step_indices(reader, task, setting, step - 1, "train", seed=split_seed)
    common: dict[str, Any] = {
        "reader": reader,
        "task": task,
        "fingerprint": fingerprint,
        "step": step,
        "pictures": [(items[index], sets[index]) for index in chosen],
        "lut": task.train_lut(step - 1, keep_old=setting == "sequential"),
        "previous": previous,
        "budget": budget,
        "seed": seed,
    }
    return (
        build_images(folder, **common)
        if kind == "images"
        else build_memory(folder, **common, connectivity=connectivity)
    )


def build_memory(
    folder: Path,
    *,
    reader: SegData,
    task: Task,
    step: int,
    pictures: Sequence[tuple[Item, Sequence[int]]],
    lut: np.ndarray,
    previous: InstanceMemory | None,
    budget: int,
    seed: int,
    connectivity: int = 4,
    fingerprint: str | None = None,
) -> InstanceMemory:
    """Keep instances of all classes before ``step``.

    Candidates are the entries of the previous memory, with the classes of their own step, and pictures of step - 1
    where each class is one connected region. Shuffled, they are shared among the classes by ``balanced_sample``; a
    picture is decoded only when its turn comes.

    Args:
        folder: of the memory, made or replaced as a whole.
        reader: decodes pictures and masks.
        task: classes by step.
        step: continual step that will replay it, at least 1.
        pictures: of step - 1, with the raw class ids in each.
        lut: (256,) uint8 raw id -> label of step - 1.
        previous: memory of step - 1; None at step 1.
        budget: most entries over all classes.
        seed: of the shuffles.
        connectivity: neighbours that make pixels one object, 4 or 8.
        fingerprint: of the data set; default: the reader's.

    Returns:
        The memory, as read from the folder.

    Raises:
        UserError: a broken picture, a mask of another size, or a folder that cannot be written; an older memory is left
            as it was.

    Source: Yin et al. 2025, instance memory. The authors' code stores names of pictures and checks regions on randomly
    cropped labels; here labels are checked whole, and what pasting needs is stored.
    """
    kept = {entry.key: entry for entry in previous.entries} if previous else {}
    items = {item.id: item for item, _ in pictures}

    def write(place: Path) -> dict[str, Any]:
        for part in ("images", "masks"):
            (place / part).mkdir()

        def accept(key: Key) -> bool:
            if key in kept:
                return True
            return admissible(lut[reader.load_mask(items[key[1]])], connectivity)

        candidates = [(key, entry.classes) for key, entry in kept.items()] + _labelled(pictures, lut, step - 1)
        entries = []
        for key, slot in _choose(candidates, task, step, budget, seed, accept):
            made = _keep(kept[key], place) if key in kept else _store(reader, items[key[1]], lut, step - 1, place)
            entries.append(replace(made, slot=slot))
        return _index("instances", reader, task, step, budget, seed, fingerprint, entries) | {
            "connectivity": connectivity
        }

    replace_folder(Path(folder), write)
    return InstanceMemory.load(folder)


def build_images(
    folder: Path,
    *,
    reader: SegData,
    task: Task,
    step: int,
    pictures: Sequence[tuple[Item, Sequence[int]]],
    lut: np.ndarray,
    previous: ImageMemory | None,
    budget: int,
    seed: int,
    fingerprint: str | None = None,
) -> ImageMemory:
    """Keep whole pictures of all classes before ``step``, with the labels of their own step.

    The choice is that of ``build_memory`` without its rule on regions.

    Args:
        folder: of the memory, made or replaced as a whole.
        reader: the data set.
        task: classes by step.
        step: continual step that will replay it, at least 1.
        pictures: of step - 1, with the raw class ids in each.
        lut: (256,) uint8 raw id -> label of step - 1.
        previous: memory of step - 1; None at step 1.
        budget: most entries over all classes.
        seed: of the shuffles.
        fingerprint: of the data set; default: the reader's.

    Returns:
        The memory, as read from the folder.

    Raises:
        UserError: a missing picture, or a folder that cannot be written; an older memory is left as it was.
    """
    known = {entry.key: entry for entry in previous.entries} if previous else {}
    for item, raws in pictures:
        present = [raw for raw in raws if lut[raw] not in (BACKGROUND, IGNORE)]
        channels = tuple(int(lut[raw]) for raw in present)
        entry = ImageEntry(item.id, step - 1, 0, channels, tuple(present), 0, item, reader)
        known.setdefault(entry.key, entry)

    def write(_: Path) -> dict[str, Any]:
        candidates = [(key, entry.classes) for key, entry in known.items()]
        entries = []
        for key, slot in _choose(candidates, task, step, budget, seed, None):
            entries.append(replace(known[key], slot=slot, source_bytes=_source_bytes(known[key].item)))
        return _index("images", reader, task, step, budget, seed, fingerprint, entries)

    replace_folder(Path(folder), write)
    return ImageMemory.load(folder, reader=reader)


def _labelled(pictures: Sequence[tuple[Item, Sequence[int]]], lut: np.ndarray, step: int) -> list[tuple[Key, set[int]]]:
    """Candidates among pictures: the classes that they have a label for in the step."""
    found = [((step, item.id), {int(lut[raw]) for raw in raws} - {BACKGROUND, IGNORE}) for item, raws in pictures]
    return [(key, classes) for key, classes in found if classes]


def _choose(
    candidates: Sequence[tuple[Key, Any]],
    task: Task,
    step: int,
    budget: int,
    seed: int,
    accept: Callable[[Key], bool] | None,
) -> list[tuple[Key, int]]:
    """Shuffle candidates and classes, and let the classes take turns."""
    from css.ops.sample import balanced_sample

    order = numpy_rng(seed, "memory candidates").permutation(len(candidates))
    channels = numpy_rng(seed, "memory classes").permutation(task.num_old(step)) + 1
    return balanced_sample([candidates[place] for place in order], budget, channels.tolist(), accept)


def _store(reader: SegData, item: Item, lut: np.ndarray, step: int, folder: Path) -> InstanceEntry:
    """Cut the instances out of a picture and write them."""
    import numpy as np
    from PIL import Image

    from css.data.files import check_sizes, write_mask

    image, mask = reader.load_image(item), reader.load_mask(item)
    check_sizes(item, image, mask)
    pixels, label, box = cut(image, lut[mask])
    name = _file_name(step, item.id)
    entry = InstanceEntry(
        id=item.id,
        step=step,
        slot=0,
        classes=tuple((np.flatnonzero(np.bincount(label.ravel())[1:]) + 1).tolist()),
        box=box,
        size=(image.shape[0], image.shape[1]),
        stored_bytes=0,
        source_bytes=_source_bytes(item),
        image=folder / "images" / name,
        mask=folder / "masks" / name,
    )
    Image.fromarray(pixels).save(entry.image, format="PNG")
    write_mask(entry.mask, label)
    return replace(entry, stored_bytes=entry.image.stat().st_size + entry.mask.stat().st_size)


def _keep(entry: InstanceEntry, folder: Path) -> InstanceEntry:
    """Take over an entry of the previous memory: a second name for its files, or copies where that cannot be."""
    moved = replace(entry, image=folder / "images" / entry.image.name, mask=folder / "masks" / entry.mask.name)
    for source, target in ((entry.image, moved.image), (entry.mask, moved.mask)):
        try:
            os.link(source, target)
        except FileNotFoundError as error:
            raise UserError(f"memory: {source} is missing; delete its folder and resume the run") from error
        except OSError:
            shutil.copyfile(source, target)
    return moved


def _index(
    kind: Kind,
    reader: SegData,
    task: Task,
    step: int,
    budget: int,
    seed: int,
    fingerprint: str | None,
    entries: Sequence[InstanceEntry | ImageEntry],
) -> dict[str, Any]:
    """The index but for what only one kind has."""
    names = reader.class_names()

    def describe(channel: int) -> dict[str, Any]:
        raw = task.raw(channel)
        return {"channel": channel, "raw": raw, "name": names[raw - 1]}

    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "data": {"name": reader.name, "fingerprint": fingerprint or reader.fingerprint()},
        "task": describe_task(task),
        "step": step,
        "budget": budget,
        "seed": seed,
        "entries": [entry.to_index(describe) for entry in entries],
    }


def _source_bytes(item: Item) -> int:
    sizes = []
    for path in (item.image, item.mask):
        try:
            sizes.append(path.stat().st_size)
        except OSError as error:
            raise UserError(f"{item.id}: {path} is missing; copy it again from the data set") from error
    return sum(sizes)


def _file_name(step: int, name: str) -> str:
    """A file name that says where an entry comes from; the hash keeps names apart that differ in special characters."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-80:]
    return f"step{step}_{plain}_{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}.png"
