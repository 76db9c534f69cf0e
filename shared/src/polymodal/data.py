"""Data helpers that know no task: folder checks, index and array caches, the length-bucketed batch sampler."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from polymodal.errors import UserError
from polymodal.files import write_text
from polymodal.paths import cache_dir, natural_key, read_text_lines, require_dir, require_files
from polymodal.untrusted import safe_extract, safe_unpickle

__all__ = [
    "cache_dir",
    "drop_index",
    "indexed",
    "natural_key",
    "read_text_lines",
    "require_dir",
    "require_files",
    "safe_extract",
    "safe_unpickle",
]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_INDEX_SCHEMA = 1


def _index_path(identity: str) -> Path:
    return cache_dir("index", hashlib.sha256(identity.encode()).hexdigest()[:24] + ".json")


def indexed(identity: str, state: Any, build: Callable[[], T]) -> T:
    """A value that is slow to find out, kept as JSON in the user's cache.

    Args:
        identity: what is indexed, e.g. ``"frames /data/phoenix/train"``; one file each, so a stale one is overwritten.
        state: JSON value that changes when the indexed thing changes (time stamp, size).
        build: makes the value when there is none for this state; it must survive JSON (tuples come back as lists).

    Returns:
        The value. A cache that cannot be read or written is logged and not an error.
    """
    path = _index_path(identity)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema_version"] == _INDEX_SCHEMA and stored["identity"] == identity and stored["state"] == state:
            value: T = stored["value"]
            return value
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("index %s cannot be used (%s); it is made again", path, error)
    value = build()
    entry = {"schema_version": _INDEX_SCHEMA, "identity": identity, "state": state, "value": value}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(entry, ensure_ascii=False))
    except (OSError, UserError) as error:
        _log.warning("index %s cannot be written (%s); indexing is repeated at the next start", path, error)
    return value


def drop_index(identity: str) -> None:
    """Forget the stored value of ``identity``, if any."""
    _index_path(identity).unlink(missing_ok=True)
