"""Whole pictures of earlier steps: which ones, and what their labels were then. No torch.

Nothing is copied: ``index.json`` names pictures of the data set, so that the memory takes a few bytes, but needs the
data of earlier steps to be still there. What storing the pictures would take is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from polymodal.errors import UserError

from css.memory.folder import damaged, locate, read_index
from css.memory.store import by_slot
from css.task import BACKGROUND, IGNORE

if TYPE_CHECKING:
    import numpy as np

    from css.data.base import Item, SegData
    from css.task import Task

__all__ = ["ImageEntry", "ImageMemory"]


@dataclass(frozen=True)
class ImageEntry:
    """One picture.

    Args:
        id: of the picture.
        step: continual step whose labels it has.
        slot: channel it was kept for.
        classes: channels in it, as of ``step``.
        raws: raw ids of ``classes``.
        source_bytes: size of the picture and its mask in the data set.
        item: its files.
        reader: decodes them.
    """

    id: str
    step: int
    slot: int
    classes: tuple[int, ...]
    raws: tuple[int, ...]
    source_bytes: int
    item: Item = field(repr=False)
    reader: SegData = field(repr=False)

    @property
    def key(self) -> tuple[int, str]:
        """Step and picture: a picture can be an entry of two steps, with the labels of each."""
        return self.step, self.id

    def load(self) -> tuple[np.ndarray, np.ndarray, None]:
        """The picture with the labels of its step.

        Returns:
            (H, W, 3) uint8 RGB, (H, W) uint8 channels of ``classes``, 255 where ignored, 0 elsewhere, and None.

        Raises:
            UserError: a missing or broken file, by name.
        """
        import numpy as np

        lut = np.full(256, BACKGROUND, np.uint8)
        lut[IGNORE] = IGNORE
        lut[list(self.raws)] = self.classes
        return self.reader.load_image(self.item), lut[self.reader.load_mask(self.item)], None

    @classmethod
    def from_index(cls, row: dict[str, Any], items: dict[str, Item], reader: SegData, path: Path) -> Self:
        """The entry of one row of the index.

        Raises:
            UserError: a picture that the data set does not have.
        """
        name = str(row["id"])
        if name not in items:
            raise UserError(f"memory {path}: picture {name} is not in the training split of {reader.name}; restore it")
        return cls(
            id=name,
            step=int(row["step"]),
            slot=int(row["slot"]["channel"]),
            classes=tuple(int(known["channel"]) for known in row["classes"]),
            raws=tuple(int(known["raw"]) for known in row["classes"]),
            source_bytes=int(row["source_bytes"]),
            item=items[name],
            reader=reader,
        )

    def to_index(self, describe: Any) -> dict[str, Any]:
        """The row of the index; ``describe`` gives a channel with its raw id and name."""
        return {
            "id": self.id,
            "step": self.step,
            "slot": describe(self.slot),
            "classes": [describe(channel) for channel in self.classes],
            "source_bytes": self.source_bytes,
        }


@dataclass
class ImageMemory:
    """The pictures that a step replays.

    Args:
        folder: where its index lies.
        step: continual step that replays it.
        budget: most entries it may have.
        entries: in the order they were taken.
        index: the whole index, as read.
    """

    folder: Path
    step: int
    budget: int
    entries: list[ImageEntry]
    index: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, *, reader: SegData, task: Task | None = None, fingerprint: str | None = None) -> Self:
        """Read a memory.

        Args:
            folder: of the memory.
            reader: the data set, which has the pictures.
            task: the run's; None: any.
            fingerprint: of the run's data set; None: any.

        Raises:
            UserError: no memory, a damaged index, a picture that is gone, a newer schema, or a memory of another kind,
                task, class order or data set.
        """
        folder = locate(Path(folder))
        index = read_index(folder, "images", task=task, fingerprint=fingerprint)
        items = {item.id: item for item in reader.items("train")}
        try:
            entries = [ImageEntry.from_index(row, items, reader, folder) for row in index["entries"]]
            step, budget = int(index["step"]), int(index["budget"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder, error) from error
        return cls(folder, step, budget, entries, index)

    @property
    def slots(self) -> dict[int, list[ImageEntry]]:
        """Channel -> the entries kept for it."""
        return by_slot(self.entries)

    @property
    def stored_bytes(self) -> int:
        """What keeping the pictures and masks takes, each once: the same as ``image_bytes``."""
        return self.image_bytes

    @property
    def image_bytes(self) -> int:
        """Bytes of the pictures and their masks in the data set, each once."""
        return sum({entry.id: entry.source_bytes for entry in self.entries}.values())

    def summary(self) -> str:
        """One line: entries, classes, bytes."""
        return (
            f"memory of step {self.step}: {len(self.entries)} pictures of at most {self.budget},"
            f" {len(self.slots)} classes, {self.image_bytes / 2**20:.2f} MiB"
        )
