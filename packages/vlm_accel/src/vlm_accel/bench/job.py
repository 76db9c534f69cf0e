"""One bench: its rows one after the other, a JSON each; what is there already is not run again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.config import to_dict
from polymodal.errors import UserError
from polymodal.files import check_writable, write_json, write_text
from polymodal.seeding import derive
from torch import Tensor

from vlm_accel.bench import fidelity, measure
from vlm_accel.bench.cases import Case, all_cases, names_of
from vlm_accel.bench.settings import BenchConfig
from vlm_accel.bench.subjects import Subject
from vlm_accel.methods import METHODS

if TYPE_CHECKING:
    from polymodal.run import Run

__all__ = ["FULL", "BenchJob"]

SCHEMA_VERSION = 1
FULL = "full"
"""label of the unmodified model's row"""
_log = logging.getLogger(__name__)


class BenchJob:
    """Rows of a bench.

    Args:
        config: what to measure.
        subject: on what.
        folder: of the cells.
    """

    def __init__(self, config: BenchConfig, subject: Subject, folder: Path) -> None:
        self.config, self.subject, self.folder = config, subject, folder
        self.model = subject.vlm.model
        self.cases = all_cases(config)
        self.tokens = config.size("max_new_tokens")
        wanted = config.fidelity or (len(subject) if config.model is None else 32)
        size = config.size("batch")
        self.compared = min(len(subject), -(-wanted // size) * size)
        self._full: list[fidelity.Answers] | None = None
        self._plain: dict[str, float] | None = None
        check_writable(folder)

    def run(self, run: Run) -> list[dict[str, Any]]:
        """Measure the rows that are missing; returns the records of all, the unmodified model's first."""
        again = bool(run.manifest["resumed"])  # then what was there is in the logs already
        fresh = self._read(None) is None
        records = [self._record(None)]
        self._add_retained(records[0], records[0])
        if fresh or not again:
            self._note(run, records[0], 0)
        began, done = time.monotonic(), 0
        for number, case in enumerate(self.cases, start=1):
            fresh = self._read(case) is None
            record = self._record(case)
            self._add_retained(record, records[0])
            records.append(record)
            if fresh or not again:
                self._note(run, record, number)
            done += fresh
            if fresh:
                left = (time.monotonic() - began) / done * sum(self._read(c) is None for c in self.cases[number:])
                _log.info("%d/%d %s: %s; %.0f s left", number, len(self.cases), case.label, said(record), left)
        return records

    @staticmethod
    def _add_retained(record: dict[str, Any], full: dict[str, Any]) -> None:
        """What follows from two rows is not stored with one."""
        from vlm_accel.metrics.tasks import retained

        share = retained(record["metrics"], full["metrics"])
        if share is not None:
            record["metrics"]["test/retained"] = share

    # ---- one row

    def settings(self, case: Case | None) -> dict[str, Any]:
        """Everything that the result of a row depends on, without folders."""
        config = self.config
        same = {name: getattr(config, name) for name in ("seed", "dtype", "attn", "frames", "metric", "repeats")}
        return {
            "schema_version": SCHEMA_VERSION,
            "case": None if case is None else case.settings(),
            "model": self.subject.vlm.path.name,
            "data": self.subject.facts,
            "tokens": self.tokens,
            "compared": self.compared,
            "batch": config.size("batch"),
            **same,
        }

    def _file(self, case: Case | None) -> Path:
        return self.folder / f"{FULL if case is None else case.label}-seed{self.config.seed}.json"

    def _read(self, case: Case | None) -> dict[str, Any] | None:
        """The record of a row that was measured with these settings.

        Raises:
            UserError: a record of a newer version.
        """
        path = self._file(case)
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read and is measured again: %s", path, error)
            return None
        version = record.get("schema_version", 0)
        if version > SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {version}; this vlm-bench reads up to {SCHEMA_VERSION}")
        return record if record.get("settings_hash") == _hash(self.settings(case)) else None

    def _record(self, case: Case | None) -> dict[str, Any]:
        known = self._read(case)
        if known is not None:
            return known
        began = time.monotonic()
        settings = self.settings(case)
        record: dict[str, Any] = {
            "schema": "vlm_accel.bench",
            "schema_version": SCHEMA_VERSION,
            "label": FULL if case is None else case.label,
            "method": "none" if case is None else case.method,
            "group": FULL if case is None else case.group,
            "fidelity": "" if case is None else _fidelity(case),
            "seed": self.config.seed,
            "settings_hash": _hash(settings),
            "settings": to_dict(settings),
            "status": "finished",
            "error": None,
            "metrics": {},
        }
        predictions: list[dict[str, Any]] = []
        try:
            record["metrics"], predictions = self._measure(case)
        except UserError as error:
            if case is None:
                raise
            record |= {"status": "refused", "error": str(error)}
        record["seconds"] = round(time.monotonic() - began, 3)
        if predictions and self.config.model is not None:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
            write_text(self._file(case).with_suffix(".predictions.jsonl"), lines)
        write_json(self._file(case), record)
        return record

    def _measure(self, case: Case | None) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if case is None:
            answers = self.full()
            rows = [row for batch in answers for row in batch.ids]
            metrics, predictions = self.subject.score(rows)
            same = {"fidelity/kl": 0.0, "fidelity/agreement": 1.0, "fidelity/undiverged": 1.0}
            costs = measure.combined({}, self.plain())
            return {**metrics, **same, **costs}, predictions
        enter = partial(self._enter, case)
        with torch.inference_mode():
            metrics = self._fidelity(case)
            rows = self._answers(case)
        scored, predictions = self.subject.score(rows)
        inputs = self._timed_inputs()
        costs = measure.combined(measure.costs_of(enter, self.model, inputs, self.tokens), self.plain())
        times: dict[str, float] = {}
        if self.config.repeats:
            times = measure.times_of(enter, self.model, inputs, self.tokens, self.config.warmup, self.config.repeats)
        return {**scored, **metrics, **costs, **times, **measure.efficiency(times, costs)}, predictions

    def _enter(self, case: Case, batch: int = 0) -> AbstractContextManager[Any]:
        """The acceleration of a row; random controls draw anew for every batch."""
        from vlm_accel.accelerate import accelerate

        return accelerate(self.model, **case.arguments(derive(self.config.seed, "batch", batch) % 2**31))

    def _answers(self, case: Case) -> list[Tensor]:
        """New tokens of every sample."""
        rows: list[Tensor] = []
        for numbers, inputs in self.subject.batches(self.config.size("batch")):
            with self._enter(case, numbers[0]):
                rows += fidelity.generate(self.model, inputs, self.tokens).ids
        return rows

    def _fidelity(self, case: Case) -> dict[str, float]:
        """Means over the compared samples."""
        parts = []
        batches = self.subject.batches(self.config.size("batch"), self.compared)
        for (numbers, inputs), answers in zip(batches, self.full(), strict=False):
            with self._enter(case, numbers[0]):
                logits = fidelity.force(self.model, inputs, answers)
            parts.append(fidelity.compare(answers, logits))
        kl, agree = (torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "agree"))
        first = torch.cat([part.diverged for part in parts])
        where = first[first >= 0].double()
        found = {
            "fidelity/kl": float(kl.mean()),
            "fidelity/agreement": float(agree.mean()),
            "fidelity/undiverged": float((first < 0).double().mean()),
        }
        return {**found, "fidelity/first_divergence": float(where.mean())} if len(where) else found

    # ---- the unmodified model

    def full(self) -> list[fidelity.Answers]:
        """Answers of the unmodified model, with logits for the samples that are compared."""
        if self._full is None:
            self._full = []
            with torch.inference_mode():
                for numbers, inputs in self.subject.batches(self.config.size("batch")):
                    record = numbers[0] < self.compared
                    self._full.append(fidelity.generate(self.model, inputs, self.tokens, record))
        return self._full

    def plain(self) -> dict[str, float]:
        """Costs of the unmodified model."""
        if self._plain is None:
            with torch.inference_mode():
                self._plain = measure.plain_costs(self.model, self._timed_inputs(), self.tokens)
        return self._plain

    def _timed_inputs(self) -> dict[str, Tensor]:
        count = min(len(self.subject), self.config.size("time_batch"))
        return self.subject.inputs(range(count))

    def _note(self, run: Run, record: dict[str, Any], number: int) -> None:
        """Write a row's figures to the loggers, by row."""
        kept = ("test/", "fidelity/", "macs/", "kv/", "time/", "speedup/", "tokens/left_share", "tokens/mean_share")
        found = {name: value for name, value in record["metrics"].items() if name.startswith(kept)}
        if found:
            run.log({**found, "row": float(number)}, number)


def said(record: dict[str, Any]) -> str:
    """A row in one line, for progress."""
    if record["error"]:
        return f"refused: {record['error']}"
    found = record["metrics"]
    main = next((name for name in found if name.startswith("test/")), None)
    text = f"{main.removeprefix('test/')} {found[main]:.3f}, " if main else ""
    return f"{text}KL {found['fidelity/kl']:.4f} ({record['seconds']:.1f} s)"


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _fidelity(case: Case) -> str:
    kinds = {METHODS.info(name).fidelity for name in names_of(case.method)}
    return next(kind for kind in ("reconstruction", "code", "paper") if kind in kinds)
