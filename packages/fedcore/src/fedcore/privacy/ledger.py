"""What was released: one event a noisy vector, written to the disk before the vector leaves the mechanism."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from polymodal.errors import UserError

__all__ = ["SCHEMA_VERSION", "Event", "Ledger"]

log = logging.getLogger(__name__)
SCHEMA = "fedcore.privacy_ledger"
SCHEMA_VERSION = 1
REMEDY = "epsilon cannot be trusted without it; start a new run"


@dataclass(frozen=True)
class Event:
    """One release. Every field is public.

    Args:
        round: index of the round, from 0; a round that was run twice after a resume is there twice.
        sampling: ``poisson`` or ``fixed``.
        sampling_rate: q, probability or share of a client.
        noise_multiplier: sigma.
        clip: C.
        clients: N.
        numbers: of the released vector.
        reasons: why the release has no guarantee; epsilon is infinite from then on.
        id: of the event, random, so that ledgers can be joined.
    """

    round: int
    sampling: str
    sampling_rate: float
    noise_multiplier: float
    clip: float
    clients: int
    numbers: int
    reasons: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """From ``to_dict``; ValueError where a field is missing, unknown or of another type."""
        kinds = {"round": int, "clients": int, "numbers": int, "sampling": str, "id": str}
        numbers = ("sampling_rate", "noise_multiplier", "clip")
        names = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"an event has the fields {', '.join(sorted(names))}")
        good = all(isinstance(values[name], kind) for name, kind in kinds.items())
        good = good and all(isinstance(values[name], (int, float)) and values[name] >= 0 for name in numbers)
        if not good or values["sampling"] not in ("poisson", "fixed") or not values["sampling_rate"] <= 1:
            raise ValueError("an event with values out of range")
        return cls(**{**values, "reasons": tuple(str(reason) for reason in values["reasons"])})


class Ledger:
    """Append-only list of events; with a file, JSON lines that reach the disk before ``append`` returns.

    Ledgers are joined by the ids of their events: a resumed run has those of its file and those of its checkpoint,
    whichever knows more, and none is ever forgotten.

    Args:
        path: the file; made where it does not exist.

    Raises:
        UserError: a file that cannot be read or written, is damaged, or of a newer schema.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.events: list[Event] = []
        self.path: Path | None = None
        self._size = 0
        if path is not None:
            self.open(path)

    def __len__(self) -> int:
        return len(self.events)

    # ------------------------------------------------------------------ adding

    def append(self, event: Event) -> None:
        """Add an event, on the disk first.

        Raises:
            UserError: the file cannot be written, or somebody else wrote to it; the event is not added then, and
                nothing may be released.
        """
        self._write([event])
        self.events.append(event)

    def merge(self, events: Iterable[Event]) -> None:
        """Add those events that are not there yet."""
        known = {event.id for event in self.events}
        fresh = [event for event in events if event.id not in known]
        if fresh:
            self._write(fresh)
            self.events.extend(fresh)

    # ------------------------------------------------------------------ as plain values, for checkpoints

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "events": [e.to_dict() for e in self.events]}

    @staticmethod
    def events_of(saved: Mapping[str, Any]) -> list[Event]:
        """Events of ``to_dict``.

        Raises:
            UserError: another or a newer schema, or damaged.
        """
        _check_header(saved, "the ledger of a checkpoint")
        try:
            return [Event.from_dict(values) for values in saved["events"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the ledger of a checkpoint is damaged ({error}); {REMEDY}") from error

    # ------------------------------------------------------------------ the file

    def open(self, path: Path) -> None:
        """Write to ``path`` from now on; its events and those known so far are joined.

        Raises:
            UserError: as the constructor.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._read(path) if path.exists() and path.stat().st_size else []
            if not path.exists() or not path.stat().st_size:
                _append(path, json.dumps({"schema": SCHEMA, "schema_version": SCHEMA_VERSION}) + "\n")
                _sync_folder(path.parent)
            self._size = path.stat().st_size
        except OSError as error:
            raise UserError(f"privacy ledger {path}: {error.strerror or error}") from error
        mine, self.events, self.path = self.events, found, path
        self.merge(mine)

    def _read(self, path: Path) -> list[Event]:
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):  # a write that was cut off: what it was to announce was never released
            log.warning("privacy ledger %s: its last line is incomplete and taken away", path)
            with path.open("r+b") as file:
                file.truncate(len(complete))
        if not complete:
            return []
        lines = complete.decode("utf-8", errors="replace").splitlines()
        try:
            parsed = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(f"privacy ledger {path} is damaged ({error}); {REMEDY}") from error
        _check_header(parsed[0], f"privacy ledger {path}")
        try:
            return [Event.from_dict(values) for values in parsed[1:]]
        except (ValueError, TypeError) as error:
            raise UserError(f"privacy ledger {path} is damaged ({error}); {REMEDY}") from error

    def _write(self, events: list[Event]) -> None:
        if self.path is None:
            return
        try:
            if self.path.stat().st_size != self._size:
                raise UserError(f"privacy ledger {self.path} was changed by another process; {REMEDY}")
            _append(self.path, "".join(json.dumps(event.to_dict()) + "\n" for event in events))
            self._size = self.path.stat().st_size
        except OSError as error:
            raise UserError(f"privacy ledger {self.path}: {error.strerror or error}; nothing was released") from error


def _check_header(values: Any, where: str) -> None:
    if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
        raise UserError(f"{where}: this is not a privacy ledger; {REMEDY}")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{where} has schema version {version}; this fedcore reads {SCHEMA_VERSION}; {REMEDY}")


def _append(path: Path, text: str) -> None:
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file outlive a loss of power, where the system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
