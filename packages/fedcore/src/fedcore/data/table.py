"""Users' own table: texts or numbers, a target, perhaps a client of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polymodal.errors import UserError, did_you_mean

from fedcore.data.array_type import ArrayData
from fedcore.data.own import check_share, file_of, held_out
from fedcore.data.text import TextData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Table"]


@dataclass
class Table(TextData):
    """A CSV, TSV or JSON file with a column for the target, and either a column of texts or columns of numbers.

    Columns of numbers are brought to mean 0 and deviation 1 by the training split. The file has all samples; a share
    of them is held out, or a column says which split a row is in.

    Args:
        root: the file: ``.csv``, ``.tsv``, ``.json`` or ``.jsonl``.
        tokenizer: for texts: local folder with a tokenizer of transformers; none: hashed words.
        ngrams: for texts: longest run of words that counts as one token.
        buckets: for texts: number of ids that words are hashed into.
        max_length: for texts: most words; 0: 64.
        trim: for texts: cut each batch to its longest text; false: batches of one width, for the batched engine.
        target: column with the class (any text; numbered in sorted order).
        text: column with the text; none: all other columns are numbers.
        client: column with the natural client of each row.
        split: column with ``train`` or ``test``; none: ``test_share`` of each class is held out.
        test_share: as above, 0..1.
        split_seed: which those are; the seed of a run does not change the data.
    """

    target: str = "label"
    text: str = ""
    client: str = ""
    split: str = ""
    test_share: float = 0.2
    split_seed: int = 0

    name: ClassVar[str] = "csv"
    remedy: ClassVar[str] = "give a .csv, .tsv, .json or .jsonl file with a header"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)

    @property
    def vocabulary(self) -> int:
        """As of texts; 0 for numbers."""
        return super().vocabulary if self.text else 0

    def class_names(self) -> list[str]:
        """Values of the target column in sorted order; numerically where all are whole numbers."""
        values = {row[self.target] for row in self._rows()}
        whole = all(value.lstrip("-").isdecimal() for value in values)
        return sorted(values, key=int) if whole else sorted(values)

    def read_split(self, split: str) -> ArrayData:
        """Samples of a split.

        Raises:
            UserError: a missing or broken file, column or number.
        """
        import numpy as np
        import torch

        from fedcore.data.arrays import ArrayData

        rows, numbers = self._rows(), {name: place for place, name in enumerate(self.class_names())}
        labels = np.array([numbers[row[self.target]] for row in rows], dtype=np.int64)
        chosen = self._chosen(rows, labels, split)
        options: dict[str, Any] = {}
        if self.client:
            names = sorted({row[self.client] for row in rows})
            places = {name: place for place, name in enumerate(names)}
            groups = [places[rows[index][self.client]] for index in chosen]
            options = {"groups": torch.tensor(groups, dtype=torch.long), "group_names": names}
        if self.text:
            return self.encode([(rows[index][self.text],) for index in chosen], labels[chosen], **options)
        values = self._numbers(rows)
        fit = values[self._chosen(rows, labels, "train")]
        scale = fit.std(axis=0)
        values = (values[chosen] - fit.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
        return ArrayData(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels[chosen]), **options)

    def _rows(self) -> list[dict[str, str]]:
        from fedcore.data.table_files import read_table

        known: dict[str, list[dict[str, str]]] = self.__dict__.setdefault("_table", {})
        if not known:
            path = file_of(self)
            columns, rows, skipped = read_table(path, self.name)
            if skipped:
                raise UserError(f"csv: {skipped} rows of {path} have fewer cells than its header; fill or remove them")
            for option in ("target", "text", "client", "split"):
                column = getattr(self, option)
                if column and column not in columns:
                    hint = did_you_mean(column, columns)
                    raise UserError(
                        f"csv: {path} has no column {column!r} (--data.{option}); {hint}columns:"
                        f" {', '.join(columns[:20])}"
                    )
            known["rows"] = rows
        return known["rows"]

    def _chosen(self, rows: list[dict[str, str]], labels: np.ndarray, split: str) -> np.ndarray:
        import numpy as np

        if not self.split:
            return held_out(labels, self.test_share, self.split_seed, split, False)
        return np.array([index for index, row in enumerate(rows) if row[self.split] == split], dtype=np.int64)

    def _numbers(self, rows: list[dict[str, str]]) -> np.ndarray:
        import numpy as np

        columns = [name for name in rows[0] if name not in (self.target, self.client, self.split)]
        if not columns:
            raise UserError(f"csv: {self.root} has no column beside the target; name the texts with --data.text COLUMN")
        values = np.empty((len(rows), len(columns)), dtype=np.float64)
        for number, row in enumerate(rows):
            for place, name in enumerate(columns):
                try:
                    values[number, place] = float(row[name])
                except ValueError as error:
                    raise UserError(
                        f"csv: {self.root}, row {number + 1}: {name} is {row[name]!r}; expected a number, or name the"
                        " column of texts with --data.text"
                    ) from error
        if not np.isfinite(values).all():
            where, place = (int(found[0]) for found in np.nonzero(~np.isfinite(values)))
            raise UserError(f"csv: {self.root}, row {where + 1}: {columns[place]} is not finite; fill or remove it")
        return values
