"""Words to hashed ids, rows of ids to one padded tensor, tokenizers from a folder."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.paths import require_dir
from torch import Tensor

__all__ = ["hash_ids", "load_tokenizer", "padded", "words"]


_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]+")


def words(text: str) -> list[str]:
    """Lower-case words and runs of punctuation (which carry the mood in short texts)."""
    return _WORD.findall(text.lower())


def hash_ids(texts: Iterable[str], ngrams: int, buckets: int, length: int) -> list[int]:
    """Ids 1..buckets of all runs of 1..``ngrams`` words; those of a second text are hashed apart from the first's.

    Args:
        texts: one text or two.
        ngrams: longest run.
        buckets: number of ids.
        length: most words of all texts together; each of two texts gets half, and what the other leaves.
    """
    cut = _shared([words(text) for text in texts], length)
    found = []
    for place, sequence in enumerate(cut):
        for run in range(1, ngrams + 1):
            for start in range(len(sequence) - run + 1):
                token = f"{place}\x1f" + "\x1f".join(sequence[start : start + run])
                found.append(zlib.crc32(token.encode("utf-8", "surrogatepass")) % buckets + 1)
    return found


def _shared(sequences: list[list[str]], length: int) -> list[list[str]]:
    """Cut one or two sequences so that all together have at most ``length`` words."""
    if len(sequences) == 1:
        return [sequences[0][:length]]
    first, second = sequences
    kept = min(len(first), max(length // 2, length - len(second)))
    return [first[:kept], second[: length - kept]]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(N, longest) int32, padded with 0 at the end."""
    longest = max([1, *map(len, rows)])
    table = np.zeros((len(rows), longest), dtype=np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table)


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers that pads at the end.

    Raises:
        UserError: no such folder, no tokenizer in it, none with padding, or transformers is missing.
    """
    require_dir(folder, "tokenizer", "give a local folder with tokenizer.json, e.g. that of the model")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(f"tokenizer {folder} needs transformers: pip install 'polymodal-fedcore[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"transformers cannot load a tokenizer from {folder}: {reason}") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no padding token; set pad_token in its tokenizer_config.json")
    tokenizer.padding_side = "right"
    return tokenizer
