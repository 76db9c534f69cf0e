"""Logits of every sample under every pattern that it can have: 2^M - 1 passes over a split, each input decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from polymodal.errors import UserError
from polymodal.progress import counted

from missing_modal.batch import Batch
from missing_modal.matrix import LogitCache
from missing_modal.tables import natural_mask

if TYPE_CHECKING:
    from missing_modal.data.base import MMData
    from missing_modal.export import Model
    from missing_modal.settings import LoaderConfig

__all__ = ["empty_cache", "run_passes", "select"]


def select(batch: Batch, keep: Sequence[int], mask: int, modalities: Sequence[str]) -> Batch:
    """Some samples of a batch, all with the same pattern.

    Args:
        batch: B samples.
        keep: numbers of n of them, ascending, each with at least the modalities of ``mask``.
        mask: the pattern that they are to have.
        modalities: names in the order of the bits.
    """
    inputs, rows = {}, {}
    for bit, name in enumerate(modalities):
        if not mask >> bit & 1:
            continue
        held = [sample for sample, has in enumerate(batch.masks) if has >> bit & 1]
        place = {sample: number for number, sample in enumerate(held)}
        chosen = [place[sample] for sample in keep]
        values = batch.inputs[name]
        inputs[name] = values if len(chosen) == len(held) else values[chosen]
        rows[name] = torch.arange(len(keep), device=values.device)
    labels = None if batch.labels is None else batch.labels[list(keep)]
    ids = [batch.ids[sample] for sample in keep]
    return Batch(ids, [mask] * len(keep), inputs, rows, labels, dict(batch.lengths))


def empty_cache(reader: MMData, split: str) -> LogitCache:
    """The cache of a split before the passes.

    Raises:
        UserError: an empty split, or a sample without a label.
    """
    samples, names = reader.samples(split), tuple(reader.modalities)
    if not samples:
        raise UserError(f"{reader.name}: the {split} split is empty; {reader.remedy}")
    blank = next((sample.id for sample in samples if sample.label is None), None)
    if blank is not None:
        raise UserError(f"{reader.name} {split}: sample {blank} has no label, nothing to score; label it or remove it")
    return LogitCache(
        [sample.id for sample in samples],
        [sample.table_id for sample in samples],
        np.array([sample.label for sample in samples]),
        reader.task,
        [natural_mask(sample.inputs, names) for sample in samples],
        names,
    )


def run_passes(model: Model, reader: MMData, split: str, loader: LoaderConfig, device: str = "cpu") -> LogitCache:
    """Run a model over a split under every pattern.

    Args:
        model: trained; is left on the device, in evaluation mode.
        reader: the data.
        split: train, val or test.
        loader: batch size and workers.
        device: where to compute.

    Returns:
        The complete cache; of rows, where the reader averages over the samples of a row.

    Raises:
        UserError: an empty split, a sample without a label, a broken file.
    """
    from missing_modal.datamodule import MMDataModule
    from missing_modal.inputs import input_transforms

    cache = empty_cache(reader, split)
    number = {name: place for place, name in enumerate(cache.ids)}
    data = MMDataModule(
        reader,
        {split: cache.natural.tolist()},
        input_transforms(model.towers, reader.kinds),
        loader,
        towers=model.towers,
    )
    model.to(device).eval()
    for tower in model.towers:
        tower.to(device)
    batches = data.loader(split, shard=False)
    samples: dict[int, list[int]] = {mask: [] for mask in cache.needed}
    found: dict[int, list[Any]] = {mask: [] for mask in cache.needed}
    with torch.inference_mode():
        for batch in counted(batches, "batches run under every pattern", len(batches)):
            held = data.with_lengths(batch).to(device)
            for mask in cache.needed:
                keep = [place for place, has in enumerate(held.masks) if has & mask == mask]
                if keep:
                    logits = model(select(held, keep, mask, cache.modalities))
                    found[mask].append(logits.cpu().numpy())
                    samples[mask] += [number[held.ids[place]] for place in keep]
    for mask in cache.needed:
        cache.put(mask, np.concatenate(found[mask])[np.argsort(samples[mask])])
    return cache.mean_rows() if reader.average_rows else cache
