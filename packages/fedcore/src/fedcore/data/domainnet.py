"""DomainNet: the same kinds of things in six styles, which are six natural clients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from polymodal.errors import UserError, did_you_mean
from polymodal.paths import read_text_lines

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData
from fedcore.data.picture_cache import cached_pictures, check_memory, open_picture

__all__ = ["DOMAINS", "DomainNet"]

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
_SMALLEST = 8


@dataclass
class DomainNet(FedData):
    """DomainNet: 409,832 + 176,743 pictures of 345 kinds of things in six styles.

    ``<root>/[splits/]<domain>_{train,test}.txt``, lines ``<domain>/<class>/<file>.jpg <label>``, and the pictures in
    ``<root>/<domain>/<class>/``. Of each, the shorter side is resized to ``image_size`` and the centre cut out, once
    and into the cache; ImageNet statistics. The domain is the natural client of a picture (``--partition.scheme
    column``). The official lists leave some classes of a domain empty (painting has no t-shirt for training).

    Args:
        root: folder with the lists and the folders of the domains.
        domains: names of domains with commas between, e.g. ``clipart,sketch``; none: all six.
        augment: random crop (padding an eighth of the side) and flip in training.
        image_size: side of the stored pictures in pixels; 224 for pretrained models.
        per_class: most training pictures of a class in a domain, the first of the list; 0: all.

    Source: Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019.
    """

    domains: str = ""
    augment: bool = True
    image_size: int = 64
    per_class: int = 0

    name: ClassVar[str] = "domainnet"
    remedy: ClassVar[str] = "give the folder with clipart_train.txt and so on, and the unpacked domains beside them"
    may_lack_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.chosen:
            if name not in DOMAINS:
                raise UserError(
                    f"domains={self.domains!r}: unknown domain {name!r}; {did_you_mean(name, DOMAINS)}known:"
                    f" {', '.join(DOMAINS)}"
                )
        if self.image_size < _SMALLEST:
            raise UserError(f"image_size={self.image_size}; expected a side of at least {_SMALLEST} pixels")
        if self.per_class < 0:
            raise UserError(f"per_class={self.per_class}; expected 0 (all) or more")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Domains that are read, in the order of ``DOMAINS``; unknown ones last."""
        names = [name.strip() for name in self.domains.split(",") if name.strip()] or DOMAINS
        return tuple(sorted(set(names), key=lambda name: (name not in DOMAINS, name)))

    def class_names(self) -> list[str]:
        """Folders of the classes in the order of their labels, from the lists of the chosen domains.

        Raises:
            UserError: a missing or broken list, or a label with two names.
        """
        known: dict[str, list[str]] = self.__dict__.setdefault("_names", {})
        if not known:
            names: dict[int, str] = {}
            for split in self.splits:
                for domain in self.chosen:
                    for file, label in self._list(domain, split):
                        name = file.split("/")[1]
                        if names.setdefault(label, name) != name:
                            raise UserError(
                                f"{self.name}: label {label} is {names[label]} and, in {domain}_{split}.txt, {name};"
                                " take all lists from one source"
                            )
            known["names"] = [names.get(label, f"class {label}") for label in range(max(names, default=-1) + 1)]
        return known["names"]

    def read_split(self, split: str) -> ArrayData:
        """(N, 3, S, S) uint8 with the domain of each picture in ``groups``.

        Raises:
            UserError: a missing or broken list or picture, or more pictures than fit into memory.
        """
        import numpy as np
        import torch

        from fedcore.data.arrays import ArrayData
        from fedcore.data.transforms import IMAGENET_MEAN, IMAGENET_STD, CropFlip, Normalise

        home, side = self.home(), self.image_size
        lists = [self._kept(self._list(domain, split), split) for domain in self.chosen]
        fewer = "choose fewer (--data.domains, --data.per_class) or a smaller --data.image_size"
        check_memory(self.name, sum(map(len, lists)), side, fewer)
        pictures = np.empty((sum(map(len, lists)), 3, side, side), dtype=np.uint8)
        labels: list[int] = []
        groups: list[int] = []
        picture = partial(open_picture, name=self.name, size=side)
        for number, (domain, rows) in enumerate(zip(self.chosen, lists, strict=True)):
            files, found = [home / file for file, _ in rows], [label for _, label in rows]
            what = f"{domain}-{split}"
            place = slice(len(labels), len(labels) + len(rows))
            pictures[place] = cached_pictures(self.name, what, files, found, side, picture, self.remedy)
            labels += found
            groups += [number] * len(rows)
        options: dict[str, Any] = {"groups": torch.tensor(groups, dtype=torch.long), "group_names": self.chosen}
        if self.augment and split == "train":
            options["augment"] = CropFlip(side // 8)
        return ArrayData(
            torch.from_numpy(pictures),
            torch.from_numpy(np.asarray(labels, dtype=np.int64)),
            transform=Normalise(IMAGENET_MEAN, IMAGENET_STD),
            **options,
        )

    def _list(self, domain: str, split: str) -> list[tuple[str, int]]:
        """Path below the root and label of each line."""
        known: dict[str, list[tuple[str, int]]] = self.__dict__.setdefault("_lists", {})
        file = f"{domain}_{split}.txt"
        if file not in known:
            home = self.home()
            path = home / "splits" / file if (home / "splits" / file).is_file() else home / file
            rows = []
            for number, line in enumerate(read_text_lines(path, f"{self.name} list", self.remedy), start=1):
                if line.strip():
                    rows.append(self._row(line.strip(), domain, path, number))
            if not rows:
                raise UserError(f"{self.name}: {path} has no lines; copy it again")
            known[file] = rows
        return known[file]

    def _row(self, line: str, domain: str, path: Path, number: int) -> tuple[str, int]:
        file, _, label = line.rpartition(" ")
        parts = file.split("/")
        if len(parts) != 3 or parts[0] != domain or ".." in parts or not label.isdecimal():
            raise UserError(
                f"{self.name}: {path}, line {number}: {line[:80]!r}; expected {domain}/CLASS/FILE.jpg LABEL"
            )
        return file, int(label)

    def _kept(self, rows: list[tuple[str, int]], split: str) -> list[tuple[str, int]]:
        if split != "train" or not self.per_class:
            return rows
        counts: dict[int, int] = {}
        kept = []
        for file, label in rows:
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= self.per_class:
                kept.append((file, label))
        return kept
