"""The loaders as a LightningDataModule: what is there of a sample is decoded and packed, nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from polymodal.data import LengthBucketBatchSampler
from polymodal.errors import UserError
from polymodal.loading import LazyLoader
from polymodal.seeding import numpy_rng
from torch import Tensor
from torch.utils.data import Dataset

from missing_modal.batch import Batch
from missing_modal.data.base import MMData, Sample, Task
from missing_modal.patterns import all_masks
from missing_modal.settings import LoaderConfig

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower

__all__ = ["MMDataModule", "MMDataset", "Row", "collate"]


@dataclass(frozen=True)
class Row:
    """One sample as a batch takes it.

    Args:
        id: of the sample.
        mask: its pattern.
        inputs: one tensor for each modality of the pattern.
        label: class number, tuple of 0/1, or None.
    """

    id: str
    mask: int
    inputs: dict[str, Tensor]
    label: int | tuple[int, ...] | None


class MMDataset(Dataset[Row]):
    """Samples with their patterns; only what the pattern has is decoded.

    Args:
        samples: of a split.
        masks: pattern of each, a part of what it really has.
        modalities: names in the order of the bits.
        transforms: modality -> function of the raw value.
        seed: root seed of ``simulate``.
        simulate: a complete sample draws its pattern anew in each epoch, all patterns alike (DCP 4.2).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        masks: Sequence[int],
        modalities: Sequence[str],
        transforms: Mapping[str, Callable[[Any], Tensor]],
        *,
        seed: int = 0,
        simulate: bool = False,
    ) -> None:
        self.samples, self.masks, self.modalities = list(samples), list(masks), tuple(modalities)
        self.transforms, self.seed, self.simulate = dict(transforms), seed, simulate
        self._complete = 2 ** len(self.modalities) - 1
        self._choices = all_masks(self.modalities)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Row:
        """The sample of (index, epoch)."""
        index, epoch = key
        sample, mask = self.samples[index], self.masks[index]
        if self.simulate and mask == self._complete:
            draw = numpy_rng(self.seed, "simulate_missing", epoch, sample.id)
            mask = self._choices[int(draw.integers(len(self._choices)))]
        inputs: dict[str, Tensor] = {}
        for bit, name in enumerate(self.modalities):
            if mask >> bit & 1:
                try:
                    inputs[name] = self.transforms[name](sample.inputs[name])
                except UserError as error:
                    raise UserError(f"sample {sample.id}, {name}: {error}") from error
        return Row(sample.id, mask, inputs, sample.label)


class Collate:
    """Rows -> ``Batch``: per modality the rows of the samples that have it, one after the other."""

    def __init__(self, modalities: Sequence[str], task: Task) -> None:
        self.modalities, self.task = tuple(modalities), task

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """One batch."""
        return collate(rows, self.modalities, self.task)


def collate(rows: Sequence[Row], modalities: Sequence[str], task: Task) -> Batch:
    """Pack samples.

    Args:
        rows: B samples.
        modalities: names in the order of the bits.
        task: multilabel has float labels (B, C), others int64 (B,).

    Raises:
        UserError: rows of one modality that differ in shape.
    """
    inputs: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}
    for name in modalities:
        have = [number for number, row in enumerate(rows) if name in row.inputs]
        if not have:
            continue
        values = [rows[number].inputs[name] for number in have]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise UserError(f"{name}: samples of shapes {sorted(shapes)[:3]} in one batch; bring them to one shape")
        inputs[name], at[name] = torch.stack(values), torch.tensor(have)
    found = [row.label for row in rows]
    labels = None
    if all(label is not None for label in found):
        labels = torch.tensor(found, dtype=torch.float32 if task == "multilabel" else torch.long)
    return Batch([row.id for row in rows], [row.mask for row in rows], inputs, at, labels)


def _context() -> Any:
    """How workers start: from a small server process, so that they inherit no threads (of torch, of loggers)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["missing_modal.datamodule"])  # imported once, not in each worker
    return context


def _ranks(shard: bool) -> tuple[int, int]:
    """This process and how many there are."""
    if shard and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class MMDataModule(L.LightningDataModule):
    """Loaders of a data set under its missing tables; the same seed gives the same batches for any number of workers.

    Args:
        reader: the data.
        masks: split -> pattern of each sample (``job.split_masks``).
        transforms: modality -> function of the raw value (``inputs.input_transforms``).
        config: loader options.
        towers: encoders; where given, a batch knows its last end of text before it goes to the device.
        seed: root seed of order and simulation.
        simulate: see ``MMDataset``; training only.

    Attributes:
        train_sampler: batch sampler of the training loader, made in ``setup``; a resumed run sets its place there.
    """

    def __init__(
        self,
        reader: MMData,
        masks: Mapping[str, Sequence[int]],
        transforms: Mapping[str, Callable[[Any], Tensor]],
        config: LoaderConfig,
        *,
        towers: Sequence[Tower] = (),
        seed: int = 0,
        simulate: bool = False,
    ) -> None:
        super().__init__()
        self.reader, self.masks, self.transforms, self.config = reader, dict(masks), transforms, config
        self.towers = {tower.spec.name: tower for tower in towers}
        self.seed, self.simulate = seed, simulate
        self.train_sampler: LengthBucketBatchSampler | None = None
        self._train_loader: LazyLoader | None = None

    def prepare_data(self) -> None:
        """Let the reader make what it needs, in one process."""
        self.reader.prepare()

    def setup(self, stage: str) -> None:
        """Make the training loader, so that its sampler can be set to a place before workers start."""
        if stage == "fit":
            self._train_loader = self._make_train_loader()

    def dataset(self, split: str, train: bool = False) -> MMDataset:
        """Samples of a split with their patterns; ``train``: as in training, with ``simulate``."""
        return MMDataset(
            self.reader.samples(split),
            self.masks[split],
            self.reader.modalities,
            self.transforms,
            seed=self.seed,
            simulate=train and self.simulate,
        )

    def _make_train_loader(self) -> LazyLoader:
        dataset = self.dataset("train", train=True)
        rank, world = _ranks(shard=True)
        self.train_sampler = LengthBucketBatchSampler(
            [1] * len(dataset), self.config.batch_size, seed=self.seed, pool=1, rank=rank, world_size=world
        )
        return self._loader(dataset, self.train_sampler, persistent=True)

    def _loader(self, dataset: MMDataset, sampler: LengthBucketBatchSampler, persistent: bool = False) -> LazyLoader:
        count = self.config.num_workers
        workers = {"persistent_workers": persistent, "multiprocessing_context": _context()} if count else {}
        return LazyLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=Collate(self.reader.modalities, self.reader.task),
            num_workers=count,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def loader(self, split: str, *, shard: bool = True) -> LazyLoader:
        """Evaluation loader of a split, in the data set's order.

        Args:
            split: ``train``, ``val`` or ``test``.
            shard: in a data-parallel run, this process's part; false gives every process the whole split.
        """
        dataset = self.dataset(split)
        rank, world = _ranks(shard)
        sampler = LengthBucketBatchSampler(
            [1] * len(dataset), self.config.eval_batch_size, shuffle=False, pool=1, rank=rank, world_size=world
        )
        return self._loader(dataset, sampler)

    def plain_batches(self) -> Iterator[Batch]:
        """Training samples under their table, in order, all of them in every process; nothing is drawn."""
        return (self.with_lengths(batch) for batch in self.loader("train", shard=False))

    def first(self, split: str, count: int) -> Batch:
        """The first so many samples of a split, as one batch."""
        dataset = self.dataset(split)
        rows = [dataset[index, 0] for index in range(min(count, len(dataset)))]
        return self.with_lengths(collate(rows, self.reader.modalities, self.reader.task))

    def train_dataloader(self) -> LazyLoader:
        """Training batches; the loader that ``setup`` made."""
        return self._train_loader or self._make_train_loader()

    def val_dataloader(self) -> LazyLoader | list[Batch]:
        """Validation batches; an empty list where there are no validation samples."""
        return self.loader("val") if self.masks.get("val") else []

    def test_dataloader(self) -> LazyLoader:
        """Test batches."""
        return self.loader("test")

    def with_lengths(self, batch: Batch) -> Batch:
        """The batch with ``lengths``: looked up on the host, so that no device is asked where texts end."""
        for name, tower in self.towers.items():
            if name in batch.inputs and name not in batch.lengths:
                length = tower.length(batch.inputs[name])
                if length is not None:
                    batch.lengths[name] = length
        return batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's place for ``with_lengths``."""
        return self.with_lengths(batch) if isinstance(batch, Batch) else batch
