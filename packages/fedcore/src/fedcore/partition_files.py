"""Partitions as JSON with a checksum, so that others can train on exactly the same clients."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.errors import UserError
from polymodal.files import check_writable, write_text
from polymodal.paths import require_files

from fedcore.partition_base import Partition

__all__ = ["SCHEMA_VERSION", "Labels", "checksum", "load", "read_labels", "save"]

_SCHEMA = "fedcore.partition"
SCHEMA_VERSION = 1
_REMEDY = "write it again with fed-data partition make --out FILE"


@dataclass(frozen=True, eq=False)
class Labels:
    """What a file tells of the labels, so that it can be shown without the data set.

    Args:
        counts: (clients, C) samples of each class by client.
        class_names: names of the classes.
        data: name of the data set.
    """

    counts: np.ndarray
    class_names: tuple[str, ...]
    data: str = ""


def checksum(partition: Partition) -> str:
    """SHA-256 of sizes and indices, whatever the scheme was called."""
    digest = hashlib.sha256(repr((partition.size, partition.sizes)).encode())
    for indices in partition.clients:
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


def save(
    partition: Partition, path: Path, *, data: str = "", fingerprint: str = "", labels: Labels | None = None
) -> None:
    """Write a partition.

    Args:
        partition: what is written.
        path: a ``.json`` file; its folder is made.
        data: name of the data set.
        fingerprint: of the data set, which ``load`` compares.
        labels: for ``fed-data partition show``; nothing else reads them.

    Raises:
        UserError: the file cannot be written.
    """
    check_writable(path.expanduser().parent)
    content = {
        "schema": _SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "data": data,
        "fingerprint": fingerprint,
        "how": partition.how,
        "size": partition.size,
        "names": list(partition.names),
        "sha256": checksum(partition),
    }
    if labels is not None:
        content["labels"] = {"classes": list(labels.class_names), "counts": json.dumps(labels.counts.tolist())}
    head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(indices.tolist())}" for indices in partition.clients)
    write_text(path.expanduser(), f'{head},\n "clients": [\n{lines}\n ]\n}}\n')


def load(path: Path, *, size: int | None = None, fingerprint: str | None = None) -> Partition:
    """Read a partition and verify its checksum.

    Args:
        path: the file.
        size: samples of the training set it is for (None: not compared).
        fingerprint: of the data set it is for (None: not compared; nor is a file that has none).

    Raises:
        UserError: missing, broken, changed since, of a newer schema, or made for another data set.
    """
    path = Path(path).expanduser()
    content = _read(path)
    try:
        clients = [np.asarray(indices, dtype=np.int64) for indices in content["clients"]]
        if any(indices.ndim != 1 for indices in clients):
            raise TypeError("clients are not lists of indices")
        partition = Partition(tuple(clients), int(content["size"]), dict(content["how"]), tuple(content["names"]))
        wanted = str(content["sha256"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"partition file {path} cannot be read ({reason}); copy it again, or {_REMEDY}") from error
    if checksum(partition) != wanted:
        raise UserError(
            f"partition file {path}: its indices do not have the checksum {wanted[:12]}... in it; copy it again, or"
            f" {_REMEDY}"
        )
    _check_data(path, content, partition, size, fingerprint)
    return partition


def read_labels(path: Path) -> Labels | None:
    """What a partition file tells of the labels; None where it tells nothing of use."""
    content = _read(Path(path).expanduser())
    stored = content.get("labels")
    if not isinstance(stored, dict):
        return None
    try:
        counts = np.asarray(json.loads(stored["counts"]), dtype=np.int64)
        names = tuple(str(name) for name in stored["classes"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    fits = counts.shape == (len(content.get("clients", ())), len(names))
    return Labels(counts, names, str(content.get("data", ""))) if fits and counts.size else None


def _read(path: Path) -> dict[str, Any]:
    require_files(path.parent, [path.name], "partition file", _REMEDY)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_schema(path, content)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"partition file {path} cannot be read ({error}); copy it again, or {_REMEDY}") from error
    found: dict[str, Any] = content
    return found


def _check_schema(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise TypeError(f'no "schema": "{_SCHEMA}" in it')
    if content["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"partition file {path} has schema version {content['schema_version']}, known is {SCHEMA_VERSION}; update"
            " polymodal-fedcore"
        )


def _check_data(path: Path, content: Any, partition: Partition, size: int | None, fingerprint: str | None) -> None:
    made_for = f"was made for {content.get('data') or 'a data set'} with"
    if size is not None and partition.size != size:
        raise UserError(
            f"partition file {path} {made_for} {partition.size} training samples, this run has {size}; give that data"
            " set, its options and its share of validation samples, or another file"
        )
    given = content.get("fingerprint")
    if fingerprint and given and given != fingerprint:
        raise UserError(
            f"partition file {path} {made_for} fingerprint {given}, this data has {fingerprint}; give that data set and"
            " its options, or another file"
        )
