"""``fed-data partition``: divide a training set over clients, store that, show who has what."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli import command
from polymodal.errors import UserError
from polymodal.tables import markdown

from fedcore.data import READERS
from fedcore.data.base import FedData
from fedcore.data.digits import Digits
from fedcore.world_settings import PartitionConfig

if TYPE_CHECKING:
    import numpy as np

    from fedcore.partition_base import Partition
    from fedcore.partition_files import Labels

__all__ = ["MakeConfig", "ShowConfig", "client_table", "partition_command", "summary"]

PROG = "fed-data partition"
_MAKE = "fed-data partition make --data cifar10 --data.root DIR --partition.alpha 0.6 --out c10-dir06.json"
_SHOW = """
fed-data partition show FILE.json --out clients.png             # a stored partition, without its data set
fed-data partition show --partition.scheme shards --out clients.png
"""
_COLUMNS = 12


@dataclass
class MakeConfig:
    """Divide the training samples over clients as ``fed-train`` would with the same options; write it as JSON."""

    data: FedData = field(default_factory=Digits, metadata={"class_typed": True})
    """reader of the data set"""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    val_share: float = 0.1
    """share of the training split that no client gets, as federation.val_share of the run, 0..1"""
    seed: int = 0
    """seed of the partition, where partition.seed is not given"""
    out: Path | None = None
    """JSON file to write"""


@dataclass
class ShowConfig(MakeConfig):
    """Sizes, label mix and repeats of a partition, of a file or as the options make it; with --out, a picture."""

    out: Path | None = None
    """picture to write, label x client (.png)"""
    rows: int = 40
    """clients in the table, at most"""


def make(config: MakeConfig) -> None:
    """Write a partition file.

    Raises:
        UserError: options that do not fit the data, or a file that cannot be written.
    """
    from fedcore.partition_files import save

    if config.out is None:
        raise UserError("no file to write; give --out FILE.json")
    if config.partition.file is not None:
        raise UserError("partition.file names a partition that exists already; show it with fed-data partition show")
    made, labels = _made(config)
    save(made, config.out, data=config.data.name, fingerprint=config.data.fingerprint(), labels=labels)
    _say(summary(made, labels.counts) + "\n")
    _say(f"{config.out}: {len(made)} clients, with checksum")
    where = f" --data.root {config.data.root}" if config.data.root else ""
    share = "" if config.val_share == MakeConfig.val_share else f" --federation.val_share {config.val_share}"
    _say(f"use it: fed-train --data {config.data.name}{where}{share} --partition.file {config.out}")


def show(config: ShowConfig) -> None:
    """Print a partition, draw it.

    Raises:
        UserError: a file that is missing or was changed, or options that do not fit the data.
    """
    from fedcore.partition_files import load, read_labels

    if config.rows < 1:
        raise UserError(f"rows={config.rows}; expected at least 1 client in the table")
    if config.out is not None and config.out.suffix.lower() != ".png":
        raise UserError(f"--out {config.out}: expected a name that ends in .png")
    labels = None if config.partition.file is None else read_labels(config.partition.file)
    if labels is not None and config.partition.file is not None:
        found = load(config.partition.file)
    else:
        found, labels = _made(config)
    _say(summary(found, labels.counts) + "\n")
    _say(client_table(found, labels, config.rows))
    if config.out is not None:
        from polymodal.files import check_writable, write_bytes

        from fedcore.figures import label_counts

        title = f"{labels.data}, {_described(found)}: samples by client and label"
        path = config.out.expanduser()
        check_writable(path.parent)
        write_bytes(path, label_counts(labels.counts, class_names=labels.class_names, title=title))
        _say(f"picture: {config.out}")


def summary(partition: Partition, counts: np.ndarray) -> str:
    """Sizes, classes a client, skew, and samples that are on several clients or on none.

    Skew is the mean over clients of the total variation distance between a client's label mix and that of all
    together: 0 for equal mixes, near 1 - 1/C where each client has one of C equally frequent classes.
    """
    import numpy as np

    sizes = np.array(partition.sizes)
    used = len(np.unique(np.concatenate(partition.clients)))
    mixes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    skew = 0.5 * np.abs(mixes - counts.sum(axis=0) / counts.sum())[sizes > 0].sum(axis=1).mean()
    classes = (counts > 0).sum(axis=1).mean()
    lines = [
        f"{_described(partition)}: {len(partition)} clients, {sizes.min()} to {sizes.max()} samples"
        f" (median {np.median(sizes):g}), {classes:.1f} classes a client, label skew {skew:.2f}",
        f"{used} of {partition.size} training samples are on a client, {partition.repeated} copies are further ones of"
        " samples that some client has",
    ]
    if partition.empty:
        lines.append(f"{len(partition.empty)} clients have no samples: a run leaves them out")
    return "\n".join(lines)


def client_table(partition: Partition, labels: Labels, rows: int) -> str:
    """Samples by client and class, as a Markdown table; many classes: the most frequent of each client."""
    counts, names = labels.counts, labels.class_names
    shown = range(min(rows, len(partition)))
    called = partition.names or tuple(str(number) for number in range(len(partition)))
    if len(names) <= _COLUMNS:
        header = ["client", "samples", *names]
        cells = [[called[i], str(counts[i].sum()), *(str(n) if n else "" for n in counts[i])] for i in shown]
    else:
        header = ["client", "samples", "classes", "most frequent"]
        cells = []
        for i in shown:
            top = [c for c in (-counts[i]).argsort(kind="stable")[:5] if counts[i, c]]
            frequent = ", ".join(f"{names[c]} {counts[i, c]}" for c in top)
            cells.append([called[i], str(counts[i].sum()), str((counts[i] > 0).sum()), frequent])
    more = len(partition) - len(shown)
    return markdown(header, cells) + (f"\n\n{more} more clients (--rows {len(partition)})" if more else "") + "\n"


def partition_command(arguments: Sequence[str]) -> int:
    """``fed-data partition``; returns the exit code."""
    rest = list(arguments[1:])
    if arguments and arguments[0] == "make":
        return command(make, MakeConfig, prog=f"{PROG} make", example=_MAKE, choices={"data": READERS}, argv=rest)
    if arguments and arguments[0] == "show":
        if rest and not rest[0].startswith("-"):
            rest[0] = f"--partition.file={rest[0]}"
        return command(show, ShowConfig, prog=f"{PROG} show", example=_SHOW, choices={"data": READERS}, argv=rest)
    wanted = bool(arguments) and arguments[0] in ("-h", "--help")
    stream = sys.stdout if wanted else sys.stderr
    stream.write(f"usage: {PROG} make|show [options]   (e.g. {PROG} show --help lists them)\n")
    return 0 if wanted else 2


def _made(config: MakeConfig) -> tuple[Partition, Labels]:
    """The partition that a run with these options has, and its labels."""
    import dataclasses

    from fedcore.partition_files import Labels
    from fedcore.world import build_world

    world = build_world(config.data, config.partition, val_share=config.val_share, seed=config.seed)
    how = {**world.partition.how, "val_share": config.val_share}
    made = dataclasses.replace(world.partition, how=how)
    classes = int(world.labels.max()) + 1
    names = config.data.class_names() or [f"bin {number}" for number in range(classes)]
    return made, Labels(made.counts(world.labels, len(names)), tuple(names), config.data.name)


def _described(partition: Partition) -> str:
    how = dict(partition.how)
    scheme = how.pop("scheme", "given")
    shown = [f"{key} {how[key]}" for key in ("alpha", "shards_per_client", "seed") if how.get(key) is not None]
    return " ".join([str(scheme), *shown])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
