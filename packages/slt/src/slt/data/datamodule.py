"""The loaders of a run as a LightningDataModule."""

from __future__ import annotations

import functools
import logging
import multiprocessing
from typing import Any

import lightning as L
import torch
from polymodal.data import LengthBucketBatchSampler
from polymodal.loading import LazyLoader

from slt.data.base import SPLITS, SLTData
from slt.data.collate import Collate, TextEncoder
from slt.data.dataset import SLTDataset
from slt.data.options import LoaderConfig

__all__ = ["SLTDataModule"]

_log = logging.getLogger(__name__)


def _context() -> Any:
    """How workers start: from a small server process, so that they inherit no threads (of torch, of loggers)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slt.data.dataset", "slt.data.collate"])  # imported once, not in each worker
    return context


class SLTDataModule(L.LightningDataModule):
    """Train, dev and test loaders of one reader; the same seed gives the same batches for any number of workers.

    Args:
        reader: the data.
        tokenizer: see :class:`slt.data.collate.TextEncoder`.
        config: loader options.
        seed: root seed of order, augmentation, masking and question dropout.
        max_positions: longest sentence in tokens; a longer one is an error.
        load_frames: false decodes no frames, for a model that looks at the question only.

    Attributes:
        train_sampler: batch sampler of the training loader, made in ``setup``; a resumed run sets its place there.
    """

    def __init__(
        self,
        reader: SLTData,
        tokenizer: TextEncoder,
        config: LoaderConfig,
        *,
        seed: int = 0,
        max_positions: int = 1024,
        load_frames: bool = True,
    ) -> None:
        super().__init__()
        self.reader, self.config, self.seed = reader, config, seed
        self.collate = Collate(tokenizer, reader.level, config.max_question_tokens, max_positions)
        self.load_frames = load_frames
        self.train_sampler: LengthBucketBatchSampler | None = None
        self._train_loader: LazyLoader | None = None
        self._datasets: dict[tuple[str, bool], SLTDataset] = {}

    def prepare_data(self) -> None:
        """Let the reader write what it needs (the synthetic world), in one process."""
        self.reader.prepare()

    def setup(self, stage: str) -> None:
        """Make the training loader, so that its sampler can be set to a place before workers start."""
        if stage == "fit":
            self._train_loader = self.loader("train", train=True)
            sampler = self._train_loader.batch_sampler
            self.train_sampler = sampler if isinstance(sampler, LengthBucketBatchSampler) else None

    def dataset(self, split: str, train: bool = False) -> SLTDataset:
        """One split; made once."""
        if (split, train) not in self._datasets:
            self._datasets[split, train] = SLTDataset(
                self.reader,
                split,
                self.config,
                train=train,
                seed=self.seed,
                cache=self._keep_clips,
                load_frames=self.load_frames,
            )
        return self._datasets[split, train]

    @functools.cached_property
    def _keep_clips(self) -> bool:
        """Whether decoded clips stay in memory: as configured, else where this process decodes them and they fit."""
        if self.config.cache_frames is not None:
            return self.config.cache_frames
        if self.config.num_workers or not self.load_frames:
            return False
        items = [item for split in SPLITS for item in self.reader.items(split)]
        frame = self.reader.load(items[0], [0])
        need = frame.nbytes * sum(item.num_frames for item in items) / 2**20
        cache = need <= self.config.cache_mib
        _log.info("decoded clips need %.0f MiB; frame cache in memory is %s", need, "on" if cache else "off")
        return cache

    def loader(self, split: str, train: bool = False, *, shard: bool = True) -> LazyLoader:
        """A loader of any split.

        Args:
            split: ``train``, ``dev`` or ``test``.
            train: shuffled, augmented, with masked words; otherwise clips sorted by length, longest first.
            shard: in a data-parallel run, this process's part; false gives every process the whole split.
        """
        dataset = self.dataset(split, train)
        config = self.config
        by_frames = train and config.max_batch_frames is not None
        world, rank = 1, 0
        if shard and torch.distributed.is_available() and torch.distributed.is_initialized():
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        sampler = LengthBucketBatchSampler(
            dataset.lengths,
            batch_size=None if by_frames else (config.batch_size if train else config.eval_batch_size),
            max_total=config.max_batch_frames if by_frames else None,
            seed=self.seed,
            shuffle=train,
            pool=config.bucket,
            rank=rank,
            world_size=world,
        )
        workers = {"persistent_workers": train, "multiprocessing_context": _context()} if config.num_workers else {}
        return LazyLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def train_dataloader(self) -> LazyLoader:
        """Training batches; the loader that ``setup`` made."""
        return self._train_loader or self.loader("train", train=True)

    def val_dataloader(self) -> LazyLoader:
        """Dev batches."""
        return self.loader("dev")

    def test_dataloader(self) -> LazyLoader:
        """Test batches."""
        return self.loader("test")
