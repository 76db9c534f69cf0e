"""Configuration of ``slt-eval`` and ``slt-translate``: what their ``--help`` lists.

The parser runs a module's ``if TYPE_CHECKING`` imports to understand its annotations, hence a module without any.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from polymodal.config import JobConfig

from slt.data.base import SLTData

__all__ = ["EvalConfig", "RunData", "TranslateConfig"]


@dataclass
class RunData(SLTData):
    """Placeholder on the command line: the data of the checkpoint's run, some options replaced.

    Args:
        root: another folder with the same data set; default: where the run had it.
        questions: another folder with question files; default: the run's.
        allow_missing: give an empty question to videos that the question file does not have; default: as the run.
        lowercase: lower-case texts; default: as the run.
        append_period: append " ." to every sentence; default: as the run.
    """

    allow_missing: bool | None = None  # type: ignore[assignment]
    lowercase: bool | None = None  # type: ignore[assignment]
    append_period: bool | None = None  # type: ignore[assignment]

    name: ClassVar[str] = "run"

    def resolve(self, base: SLTData) -> SLTData:
        """``base`` with the options that were given here."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


@dataclass
class EvalConfig(JobConfig):
    """Audited scores of question-based sign language translation."""

    seed: int = 0
    """draws the shuffled questions; with --checkpoint it is the training run's"""
    checkpoint: Path | None = None
    """run folder of slt-train (its best weights) or checkpoint in one: translate, then score"""
    pred: Path | None = None
    """translations to score: .jsonl with {"video_id", "prediction"}, or text, one line a clip in split order"""
    reference: Path | None = None
    """with --pred, not --data: .jsonl with {"video_id", "sentence", "question"?}, e.g. a question file"""
    split: Literal["test", "dev"] = "test"
    """part of the data"""
    question_only: Path | None = None
    """translations made without video: file as for --pred, or run folder (default: the run's own probe)"""
    probes: bool = True
    """translate with other clips' questions and with none, too (frames are encoded once)"""
    level: Literal["", "word", "char"] = ""
    """with --reference: unit of BLEU and ROUGE (readers of --data know theirs) [word]"""
    lowercase: bool = False
    """with --reference: lower-case all texts (with --data: --data.lowercase)"""
    samples: int = 8
    """translations in the table of samples"""
    num_workers: int | None = None
    """processes that decode frames (default: the training run's)"""
    feature_cache: Path | None = None
    """features of the clips, for a model with backbone=features (default: the training run's cache)"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute; float32 everywhere"""
    data: SLTData = field(default_factory=RunData, metadata={"class_typed": True})
    """the training run's data and options where not given"""


@dataclass
class TranslateConfig:
    """Translate clips with a trained model."""

    checkpoint: Path | None = None
    """run folder of slt-train (its best weights) or checkpoint in one"""
    video: list[str] = field(default_factory=list)
    """video file, folder of frames, .pose file (pose models), or clip id of the run's data; one or more"""
    question: list[str] = field(default_factory=list)
    """question that the signer answers: one for all clips, or one each; none: translate without"""
    picture: Path | None = None
    """draw weights and evidence into this file; several clips: a number is added to the name [translation.png]"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute; float32 everywhere"""
    threads: int | None = None
    """intra-op CPU threads (default 1)"""
