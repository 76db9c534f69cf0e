"""Fashion-MNIST in its official gzip files; any data set in that form (MNIST, KMNIST) is read too."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_files

from fedcore.data.array_type import ArrayData
from fedcore.data.images import ImageData, quarter_turns

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FashionMNIST", "read_idx"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PREFIX = {"train": "train", "test": "t10k"}
_MAX_BYTES = 1 << 30


@dataclass
class FashionMNIST(ImageData):
    """60,000 + 10,000 grey 28x28 pictures of ten kinds of clothing.

    ``<root>/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``, or the same unpacked.

    Args:
        root: folder with the four files; by default the folder of Debian's package dataset-fashion-mnist.
        augment: random crop and flip in training; off by default, as is usual here.
        image_size: as for all pictures; the grey channel is repeated three times then.
        rotate: degrees that every picture is turned to the left: 0, 90, 180 or 270.
    """

    augment: bool = False
    rotate: int = 0

    name: ClassVar[str] = "fashion_mnist"
    remedy: ClassVar[str] = "give the folder with its four idx files, or install Debian's package dataset-fashion-mnist"
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    padding: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        quarter_turns(self.rotate)

    def class_names(self) -> list[str]:
        """The ten kinds."""
        text = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
        return text.split(", ")

    def home(self) -> Path:
        """The folder with the files; Debian's where none was given."""
        if self.root is None and DEBIAN.is_dir():
            return DEBIAN
        return super().home()

    def read_split(self, split: str) -> ArrayData:
        """(N, 1, 28, 28) uint8.

        Raises:
            UserError: a missing or broken file.
        """
        import numpy as np

        home = self.home()
        names = [f"{_PREFIX[split]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        images, labels = (read_idx(_either(home, name, self.name, self.remedy), self.name) for name in names)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{self.name}: {home / names[0]} holds {images.shape}, {names[1]} holds {labels.shape}; expected"
                " (N, H, W) and (N,): copy both again from one source"
            )
        if len(labels) and labels.max() >= self.num_classes:
            raise UserError(
                f"{self.name}: {home / names[1]} has label {labels.max()}; expected 0..9: is it another set?"
            )
        if self.rotate:
            images = np.ascontiguousarray(np.rot90(images, quarter_turns(self.rotate), axes=(1, 2)))
        return self.pictures(images[:, None], labels, split)


def read_idx(path: Path, what: str) -> np.ndarray:
    """Array of unsigned bytes in an idx file, gzipped or plain.

    Args:
        path: the file.
        what: name of the data set, for messages.

    Raises:
        UserError: no idx file of unsigned bytes, cut short, or larger than 1 GiB.
    """
    import numpy as np

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            data = handle.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{what}: {path} cannot be read ({error}); copy it again") from error
    if len(data) > _MAX_BYTES:
        raise UserError(f"{what}: {path} holds more than {_MAX_BYTES} bytes; is it the right file?")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"{what}: {path} is no idx file of unsigned bytes; copy it again")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{what}: {path} is cut short; copy it again")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != int(np.prod(shape, dtype=object)):
        raise UserError(f"{what}: {path} has {len(data) - start} bytes, its header says {shape}; copy it again")
    return np.frombuffer(bytearray(data), dtype=np.uint8, offset=start).reshape(shape)


def _either(home: Path, name: str, what: str, remedy: str) -> Path:
    """The gzipped file, or the plain one."""
    return home / name if (home / name).is_file() else require_files(home, [f"{name}.gz"], what, remedy)[0]
