"""What is in a data set: sizes, texts, leakage, and whether its clips can be decoded."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from polymodal.errors import UserError

from slt.data.base import SPLITS, Item, SLTData
from slt.data.leak import THRESHOLD, LeakReport, leak_report
from slt.data.manifest import Manifest
from slt.data.questions import Question, read_questions

__all__ = ["broken_clips", "leak_reports", "raw_sentences", "statistics_text"]


def raw_sentences(reader: SLTData, split: str) -> dict[str, str]:
    """Sentences as the annotation has them, by id (text options not applied)."""
    reader.prepare()
    return {item.id: item.sentence for item in reader.read_split(split)}


def leak_reports(reader: SLTData, threshold: float = THRESHOLD) -> list[tuple[Path, LeakReport]]:
    """Leakage of every split, with the file that its questions were read from.

    Args:
        reader: the data; questions come from its question folder, else from the annotation itself.
        threshold: largest share of content tokens that a question may repeat, 0..1.

    Raises:
        UserError: bad question files.
    """
    folder = reader.questions_dir()
    out: list[tuple[Path, LeakReport]] = []
    for split in SPLITS:
        found: Iterable[Question] = [Question(i.id, i.question, i.sentence) for i in reader.items(split)]
        path = reader.file(split) if isinstance(reader, Manifest) else Path(f"{reader.name} {split}")
        if folder is not None:
            path = folder / f"{split}.jsonl"
            sentences = raw_sentences(reader, split)
            found = read_questions(path, sentences, allow_missing=reader.allow_missing).values()
        out.append((path, leak_report(split, found, reader.language, threshold)))
    return out


def broken_clips(
    reader: SLTData, how: str = "sample", *, sample: int = 20, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Decode clips and collect what is wrong.

    Args:
        reader: the data.
        how: ``none``; ``sample``: first and last frame of some clips of each split, evenly spread; ``all``: every
            frame of every clip.
        sample: clips per split for ``sample``.
        progress: called with (clips done, clips in all).

    Returns:
        One message per broken clip.

    Raises:
        UserError: unknown ``how``.
    """
    if how not in ("none", "sample", "all"):
        raise UserError(f"frames={how}; expected none, sample (some clips) or all (every frame of every clip)")
    chosen: list[Item] = []
    for split in SPLITS if how != "none" else ():
        items = reader.items(split)
        step = max(1, len(items) // sample) if how == "sample" else 1
        chosen += items[::step]
    problems = []
    for done, item in enumerate(chosen, 1):
        try:
            reader.load(item, range(item.num_frames) if how == "all" else sorted({0, item.num_frames - 1}))
        except UserError as error:
            problems.append(str(error))
        if progress is not None:
            progress(done, len(chosen))
    return problems


def statistics_text(reader: SLTData) -> str:
    """Markdown tables: clips, frames, words, questions, and what the questions alone are worth.

    Raises:
        UserError: bad annotation or question files.
    """
    lines = [f"{reader.name}: {reader.language}, level {reader.level}, {reader.modality}", ""]
    lines += [
        "| split | clips | frames: mean (min, median, max) | units a sentence | vocabulary | unseen in train "
        "| different sentences | signers | with question |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = set(_units(reader, "train"))
    for split in SPLITS:
        items = reader.items(split)
        frames = [item.num_frames for item in items]
        units = _units(reader, split)
        unseen = sum(count for unit, count in units.items() if unit not in known)
        cells = [
            split,
            len(items),
            f"{statistics.mean(frames):.1f} ({min(frames)}, {statistics.median(frames):.0f}, {max(frames)})",
            f"{units.total() / len(items):.1f}",
            len(units),
            f"{100 * unseen / units.total():.1f} %",
            len({item.sentence for item in items}),
            len({item.speaker for item in items if item.speaker}) or "?",
            sum(bool(item.question) for item in items),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    overlaps = [
        f"{len({i.sentence for i in reader.items(split)} & {i.sentence for i in reader.items('train')})} of {split}"
        for split in SPLITS[1:]
    ]
    lines += ["", f"sentences that occur in train too: {', '.join(overlaps)}"]
    if any(item.question for split in SPLITS for item in reader.items(split)):
        lines += ["", *_questions_alone(reader)]
    return "\n".join(lines)


def _units(reader: SLTData, split: str) -> Counter[str]:
    texts = [item.sentence for item in reader.items(split)]
    if reader.level == "char":
        return Counter("".join("".join(texts).split()))
    return Counter(unit for text in texts for unit in text.split())


def _questions_alone(reader: SLTData) -> list[str]:
    from slt.metrics import bleu, bleu_signature
    from slt.no_video import copy_question, question_1nn

    lines = ["BLEU-4 of the questions alone, no video (a model must beat these):", ""]
    lines += ["| split | copy_question | question_1nn |", "|---|---|---|"]
    for split in SPLITS[1:]:
        items = reader.items(split)
        references = [item.sentence for item in items]
        copied = bleu(references, copy_question(items), reader.level)[3]
        nearest = bleu(references, question_1nn(reader.items("train"), items, reader.level), reader.level)[3]
        lines.append(f"| {split} | {copied:.1f} | {nearest:.1f} |")
    return [*lines, "", bleu_signature(reader.level, reader.lowercase, reader.append_period)]
