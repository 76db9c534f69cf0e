"""Users' own arrays in one NumPy file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData
from fedcore.data.own import check_share, file_of, held_out

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Npz"]


@dataclass
class Npz(FedData):
    """Arrays of one ``.npz`` file: ``x`` (N, ...), ``y`` (N,), and perhaps ``client`` (N,), ``x_test``, ``y_test``.

    ``x`` is uint8 pictures (N, C, H, W), (N, H, W) or (N, H, W, 3), which are divided by 255, or numbers of any shape.
    ``y`` is classes (integers or texts, numbered in sorted order), or floats for a regression. ``client`` is each
    training sample's natural client. Without ``x_test`` a share of the samples is held out.

    Args:
        root: the file.
        augment: random crop (padding 4) and flip of training pictures.
        test_share: share of the samples of each class that are for testing where the file has no ``x_test``, 0..1.
        split_seed: which those are; the seed of a run does not change the data.
    """

    augment: bool = False
    test_share: float = 0.2
    split_seed: int = 0

    name: ClassVar[str] = "npz"
    remedy: ClassVar[str] = "save it with numpy.savez(FILE, x=inputs, y=targets)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)

    @property
    def regression(self) -> bool:
        """Whether ``y`` is floats."""
        return bool(self._arrays()["y"].dtype.kind == "f")

    def class_names(self) -> list[str]:
        """Values of ``y`` in sorted order."""
        return [] if self.regression else [str(value) for value in self._arrays()["labels"]]

    def read_split(self, split: str) -> ArrayData:
        """Samples of a split.

        Raises:
            UserError: a missing or broken file, or arrays that do not belong together.
        """
        import numpy as np
        import torch

        from fedcore.data.arrays import ArrayData
        from fedcore.data.transforms import CropFlip, Normalise

        arrays = self._arrays()
        if "x_test" in arrays:
            ending = "" if split == "train" else "_test"
            inputs, targets, clients = (arrays.get(f"{name}{ending}") for name in ("x", "y", "client"))
        else:
            chosen = held_out(arrays["y"], self.test_share, self.split_seed, split, self.regression)
            inputs, targets, clients = (
                None if (a := arrays.get(name)) is None else a[chosen] for name in ("x", "y", "client")
            )
        assert inputs is not None  # _arrays has seen to it, as for the targets
        assert targets is not None
        options: dict[str, Any] = {}
        if clients is not None:
            names = arrays["clients"]
            options = {
                "groups": torch.from_numpy(np.searchsorted(names, clients)),
                "group_names": list(map(str, names)),
            }
        if self.regression:
            values = torch.from_numpy(targets.astype(np.float32))
        else:
            values = torch.from_numpy(np.searchsorted(arrays["labels"], targets))
        if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
            pictures = torch.from_numpy(_channels_first(inputs))
            channels = pictures.shape[1]
            options["transform"] = Normalise((0.0,) * channels, (1.0,) * channels)
            options["augment"] = CropFlip() if self.augment and split == "train" else None
            return ArrayData(pictures, values, **options)
        return ArrayData(torch.from_numpy(inputs.astype(np.float32)), values, **options)

    def _arrays(self) -> dict[str, np.ndarray]:
        known: dict[str, dict[str, np.ndarray]] = self.__dict__.setdefault("_stored", {})
        if not known:
            known["arrays"] = self._checked(self._read())
        return known["arrays"]

    def _read(self) -> dict[str, np.ndarray]:
        import numpy as np

        path = file_of(self)
        try:
            with np.load(path, allow_pickle=False) as stored:
                if not isinstance(stored, np.lib.npyio.NpzFile):
                    raise ValueError("it holds one array, not several by name")
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            reason = "it holds objects" if "allow_pickle" in str(error) else str(error).splitlines()[0]
            raise UserError(f"npz: {path} cannot be read ({reason}); {self.remedy}") from error

    def _checked(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        for ending in ("", "_test"):
            if ending and "x_test" not in arrays:
                continue
            for name in (f"x{ending}", f"y{ending}"):
                if name not in arrays:
                    raise UserError(f"npz: {self.root} has no array {name!r} but {', '.join(arrays)}; {self.remedy}")
            lengths = {name: len(arrays[name + ending]) for name in ("x", "y", "client") if name + ending in arrays}
            if len(set(lengths.values())) > 1 or arrays[f"y{ending}"].ndim != 1:
                shapes = ", ".join(f"{name}{ending} {arrays[name + ending].shape}" for name in lengths)
                raise UserError(f"npz: {self.root}: {shapes}; expected one target and one client for each sample")
        if arrays["x"].dtype.kind not in "fiub":
            raise UserError(f"npz: x of {self.root} is {arrays['x'].dtype}; expected numbers")
        found = dict(arrays)
        found["labels"] = np.unique(arrays["y"])
        if "client" in arrays:
            found["clients"] = np.unique(
                np.concatenate([arrays["client"], arrays.get("client_test", arrays["client"][:0])])
            )
        if "y_test" in arrays and arrays["y"].dtype.kind != "f":
            unknown = np.setdiff1d(arrays["y_test"], found["labels"])
            if len(unknown):
                raise UserError(f"npz: {self.root}: y_test has {unknown[0]!s}, which y never has; mend the labels")
        return found


def _channels_first(pictures: np.ndarray) -> np.ndarray:
    """(N, C, H, W) of pictures in any usual order."""
    import numpy as np

    if pictures.ndim == 3:
        return pictures[:, None]
    if pictures.shape[-1] in (1, 3) and pictures.shape[1] not in (1, 3):
        return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    return pictures
