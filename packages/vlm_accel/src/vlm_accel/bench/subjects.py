"""What a bench runs on: samples as inputs for ``generate``, and how answers to them are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor

from vlm_accel.bench.settings import BenchConfig

if TYPE_CHECKING:
    from vlm_accel.data.jsonl import Sample
    from vlm_accel.loading import VisionLanguageModel

__all__ = ["DigitSubject", "JsonlSubject", "Subject", "collate"]


class Subject(ABC):
    """A model and its samples.

    Attributes:
        vlm: model and processor.
        facts: name and fingerprint of the data.
    """

    vlm: VisionLanguageModel
    facts: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Samples."""

    @abstractmethod
    def inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of ``generate`` for samples by their numbers, as one batch."""

    @abstractmethod
    def score(self, ids: list[Tensor]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics by full name (``test/...``), and predictions one a sample, from the new tokens of all samples."""

    def signature(self, metric: str) -> str:
        """How a metric is measured, in one line."""
        return "whole answers, greedy decoding"

    def batches(self, size: int, count: int | None = None) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """(numbers, inputs) of the first ``count`` samples, ``size`` at a time."""
        total = len(self) if count is None else min(count, len(self))
        for first in range(0, total, size):
            numbers = list(range(first, min(first + size, total)))
            yield numbers, self.inputs(numbers)


class DigitSubject(Subject):
    """The built-in model on test canvases.

    Args:
        config: of the bench.
        vlm: the built-in model.
    """

    def __init__(self, config: BenchConfig, vlm: VisionLanguageModel) -> None:
        import numpy as np

        from vlm_accel.bench import world
        from vlm_accel.bench.built_in import describe

        self.vlm = vlm
        self.facts = describe(config)
        self.samples = world.draw_samples(config.built_in.world, "test", np.arange(config.built_in.test))

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Prompts of one length: no padding."""
        from vlm_accel.bench.model import pixels_of

        rows = list(numbers)
        prompt = torch.from_numpy(self.samples.prompt[rows])
        pixels = pixels_of(self.samples.canvas[rows])
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}

    def score(self, ids: list[Tensor]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Share of answers that are right to the last token, of all and by question."""
        from vlm_accel.bench.world import KINDS

        found = [self._text(row.tolist()) for row in ids]
        wanted = [self._text(row.tolist()) for row in self.samples.answer]
        right = [a == b for a, b in zip(found, wanted, strict=True)]
        kinds = self.samples.kind.tolist()
        metrics = {"test/accuracy": sum(right) / len(right)}
        for number, name in enumerate(KINDS):
            mine = [ok for ok, kind in zip(right, kinds, strict=True) if kind == number]
            metrics[f"test/accuracy_{name}"] = sum(mine) / max(1, len(mine))
        rows = [
            {"id": str(number), "question": KINDS[kinds[number]], "answer": wanted[number], "prediction": text}
            for number, text in enumerate(found)
        ]
        return metrics, rows

    @staticmethod
    def _text(ids: list[int]) -> str:
        from vlm_accel.bench.world import EOS, VOCABULARY

        return " ".join(VOCABULARY[i] for i in (ids[: ids.index(EOS)] if EOS in ids else ids))


class JsonlSubject(Subject):
    """A checkpoint on samples of JSONL files.

    Args:
        config: of the bench.
        vlm: the checkpoint.
        samples: of all tasks.
        fingerprint: of the files.
    """

    def __init__(self, config: BenchConfig, vlm: VisionLanguageModel, samples: list[Sample], fingerprint: str) -> None:
        self.vlm, self.samples, self.config = vlm, samples, config
        tasks = dict.fromkeys(sample.task for sample in samples)
        self.facts = {"name": "+".join(tasks), "fingerprint": fingerprint, "samples": len(samples)}

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Prompts of the processor's chat template, padded on the left."""
        from vlm_accel.media import read_image, read_video
        from vlm_accel.metrics.tasks import prompt_text

        made = []
        for number in numbers:
            sample = self.samples[number]
            images = [read_image(path) for path in sample.images]
            video = read_video(sample.video, self.config.frames) if sample.video is not None else None
            made.append(self.vlm.prompt(prompt_text(sample), images, video))
        model: Any = self.vlm.model
        return collate(made, model.generation_config.pad_token_id or 0)

    def score(self, ids: list[Tensor]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of every task, and the predictions."""
        from vlm_accel.metrics.tasks import score_tasks

        texts = [self.vlm.processor.batch_decode(row[None], skip_special_tokens=True)[0].strip() for row in ids]
        return score_tasks(self.samples, texts, self.config.metric)

    def signature(self, metric: str) -> str:
        """The task's metric of ``vlm_accel.metrics``."""
        from vlm_accel.metrics.tasks import task_info

        if metric == "test/retained":
            return "mean over tasks, main metric of each"
        return f"{task_info(metric.split('/')[1], self.config.metric).metric}, greedy decoding"


_PADDED = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}
"""inputs with one column a token, and what pads them; None: the padding token"""


def collate(inputs: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """One batch of single prompts: tokens padded on the left, pictures one after the other.

    Raises:
        UserError: pictures that make tensors of different shapes.
    """
    if len(inputs) == 1:
        return inputs[0]
    longest = max(one["input_ids"].shape[1] for one in inputs)
    batch = {}
    for name in inputs[0]:
        rows = [one[name] for one in inputs if name in one]
        if name in _PADDED:
            value = pad if _PADDED[name] is None else 0
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows]
        try:
            batch[name] = torch.cat(rows)
        except RuntimeError as error:
            raise UserError(
                f"--batch {len(inputs)}: {name} of these samples has different shapes; use --batch 1"
            ) from error
    return batch
