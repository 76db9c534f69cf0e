"""``mm-data``: convert a raw data set to Arrow files, check every file, show what it holds and what goes missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command, subcommands
from polymodal.errors import UserError
from polymodal.tables import markdown

from missing_modal.data import READERS, spell_manifest
from missing_modal.data.base import SPLITS, MissingConfig, MMData
from missing_modal.data.manifest import Manifest

if TYPE_CHECKING:
    from missing_modal.data.base import Sample

__all__ = ["class_table", "find_problems", "main", "pattern_table", "size_table"]

EXAMPLE = """
mm-data check --data mmimdb --data.root DIR                   # decode everything, name what is wrong
mm-data convert --data food101 --data.root DIR --out ARROW    # the Arrow files of the official code
mm-data show --data manifest.jsonl --missing.kind both --missing.ratio 0.7
"""
_SHOWN = 20
_MAX_WORKERS = 16
_MOST_CLASSES = 120
_MOST_LETTERS = 60


@dataclass
class CheckConfig:
    """Read all splits and decode every image, sound and array; exit code 2 where one is wrong."""

    data: MMData = field(default_factory=Manifest, metadata={"class_typed": True})
    """reader of the data set, or a .jsonl file"""
    files: bool = True
    """decode the files (without: lists and labels only)"""
    workers: int = 0
    """threads that decode (0: one a core)"""


@dataclass
class ConvertConfig:
    """Write the Arrow files of the official code from a raw folder."""

    data: MMData = field(default_factory=Manifest, metadata={"class_typed": True})
    """reader of the data set: mmimdb, food101 or hatememes"""
    out: Path | None = None
    """folder to write"""
    overwrite: bool = False
    """replace Arrow files that are there"""


@dataclass
class ShowConfig:
    """Sizes, labels and patterns of each split; what a missing table takes away."""

    data: MMData = field(default_factory=Manifest, metadata={"class_typed": True})
    """reader of the data set, or a .jsonl file"""
    missing: MissingConfig = field(default_factory=MissingConfig)
    out: Path | None = None
    """folder for the missing tables as JSON (for --missing.tables)"""
    samples: int = 2
    """samples of each split to print"""


def check(config: CheckConfig) -> None:
    """Look at every sample.

    Raises:
        UserError: something is wrong; each was named in a line before.
    """
    data = config.data
    data.prepare()
    data.check()
    data.class_names()
    problems: list[str] = []
    published: dict[str, int] = getattr(data, "counts", {})
    for split in SPLITS:
        samples = data.samples(split)
        rows = len({sample.table_id for sample in samples})
        found = find_problems(data, samples, split, config.workers) if config.files else []
        problems += found
        _say(f"{split}: {len(samples)} samples of {rows} rows, {len(found)} with problems")
        if published and rows != published[split]:
            _say(f"note: the published {split} split has {published[split]} rows")
    for line in problems[:_SHOWN]:
        _say(f"  {line}")
    if problems:
        count = f"{len(problems)} file{'s' if len(problems) > 1 else ''} of {data.name} cannot be used"
        raise UserError(f"{count}, first: {problems[0]}")  # which says what to do
    _say("all files can be used" if config.files else "lists and labels can be used (no file was decoded)")


def find_problems(data: MMData, samples: Sequence[Sample], split: str, workers: int = 0) -> list[str]:
    """Decode what each row has, once a row.

    Args:
        data: their reader.
        samples: of the split.
        split: name, for the lines.
        workers: threads; 0: one a core.

    Returns:
        One line for each file that cannot be used.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    rows = {sample.table_id: sample for sample in samples}

    def look(sample: Sample) -> str:
        try:
            for name, kind in data.kinds.items():
                _decode(kind, sample.inputs.get(name))
        except UserError as error:
            return f"{split} {sample.table_id}: {error}"
        return ""

    with ThreadPoolExecutor(workers or min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        return [line for line in pool.map(look, rows.values()) if line]


def _decode(kind: str, source: Any) -> None:
    from missing_modal.data.arrays import load_npy, numbers, read_wav
    from missing_modal.data.images import read_image

    if source is None or kind == "text" or hasattr(source, "dtype"):
        return
    if kind == "image":
        read_image(source)
    elif kind == "tabular":
        numbers(source)
    elif str(source).endswith(".npy"):
        load_npy(source)
    else:
        read_wav(source)


def convert(config: ConvertConfig) -> None:
    """Write the Arrow files and say how they are used.

    Raises:
        UserError: no output folder, data that are no raw public set, files that exist, a missing or broken file.
    """
    from missing_modal.data.arrow import write_table
    from missing_modal.data.published import Published

    data, out = config.data, config.out
    if not isinstance(data, Published):
        raise UserError(f"--data {data.name}: only mmimdb, food101 and hatememes have an Arrow form; others need none")
    if out is None:
        raise UserError("--out is missing; name the folder for the Arrow files")
    if data.is_arrow:
        raise UserError(f"{data.root} holds Arrow files already; give the raw folder, or --data.layout raw")
    out = out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    files = {split: data.arrow_file(split, out) for split in SPLITS}
    taken = next((path for path in files.values() if path.exists()), None)
    if taken is not None and not config.overwrite:
        raise UserError(f"{taken} exists; choose another folder with --out, or replace it with --overwrite true")
    for split, path in files.items():
        count = write_table(path, data.arrow_rows(split), data.label_type)
        _say(f"{path}: {count} rows, {path.stat().st_size / 2**20:.1f} MiB")
    _say(f"use them: mm-train --data {data.name} --data.root {out}")


def show(config: ShowConfig) -> None:
    """Print tables about a data set.

    Raises:
        UserError: missing or broken files, or a missing table that does not fit.
    """
    data = config.data
    data.prepare()
    data.check()
    names = data.class_names()
    _say(f"{data.name}: {data.task}, {len(names)} classes, {' + '.join(data.modalities)}, scored by {data.metric}\n")
    _say(size_table(data))
    _say(pattern_table(data, config.missing))
    if len(names) <= _MOST_CLASSES:
        _say(class_table(data))
    for split in SPLITS:
        for sample in data.samples(split)[: config.samples]:
            _say(f"{split} {sample.id}: {_sample_line(data, sample)}")
    if config.out is not None:
        _write_tables(config, config.out.expanduser())


def size_table(data: MMData) -> str:
    """Samples and rows of each split, and the published rows where there are some, as a Markdown table."""
    published: dict[str, int] = getattr(data, "counts", {})
    rows = [
        [
            split,
            str(len(data.samples(split))),
            str(len({sample.table_id for sample in data.samples(split)})),
            *([str(published[split])] if published else []),
        ]
        for split in SPLITS
    ]
    return markdown(["split", "samples", "rows", *(["published rows"] if published else [])], rows) + "\n"


def pattern_table(data: MMData, missing: MissingConfig) -> str:
    """Rows of each pattern as the data are, and after the missing table took its share, as a Markdown table."""
    from missing_modal.patterns import all_masks, mask_name

    masks = all_masks(data.modalities)
    rows = []
    for split in SPLITS:
        if not data.samples(split):
            continue
        real, left = _masks(data, missing, split)
        for name, held in (("as it is", real), ("with the table", left)):
            rows.append([split, name, *(str(sum(one == mask for one in held.values())) for mask in masks)])
    kind = f"kind {missing.kind}, ratio {missing.ratio}, seed {missing.seed}"
    head = ["split", "rows", *(mask_name(mask, data.modalities) for mask in masks)]
    return markdown(head, rows) + f"\n\nColumns say what is present; the table: {kind}.\n"


def _masks(data: MMData, missing: MissingConfig, split: str) -> tuple[dict[str, int], dict[str, int]]:
    """Pattern of each row as it is, and with the table."""
    from missing_modal.tables import combine, natural_mask, row_ids, table_for

    samples = data.samples(split)
    real = {sample.table_id: natural_mask(sample.inputs, data.modalities) for sample in samples}
    table = table_for(missing, row_ids(samples), data.name, split, data.modalities)
    return real, {row: combine(mask, table.masks[row]) for row, mask in real.items()}


def class_table(data: MMData) -> str:
    """Rows of each class in each split, as a Markdown table."""
    names = data.class_names()
    counts = {split: [0] * len(names) for split in SPLITS}
    for split in SPLITS:
        for label in {sample.table_id: sample.label for sample in data.samples(split)}.values():
            if label is None:
                continue
            for place in [label] if isinstance(label, int) else [i for i, one in enumerate(label) if one]:
                counts[split][place] += 1
    rows = [[name, str(i), *(str(counts[split][i]) for split in SPLITS)] for i, name in enumerate(names)]
    return markdown(["class", "output", *SPLITS], rows) + "\n"


def _sample_line(data: MMData, sample: Sample) -> str:
    names = data.class_names()
    if sample.label is None:
        label = "no label"
    elif isinstance(sample.label, int):
        label = names[sample.label]
    else:
        label = ", ".join(name for name, one in zip(names, sample.label, strict=True) if one) or "none"
    parts = [f"{name} {_shown(value)}" for name, value in sample.inputs.items() if value is not None]
    return f"[{label}] " + " | ".join(parts)


def _shown(value: Any) -> str:
    """A value in a few words: a text, a path, a short row of numbers, the shape of an array."""
    shape = tuple(getattr(value, "shape", ()))
    if len(shape) > 1:
        return f"{' x '.join(map(str, shape))} numbers"
    return " ".join(str(value).split())[:_MOST_LETTERS]


def _write_tables(config: ShowConfig, out: Path) -> None:
    from missing_modal.tables import row_ids, save_table, table_for, table_name

    data, missing = config.data, config.missing
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        if data.samples(split):
            table = table_for(missing, row_ids(data.samples(split)), data.name, split, data.modalities)
            path = out / table_name(data.name, split, table.kind, table.ratio, missing.seed)
            save_table(path, table)
            _say(f"{path}: {len(table.masks)} rows")
    _say(f"use them: mm-train --data {data.name} --missing.tables {out}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


_TABLE: dict[str, tuple[str, Callable[[Any], None], type[Any], str]] = {
    "check": ("decode every file, name what is wrong", check, CheckConfig, ""),
    "convert": ("raw folder to the official Arrow files", convert, ConvertConfig, "--out DIR"),
    "show": ("sizes, classes, what a missing table takes", show, ShowConfig, "--missing.ratio 0.7"),
}


def _runner(name: str) -> Callable[[Sequence[str]], int]:
    _, function, config_class, options = _TABLE[name]

    def run(arguments: Sequence[str]) -> int:
        return command(
            function,
            config_class,
            prog=f"mm-data {name}",
            example=f"mm-data {name} --data mmimdb --data.root DIR {options}".rstrip(),
            choices={"data": READERS},
            argv=spell_manifest(arguments),
        )

    return run


def main() -> int:
    """Entry point of ``mm-data``; returns the exit code."""
    return subcommands({name: (row[0], _runner(name)) for name, row in _TABLE.items()}, prog="mm-data", example=EXAMPLE)
