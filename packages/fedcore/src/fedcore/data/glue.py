"""The nine GLUE tasks from their official TSV files, or from a folder a task with CSV or JSON files."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.errors import UserError

from fedcore.data.array_type import ArrayData
from fedcore.data.glue_tasks import TASKS, GlueTask
from fedcore.data.table_files import pick, read_table
from fedcore.data.text import TextData

__all__ = ["MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST2", "STSB", "WNLI", "CoLA", "Glue"]

_ENDINGS = (".tsv", ".csv", ".json", ".jsonl")
TaskName = Literal["sst2", "cola", "mrpc", "qqp", "qnli", "rte", "wnli", "mnli", "stsb"]
_log = logging.getLogger(__name__)


@dataclass
class Glue(TextData):
    """A GLUE task; its development set is the test split (test labels are not public).

    ``<root>/[TASK/]{train,dev}.tsv`` as official (MNLI: ``dev_matched``, ``dev_mismatched``), or
    ``<root>/[task/]{train,validation}.{csv,json,jsonl}`` with columns such as ``text1``, ``text2``, ``label``.
    Lines of an official file with too few cells, and pairs that annotators did not agree on, are left out and counted.

    Args:
        root: the folder that holds the tasks' folders, or the task's folder itself.
        tokenizer: local folder with a tokenizer of transformers; none: hashed words.
        ngrams: longest run of words that counts as one token.
        buckets: number of ids that words are hashed into.
        max_length: most words or tokens of a sample; 0: 128 for pairs, 64 for single texts.
        trim: cut each batch to its longest text; false: batches of one width, for the batched engine.
        task: which of the nine; ``--data glue:sst2`` is short for ``--data glue --data.task sst2``.
    """

    task: TaskName = "sst2"

    name: ClassVar[str] = "glue"
    remedy: ClassVar[str] = "give the folder that holds the tasks' folders (SST-2, MRPC, ...), or that of the task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise UserError(f"glue task {self.task!r}; expected one of {', '.join(TASKS)}")

    @property
    def spec(self) -> GlueTask:
        """Folder, columns and labels of the task."""
        return TASKS[self.task]

    @property
    def splits(self) -> tuple[str, ...]:
        """MNLI has a second test split, ``test_mismatched``."""
        return ("train", *(split for split, _ in self.spec.dev))

    @property
    def pairs(self) -> bool:
        """All tasks but SST-2 and CoLA."""
        return self.spec.pairs

    @property
    def regression(self) -> bool:
        """STS-B: scores 0..5."""
        return not self.spec.labels

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in ``fedcore.data.metrics``."""
        return self.spec.metrics

    def class_names(self) -> list[str]:
        """Labels in the order of their numbers."""
        return list(self.spec.labels)

    def home(self) -> Path:
        """The task's folder: in the root under its official or its short name, or the root itself."""
        root = super().home()
        for name in (self.spec.folder, self.task, self.spec.folder.lower()):
            if (root / name).is_dir():
                return root / name
        return root

    def read_split(self, split: str) -> ArrayData:
        """Token ids (N, L) and labels, or scores.

        Raises:
            UserError: a missing or broken file, column or label.
        """
        import numpy as np

        path, spec = self._file(split), self.spec
        columns, rows, skipped = read_table(path, self._what, spec.header if path.suffix == ".tsv" else ())
        texts = [pick(columns, spec.first, path, self._what, "text")]
        if spec.second:
            texts.append(pick(columns, spec.second, path, self._what, "second text"))
        target = pick(columns, spec.target, path, self._what, "label")
        kept = [row for row in rows if row[target] != "-"]
        skipped += len(rows) - len(kept)
        if skipped:
            _log.info("%s: %d lines of %s left out (cells missing, or no agreed label)", self._what, skipped, path)
        values = [self._value(row[target], path, number) for number, row in enumerate(kept, start=1)]
        samples = [tuple(row[column] for column in texts) for row in kept]
        return self.encode(samples, np.asarray(values, dtype=np.float32 if self.regression else np.int64))

    def describe(self) -> dict[str, Any]:
        """As of every reader, with the task's name."""
        return super().describe() | {"name": self._what}

    @property
    def _what(self) -> str:
        return f"glue:{self.task}"

    def _file(self, split: str) -> Path:
        """The first file of a split that is there, under its official name or the common one."""
        home = self.home()
        official = "train" if split == "train" else dict(self.spec.dev)[split]
        common = [official, official.replace("dev", "validation"), *(["validation", "dev"] if split == "test" else [])]
        for stem in common:
            for ending in _ENDINGS:
                if (home / f"{stem}{ending}").is_file():
                    return home / f"{stem}{ending}"
        raise UserError(f"{self._what}: {home / official}.tsv is missing, nor is there {common[1]}.csv; {self.remedy}")

    def _value(self, text: str, path: Path, row: int) -> float | int:
        labels = self.spec.labels
        if text in labels:
            return labels.index(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not labels and math.isfinite(number):
            return number
        if labels and number in range(len(labels)):
            return int(number)
        wanted = f"0..{len(labels) - 1} or {', '.join(labels)}" if labels else "a score 0..5"
        raise UserError(f"{self._what}: {path}, row {row}: label {text!r}; expected {wanted}")


@dataclass
class SST2(Glue):
    """Sentiment of film review sentences; see ``Glue``."""

    task: TaskName = "sst2"


@dataclass
class CoLA(Glue):
    """Acceptable sentences; see ``Glue``."""

    task: TaskName = "cola"


@dataclass
class MRPC(Glue):
    """Paraphrases in news; see ``Glue``."""

    task: TaskName = "mrpc"


@dataclass
class QQP(Glue):
    """Duplicate questions; see ``Glue``."""

    task: TaskName = "qqp"


@dataclass
class QNLI(Glue):
    """Whether a sentence answers a question; see ``Glue``."""

    task: TaskName = "qnli"


@dataclass
class RTE(Glue):
    """Textual entailment; see ``Glue``."""

    task: TaskName = "rte"


@dataclass
class WNLI(Glue):
    """Pronouns; see ``Glue``."""

    task: TaskName = "wnli"


@dataclass
class MNLI(Glue):
    """Entailment in ten genres; see ``Glue``."""

    task: TaskName = "mnli"


@dataclass
class STSB(Glue):
    """Similarity of sentences, 0..5; see ``Glue``."""

    task: TaskName = "stsb"
