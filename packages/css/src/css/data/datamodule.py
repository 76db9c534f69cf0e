"""The loaders of one continual step as a LightningDataModule."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from polymodal.data import LengthBucketBatchSampler
from polymodal.errors import UserError
from polymodal.loading import LazyLoader
from polymodal.seeding import numpy_rng

from css.data.base import Item, SegData
from css.data.batch import Batch, collate
from css.data.dataset import CSSDataset, Decoded, ReplayEntry
from css.data.options import LoaderConfig
from css.data.scenarios import select_test
from css.data.split_files import step_indices
from css.task import BACKGROUND, IGNORE, Task

__all__ = ["CSSDataModule", "ReplaySampler"]

_CACHE_BYTES = 2**29
"""largest cache of decoded pictures of a split"""
_log = logging.getLogger(__name__)


def _context() -> Any:
    """How workers start: from a small server process, so that they inherit no threads (of torch, of loggers)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["css.data.dataset"])  # imported once, not in each worker
    return context


def _ranks(shard: bool) -> tuple[int, int]:
    """This process and how many there are."""
    if shard and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class ReplaySampler(LengthBucketBatchSampler):
    """Batches of new pictures, each filled up with memory entries.

    Entries come in random order, all once before any comes again; the order is a function of (seed, epoch), and what a
    batch gets depends on its place in the epoch alone.

    Args:
        new: number of new pictures, at least 1; entries have the indices from there on.
        entries: number of memory entries, at least 1.
        batch_size: new pictures a batch.
        replayed: entries a batch.
        options: see :class:`polymodal.data.LengthBucketBatchSampler`.
    """

    def __init__(self, new: int, entries: int, batch_size: int, replayed: int, **options: Any) -> None:
        super().__init__([1] * new, batch_size, **options)
        self.entries, self.replayed = entries, replayed

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:  # type: ignore[override]
        """The epoch's batches of this rank: ``(index, epoch)``, and ``(index, epoch, occurrence)`` of entries."""
        start, epoch = self.start_batch, self.epoch
        orders: dict[int, list[int]] = {}
        for number, batch in enumerate(super().__iter__(), start=start):
            first = (number * self.world_size + self.rank) * self.replayed
            keys: list[tuple[int, ...]] = list(batch)
            for place in range(first, first + self.replayed):
                occurrence, which = divmod(place, self.entries)
                if occurrence not in orders:
                    draws = numpy_rng(self.seed, "replay", epoch, occurrence)
                    orders = {occurrence: draws.permutation(self.entries).tolist()}
                keys.append((len(self.lengths) + orders[occurrence][which], epoch, occurrence))
            yield keys


class CSSDataModule(L.LightningDataModule):
    """Loaders of one step; the same seed gives the same batches for any number of workers.

    Training labels are those of the step alone. Validation and test pictures are those with any class seen so far, and
    their labels have all of these: what is reported is old and new classes together.

    Args:
        reader: the data.
        task: classes by step.
        setting: which pictures a step has, see :func:`css.data.scenarios.select_train`.
        step: continual step, from 0.
        config: loader options.
        seed: root seed of order, augmentation, replay and the ``partitioned`` setting.
        replay: memory entries.
        mix: ``concat``: each entry is one more training picture; ``half``: half of each batch are entries, and an
            epoch goes once over the new pictures.
        keep_old: training labels keep classes of earlier steps, as they do in the setting ``sequential``.

    Attributes:
        train_sampler: batch sampler of the training loader, made in ``setup``; a resumed run sets its place there.
            The last batch of an epoch is left out where it is smaller, so that no normalisation sees a single picture;
            where all pictures together fill no batch, they are one.
    """

    def __init__(
        self,
        reader: SegData,
        task: Task,
        setting: str,
        step: int,
        config: LoaderConfig,
        *,
        seed: int = 0,
        replay: Sequence[ReplayEntry] = (),
        mix: Literal["concat", "half"] = "concat",
        keep_old: bool = False,
    ) -> None:
        super().__init__()
        if mix == "half" and replay and config.batch_size < 2:
            raise UserError("loader.batch_size=1, but half of each batch is replayed; give at least 2")
        self.reader, self.task, self.setting, self.step, self.config = reader, task, setting, step, config
        self.seed, self.replay, self.mix = seed, list(replay), mix
        self.keep_old = keep_old or setting == "sequential"
        self.train_sampler: LengthBucketBatchSampler | None = None
        self._train_loader: LazyLoader | None = None
        self._items: dict[str, list[Item]] = {}
        self._caches: dict[str, dict[str, Decoded] | None] = {}

    def prepare_data(self) -> None:
        """Let the reader write what it needs (the shapes world), in one process."""
        self.reader.prepare()

    def setup(self, stage: str) -> None:
        """Make the training loader, so that its sampler can be set to a place before workers start."""
        if stage == "fit":
            self._train_loader = self._make_train_loader()
            sampler = self._train_loader.batch_sampler
            self.train_sampler = sampler if isinstance(sampler, LengthBucketBatchSampler) else None

    # --- which pictures -----------------------------------------------------------------------------------------

    def train_items(self) -> list[Item]:
        """Training pictures of the step, without the memory.

        Raises:
            UserError: there are none.
        """
        return list(self._chosen("train"))

    def _chosen(self, split: str) -> list[Item]:
        """Pictures of a split at this step, chosen once."""
        if split not in self._items:
            items = self.reader.items(split)
            if split == "val":
                sets = self.reader.class_sets(split) if items else []
                chosen = select_test(self.task, sets, self.step, allow_empty=True)
            else:
                chosen = step_indices(self.reader, self.task, self.setting, self.step, split, seed=self.seed)
            self._items[split] = [items[index] for index in chosen]
        return self._items[split]

    # --- loaders ------------------------------------------------------------------------------------------------

    def _cache(self, split: str) -> dict[str, Decoded] | None:
        """Where decoded pictures of a split stay: in memory, where this process decodes them and they fit."""
        if self.config.num_workers:
            return None
        if split not in self._caches:
            items = self._chosen(split)
            pixels = self.reader.load_mask(items[0]).size  # of the first, as a measure of all
            need = 4 * pixels * (len(items) + (len(self.replay) if split == "train" else 0))
            fits = need <= _CACHE_BYTES
            _log.debug("decoded %s pictures need %.0f MiB; cache in memory: %s", split, need / 2**20, fits)
            self._caches[split] = {} if fits else None
        return self._caches[split]

    def _make_train_loader(self) -> LazyLoader:
        items, config = self.train_items(), self.config
        lut = self.task.train_lut(self.step, self.keep_old)
        dataset = CSSDataset(
            self.reader, items, lut, config, train=True, seed=self.seed, replay=self.replay, cache=self._cache("train")
        )
        rank, world = _ranks(shard=True)
        options: dict[str, Any] = {"seed": self.seed, "pool": 1, "rank": rank, "world_size": world}
        sampler: LengthBucketBatchSampler
        if self.mix == "half" and self.replay:
            replayed = config.batch_size // 2
            new = config.batch_size - replayed
            options["drop_last"] = len(items) >= new * world
            sampler = ReplaySampler(len(items), len(self.replay), new, replayed, **options)
        else:
            options["drop_last"] = len(dataset) >= config.batch_size * world
            sampler = LengthBucketBatchSampler([1] * len(dataset), config.batch_size, **options)
        return self._loader(dataset, sampler, persistent=True)

    def _loader(self, dataset: CSSDataset, sampler: LengthBucketBatchSampler, persistent: bool = False) -> LazyLoader:
        count = self.config.num_workers
        workers = {"persistent_workers": persistent, "multiprocessing_context": _context()} if count else {}
        return LazyLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=count,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def loader(self, split: str, *, shard: bool = True) -> LazyLoader:
        """Evaluation loader of a split: pictures in file order, labels of all classes seen so far.

        Args:
            split: ``train``, ``val`` or ``test``; of ``train``, the pictures of the step.
            shard: in a data-parallel run, this process's part; false gives every process the whole split.
        """
        native = self.config.eval_size == "native"
        lut = self.task.test_lut(self.step, IGNORE if self.config.unseen_as == "ignore" else BACKGROUND)
        dataset = CSSDataset(
            self.reader, self._chosen(split), lut, self.config, native=native, cache=self._cache(split)
        )
        return self._in_order(dataset, 1 if native else self.config.eval_batch_size, shard)

    def _in_order(self, dataset: CSSDataset, batch_size: int, shard: bool) -> LazyLoader:
        rank, world = _ranks(shard)
        sampler = LengthBucketBatchSampler(
            [1] * len(dataset), batch_size, shuffle=False, pool=1, rank=rank, world_size=world
        )
        return self._loader(dataset, sampler)

    def plain_batches(self) -> Iterator[Batch]:
        """Training pictures of the step with their training labels, as evaluation crops, in file order, all of them.

        Nothing is drawn, memory entries are left out, and every process of a data-parallel run sees the same.
        """
        lut = self.task.train_lut(self.step, self.keep_old)
        dataset = CSSDataset(self.reader, self.train_items(), lut, self.config, cache=self._cache("train"))
        return iter(self._in_order(dataset, self.config.eval_batch_size, shard=False))

    def train_dataloader(self) -> LazyLoader:
        """Training batches; the loader that ``setup`` made."""
        return self._train_loader or self._make_train_loader()

    def val_dataloader(self) -> LazyLoader | list[Batch]:
        """Validation batches; an empty list where there are no validation pictures."""
        return self.loader("val") if self._chosen("val") else []

    def test_dataloader(self) -> LazyLoader:
        """Test batches."""
        return self.loader("test")
