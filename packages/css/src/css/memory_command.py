"""``css-data memory show``: what a method keeps of earlier steps, as a table and as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError
from polymodal.tables import markdown

from css.data import READERS
from css.data.base import SegData
from css.eval_settings import RunData, gather, run_config_of

if TYPE_CHECKING:
    from css.memory import ImageMemory, InstanceMemory
    from css.pictures import MemoryTile

__all__ = ["MemoryConfig", "memory_command", "memory_show", "memory_table", "open_memory"]

PROG = "css-data memory show"
EXAMPLE = """
css-data memory show runs/css/RUN                     # of the run's last step
css-data memory show runs/css/RUN/steps/01 --out memory.pdf
"""
_FORMATS = (".png", ".pdf", ".svg", ".jpg")


@dataclass
class MemoryConfig:
    """Print what a memory has and draw its entries."""

    folder: Path | None = None
    """run folder, step folder or memory folder"""
    out: Path | None = None
    """picture to write: .png, .pdf, .svg, .jpg (default: memory.png beside the memory)"""
    entries: int = 64
    """entries in the picture, at most (0: no picture)"""
    data: SegData = field(default_factory=RunData, metadata={"class_typed": True})
    """data of a memory of whole pictures; the training run's where not given"""


def memory_command(arguments: Sequence[str]) -> int:
    """``css-data memory``; returns the exit code."""
    if not arguments or arguments[0] != "show":
        stream = sys.stdout if arguments and arguments[0] in ("-h", "--help") else sys.stderr
        stream.write(f"usage: {PROG} FOLDER [options]   ({PROG} --help lists them)\n")
        return 0 if stream is sys.stdout else 2
    return command(
        memory_show,
        MemoryConfig,
        prog=PROG,
        example=EXAMPLE,
        choices={"data": {"run": "css.eval_settings.RunData", **READERS}},
        argv=gather(arguments[1:], "folder"),
    )


def memory_show(config: MemoryConfig) -> None:
    """Print and draw a memory.

    Raises:
        UserError: no memory there, a damaged one, or one whose pictures are not known.
    """
    from polymodal.files import check_writable

    from css.pictures import memory_sheet, save_picture

    if config.folder is None:
        raise UserError("no folder given; css-data memory show runs/css/RUN")
    if config.out is not None and config.out.suffix.lower() not in _FORMATS:
        raise UserError(f"--out {config.out}: expected a name that ends in {', '.join(_FORMATS)}")
    memory = open_memory(config.folder.expanduser(), config.data)
    sys.stdout.write(f"{memory_table(memory)}\n{memory.summary()}\n")
    if not memory.entries or config.entries < 1:
        return
    path = config.out.expanduser() if config.out else memory.folder.parent / "memory.png"
    check_writable(path.parent)
    known = _classes(memory)
    chosen = sorted(memory.entries, key=lambda entry: (entry.slot, entry.step, entry.id))[: config.entries]
    more = f", {len(chosen)} of them shown" if len(chosen) < len(memory.entries) else ""
    title = (
        f"memory of step {memory.step}: {len(memory.entries)} entries{more}; {_size(memory.stored_bytes)}"
        f" (their whole pictures: {_size(memory.image_bytes)})"
    )
    save_picture(memory_sheet([_tile(entry, known) for entry in chosen], title), path)
    sys.stdout.write(f"picture: {path}\n")


def open_memory(path: Path, data: SegData | None = None) -> InstanceMemory | ImageMemory:
    """The memory that a run folder (of its last step), a step folder or a memory folder means.

    Args:
        path: the folder.
        data: reader of the pictures that a memory of whole pictures names; default: of the run around the folder.

    Raises:
        UserError: no memory there, a damaged one, or one whose pictures are not known.
    """
    from css.memory import ImageMemory, InstanceMemory
    from css.memory.folder import INDEX, locate

    inside = [path, path / "memory", *sorted(path.glob("steps/*/memory"), reverse=True)]
    folder = next((place for place in inside if (locate(place) / INDEX).is_file()), None)
    if folder is None:
        raise UserError(
            f"{path}: no memory there; give a run folder of a method that replays, or steps/NN/memory in it"
        )
    if _kind(locate(folder) / INDEX) != "images":
        return InstanceMemory.load(folder)
    if data is None or isinstance(data, RunData):
        run = run_config_of(folder)
        if run is None:
            raise UserError(f"{folder} names pictures of a data set; give --data and --data.root")
        data = run.data if data is None else data.resolve(run.data)
    return ImageMemory.load(folder, reader=data)


def memory_table(memory: InstanceMemory | ImageMemory) -> str:
    """Entries by class, with the steps they come from, and bytes, as a Markdown table."""
    known, rows = _classes(memory), []
    for slot, entries in memory.slots.items():
        raw, name = known[slot]
        steps = ", ".join(map(str, sorted({entry.step for entry in entries})))
        sources = {entry.id: entry.source_bytes for entry in entries}
        kept = sum(getattr(entry, "stored_bytes", entry.source_bytes) for entry in entries)
        rows.append(
            [name, str(raw), str(len(entries)), steps, f"{kept / 1024:.1f}", f"{sum(sources.values()) / 1024:.1f}"]
        )
    total = [f"{memory.stored_bytes / 1024:.1f}", f"{memory.image_bytes / 1024:.1f}"]
    rows.append(["all", "–", str(len(memory.entries)), "–", *total])
    return markdown(["class", "id", "entries", "from step", "KiB", "whole pictures, KiB"], rows) + "\n"


def _kind(index: Path) -> str:
    """Kind of a memory; empty where the index is damaged, which reading it will tell."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    return str(found.get("kind", "")) if isinstance(found, dict) else ""


def _classes(memory: InstanceMemory | ImageMemory) -> dict[int, tuple[int, str]]:
    """Channel -> raw id and name of every class in the index."""
    known = [each for row in memory.index["entries"] for each in (row["slot"], *row["classes"])]
    return {int(each["channel"]): (int(each["raw"]), str(each["name"])) for each in known}


def _tile(entry: Any, known: dict[int, tuple[int, str]]) -> MemoryTile:
    """One entry to be drawn: its crop, or its whole picture."""
    import numpy as np

    from css.pictures import MemoryTile

    table = np.arange(256, dtype=np.uint8)
    for channel, (raw, _) in known.items():
        table[channel] = raw
    image, label = entry.crop() if hasattr(entry, "crop") else entry.load()[:2]
    size = f"{image.shape[1]} x {image.shape[0]}"
    if hasattr(entry, "box"):
        size += f" of {entry.size[1]} x {entry.size[0]}"
    kept = getattr(entry, "stored_bytes", entry.source_bytes)
    return MemoryTile(image, table[label], known[entry.slot][1], (entry.id, f"step {entry.step}, {_size(kept)}", size))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
