"""What readers of single texts with classes share: official folder or plain tables, stratified subsets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

from fedcore.data.array_type import ArrayData
from fedcore.data.table_files import pick, read_table
from fedcore.data.text import TextData
from fedcore.data.text_rows import Rows, label_number

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TextSet", "stratified"]

_TABLES = (".tsv", ".jsonl", ".json", ".csv")
_log = logging.getLogger(__name__)


def stratified(labels: Sequence[int], count: int, seed: int, split: str) -> np.ndarray:
    """Rising indices of ``count`` samples, classes in the shares that they have in all; all where there are no more.

    Args:
        labels: (N,) class numbers.
        count: samples to choose; 0: all.
        seed: of the choice.
        split: name of the split, which has a draw of its own.
    """
    import numpy as np

    known = np.asarray(labels, dtype=np.int64)
    if not 0 < count < len(known):
        return np.arange(len(known))
    sizes = np.bincount(known)
    exact = sizes * count / len(known)
    quota = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to the largest remainders, the lower class first.
    quota[np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]] += 1
    rng = numpy_rng(seed, "subset", split)
    chosen = [rng.permutation(np.flatnonzero(known == label))[: quota[label]] for label in range(len(sizes))]
    return np.sort(np.concatenate(chosen))


@dataclass
class TextSet(TextData):
    """Base class: a subclass names its classes and files, and gives its samples by ``rows``.

    Where the official files are not there, ``{train,test}.{tsv,jsonl,json,csv}`` with the columns ``text`` and
    ``label`` (a name or a number from 0) are read instead.

    Args:
        root: folder with the official files, or the one that holds the official folder.
        tokenizer: local folder with a tokenizer of transformers; none: hashed words.
        ngrams: longest run of words that counts as one token.
        buckets: number of ids that words are hashed into.
        max_length: most words or tokens of a text; 0: 64.
        trim: cut each batch to its longest text; false: batches of one width, for the batched engine.
        train_samples: size of a stratified subset of the training split; 0: all samples.
        test_samples: the same of the test split.
        subset_seed: which samples those are; the seed of a run does not change the data.
    """

    train_samples: int = 0
    test_samples: int = 0
    subset_seed: int = 0

    labels: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()
    """official folders that may lie in the root"""
    marks: ClassVar[tuple[str, ...]] = ()
    """files or folders by which the official layout is known"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("train_samples", "test_samples"):
            if getattr(self, option) < 0:
                raise UserError(f"{option}={getattr(self, option)}; expected 0 (all) or more")

    def rows(self, home: Path, split: str) -> Rows:
        """Class number and text of each sample of a split, from the official files in ``home``."""
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def class_names(self) -> list[str]:
        """Names in the official order."""
        return list(self.labels)

    def home(self) -> Path:
        """The folder with the official files: the root, or the official folder in it; else the root."""
        root = super().home()
        for folder in (root, *(root / name for name in self.folders)):
            if any((folder / mark).exists() for mark in self.marks):
                return folder
        return root

    def read_split(self, split: str) -> ArrayData:
        """Token ids (N, L) and classes (N,).

        Raises:
            UserError: a missing or broken file, or no sample.
        """
        import numpy as np

        count = self.train_samples if split == "train" else self.test_samples
        if count:  # Two passes: the texts that are not chosen need not fit into memory.
            chosen = stratified([label for label, _ in self._rows(split)], count, self.subset_seed, split)
            wanted = set(chosen.tolist())
            rows = [row for place, row in enumerate(self._rows(split)) if place in wanted]
            _log.info("%s: %d samples of %s, stratified", self.name, len(rows), split)
        else:
            rows = list(self._rows(split))
        if not rows:
            raise UserError(f"{self.name}: the {split} split is empty; {self.remedy}")
        return self.encode([(text,) for _, text in rows], np.array([label for label, _ in rows], dtype=np.int64))

    def _rows(self, split: str) -> Rows:
        home = self.home()
        if not any((home / mark).exists() for mark in self.marks):
            for ending in _TABLES:
                if (home / f"{split}{ending}").is_file():
                    return self._table(home / f"{split}{ending}")
        return self.rows(home, split)

    def _table(self, path: Path) -> Rows:
        columns, rows, skipped = read_table(path, self.name)
        if skipped:
            raise UserError(f"{self.name}: {skipped} rows of {path} have no text or label; fill or remove them")
        text = pick(columns, ("text", "sentence"), path, self.name, "text")
        target = pick(columns, ("label",), path, self.name, "label")
        names = self.class_names()
        for number, row in enumerate(rows, start=1):
            yield label_number(row[target], names, path, number, self.name), row[text]
