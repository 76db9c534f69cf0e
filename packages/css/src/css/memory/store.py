"""Instances of earlier steps: crops, masks, boxes and where they come from, in one folder that can be looked at.

``index.json`` says what is there, in channels as well as in the data set's own ids and names; ``images/`` has the boxes
of the instances as PNG, black away from them, ``masks/`` their channels as palette PNG. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from css.memory.folder import damaged, locate, read_index
from css.task import IGNORE

if TYPE_CHECKING:
    import numpy as np

    from css.task import Task

__all__ = ["InstanceEntry", "InstanceMemory", "cut"]

_RIM = 3
"""pixels of surroundings kept around an instance: what bilinear resizing mixes into its edge"""


@dataclass(frozen=True)
class InstanceEntry:
    """One picture's instances.

    Args:
        id: of the picture.
        step: continual step whose labels it has.
        slot: channel it was kept for.
        classes: channels of all its instances, as of ``step``.
        box: (top, left, height, width) around them, pixels of the picture.
        size: (height, width) of the picture.
        stored_bytes: size of its two files.
        source_bytes: size of the picture and its mask in the data set.
        image: file with the box of the picture.
        mask: file with its channels.
    """

    id: str
    step: int
    slot: int
    classes: tuple[int, ...]
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    stored_bytes: int
    source_bytes: int
    image: Path
    mask: Path

    @property
    def key(self) -> tuple[int, str]:
        """Step and picture: a picture can be an entry of two steps, with the labels of each."""
        return self.step, self.id

    def crop(self) -> tuple[np.ndarray, np.ndarray]:
        """The stored box: (h, w, 3) uint8 RGB, black away from the instances, and (h, w) uint8 channels, 0 around.

        Raises:
            UserError: a missing or broken file, or one of another size than the index says.
        """
        from css.data.files import read_image, read_mask

        image, label = read_image(self.image), read_mask(self.mask)
        if not image.shape[:2] == label.shape == self.box[2:]:
            raise damaged(self.image, ValueError(f"{image.shape[:2]} and {label.shape}, the index says {self.box[2:]}"))
        return image, label

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The instances at their place in the picture.

        Around the stored box its outermost pixels are repeated: nothing of them is seen (the foreground masks them),
        but resizing mixes neighbours into the edge of an instance, and these are nearer to what was there than black.

        Returns:
            (H, W, 3) uint8 RGB, (H, W) uint8 channels of ``classes``, 0 elsewhere, and (H, W) bool foreground.

        Raises:
            UserError: a missing or broken file, by name.
        """
        import numpy as np

        image, label = self.crop()
        top, left, height, width = self.box
        around = ((top, self.size[0] - top - height), (left, self.size[1] - left - width))
        label = np.pad(label, around)
        return np.pad(image, (*around, (0, 0)), mode="edge"), label, label > 0

    @classmethod
    def from_index(cls, row: dict[str, Any], folder: Path) -> Self:
        """The entry of one row of the index."""
        top, left, height, width = (int(value) for value in row["box"])
        return cls(
            id=str(row["id"]),
            step=int(row["step"]),
            slot=int(row["slot"]["channel"]),
            classes=tuple(int(known["channel"]) for known in row["classes"]),
            box=(top, left, height, width),
            size=(int(row["source_size"][0]), int(row["source_size"][1])),
            stored_bytes=int(row["bytes"]),
            source_bytes=int(row["source_bytes"]),
            image=folder / row["image"],
            mask=folder / row["mask"],
        )

    def to_index(self, describe: Any) -> dict[str, Any]:
        """The row of the index; ``describe`` gives a channel with its raw id and name."""
        return {
            "id": self.id,
            "step": self.step,
            "slot": describe(self.slot),
            "classes": [describe(channel) for channel in self.classes],
            "box": list(self.box),
            "source_size": list(self.size),
            "bytes": self.stored_bytes,
            "source_bytes": self.source_bytes,
            "image": f"images/{self.image.name}",
            "mask": f"masks/{self.mask.name}",
        }


@dataclass
class InstanceMemory:
    """The instances that a step replays.

    Args:
        folder: where it lies.
        step: continual step that replays it.
        budget: most entries it may have.
        entries: in the order they were taken.
        index: the whole index, as read.
    """

    folder: Path
    step: int
    budget: int
    entries: list[InstanceEntry]
    index: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, *, task: Task | None = None, fingerprint: str | None = None) -> Self:
        """Read a memory.

        Args:
            folder: of the memory.
            task: the run's; None: any.
            fingerprint: of the run's data set; None: any.

        Raises:
            UserError: no memory, a damaged index, a missing file, a newer schema, or a memory of another kind, task,
                class order or data set.
        """
        from polymodal.paths import require_files

        folder = locate(Path(folder))
        index = read_index(folder, "instances", task=task, fingerprint=fingerprint)
        try:
            entries = [InstanceEntry.from_index(row, folder) for row in index["entries"]]
            step, budget = int(index["step"]), int(index["budget"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise damaged(folder, error) from error
        names = [f"{path.parent.name}/{path.name}" for entry in entries for path in (entry.image, entry.mask)]
        require_files(folder, names, f"memory {folder}", "delete the folder and resume the run: it is built again")
        return cls(folder, step, budget, entries, index)

    @property
    def slots(self) -> dict[int, list[InstanceEntry]]:
        """Channel -> the entries kept for it."""
        return by_slot(self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all crops and masks."""
        return sum(entry.stored_bytes for entry in self.entries)

    @property
    def image_bytes(self) -> int:
        """Bytes of the whole pictures and masks that the entries come from, each once."""
        return sum({entry.id: entry.source_bytes for entry in self.entries}.values())

    def summary(self) -> str:
        """One line: entries, classes, bytes."""
        return (
            f"memory of step {self.step}: {len(self.entries)} instances of at most {self.budget},"
            f" {len(self.slots)} classes, {self.stored_bytes / 2**20:.2f} MiB"
            f" (their whole pictures: {self.image_bytes / 2**20:.2f} MiB)"
        )


def by_slot(entries: Iterable[Any]) -> dict[int, list[Any]]:
    """Channel -> entries kept for it, channels ascending."""
    found: dict[int, list[Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry.slot):
        found.setdefault(entry.slot, []).append(entry)
    return found


def cut(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """What of a picture is stored.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) uint8 channels, with at least one class.

    Returns:
        The box around all classes: (h, w, 3) pixels, black farther than three pixels from an instance, (h, w)
        channels, 0 for background and ignored; and the box (top, left, height, width).
    """
    import numpy as np
    from scipy import ndimage

    label = np.where(label == IGNORE, 0, label)
    rows, columns = (np.flatnonzero((label > 0).any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    part = slice(top, top + height), slice(left, left + width)
    near = ndimage.maximum_filter(label[part] > 0, size=2 * _RIM + 1)
    return np.where(near[:, :, None], image[part], 0).astype(np.uint8), label[part], (top, left, height, width)
