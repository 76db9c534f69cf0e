"""CIFAR-10 and CIFAR-100 in their official python batches, read without running anything in the pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_files

from fedcore.data.array_type import ArrayData
from fedcore.data.images import CIFAR_MEAN, CIFAR_STD, ImageData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CIFAR10", "CIFAR100"]


@dataclass
class _CIFAR(ImageData):
    """50,000 + 10,000 pictures, 3x32x32; random crop (padding 4) and flip in training."""

    mean: ClassVar[tuple[float, ...]] = CIFAR_MEAN
    std: ClassVar[tuple[float, ...]] = CIFAR_STD
    folder: ClassVar[str] = ""
    files: ClassVar[dict[str, tuple[str, ...]]] = {}
    labels: ClassVar[str] = ""
    meta: ClassVar[tuple[str, str]] = ("", "")

    def home(self) -> Path:
        """The folder with the batches: the root, or the official folder in it."""
        root = super().home()
        inside = root / self.folder
        return inside if inside.is_dir() and not (root / self.meta[0]).is_file() else root

    def class_names(self) -> list[str]:
        """Names from the official meta file.

        Raises:
            UserError: it is missing or broken.
        """
        known: dict[str, list[str]] = self.__dict__.setdefault("_names", {})
        if not known:
            file, key = self.meta
            path = require_files(self.home(), [file], self.name, self.remedy)[0]
            names = self._entry(self._read(path), key, path)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"{self.name}: {key} of {path} is no list of names; unpack the archive again")
            known["names"] = names
        return known["names"]

    def read_split(self, split: str) -> ArrayData:
        """(N, 3, 32, 32) uint8.

        Raises:
            UserError: a missing or broken file.
        """
        import numpy as np

        home, names = self.home(), self.files[split]
        require_files(home, names, self.name, self.remedy)
        parts = [self._batch(home / name) for name in names]
        return self.pictures(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), split)

    def _batch(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        batch = self._read(path)
        data, labels = self._entry(batch, "data", path), self._entry(batch, self.labels, path)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
            shape = getattr(data, "shape", type(data).__name__)
            raise UserError(
                f"{self.name}: data of {path} is {shape}; expected (N, 3072) bytes: unpack the archive again"
            )
        if not isinstance(labels, list) or len(labels) != len(data):
            raise UserError(f"{self.name}: {path} has {len(data)} pictures and not as many {self.labels}")
        top = len(self.class_names()) - 1
        wrong = [x for x in labels if not isinstance(x, int) or not 0 <= x <= top]
        if wrong:
            raise UserError(f"{self.name}: {path} has label {wrong[0]!r}; expected 0..{top}")
        return data.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)

    def _read(self, path: Path) -> dict[str, Any]:
        from fedcore.data.array_pickle import load_array_pickle

        batch = load_array_pickle(path, self.name)
        if not isinstance(batch, dict):
            raise UserError(f"{self.name}: {path} holds {type(batch).__name__}, expected a batch; unpack it again")
        return batch

    def _entry(self, batch: dict[str, Any], key: str, path: Path) -> Any:
        if key not in batch:
            raise UserError(
                f"{self.name}: {path} has no {key!r} but {', '.join(map(str, batch))}; is it the right set?"
            )
        return batch[key]


@dataclass
class CIFAR10(_CIFAR):
    """CIFAR-10: 50,000 + 10,000 pictures of ten classes, 3x32x32.

    ``<root>/[cifar-10-batches-py/]{data_batch_1..5,test_batch,batches.meta}``.

    Args:
        root: ``cifar-10-batches-py``, or the folder that holds it.
        augment: random crop (padding 4) and flip in training.
        image_size: as for all pictures.
    """

    name: ClassVar[str] = "cifar10"
    remedy: ClassVar[str] = "unpack cifar-10-python.tar.gz and give the folder that holds cifar-10-batches-py"
    folder: ClassVar[str] = "cifar-10-batches-py"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test": ("test_batch",),
    }
    labels: ClassVar[str] = "labels"
    meta: ClassVar[tuple[str, str]] = ("batches.meta", "label_names")


@dataclass
class CIFAR100(_CIFAR):
    """CIFAR-100: 50,000 + 10,000 pictures of a hundred (fine) classes, 3x32x32.

    ``<root>/[cifar-100-python/]{train,test,meta}``.

    Args:
        root: ``cifar-100-python``, or the folder that holds it.
        augment: random crop (padding 4) and flip in training.
        image_size: as for all pictures.
    """

    name: ClassVar[str] = "cifar100"
    remedy: ClassVar[str] = "unpack cifar-100-python.tar.gz and give the folder that holds cifar-100-python"
    folder: ClassVar[str] = "cifar-100-python"
    files: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    labels: ClassVar[str] = "fine_labels"
    meta: ClassVar[tuple[str, str]] = ("meta", "fine_label_names")
