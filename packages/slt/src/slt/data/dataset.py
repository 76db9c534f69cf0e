"""A split as samples whose every random draw is a function of (seed, epoch, video)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.seeding import derive, generator
from torch import Tensor
from torch.utils.data import Dataset

from slt.data.base import Item, SLTData
from slt.data.collate import Sample
from slt.data.options import LoaderConfig
from slt.data.transforms import ClipTransform, draw_augmentation
from slt.ops.corrupt import corrupt, split_units
from slt.ops.lengths import frame_indices

__all__ = ["SLTDataset"]


class SLTDataset(Dataset[Sample]):
    """One split of a reader.

    An item is asked for as ``(index, epoch)``: augmentation, thinning of long clips, masked words and dropped
    questions then do not depend on which worker loads it, or when.

    Args:
        reader: the data.
        split: ``train``, ``dev`` or ``test``.
        config: loader options.
        train: draw at random; otherwise every epoch is the same.
        seed: root seed of the draws.
        cache: keep decoded clips in memory (in this process).
        load_frames: false gives clips without frames, for a model that looks at the question only.

    Raises:
        UserError: the split has no clip, or reading it failed.
    """

    def __init__(
        self,
        reader: SLTData,
        split: str,
        config: LoaderConfig,
        *,
        train: bool = False,
        seed: int = 0,
        cache: bool = False,
        load_frames: bool = True,
    ) -> None:
        self.reader, self.split, self.config, self.train, self.seed = reader, split, config, train, seed
        self.items: list[Item] = reader.items(split)
        if not self.items:
            raise UserError(f"{reader.name} {split}: no clips; check the annotation of this split")
        self.transform = ClipTransform(config.frame_size, config.resize) if reader.modality == "frames" else None
        self._cache: dict[int, np.ndarray] | None = {} if cache else None
        self.load_frames = load_frames

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip as the model sees them (after thinning)."""
        return [min(item.num_frames, self.config.max_frames) for item in self.items]

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """The sample at ``(index, epoch)``; a bare index is epoch 0.

        Raises:
            UserError: a missing or broken file of this clip.
        """
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        item = self.items[index]
        question = item.question
        if self.train and derive(self.seed, "question-dropout", epoch, item.id) / 2**63 < self.config.question_dropout:
            question = ""
        return Sample(
            id=item.id,
            question=question,
            sentence=item.sentence,
            frames=self._frames(index, epoch),
            masked_question=self._masked(question, "question", epoch, item.id),
            masked_sentence=self._masked(item.sentence, "sentence", epoch, item.id),
        )

    def _draws(self, what: str, epoch: int, name: str) -> torch.Generator | None:
        return generator(self.seed, what, epoch, name) if self.train else None

    def _masked(self, text: str, what: str, epoch: int, name: str) -> tuple[str, ...]:
        units = split_units(text, self.reader.level)
        draws = self._draws(f"corrupt-{what}", epoch, name) if units else None
        return tuple(corrupt(units, self.config.corruption, self.config.corruption_rate, draws))

    def _frames(self, index: int, epoch: int) -> Tensor:
        if not self.load_frames:
            return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        item = self.items[index]
        chosen = frame_indices(item.num_frames, self.config.max_frames, self._draws("frames", epoch, item.id))
        frames = self._decode(index, chosen)
        if self.transform is None:
            return torch.from_numpy(np.require(frames, dtype=np.float32, requirements=["C", "W"]))
        augment = self.train and self.config.augment == "paper"
        return self.transform(
            frames, draw_augmentation(generator(self.seed, "augment", epoch, item.id)) if augment else None
        )

    def _decode(self, index: int, chosen: Sequence[int]) -> np.ndarray:
        item = self.items[index]
        if self._cache is None:
            return self.reader.load(item, chosen)
        if index not in self._cache:
            self._cache[index] = self.reader.load(item, range(item.num_frames))
        clip = self._cache[index]
        return clip if len(chosen) == len(clip) else clip[list(chosen)]
