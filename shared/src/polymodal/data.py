"""Data helpers that know no task: folder checks, index and array caches, the length-bucketed batch sampler."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from polymodal.arrays import ArrayCache, ArrayCacheWriter
from polymodal.errors import UserError
from polymodal.files import write_text
from polymodal.paths import cache_dir, natural_key, read_text_lines, require_dir, require_files
from polymodal.seeding import derive
from polymodal.untrusted import safe_extract, safe_unpickle

__all__ = [
    "ArrayCache",
    "ArrayCacheWriter",
    "LengthBucketBatchSampler",
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
_ORDERS = 4
_ATTEMPTS = 64


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


class LengthBucketBatchSampler:
    """Batches of samples of similar length, in an order that is a pure function of (seed, epoch).

    A batch sampler for ``torch.utils.data.DataLoader(batch_sampler=...)``; it yields lists of ``(index, epoch)``, so
    that a dataset can make each random draw a function of (seed, epoch, sample id) in whichever worker it runs.

    With ``shuffle``, samples are permuted, sorted by length inside pools of ``pool`` batches, cut into batches, and
    the batches are permuted. Without, all samples are sorted by length, longest first, so that memory runs out at
    once or never. The number of batches is the same in every epoch: a frame budget that would give one batch less
    has one of its batches halved.

    Args:
        lengths: length of each sample (frames, tokens), at least 1.
        batch_size: samples a batch; exactly one of this and ``max_total`` is given.
        max_total: bound on the sum of lengths in a batch; a single longer sample is a batch of its own.
        seed: root seed of the order.
        shuffle: new order each epoch (training), else sorted (evaluation).
        drop_last: leave out the last, smaller batch (``batch_size`` only), and what does not divide among ranks.
        pool: batches that are sorted together; 1 shuffles fully, more saves padding.
        rank: this process.
        world_size: number of processes; each gets the same number of batches. Batches are halved to make their
            number divide; where all have one sample, some are repeated, and evaluation merges them by id.

    Raises:
        ValueError: both or none of ``batch_size`` and ``max_total``, or a value out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None = None,
        max_total: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        pool: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_size is None) == (max_total is None):
            raise ValueError("give batch_size or max_total, not both")
        if (batch_size or max_total or 0) < 1 or pool < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{batch_size=} {max_total=} {pool=} {rank=} {world_size=}; sizes >= 1, rank < world_size")
        if not lengths or min(lengths) < 1:
            raise ValueError("lengths must be at least 1, and there must be some")
        self.lengths = [int(n) for n in lengths]
        self.by_total = max_total is not None
        self.limit = int(batch_size or max_total or 0)
        self.seed, self.shuffle, self.drop_last, self.pool = seed, shuffle, drop_last and not self.by_total, pool
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start_batch = 0
        self._known: tuple[int, list[list[int]]] | None = None
        # By count, every order has the same number of batches. By total, orders differ a little: the most of a few.
        tried = range(_ORDERS if self.by_total and shuffle else 1)
        self._count = max(len(self._draw(order)) for order in tried)
        if self.drop_last:
            self._count = self._count // world_size * world_size
            if not self._count:
                raise UserError(
                    f"{len(self.lengths)} samples do not fill {world_size} batches of {batch_size}; lower batch_size"
                )
        else:
            self._count = -(-self._count // world_size) * world_size

    @property
    def sampler(self) -> LengthBucketBatchSampler:
        """Itself: Lightning looks for ``set_epoch`` on ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order. A new epoch starts at its first batch; the same epoch keeps ``start_batch``."""
        if epoch != self.epoch:
            self.epoch, self.start_batch = epoch, 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, the same in every epoch and not less after a resume."""
        return self._count // self.world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The epoch's batches of this rank from ``start_batch`` on."""
        epoch, start = self.epoch, self.start_batch
        self.start_batch = 0  # it belongs to one pass: going over the epoch again starts at the beginning
        for batch in self.batches(epoch)[self.rank :: self.world_size][start:]:
            yield [(index, epoch) for index in batch]

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, of all ranks, as lists of indices."""
        if self._known is None or self._known[0] != epoch:
            self._known = (epoch, self._even(self._draw(epoch), epoch))
        return self._known[1]

    def _draw(self, order: int, attempt: int = 0) -> list[list[int]]:
        if not self.shuffle:
            return self._cut(sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)))
        rng = random.Random(derive(self.seed, "batches", order, attempt))
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)
        width = self.pool * self.limit  # in samples, or in length
        if self.by_total:
            width = max(1, round(width * len(self.lengths) / sum(self.lengths)))
        ordered: list[int] = []
        if self.pool == 1 and not self.by_total:
            ordered = indices
        else:
            for number, start in enumerate(range(0, len(indices), width)):
                # up, down, up: a batch that spans two pools is of one length too
                down = self.by_total and number % 2 == 1
                ordered += sorted(indices[start : start + width], key=self.lengths.__getitem__, reverse=down)
        batches = self._cut(ordered)
        rng.shuffle(batches)
        return batches

    def _cut(self, ordered: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        total = 0
        for index in ordered:
            cost = self.lengths[index] if self.by_total else 1
            if not batches or total + cost > self.limit:
                batches.append([])
                total = 0
            batches[-1].append(index)
            total += cost
        if self.drop_last and len(batches[-1]) < self.limit:
            batches.pop()
        return batches

    def _even(self, batches: list[list[int]], epoch: int) -> list[list[int]]:
        """Exactly ``_count`` batches."""
        attempt = 0
        while len(batches) > self._count and not self.drop_last:
            attempt += 1  # rare: this order needs more batches than the first ones; another order of the same epoch
            batches = self._draw(epoch, attempt) if attempt < _ATTEMPTS else self._draw(epoch % _ORDERS)
        batches = batches[: self._count]
        whole = len(batches)
        while len(batches) < self._count:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[largest]
            if len(batch) == 1:
                batches.append(batches[len(batches) - whole])
            else:
                batches[largest] = batch[::2]
                batches.append(batch[1::2])
        return batches

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        """The place in the epoch, after ``done`` batches of it were used (not merely prefetched)."""
        return {"epoch": self.epoch, "start_batch": done, "order": self._order_id()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a stored place.

        Raises:
            UserError: the state belongs to other data or another batch size, so that its batches do not exist here.
        """
        if state["order"] != self._order_id():
            raise UserError(
                "the checkpoint was written with other data, batch size, seed or number of processes; its place in the"
                " epoch has no meaning here: resume with the same settings"
            )
        self.epoch, self.start_batch = state["epoch"], state["start_batch"]

    def _order_id(self) -> str:
        options = [self.limit, self.by_total, self.seed, self.shuffle, self.drop_last, self.pool, self.world_size]
        return hashlib.sha256(json.dumps([self.lengths, options]).encode()).hexdigest()[:16]
