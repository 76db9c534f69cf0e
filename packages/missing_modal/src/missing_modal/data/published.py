"""What the three public data sets share: raw folders or Arrow files, the published counts, conversion. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError

from missing_modal.data.arrow import has_arrow
from missing_modal.data.base import Sample
from missing_modal.data.files import FileData

__all__ = ["Published", "checked_texts"]

Layout = Literal["auto", "raw", "arrow"]


@dataclass
class Published(FileData):
    """Base class of the public data sets; a subclass reads one split of either form.

    Args:
        root: folder of the data set: raw, or with the Arrow files.
        layout: auto takes the Arrow files where the root holds some.
    """

    layout: Layout = "auto"

    counts: ClassVar[dict[str, int]] = {}
    """published rows of each split (DCP 4.1)"""
    label_type: ClassVar[str] = "int"
    """of the Arrow column ``label``"""
    text_column: ClassVar[str] = "text"
    """Arrow column of the texts"""

    @property
    def is_arrow(self) -> bool:
        """Whether the Arrow files are read."""
        if self.layout != "auto":
            return self.layout == "arrow"
        return has_arrow(self.home(), self.name)

    def arrow_file(self, split: str, folder: Path | None = None) -> Path:
        """The Arrow file of a split (``val`` is called dev in two of the three data sets)."""
        return (folder or self.home()) / f"{self.name}_{self.official(split)}.arrow"

    def official(self, split: str) -> str:
        """The split's name in the official files."""
        return "dev" if split == "val" else split

    def read_split(self, split: str) -> list[Sample]:
        """Samples of a split in the order of the official files, on which the official missing tables rest."""
        return self.read_arrow(split) if self.is_arrow else self.read_raw(split)

    def read_raw(self, split: str) -> list[Sample]:
        """Samples of a split from the raw folder."""
        raise NotImplementedError(f"{type(self).__name__}.read_raw")

    def read_arrow(self, split: str) -> list[Sample]:
        """Samples of a split from its Arrow file."""
        raise NotImplementedError(f"{type(self).__name__}.read_arrow")

    def arrow_rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows of the split's Arrow file, made of the raw folder; one image at a time is in memory."""
        raise NotImplementedError(f"{type(self).__name__}.arrow_rows")

    def rows_of(self, split: str) -> int:
        """Rows of a split, the unit of the published counts."""
        return len({sample.table_id for sample in self.samples(split)})


def checked_texts(value: Any, where: str, remedy: str) -> list[str]:
    """A list of texts.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise UserError(f"{where}: expected a list of texts, found {str(value)[:60]!r}; {remedy}")
