"""From samples to a batch: frames packed end to end, texts tokenised and padded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from polymodal.errors import UserError
from torch import Tensor

from slt.data.base import collapse

__all__ = ["Batch", "Collate", "Sample", "TextEncoder", "sentence_id"]


class TextEncoder(Protocol):
    """What the collate function needs of a tokenizer."""

    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Encoder form ``tokens </s> <tag>``."""
        ...

    def encode_words(self, words: list[str], unit: str) -> list[int]:
        """Encoder form of units, where ``"<mask>"`` becomes the mask token; ``unit`` is ``word`` or ``char``."""
        ...


@dataclass(frozen=True)
class Sample:
    """One clip as the dataset gives it.

    Args:
        id: name of the video.
        question: text, may be empty.
        sentence: text.
        frames: ``(T, 3, H, W)`` uint8, or ``(T, P, 4)`` float32 for poses.
        masked_question: units of the question, some of them ``"<mask>"``.
        masked_sentence: units of the sentence, some of them ``"<mask>"``.
    """

    id: str
    question: str
    sentence: str
    frames: Tensor
    masked_question: tuple[str, ...]
    masked_sentence: tuple[str, ...]


@dataclass
class Batch:
    """B clips. Masks are boolean, True = valid; the encoder form of a text is ``tokens </s> <tag>``.

    Args:
        ids: names of the videos.
        questions: texts; empty where there is none.
        sentences: texts.
        frames: valid frames of all clips end to end, N = sum of lengths: ``(N, 3, H, W)`` uint8, or ``(N, P, 4)``
            float32 for poses.
        lengths: ``(B,)`` int64, frames of each clip.
        question_ids: ``(B, Lq)`` int64; the row of an empty question is all padding, and Lq may be 0.
        question_mask: ``(B, Lq)``.
        sentence_ids: ``(B, Ls)`` int64.
        sentence_mask: ``(B, Ls)``.
        masked_question_ids: the corrupted question (outside training: the question), ``(B, Lq')`` int64.
        masked_question_mask: ``(B, Lq')``.
        masked_sentence_ids: the corrupted sentence, ``(B, Ls')`` int64.
        masked_sentence_mask: ``(B, Ls')``.
        positives: ``(B,)`` int64, equal for equal sentences.
    """

    ids: list[str]
    questions: list[str]
    sentences: list[str]
    frames: Tensor
    lengths: Tensor
    question_ids: Tensor
    question_mask: Tensor
    sentence_ids: Tensor
    sentence_mask: Tensor
    masked_question_ids: Tensor
    masked_question_mask: Tensor
    masked_sentence_ids: Tensor
    masked_sentence_mask: Tensor
    positives: Tensor

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with all tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return len(self.ids)


def sentence_id(sentence: str) -> int:
    """Number in [0, 2**63) that is equal for sentences equal but for case and white space; the same everywhere."""
    digest = hashlib.blake2b(collapse(sentence).casefold().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Collate:
    """Makes a :class:`Batch` of samples; picklable, so that workers can run it.

    Args:
        tokenizer: see :class:`TextEncoder`.
        level: ``word`` or ``char``: the units of corrupted texts.
        max_question_tokens: longer questions lose tokens at their end; end and language tag stay.
        max_sentence_tokens: longer sentences are an error.
    """

    def __init__(
        self,
        tokenizer: TextEncoder,
        level: str = "word",
        max_question_tokens: int = 64,
        max_sentence_tokens: int = 1024,
    ) -> None:
        if max_question_tokens < 3:
            raise UserError(f"max_question_tokens={max_question_tokens}; expected at least 3 (token, end, tag)")
        self.tokenizer = tokenizer
        self.level = level
        self.max_question_tokens = max_question_tokens
        self.max_sentence_tokens = max_sentence_tokens

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Batch of at least one sample, in the given order."""
        questions = [self._question(self.tokenizer.encode(s.question)) if s.question else [] for s in samples]
        masked_questions = [self._question(self._units(s.masked_question)) for s in samples]
        question_ids, question_mask = self._pad(questions)
        masked_question_ids, masked_question_mask = self._pad(masked_questions)
        sentence_ids, sentence_mask = self._pad(
            [self._sentence(s.id, self.tokenizer.encode(s.sentence)) for s in samples]
        )
        masked_sentence_ids, masked_sentence_mask = self._pad(
            [self._sentence(s.id, self._units(s.masked_sentence)) for s in samples]
        )
        return Batch(
            ids=[s.id for s in samples],
            questions=[s.question for s in samples],
            sentences=[s.sentence for s in samples],
            frames=_pack(samples),
            lengths=torch.tensor([len(s.frames) for s in samples], dtype=torch.int64),
            question_ids=question_ids,
            question_mask=question_mask,
            sentence_ids=sentence_ids,
            sentence_mask=sentence_mask,
            masked_question_ids=masked_question_ids,
            masked_question_mask=masked_question_mask,
            masked_sentence_ids=masked_sentence_ids,
            masked_sentence_mask=masked_sentence_mask,
            positives=torch.tensor([sentence_id(s.sentence) for s in samples], dtype=torch.int64),
        )

    def ask(self, batch: Batch, questions: Sequence[str]) -> Batch:
        """The same clips with other questions, one for each; corrupted copies stay as they are.

        Args:
            batch: B clips.
            questions: B texts; empty where there is none.
        """
        ids, mask = self._pad([self._question(self.tokenizer.encode(q)) if q else [] for q in questions])
        return replace(batch, questions=list(questions), question_ids=ids, question_mask=mask)

    def _units(self, units: Sequence[str]) -> list[int]:
        return self.tokenizer.encode_words(list(units), self.level) if units else []

    def _question(self, ids: list[int]) -> list[int]:
        limit = self.max_question_tokens
        return ids if len(ids) <= limit else [*ids[: limit - 2], *ids[-2:]]

    def _sentence(self, name: str, ids: list[int]) -> list[int]:
        if len(ids) > self.max_sentence_tokens:
            raise UserError(
                f"sentence of video {name} has {len(ids)} tokens, the model has {self.max_sentence_tokens} positions;"
                " shorten the sentence or raise model.max_positions"
            )
        return ids

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[number, : len(row)] = True
        return ids, mask


def _pack(samples: Sequence[Sample]) -> Tensor:
    shapes = {tuple(s.frames.shape[1:]) for s in samples}
    if len(shapes) > 1:
        other = next(s for s in samples if s.frames.shape[1:] != samples[0].frames.shape[1:])
        raise UserError(
            f"clip {other.id} has frames of shape {tuple(other.frames.shape[1:])}, clip {samples[0].id} of"
            f" {tuple(samples[0].frames.shape[1:])}; one model takes one shape"
        )
    return torch.cat([s.frames for s in samples])
