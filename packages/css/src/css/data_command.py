"""``css-data``: index and split a data set, show what each step has, check every file, look into a memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.cli import command, subcommands
from polymodal.errors import UserError
from polymodal.tables import markdown

from css.data import READERS
from css.data.base import SPLITS, SegData
from css.data.shapes import Shapes
from css.memory_command import memory_command
from css.task import Task

if TYPE_CHECKING:
    from css.data.base import Item

__all__ = ["class_table", "find_problems", "main", "step_table"]

EXAMPLE = """
css-data check --data voc --data.root DIR/VOC2012             # decode everything, name what is wrong
css-data show --data voc --data.root DIR/VOC2012 --task 15-1 --setting disjoint --out pictures
css-data prepare --data voc --data.root DIR/VOC2012 --task 15-1 --out splits
css-data memory show runs/css/RUN                             # what a method keeps of earlier steps
"""
TASKS = {"shapes": "2-1", "voc": "15-1", "ade20k": "100-50"}
"""Task by data set, where none is given."""
_MAX_WORKERS = 16


@dataclass
class CheckConfig:
    """Decode every mask and picture: unknown ids, sizes that differ, broken files; exit code 2 where one is wrong."""

    data: SegData = field(default_factory=Shapes, metadata={"class_typed": True})
    """reader of the data set"""
    images: bool = True
    """decode pictures too, and compare sizes (without: masks only)"""
    workers: int = 0
    """threads that decode (0: one a core)"""


@dataclass
class StepsConfig:
    """Options of the commands that cut a data set into steps."""

    data: SegData = field(default_factory=Shapes, metadata={"class_typed": True})
    """reader of the data set"""
    task: str | None = None
    """classes of the base step and of each later step, or offline (default: 2-1, VOC 15-1, ADE 100-50)"""
    setting: Literal["overlap", "disjoint", "sequential", "partitioned"] = "overlap"
    """which pictures a step has"""
    order: list[int] | None = None
    """class ids in learning order (default: as in the data set)"""
    seed: int = 0
    """of the setting partitioned"""


@dataclass
class PrepareConfig(StepsConfig):
    """Make data that can be made, index the classes of every mask, write the pictures of each step as text."""

    out: Path | None = None
    """folder for {train,test}-step<N>.txt with checksums (for --data.split_files); none: index only"""


@dataclass
class ShowConfig(StepsConfig):
    """Tables of pictures by step and class; with --out, pictures with their annotation and the label of the step."""

    out: Path | None = None
    """folder for step<N>.png"""
    pictures: int = 6
    """pictures a step"""


def prepare(config: PrepareConfig) -> None:
    """Index a data set and write its split files.

    Raises:
        UserError: missing or broken files, or a step without pictures.
    """
    from css.data.split_files import write_splits

    data, task = config.data, _task(config)
    data.prepare()
    data.check()
    for split in SPLITS:
        start, items = time.monotonic(), data.items(split)
        if items:
            data.class_sets(split)
            _say(f"{split}: {len(items)} masks indexed in {time.monotonic() - start:.2f} s")
    _say("\n" + step_table(data, task, config.setting, config.seed))
    if config.out is not None:
        files = write_splits(config.out.expanduser(), data, task, config.setting, config.seed)
        _say(f"{config.out}: {len(files)} files")
        where = f" --data.root {data.root}" if data.root else ""
        options = f" --task {task.name} --setting {config.setting}"
        _say(f"use them: css-train --data {data.name}{where}{options} --data.split_files {config.out}")


def show(config: ShowConfig) -> None:
    """Print pictures by step and by class; draw some.

    Raises:
        UserError: missing or broken files, or a step without pictures.
    """
    data, task = config.data, _task(config)
    data.check()
    _say(f"{data.name}, task {task.name}, {config.setting}: {task.num_classes} classes in {task.num_steps} steps\n")
    _say(step_table(data, task, config.setting, config.seed))
    _say(class_table(data, task, config.setting, config.seed))
    if config.out is not None:
        _draw_steps(config, task, config.out.expanduser())


def check(config: CheckConfig) -> None:
    """Look at every file.

    Raises:
        UserError: something is wrong; each was named in a line before.
    """
    data = config.data
    data.prepare()
    data.check()
    problems: list[str] = []
    seen: dict[str, set[int]] = {}
    for split in SPLITS:
        items = data.items(split)
        if items:
            found, seen[split] = find_problems(data, items, split, images=config.images, workers=config.workers)
            problems += found
            _say(f"{split}: {len(items)} pictures, {len(found)} with problems")
    for line in problems:
        _say(f"  {line}")
    names = data.class_names()
    for split in ("train", "test"):
        absent = [names[raw - 1] for raw in range(1, len(names) + 1) if raw not in seen[split]]
        if absent and not problems:
            shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
            _say(f"note: {len(absent)} of {len(names)} classes never occur in {split}: {shown}")
    both = {item.id for item in data.items("train")} & {item.id for item in data.items("test")}
    if both:
        _say(f"note: {len(both)} pictures are in train and in test, e.g. {min(both)}")
    if problems:
        raise UserError(f"{len(problems)} of the pictures of {data.name} cannot be used; mend or remove those above")
    _say("all files can be used")


# ------------------------------------------------------------------ steps


def _task(config: StepsConfig) -> Task:
    name = config.task or TASKS.get(config.data.name)
    if name is None:
        raise UserError(f"--task is missing; how are the {config.data.num_classes} classes cut into steps? e.g. 5-1")
    return Task(name, config.data.num_classes, tuple(config.order or ()))


def _pictures(data: SegData, task: Task, setting: str, seed: int, split: str) -> list[list[int]]:
    """Indices of the pictures of each step."""
    from css.data.split_files import step_indices

    return [step_indices(data, task, setting, step, split, seed) for step in range(task.num_steps)]


def step_table(data: SegData, task: Task, setting: str, seed: int = 0) -> str:
    """Pictures of each step, as a Markdown table.

    Raises:
        UserError: a step without pictures.
    """
    names = data.class_names()
    counts = {split: _pictures(data, task, setting, seed, split) for split in SPLITS if data.items(split)}
    rows = []
    for step, classes in enumerate(task.steps):
        shown = ", ".join(names[raw - 1] for raw in classes[:4]) + (", ..." if len(classes) > 4 else "")
        rows.append([str(step), str(len(classes)), *(str(len(chosen[step])) for chosen in counts.values()), shown])
    return markdown(["step", "classes", *counts, "which"], rows) + "\n"


def class_table(data: SegData, task: Task, setting: str, seed: int = 0) -> str:
    """Training pictures of each class, with label and without, and its test pictures, as a Markdown table."""
    sets, names = data.class_sets("train"), data.class_names()
    chosen = _pictures(data, task, setting, seed, "train")
    labelled, hidden = dict.fromkeys(task.order, 0), dict.fromkeys(task.order, 0)
    for step, indices in enumerate(chosen):
        known = set(task.seen(step) if setting == "sequential" else task.steps[step])
        for index in indices:
            for raw in sets[index]:
                (labelled if raw in known else hidden)[raw] += 1
    tested = [raw for found in data.class_sets("test") for raw in found]
    rows = [
        [names[raw - 1], str(raw), str(step), str(labelled[raw]), str(hidden[raw]), str(tested.count(raw))]
        for step, classes in enumerate(task.steps)
        for raw in classes
    ]
    explained = "labelled: training pictures whose label has the class; hidden: pictures that show it as background."
    return markdown(["class", "id", "learnt in", "labelled", "hidden", "test"], rows) + f"\n\n{explained}\n"


def _draw_steps(config: ShowConfig, task: Task, out: Path) -> None:
    """Some pictures of each step: annotation, and what of it the step's label keeps."""
    from polymodal.files import check_writable

    from css.pictures import prediction_grid, save_picture
    from css.samples import Shown, choose_pictures, raw_lut

    check_writable(out)
    data, names, table = config.data, config.data.class_names(), raw_lut(task)
    items, sets = data.items("train"), data.class_sets("train")
    for step, indices in enumerate(_pictures(data, task, config.setting, config.seed, "train")):
        lut = table[task.train_lut(step, keep_old=config.setting == "sequential")]
        # classes of the step in every picture; of the others as many as possible, for they turn into background
        wanted = [*(raw for raw in task.order if raw not in task.steps[step]), *task.steps[step]]
        chosen = choose_pictures([sets[index] for index in indices], wanted, config.pictures)
        shown = []
        for index in (indices[place] for place in chosen):
            mask = data.load_mask(items[index])
            shown.append(Shown(data.load_image(items[index]), mask, lut[mask], items[index].id))
        classes = ", ".join(names[raw - 1] for raw in task.steps[step][:8])
        title = f"{data.name} {task.name}, {config.setting}, step {step}: {classes}"
        path = out / f"step{step}.png"
        save_picture(prediction_grid(shown, names, title, ("image", "annotation", "label")), path)
        _say(f"picture: {path}")


# ------------------------------------------------------------------ check


def find_problems(
    data: SegData, items: Sequence[Item], split: str, *, images: bool = True, workers: int = 0
) -> tuple[list[str], set[int]]:
    """Decode masks and pictures.

    Args:
        data: their reader.
        items: the pairs.
        split: name, for the messages.
        images: pictures too.
        workers: threads; 0: one a core.

    Returns:
        One line for each pair that cannot be used, and the raw ids that occur in the others.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    from polymodal.progress import counted

    from css.data.files import check_sizes, mask_ids

    def look(item: Item) -> tuple[str, tuple[int, ...]]:
        try:
            mask = data.load_mask(item)
            if images:
                check_sizes(item, data.load_image(item), mask)
        except UserError as error:
            return f"{split} {item.id}: {error}", ()
        return "", mask_ids(mask)

    with ThreadPoolExecutor(workers or min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        found = list(counted(pool.map(look, items), f"{split} pictures checked", len(items)))
    return [line for line, _ in found if line], {raw for _, ids in found for raw in ids}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


_TABLE: dict[str, tuple[str, Callable[[Any], None], type[Any], str]] = {
    "prepare": ("index a data set, write the pictures of each step", prepare, PrepareConfig, "--task 15-1 --out DIR"),
    "show": ("pictures by step and class, as tables and drawn", show, ShowConfig, "--task 15-1 --out DIR"),
    "check": ("decode every file, name what is wrong", check, CheckConfig, ""),
}


def _runner(name: str) -> Callable[[Sequence[str]], int]:
    _, function, config_class, options = _TABLE[name]

    def run(arguments: Sequence[str]) -> int:
        return command(
            function,
            config_class,
            prog=f"css-data {name}",
            example=f"css-data {name} --data voc --data.root DIR {options}".rstrip(),
            choices={"data": READERS},
            argv=arguments,
        )

    return run


def main() -> int:
    """Entry point of ``css-data``; returns the exit code."""
    table = {name: (row[0], _runner(name)) for name, row in _TABLE.items()}
    table["memory"] = ("memory show FOLDER: what a memory keeps, printed and drawn", memory_command)
    return subcommands(table, prog="css-data", example=EXAMPLE)
