"""The nine GLUE tasks: folders, columns, labels, metrics. No torch: it is part of the CLI."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TASKS", "GlueTask"]


@dataclass(frozen=True)
class GlueTask:
    """How a task is stored.

    Args:
        folder: official name of its folder.
        labels: names of the classes in the order of their numbers; none: a regression.
        first: columns that may hold the first text, best first.
        second: columns that may hold the second text; none: single texts.
        target: columns that may hold the label.
        metrics: what is reported, see ``fedcore.data.metrics``.
        dev: official development file by split.
        header: columns of official files without a header line.
    """

    folder: str
    labels: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    target: tuple[str, ...] = ("label",)
    metrics: tuple[str, ...] = ("accuracy",)
    dev: tuple[tuple[str, str], ...] = (("test", "dev"),)
    header: tuple[str, ...] = ()

    @property
    def pairs(self) -> bool:
        """Whether a sample is two texts."""
        return bool(self.second)


_ONE, _TWO = ("sentence1", "text1"), ("sentence2", "text2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    "sst2": GlueTask("SST-2", ("negative", "positive"), ("sentence", "text", "text1")),
    "cola": GlueTask(
        "CoLA",
        ("unacceptable", "acceptable"),
        ("sentence", "Sentence", "text", "text1"),
        target=("label", "Acceptability"),
        metrics=("accuracy", "matthews"),
        header=("source", "label", "star", "sentence"),
    ),
    "mrpc": GlueTask(
        "MRPC",
        ("not_equivalent", "equivalent"),
        ("#1 String", *_ONE),
        ("#2 String", *_TWO),
        ("Quality", "label"),
        ("accuracy", "f1"),
    ),
    "qqp": GlueTask(
        "QQP",
        ("not_duplicate", "duplicate"),
        ("question1", "text1"),
        ("question2", "text2"),
        ("is_duplicate", "label"),
        ("accuracy", "f1"),
    ),
    "qnli": GlueTask("QNLI", _ENTAILMENT, ("question", "text1"), ("sentence", "text2")),
    "rte": GlueTask("RTE", _ENTAILMENT, _ONE, _TWO),
    "wnli": GlueTask("WNLI", _ENTAILMENT[::-1], _ONE, _TWO),
    "mnli": GlueTask(
        "MNLI",
        ("entailment", "neutral", "contradiction"),
        _ONE,
        _TWO,
        ("gold_label", "label"),
        dev=(("test", "dev_matched"), ("test_mismatched", "dev_mismatched")),
    ),
    "stsb": GlueTask("STS-B", (), _ONE, _TWO, ("score", "label"), ("pearson", "spearman")),
}
