"""The evaluation matrix without running the model again: every cell is a lookup in logits that were computed once.

The logits of a sample depend on its own pattern only (DCP 8). So 2^M - 1 passes, one for each pattern, hold the answer
to every kind, ratio and seed of a missing table: a cell picks each sample's scores from the pass of its pattern.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from polymodal.errors import UserError
from polymodal.files import atomic_write
from polymodal.paths import require_files

from missing_modal.data.base import Task
from missing_modal.metrics import Addends, Scores, as_array, mean_by_row, score_samples
from missing_modal.patterns import IMAGE_TEXT, all_masks, mask_name
from missing_modal.tables import draw_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Cell", "LogitCache", "passes", "sweep"]

SCHEMA_VERSION = 1


def passes(natural: Sequence[int], modalities: Sequence[str] = IMAGE_TEXT) -> dict[int, NDArray[np.int64]]:
    """What must be run: for each pattern the samples that can have it.

    Args:
        natural: (N,) what each sample really has, as bit masks.
        modalities: in the order of the model.

    Returns:
        Pattern (bit mask) -> numbers of the samples that have at least its modalities, ascending; patterns that no
        sample can have are left out.
    """
    held = np.asarray(natural, dtype=np.int64)
    found = {mask: np.flatnonzero(held & mask == mask) for mask in all_masks(modalities)}
    return {mask: samples for mask, samples in found.items() if len(samples)}


class LogitCache:
    """Logits of N samples under every pattern that they can have.

    Args:
        ids: N sample ids.
        rows: N row ids of the missing table (several samples may share one).
        labels: (N,) class numbers, or (N, C) of 0/1.
        natural: (N,) what each sample really has, as bit masks; default: everything.
        task: multiclass, multilabel, binary.
        modalities: in the order of the model.
    """

    def __init__(
        self,
        ids: Sequence[str],
        rows: Sequence[str],
        labels: Any,
        task: Task,
        natural: Sequence[int] | None = None,
        modalities: Sequence[str] = IMAGE_TEXT,
    ) -> None:
        self.ids, self.rows = list(ids), list(rows)
        self.labels = as_array(labels)
        self.task: Task = task
        self.modalities = tuple(modalities)
        full = 2 ** len(self.modalities) - 1
        self.natural = np.full(len(self.ids), full) if natural is None else np.asarray(natural, dtype=np.int64)
        if not len(self.ids) == len(self.rows) == len(self.labels) == len(self.natural):
            raise ValueError(
                f"{len(self.ids)} ids, {len(self.rows)} rows, {len(self.labels)} labels, {len(self.natural)} patterns"
            )
        if len(self.natural) and not 1 <= self.natural.min() <= self.natural.max() <= full:
            raise ValueError(f"natural patterns {self.natural.min()}..{self.natural.max()}; expected 1..{full}")
        #: rows of the missing table, sorted, and the place of each sample's row among them
        self.table_ids, self._place = np.unique(np.array(self.rows, dtype=object), return_inverse=True)
        self.needed = passes(cast("Sequence[int]", self.natural), self.modalities)
        self._logits: dict[int, NDArray[Any]] = {}
        self._names = {mask: mask_name(mask, self.modalities) for mask in all_masks(self.modalities)}
        #: (2^M, N) line of a sample under a pattern in the passes laid end to end, -1 where it cannot have it
        self._line = np.full((full + 1, len(self.ids)), -1, dtype=np.int64)
        offset = 0
        for mask, samples in self.needed.items():
            self._line[mask, samples] = offset + np.arange(len(samples))
            offset += len(samples)
        self._scores: Scores | None = None
        self._addends: Addends | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def missing_passes(self) -> list[int]:
        """Patterns that are still to be run."""
        return [mask for mask in self.needed if mask not in self._logits]

    def put(self, mask: int, logits: Any) -> None:
        """Keep the logits of one pass.

        Args:
            mask: its pattern.
            logits: (n, C) of the samples ``needed[mask]``, in that order.

        Raises:
            ValueError: a pattern that no sample can have, or another shape.
        """
        values = as_array(logits)
        if mask not in self.needed:
            raise ValueError(f"pattern {mask}; needed are {list(self.needed)}")
        classes = {v.shape[1] for v in self._logits.values()} | ({values.shape[1]} if values.ndim == 2 else set())
        if values.ndim != 2 or len(values) != len(self.needed[mask]) or len(classes) != 1:
            raise ValueError(f"logits {values.shape} of pattern {mask}; expected ({len(self.needed[mask])}, C)")
        self._logits[mask] = values
        self._scores = self._addends = None

    def logits(self, masks: Any) -> NDArray[Any]:
        """(N, C) logits of all samples under the patterns ``masks`` (N,).

        Raises:
            ValueError: a sample without that pattern, or a pass that is still to be run.
        """
        held = np.asarray(masks, dtype=np.int64)
        self._complete()
        line = self._lines(held)
        return np.concatenate([self._logits[mask] for mask in self.needed])[line]

    def final_masks(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) patterns of the samples under a table given as (R,) masks by ``table_ids``; see ``tables.combine``."""
        left = self.natural & table[self._place]
        return np.where(left == 0, self.natural, left)

    def table_masks(self, table: Mapping[str, int]) -> NDArray[np.int64]:
        """(N,) patterns of the samples under a table row id -> mask (``MissingTable.masks``).

        Raises:
            UserError: a row that the table lacks.
        """
        lacking = next((row for row in self.table_ids if row not in table), None)
        if lacking is not None:
            raise UserError(f"the missing table has no row {lacking}; give the table of this split")
        return self.final_masks(np.array([table[row] for row in self.table_ids], dtype=np.int64))

    def scores(self, masks: Any) -> Scores:
        """Scores of the samples under the patterns ``masks`` (N,): computed once a pass, then only picked."""
        return self._all_scores().take(self._lines(np.asarray(masks, dtype=np.int64)))

    def _all_scores(self) -> Scores:
        """Scores of the passes laid end to end."""
        self._complete()
        if self._scores is None:
            logits = np.concatenate([self._logits[mask] for mask in self.needed])
            labels = np.concatenate([self.labels[samples] for samples in self.needed.values()])
            self._scores = score_samples(logits, labels, self.task)
        return self._scores

    def evaluate(self, masks: Any, prefix: str = "test/") -> dict[str, float]:
        """``metrics.report`` of the samples under the patterns ``masks`` (N,): sums over what was computed once."""
        held = np.asarray(masks, dtype=np.int64)
        if self._addends is None:
            self._addends = Addends(self._all_scores())
        line = self._lines(held)
        return self._addends.by_group({name: line[held == mask] for mask, name in self._names.items()}, prefix)

    def mean_rows(self) -> LogitCache:
        """The cache of the rows: probabilities averaged over the samples of a row under each pattern.

        Raises:
            ValueError: samples of one row that differ in label or in what they really have, or a pass not run yet.
        """
        self._complete()
        _, first = np.unique(self._place, return_index=True)
        chosen = np.sort(first)
        position = first[self._place]
        if (self.natural != self.natural[position]).any() or (self.labels != self.labels[position]).any():
            raise ValueError("samples of one row differ in label or modalities; their probabilities cannot be averaged")
        rows = [self.rows[sample] for sample in chosen]
        cache = LogitCache(rows, rows, self.labels[chosen], self.task, self.natural[chosen].tolist(), self.modalities)
        for mask, samples in self.needed.items():
            _, logits = mean_by_row(self._logits[mask], (self.rows[sample] for sample in samples), self.task)
            cache.put(mask, logits)
        return cache

    def _complete(self) -> None:
        if self.missing_passes:
            names = ", ".join(mask_name(mask, self.modalities) for mask in self.missing_passes)
            raise ValueError(f"passes not run yet: {names}")

    def _lines(self, masks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Line of each sample in the passes laid end to end."""
        if masks.shape != self.natural.shape:
            raise ValueError(f"patterns {masks.shape} for {len(self)} samples")
        known = (masks >= 0) & (masks < len(self._line))
        line = np.where(known, self._line[np.where(known, masks, 0), np.arange(len(self))], -1)
        if (line < 0).any():
            sample = int(np.flatnonzero(line < 0)[0])
            raise ValueError(f"sample {self.ids[sample]} has {self.natural[sample]}, not pattern {masks[sample]}")
        return line

    def save(self, path: Path, meta: Mapping[str, Any] | None = None) -> None:
        """Write the passes that were run (``.npz``), with JSON values that say which model and data they are of."""
        header = {
            "schema_version": SCHEMA_VERSION,
            "ids": self.ids,
            "rows": self.rows,
            "task": self.task,
            "modalities": list(self.modalities),
            "meta": dict(meta or {}),
        }
        arrays: dict[str, Any] = {f"logits_{mask}": values for mask, values in self._logits.items()}
        arrays |= {"labels": self.labels, "natural": self.natural}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        atomic_write(path, lambda handle: np.savez(cast("Any", handle), header=text, **arrays))

    @classmethod
    def load(cls, path: Path) -> tuple[LogitCache, dict[str, Any]]:
        """What ``save`` wrote: the cache, with the passes that were run by then, and its ``meta``.

        Raises:
            UserError: missing, damaged, or of a newer schema.
        """
        remedy = "remove the file, it is computed anew"
        require_files(path.parent, [path.name], "cached logits")
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(arrays.pop("header").tobytes())
            version = header["schema_version"]
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"cached logits {path}: schema version {version} is newer than {SCHEMA_VERSION}; {remedy}"
                )
            if header["task"] not in get_args(Task):
                raise ValueError(f"task {header['task']!r}")
            labels, natural = arrays.pop("labels"), arrays.pop("natural")
            cache = cls(header["ids"], header["rows"], labels, header["task"], natural, header["modalities"])
            for name, values in arrays.items():
                cache.put(int(name.removeprefix("logits_")), values)
            meta: dict[str, Any] = header["meta"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"cached logits {path} cannot be read ({reason}); {remedy}") from error
        return cache, meta


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Args:
        kind: what goes missing in the test.
        ratio: share of the rows that lack something, as asked for.
        seed: of the table.
        metrics: by full name, overall and by pattern.
        counts: samples of each pattern by name.
    """

    kind: str
    ratio: float
    seed: int
    metrics: dict[str, float]
    counts: dict[str, int]


def sweep(
    cache: LogitCache,
    kinds: Iterable[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    dataset: str,
    split: str = "test",
    weights: Mapping[str, float] | None = None,
    prefix: str = "test/",
) -> Iterator[Cell]:
    """All cells of one model: kinds x ratios x seeds, each with the table that ``missing_table`` draws for it.

    Args:
        cache: complete logits of the model on the split.
        kinds: see ``tables.canonical_kind``.
        ratios: shares, 0..1.
        seeds: of the tables.
        dataset: name, as in ``missing_table``.
        split: name, as in ``missing_table``.
        weights: kind ``any``: weight by pattern name.
        prefix: of the metrics' names.

    Yields:
        Cells, the seed varying fastest.

    Raises:
        UserError: unknown kind, ratio outside 0..1, negative seed.
    """
    count = len(cache.table_ids)
    for kind in kinds:
        for ratio in ratios:
            for seed in seeds:
                table = draw_masks(count, kind, ratio, seed, dataset, split, cache.modalities, weights)
                masks = cache.final_masks(table)
                held = np.bincount(masks, minlength=2 ** len(cache.modalities))
                counts = {mask_name(m, cache.modalities): int(held[m]) for m in all_masks(cache.modalities)}
                yield Cell(kind, float(ratio), seed, cache.evaluate(masks, prefix), counts)
