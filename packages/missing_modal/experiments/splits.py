"""What emoji.py and six_views.py share: splits that keep groups together, manifest and command line."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from polymodal.errors import UserError
from polymodal.files import write_text

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
SEED = 0


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Group of each of ``count`` rows, named by its smallest row: rows of one pair are in one group."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return [root(row) for row in range(count)]


def deal(groups: Sequence[int], labels: Sequence[str], names: Sequence[str], seed: int = SEED) -> list[str]:
    """Split of each row: whole groups, and of each class about the same shares.

    The groups of a class (that of their first row) are put in an order that is a hash of ``seed`` and their first name,
    the large ones first; each goes where the class lacks most rows, so that large groups are for training.

    Args:
        groups: of each row, named by its smallest row.
        labels: class of each row.
        names: of each row, distinct.
        seed: of the order.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)

    def place(group: int) -> tuple[int, str]:
        return -len(members[group]), hashlib.sha256(f"{seed}|{names[group]}".encode()).hexdigest()

    totals = {label: labels.count(label) for label in labels}
    held: dict[tuple[str, str], int] = {}
    found = [""] * len(groups)
    for group in sorted(members, key=place):
        label, size = labels[group], len(members[group])
        lack = {split: share * totals[label] - held.get((label, split), 0) for split, share in SHARES.items()}
        split = max(lack, key=lack.__getitem__)
        held[label, split] = held.get((label, split), 0) + size
        for row in members[group]:
            found[row] = split
    return found


def write_manifest(path: Path, modalities: Mapping[str, str], classes: Sequence[str], rows: Sequence[dict]) -> None:
    """A manifest with its header; see ``Manifest`` for the keys of a row."""
    head = {"schema": "missing_modal.manifest", "schema_version": 1, "modalities": dict(modalities)}
    lines = [head | {"classes": list(classes)}, *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def counts(splits: Sequence[str]) -> str:
    """Rows by split, as text."""
    return ", ".join(f"{split} {splits.count(split):,}" for split in SHARES)


def script(doc: str, package: str, write: Callable[[Path, Path], str]) -> int:
    """The command line of a script that makes a data set of a downloaded package; returns the exit code.

    Args:
        doc: of the script; its first line is shown.
        package: help text of the argument.
        write: (package, folder) -> one line about what was written to ``folder/manifest.jsonl``.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("package", type=Path, help=package)
    parser.add_argument("--out", type=Path, required=True, help="folder for manifest.jsonl and its files")
    options = parser.parse_args()
    try:
        sys.stdout.write(f"{write(options.package, options.out)}\n{options.out / 'manifest.jsonl'}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
