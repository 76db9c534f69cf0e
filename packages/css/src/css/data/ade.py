"""ADE20K scene parsing (150 classes) in its official layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import require_files

from css.data.base import Item, SegData
from css.data.listing import check_share, names_in, with_share
from css.data.names import ADE20K_NAMES

__all__ = ["ADE20K"]

_FOLDERS = {"train": "training", "val": "training", "test": "validation"}


@dataclass
class ADE20K(SegData):
    """ADE20K (ADEChallengeData2016): 150 classes; 20,210 training and 2,000 test pictures.

    ``<root>/[ADEChallengeData2016/]images/{training,validation}/*.jpg`` and
    ``annotations/{training,validation}/*.png`` with 0 = other, 1..150. Id 0 stays background; it is not ignored. The
    official validation set is the test set, as in all published work; validation pictures are held out of the
    training set. The published index of 100-50 lists all 20,210 pictures in step 0, that of 100-10 lists 20,192 for the
    same classes; the rule of ``overlap`` (at least one pixel of a class of the step) gives 20,192, and is followed.

    Args:
        root: ``ADEChallengeData2016`` or the folder that holds it.
        val_share: share of training pictures held out for validation, chosen by id, 0..1.
    """

    val_share: float = 0.0

    name: ClassVar[str] = "ade20k"
    remedy: ClassVar[str] = "give the folder ADEChallengeData2016 of the official archive, or the one that holds it"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.val_share)

    def class_names(self) -> list[str]:
        """The 150 names; raw ids are their places from 1."""
        return list(ADE20K_NAMES)

    def home(self) -> Path:
        """The folder with ``images`` and ``annotations``.

        Raises:
            UserError: no root given, or it holds no ADEChallengeData2016.
        """
        root = super().home()
        for candidate in (root, root / "ADEChallengeData2016"):
            if (candidate / "annotations").is_dir():
                return candidate
        require_files(root, ["annotations"], f"{self.name} root", self.remedy)
        return root  # pragma: no cover - the line above raises unless the folder appeared this instant

    def read_split(self, split: str) -> list[Item]:
        """Pictures by name; ``test`` is the official validation set, ``val`` what ``val_share`` holds out."""
        if split == "val" and not self.val_share:
            return []
        folder = _FOLDERS[split]
        images, masks = (self.home() / part / folder for part in ("images", "annotations"))
        remedy = "unpack the archive again"
        known = names_in(masks, f"{self.name} masks", remedy)
        stems = sorted(name[:-4] for name in names_in(images, f"{self.name} images", remedy) if name.endswith(".jpg"))
        if not stems:
            raise UserError(f"{self.name}: {images} has no .jpg files; {remedy}")
        for stem in stems:
            if f"{stem}.png" not in known:
                raise UserError(f"{self.name}: {masks / stem}.png is missing, {stem}.jpg is there; {remedy}")
        items = [Item(stem, images / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems]
        return items if split == "test" else with_share(items, self.val_share, split)
