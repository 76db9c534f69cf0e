"""``fed-data``: which data sets are read, whether the files are good, and who has which samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polymodal.cli import command, subcommands
from polymodal.errors import UserError
from polymodal.tables import markdown

from fedcore.data import READERS, reader_class
from fedcore.data.base import FedData
from fedcore.data.digits import Digits
from fedcore.partition_command import partition_command

if TYPE_CHECKING:
    from fedcore.data.array_type import ArrayData

__all__ = ["check", "find_problems", "main", "reader_table"]

EXAMPLE = """
fed-data list                                            # data sets and where their files are expected
fed-data check --data cifar10 --data.root DIR            # read everything, say what is wrong
fed-data partition make --data cifar10 --data.root DIR --partition.alpha 0.1 --out clients.json
fed-data partition show clients.json --out clients.png   # label x client
"""
_CHUNK = 4096


@dataclass
class CheckConfig:
    """Read all files of a data set; sizes, classes, what is not finite, samples that are in train and in test."""

    data: FedData = field(default_factory=Digits, metadata={"class_typed": True})
    """reader of the data set"""


def check(config: CheckConfig) -> None:
    """Read and look at every sample.

    Raises:
        UserError: missing or broken files, empty splits, or samples that cannot be used; each was named before.
    """
    data = config.data
    data.check()
    _say(split_table(data))
    problems = [line for split in data.splits for line in find_problems(data.load(split), data, split)]
    for line in problems:
        _say(f"  {line}")
    for split in data.splits[1:]:
        both = _shared(data.load("train"), data.load(split))
        if both:
            _say(f"note: {both} samples of {split} are in train too, input for input")
    if problems:
        raise UserError(f"{len(problems)} problems in {data.name}, see above; mend the files")
    _say(f"all files can be used (fingerprint {data.fingerprint()})")


def split_table(data: FedData) -> str:
    """Samples, shape, classes and natural clients of each split, as a Markdown table."""
    rows = []
    for split in data.splits:
        found = data.load(split)
        shape = "x".join(map(str, found.input_shape))
        least, most = "", ""
        if not data.regression:
            counts = found.targets.bincount(minlength=data.num_classes)
            least, most = str(int(counts.min())), str(int(counts.max()))
        rows.append([split, str(len(found)), shape, str(data.num_classes), least, most, ", ".join(found.group_names)])
    header = ["split", "samples", "input", "classes", "of the rarest", "of the most frequent", "natural clients"]
    return markdown(header, rows) + "\n"


def find_problems(found: ArrayData, data: FedData, split: str) -> list[str]:
    """One line for each kind of sample that cannot be used."""
    import torch

    lines = []
    inputs, targets = found.inputs, found.targets
    if inputs.is_floating_point():
        bad = (~torch.isfinite(inputs.flatten(1))).any(dim=1).nonzero()
        if len(bad):
            lines.append(f"{split}: {len(bad)} inputs are not finite, the first is number {int(bad[0])}")
    if data.regression:
        bad = (~torch.isfinite(targets)).nonzero()
        if len(bad):
            lines.append(f"{split}: {len(bad)} targets are not finite, the first is number {int(bad[0])}")
        return lines
    outside = ((targets < 0) | (targets >= data.num_classes)).nonzero()
    if len(outside):
        lines.append(f"{split}: {len(outside)} targets are outside 0..{data.num_classes - 1}")
        return lines
    absent = (targets.bincount(minlength=data.num_classes) == 0).nonzero().flatten().tolist()
    if absent and split == "train" and not data.may_lack_classes:
        names = data.class_names()
        shown = ", ".join(names[number] for number in absent[:8]) + (", ..." if len(absent) > 8 else "")
        lines.append(f"{split}: {len(absent)} of {data.num_classes} classes never occur: {shown}")
    return lines


def _shared(first: ArrayData, second: ArrayData) -> int:
    """How many inputs of ``second`` are in ``first``, byte for byte."""
    if first.input_shape != second.input_shape and first.inputs.ndim != 2:
        return 0
    known = set(_keys(first))
    return sum(key in known for key in _keys(second))


def _keys(found: ArrayData) -> list[bytes]:
    """A hash of each input; padding at the end of texts does not count."""
    import hashlib

    import torch

    keys = []
    inputs = found.inputs.flatten(1)
    for chunk in torch.split(inputs, _CHUNK):
        keys += [hashlib.blake2b(row.tobytes().rstrip(b"\0"), digest_size=16).digest() for row in chunk.numpy()]
    return keys


def reader_table() -> str:
    """Names of the readers, what they read, and whether files are needed, as a Markdown table."""
    rows = []
    for name in READERS:
        made = reader_class(name)
        summary = (made.__doc__ or "").strip().splitlines()[0].removesuffix("; see ``Glue``.")
        rows.append([name, summary.replace("``", ""), made.remedy])
    return markdown(["--data", "what", "files"], rows) + "\n"


@dataclass
class _ListConfig:
    """Data sets that can be named with --data; their options are listed by --help with --data NAME."""


def _list(_: _ListConfig) -> None:
    _say(reader_table())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _run_list(arguments: Sequence[str]) -> int:
    return command(_list, _ListConfig, prog="fed-data list", argv=arguments)


def _run_check(arguments: Sequence[str]) -> int:
    example = "fed-data check --data cifar10 --data.root DIR"
    choices = {"data": READERS}
    return command(check, CheckConfig, prog="fed-data check", example=example, choices=choices, argv=arguments)


def main() -> int:
    """Entry point of ``fed-data``; returns the exit code."""
    table = {
        "list": ("data sets and where their files are expected", _run_list),
        "check": ("read every file, say what is wrong", _run_check),
        "partition": ("make or show who has which samples", partition_command),
    }
    return subcommands(table, prog="fed-data", example=EXAMPLE)
