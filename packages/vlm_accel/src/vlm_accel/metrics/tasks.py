"""Which task is asked and scored how (iLLaVA 4.1, LightVLM 4), and what a method retains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymodal.errors import UserError, did_you_mean

from vlm_accel.data.jsonl import Sample
from vlm_accel.metrics.choice import LETTERS, by_category, circular, mme, parse_letter, parse_yes_no
from vlm_accel.metrics.cider import cider
from vlm_accel.metrics.short import anls, exact, open_match, relaxed, vqa_accuracy

__all__ = ["METRICS", "TASKS", "TaskInfo", "prompt_text", "retained", "score_tasks", "task_info"]

_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_YES_NO = "Please answer yes or no."


@dataclass(frozen=True)
class TaskInfo:
    """How a task is scored.

    Args:
        metric: name in ``METRICS``.
        tail: what stands behind the question.
        main: the metric of ``METRICS`` that "Retained %" uses.
    """

    metric: str
    tail: str = ""
    main: str = "accuracy"


def _tasks(names: str, metric: str, tail: str, main: str = "accuracy") -> dict[str, TaskInfo]:
    return dict.fromkeys(names.split(), TaskInfo(metric, tail, main))


TASKS: dict[str, TaskInfo] = {
    **_tasks("mmmu mmmu_pro", "mmmu", _LETTER),
    **_tasks("mme", "mme", _YES_NO, "total"),
    **_tasks("mmbench mmbench_en mmbench_v11", "mmbench", _LETTER),
    **_tasks("mmstar", "mmstar", _LETTER),
    **_tasks("ai2d scienceqa_img muirbench qbench seed_image seed_video", "letter", _LETTER),
    **_tasks("videomme mvbench nextqa_mc perceptiontest mlvu egoschema", "letter", _LETTER),
    **_tasks("textvqa", "vqa", _SHORT),
    **_tasks("docvqa infovqa", "anls", _SHORT, "anls"),
    **_tasks("chartqa", "relaxed", "Answer the question with a single word."),
    **_tasks("realworldqa", "realworldqa", ""),
    **_tasks("nocaps flickr30k", "cider", "Provide a one-sentence caption for the provided image.", "cider"),
    **_tasks("mmvet videochatgpt video_detail activitynet_qa", "judge", ""),
}
"""by name; ``task_info`` overlooks case, - and _"""


def task_info(task: str, metric: str | None = None) -> TaskInfo:
    """The row of a task; an unknown task is scored by exact match, or by ``metric``.

    Raises:
        UserError: an unknown metric.
    """
    if metric is not None and metric not in METRICS:
        raise UserError(f"--metric {metric}: unknown; {did_you_mean(metric, METRICS)}known: {', '.join(METRICS)}")
    name = task.lower().replace("-", "").replace("_", "")
    found = next((info for key, info in TASKS.items() if key.replace("_", "") == name), None)
    if metric is None:
        return found or TaskInfo("exact")
    main = {"mme": "total", "anls": "anls", "cider": "cider"}.get(metric, "accuracy")
    return TaskInfo(metric, found.tail if found else "", main)


def prompt_text(sample: Sample) -> str:
    """Question, options by letter, and the task's tail."""
    lines = [sample.question.strip()]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, sample.options, strict=False)]
    tail = task_info(sample.task).tail
    if tail == _LETTER and not sample.options:
        tail = _SHORT
    return "\n".join([*lines, *([tail] if tail and tail.lower() not in sample.question.lower() else [])])


# ---- metrics: samples and texts of one task -> values by name, and (found, score) a sample

Scored = tuple[dict[str, float], list[tuple[str, float | None]]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _by_sample(function: Callable[[str, Sequence[str]], float], name: str) -> Callable[..., Scored]:
    def score(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
        values = [function(text, sample.answers) for sample, text in zip(samples, texts, strict=True)]
        return {name: _mean(values)}, [(text, value) for text, value in zip(texts, values, strict=True)]

    return score


def _letter_of(sample: Sample, text: str) -> tuple[str, float]:
    """(letter found, 1 or 0). Answers are letters, or texts of options."""
    found = parse_letter(text, sample.options) or ""
    wanted = set()
    for answer in sample.answers:
        if answer.strip().upper() in tuple(LETTERS):
            wanted.add(answer.strip().upper())
        wanted |= {letter for letter, option in zip(LETTERS, sample.options, strict=False) if option == answer}
    return found, float(found in wanted)


def _letter(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    rows = [_letter_of(sample, text) for sample, text in zip(samples, texts, strict=True)]
    return {"accuracy": _mean([value for _, value in rows])}, list(rows)


def _mmmu(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    rows = [
        _letter_of(sample, text) if sample.options else (text, open_match(text, sample.answers))
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"accuracy": _mean([value for _, value in rows])}, list(rows)


def _mmbench(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    """Letter match; where lines name a common ``group`` (variants with turned options), the circular accuracy too."""
    values, rows = _letter(samples, texts)
    groups = [str(sample.extra.get("group", sample.id)) for sample in samples]
    if len(set(groups)) < len(groups):
        values["accuracy_circular"] = circular([value == 1 for _, value in rows], groups)
    return values, rows


def _mmstar(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    _, rows = _letter(samples, texts)
    mean, parts = by_category([value or 0.0 for _, value in rows], [sample.category or "all" for sample in samples])
    return {"accuracy": mean, **{f"accuracy_{_name(part)}": value for part, value in parts.items()}}, rows


def _relaxed(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    values, rows = _by_sample(relaxed, "accuracy")(samples, texts)
    _, parts = by_category([value or 0.0 for _, value in rows], [sample.category or "" for sample in samples])
    return {**values, **{f"accuracy_{_name(part)}": value for part, value in parts.items() if part}}, rows


def _mme(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    found = [parse_yes_no(text) or "" for text in texts]
    right = [bool(word) and word == parse_yes_no(s.answers[0]) for word, s in zip(found, samples, strict=True)]
    images = [str(sample.images[0]) if sample.images else sample.id for sample in samples]
    scores = mme(right, [sample.category or "all" for sample in samples], images)
    return {**scores, "accuracy": _mean([float(ok) for ok in right])}, list(zip(found, map(float, right), strict=True))


def _realworldqa(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    rows = []
    for sample, text in zip(samples, texts, strict=True):
        whole = exact(text, sample.answers)
        letters = all(answer.strip().upper() in tuple(LETTERS) for answer in sample.answers)
        rows.append(_letter_of(sample, text) if letters and not whole else (text, whole))
    return {"accuracy": _mean([value for _, value in rows])}, list(rows)


def _cider(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    return {"cider": cider(texts, [sample.answers for sample in samples])}, [(text, None) for text in texts]


def _judge(samples: Sequence[Sample], texts: Sequence[str]) -> Scored:
    """No score offline: an external judge reads the exported predictions."""
    return {}, [(text, None) for text in texts]


METRICS: dict[str, Callable[[Sequence[Sample], Sequence[str]], Scored]] = {
    "exact": _by_sample(exact, "accuracy"), "letter": _letter, "mmmu": _mmmu, "mme": _mme, "mmbench": _mmbench,
    "mmstar": _mmstar, "vqa": _by_sample(vqa_accuracy, "accuracy"), "anls": _by_sample(anls, "anls"),
    "relaxed": _relaxed, "realworldqa": _realworldqa, "cider": _cider, "judge": _judge,
}  # fmt: skip


def score_tasks(
    samples: Sequence[Sample], texts: Sequence[str], metric: str | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics ``test/<task>/<name>``, the main one of each task first, and one prediction a sample.

    Args:
        samples: of all tasks.
        texts: what the model said to each.
        metric: for all tasks instead of their own.
    """
    metrics: dict[str, float] = {}
    predictions: list[dict[str, Any]] = []
    for task in dict.fromkeys(sample.task for sample in samples):
        mine = [(s, t) for s, t in zip(samples, texts, strict=True) if s.task == task]
        info = task_info(task, metric)
        values, rows = METRICS[info.metric]([s for s, _ in mine], [t for _, t in mine])
        for name in sorted(values, key=lambda name: name != info.main):
            metrics[f"test/{task}/{name}"] = values[name]
        for (sample, text), (found, score) in zip(mine, rows, strict=True):
            predictions.append(
                {"task": task, "id": sample.id, "question": sample.question, "answers": list(sample.answers)}
                | {"prediction": text, "parsed": found, "score": score}
            )
    return metrics, predictions


def retained(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> float | None:
    """``Retained %``: mean over tasks of 100 * method / baseline, of each task's main metric; None without any.

    A task's main metric is the first of its ``test/<task>/...`` (or the only ``test/accuracy``). Tasks at which the
    unmodified model scores 0 are left out. Source: iLLaVA 4.1.
    """
    mains: dict[str, str] = {}
    for name in baseline:
        if name.startswith("test/") and name != "test/retained":
            mains.setdefault(name.rpartition("/")[0], name)
    shares = [100 * metrics[name] / baseline[name] for name in mains.values() if baseline[name] and name in metrics]
    return sum(shares) / len(shares) if shares else None


def _name(category: str) -> str:
    return "_".join(category.lower().split())
