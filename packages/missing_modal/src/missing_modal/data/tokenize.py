"""Texts as token ids: CLIP's byte pairs, offline from open_clip's own file, or a tokenizer in a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLIP_CONTEXT", "CLIP_VOCABULARY", "Tokenize", "tokenizer"]

CLIP_CONTEXT = 77
CLIP_VOCABULARY = 49408
"""the last id is the end of text, the one before the start"""
Tokenize = Callable[[Sequence[str]], "Tensor"]


@functools.lru_cache(maxsize=4)
def tokenizer(source: str = "clip", context: int = CLIP_CONTEXT) -> Tokenize:
    """A function from n texts to (n, context) int64 ids.

    Each row is start, tokens, end, zeros; what is too long is cut and its last id replaced by the end (DCP 3.6). An
    empty text is start and end alone, the placeholder of a missing one (DCP 4.2).

    Args:
        source: ``clip`` for CLIP's vocabulary as open_clip ships it; else a folder with a Hugging Face CLIP tokenizer
            (``vocab.json`` and ``merges.txt``, or ``tokenizer.json``).
        context: ids of a row, at least 3.

    Raises:
        UserError: a missing extra, a folder without a tokenizer, a context that is too short.
    """
    if context < 3:
        raise UserError(f"context={context}; expected at least 3: start, one token, end (CLIP: {CLIP_CONTEXT})")
    encode, start, end = _clip() if source == "clip" else _folder(Path(source).expanduser())

    def tokenize(texts: Sequence[str]) -> Tensor:
        import torch

        ids = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in enumerate(texts):
            found = [start, *encode(text), end][:context]
            found[-1] = end
            ids[row, : len(found)] = torch.tensor(found)
        return ids

    return tokenize


def _clip() -> tuple[Callable[[str], list[int]], int, int]:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise UserError(
            "CLIP's vocabulary comes with open_clip; install it: "
            'uv pip install "polymodal-missing-modal[open_clip]", or name a folder with a CLIP tokenizer'
        ) from error
    bpe: Any = SimpleTokenizer()
    return bpe.encode, int(bpe.sot_token_id), int(bpe.eot_token_id)


def _folder(folder: Path) -> tuple[Callable[[str], list[int]], int, int]:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"tokenizer {folder}: neither tokenizer.json nor vocab.json is there; give CLIP's folder, or clip"
        )
    from transformers import CLIPTokenizer

    try:
        loaded = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer {folder} cannot be read ({str(error).splitlines()[0]}); copy it again") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode, int(loaded.bos_token_id), int(loaded.eos_token_id)
