"""MM-IMDb: film posters and plots, 23 genres, several a film. No torch: it is part of the CLI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError

from missing_modal.data.arrow import ArrowCell, columns
from missing_modal.data.base import Sample, Task
from missing_modal.data.files import Listing, read_json
from missing_modal.data.images import read_bytes
from missing_modal.data.published import Published, checked_texts

__all__ = ["GENRES", "MMIMDb"]

GENRES = (
    "Drama",
    "Comedy",
    "Romance",
    "Thriller",
    "Crime",
    "Action",
    "Adventure",
    "Horror",
    "Documentary",
    "Mystery",
    "Sci-Fi",
    "Fantasy",
    "Family",
    "Biography",
    "War",
    "History",
    "Music",
    "Animation",
    "Musical",
    "Western",
    "Sport",
    "Short",
    "Film-Noir",
)
"""Order of the 23 outputs (DCP 4.1); a film's other genres are ignored."""
_RAW = "unpack MM-IMDb so that the folder has split.json, images/ID.jpeg and labels/ID.json"


@dataclass
class MMIMDb(Published):
    """MM-IMDb, raw (``split.json``, ``images/ID.jpeg``, ``labels/ID.json``) or as ``mmimdb_{train,dev,test}.arrow``.

    Args:
        root: the folder.
        layout: auto takes the Arrow files where the root holds some.
        plots: all: each (film, plot) pair is a sample, in training and testing (the official protocol); first: a film's
            first plot; mean: all, and the probabilities of a film's samples are averaged. The missing table has one row
            a film in each case.
    """

    plots: Literal["all", "first", "mean"] = "all"

    name: ClassVar[str] = "mmimdb"
    task: ClassVar[Task] = "multilabel"
    metric: ClassVar[str] = "f1_macro"
    remedy: ClassVar[str] = "give the folder with split.json, images and labels, or with mmimdb_train.arrow"
    counts: ClassVar[dict[str, int]] = {"train": 15552, "val": 2608, "test": 7799}
    label_type: ClassVar[str] = "list"
    text_column: ClassVar[str] = "plots"

    @property
    def average_rows(self) -> bool:
        """Whether the probabilities of a film's samples are averaged."""
        return self.plots == "mean"

    def class_names(self) -> list[str]:
        """The 23 genres in their order."""
        return list(GENRES)

    def read_raw(self, split: str) -> list[Sample]:
        """Samples of the films of ``split.json``, in its order."""
        home, found = self.home(), Listing(f"{self.name} {split}", _RAW)
        samples: list[Sample] = []
        for film in self._films(split):
            image = found.need(home / "images" / f"{film}.jpeg")
            plots, genres = self._label(film, found)
            samples += self._of_film(film, image, plots, _multi_hot(genres))
        return samples

    def read_arrow(self, split: str) -> list[Sample]:
        """Samples of the split's Arrow file, in its order."""
        path = self.arrow_file(split)
        held = columns(path, ("image", "plots", "label", "image_id"))
        samples: list[Sample] = []
        rows = zip(held["image_id"], held["plots"], held["label"], strict=True)
        for number, (film, plots, label) in enumerate(rows):
            if len(label) != len(GENRES) or not set(label) <= {0, 1}:
                raise UserError(f"{path}, row {number}: label of {len(label)} values; expected {len(GENRES)} of 0 or 1")
            samples += self._of_film(str(film), ArrowCell(path, number), plots, tuple(int(one) for one in label))
        return samples

    def arrow_rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows with the columns image, plots, label, genres, image_id, split."""
        home, found = self.home(), Listing(f"{self.name} {split}", _RAW)
        for film in self._films(split):
            plots, genres = self._label(film, found)
            yield {
                "image": read_bytes(found.need(home / "images" / f"{film}.jpeg")),
                "plots": plots,
                "label": list(_multi_hot(genres)),
                "genres": genres,
                "image_id": film,
                "split": self.official(split),
            }

    def _films(self, split: str) -> list[str]:
        path = self.home() / "split.json"
        lists = read_json(path, self.name, _RAW)
        films = lists.get(self.official(split))
        if not isinstance(films, list):
            raise UserError(f"{self.name}: {path} has no list {self.official(split)!r}; {_RAW}")
        return [str(film) for film in films]

    def _label(self, film: str, found: Listing) -> tuple[list[str], list[str]]:
        """Plots and genres of a film."""
        path = found.need(self.home() / "labels" / f"{film}.json")
        content = read_json(path, self.name, _RAW)
        for key in ("plot", "genres"):
            if key not in content:
                raise UserError(f"{self.name}: {path} has no key {key!r}; {_RAW}")
        plots = [content["plot"]] if isinstance(content["plot"], str) else content["plot"]
        return checked_texts(plots, f"{path}: plot", _RAW), checked_texts(content["genres"], f"{path}: genres", _RAW)

    def _of_film(self, film: str, image: Any, plots: Sequence[str], label: tuple[int, ...]) -> list[Sample]:
        """The samples of a film: one a plot, or one alone; a film without a plot really lacks the text."""
        if not plots:
            return [Sample(film, {"image": image, "text": None}, label)]
        if self.plots == "first":
            return [Sample(film, {"image": image, "text": plots[0]}, label)]
        return [
            Sample(f"{film}#{number}", {"image": image, "text": plot}, label, row=film)
            for number, plot in enumerate(plots)
        ]


def _multi_hot(genres: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(name in genres) for name in GENRES)
