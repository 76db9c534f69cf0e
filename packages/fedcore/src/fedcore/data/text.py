"""Texts to token ids: hashed words and word pairs for the bag model, or a tokenizer of transformers from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from fedcore.data.array_type import ArrayData
from fedcore.data.base import FedData

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TextData"]


@dataclass
class TextData(FedData):
    """Base class: a subclass reads texts (or pairs of texts) and targets.

    Args:
        root: folder of the data set.
        tokenizer: local folder with a tokenizer of transformers; none: the model's for ``hf:FOLDER``, else hashed
            words.
        ngrams: hashed words: longest run of words that counts as one token, 1..5.
        buckets: hashed words: number of ids they are hashed into.
        max_length: most words (or tokens, with a tokenizer) of a text; 0: 128 for pairs, 64 for single texts.
        trim: cut each batch to its longest text; false: batches of one width, which clients need that are computed
            together (federation.engine=batched).
    """

    tokenizer: Path | None = None
    ngrams: int = 2
    buckets: int = 16384
    max_length: int = 0
    trim: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None:
            self.tokenizer = Path(self.tokenizer).expanduser()
        if not 1 <= self.ngrams <= 5:
            raise UserError(f"ngrams={self.ngrams}; expected 1..5 words a token")
        if self.buckets < 1:
            raise UserError(f"buckets={self.buckets}; expected at least 1")
        if self.max_length < 0:
            raise UserError(f"max_length={self.max_length}; expected 0 (the default) or more")

    @property
    def pairs(self) -> bool:
        """Whether a sample is two texts."""
        return False

    @property
    def length(self) -> int:
        """Most words or tokens of a sample."""
        return self.max_length or (128 if self.pairs else 64)

    def fit_to_model(self, model: str) -> None:
        """Take the tokenizer of the model ``hf:FOLDER`` unless one was given; call it before anything is read.

        ``text_transformer`` sees the order of words itself: the default runs of two words become single words.
        """
        if model == "text_transformer" and self.ngrams == type(self).ngrams:
            self.ngrams = 1
        library, _, folder = model.partition(":")
        if library == "hf" and self.tokenizer is None:
            self.tokenizer = Path(folder).expanduser()

    @property
    def vocabulary(self) -> int:
        """Number of stored ids: padding 0, and the hash buckets or the tokenizer's ids, one higher."""
        return 1 + (self.buckets if self.tokenizer is None else len(self._tokenizer()))

    def encode(self, texts: Sequence[tuple[str, ...]], targets: np.ndarray, **options: Any) -> ArrayData:
        """Samples from texts.

        Args:
            texts: one text, or two, a sample.
            targets: (N,) classes (integers) or numbers.
            options: further arguments of ``ArrayData``.
        """
        import torch

        from fedcore.data.arrays import ArrayData
        from fedcore.data.text_ids import hash_ids, padded
        from fedcore.data.transforms import Trim

        if self.tokenizer is None:
            rows = [hash_ids(sample, self.ngrams, self.buckets, self.length) for sample in texts]
        else:
            columns = [list(column) for column in zip(*texts, strict=True)]
            coded = self._tokenizer()(*columns, truncation=True, max_length=self.length)["input_ids"] if columns else []
            rows = [[number + 1 for number in ids] for ids in coded]
        values = torch.from_numpy(targets)
        values = values.float() if self.regression else values.long()
        return ArrayData(padded(rows), values, transform=Trim() if self.trim else None, **options)

    def _tokenizer(self) -> Any:
        known: dict[str, Any] = self.__dict__.setdefault("_tokenizers", {})
        if not known:
            assert self.tokenizer is not None
            from fedcore.data.text_ids import load_tokenizer

            known["tokenizer"] = load_tokenizer(self.tokenizer)
        return known["tokenizer"]
