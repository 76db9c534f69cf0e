"""All 2^M - 1 passes at once: what is looked up equals what is computed directly (DCP 8)."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.classifier import Classifier
from missing_modal.data.base import MMData, Sample
from missing_modal.datamodule import MMDataModule
from missing_modal.inputs import ArrayInput
from missing_modal.matrix import sweep
from missing_modal.methods import create
from missing_modal.metrics import report
from missing_modal.passes import empty_cache, run_passes, select
from missing_modal.patterns import all_masks
from missing_modal.settings import LoaderConfig
from missing_modal.tables import combine, draw_table
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

COUNT = 23
REALLY = [(2, "text"), (5, "image"), (11, "text"), (20, "audio")]
"""(sample, modality) that really lacks"""


@dataclass
class Toys(MMData):
    """Samples for toy towers; some really lack something; the last has no label on request."""

    unlabelled: bool = False
    averaged: bool = False

    name: ClassVar[str] = "toys"
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio")

    @property
    def average_rows(self):
        return self.averaged

    def class_names(self):
        return ["a", "b", "c"]

    def read_split(self, split):
        if split != "test":
            return []
        drawn = toy.draw_inputs(COUNT, 3)
        found = []
        for number in range(COUNT):
            inputs = {
                name: None if (number, name) in REALLY and not self.averaged else drawn[name][number]
                for name in self.modalities
            }
            label = None if self.unlabelled and number == COUNT - 1 else number // 2 % 3
            found.append(Sample(f"s{number}", inputs, label, f"r{number // 2}" if self.averaged else ""))
        return found

    def describe(self):
        return {"name": self.name, "fingerprint": "toys"}


def towers():
    return [*toy.two_towers(), toy.ToyTower("audio", 6, 2, 4, 2, 3)]


@pytest.fixture(scope="module")
def model():
    made = Classifier(towers(), create("dcp", length=6, depth=2, reduction=3), 3).double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in made.parameters():
            value += 0.2 * torch.randn(value.shape, generator=draw, dtype=torch.float64)
    return made.eval()


def direct(model, reader, masks, batch=7):
    """Logits of the test split under these patterns, by the loader that mm-eval uses."""
    transforms = {name: ArrayInput() for name in reader.modalities}
    loader = LoaderConfig(eval_batch_size=batch)
    data = MMDataModule(reader, {"test": list(masks)}, transforms, loader, towers=model.towers)
    found = {}
    with torch.inference_mode():
        for one in data.loader("test", shard=False):
            found |= dict(zip(one.ids, model(one).numpy(), strict=True))
    return np.stack([found[sample.id] for sample in reader.samples("test")])


def test_every_lookup_equals_a_direct_evaluation(model):
    reader = Toys()
    cache = run_passes(model, reader, "test", LoaderConfig(eval_batch_size=5))
    assert set(cache.needed) == set(all_masks(reader.modalities))
    ids = [sample.id for sample in reader.samples("test")]
    for kind in ("any", "only:image", "only:text", "none"):
        table = draw_table(ids, kind, 0.7, 1, "toys", "test", reader.modalities)
        masks = [combine(int(has), table.masks[name]) for has, name in zip(cache.natural, ids, strict=True)]
        np.testing.assert_allclose(cache.logits(masks), direct(model, reader, masks), rtol=0, atol=1e-12)
        (cell,) = sweep(cache, [kind], [0.7], [1], "toys")
        labels = [sample.label for sample in reader.samples("test")]
        wanted = report(direct(model, reader, masks), labels, masks, "multiclass", reader.modalities)
        assert cell.metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            assert cell.metrics[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_batch_size_changes_nothing(model):
    reader = Toys()
    one, other = (run_passes(model, reader, "test", LoaderConfig(eval_batch_size=size)) for size in (1, COUNT))
    for mask, samples in one.needed.items():
        masks = np.array(one.natural)
        masks[samples] = mask
        np.testing.assert_allclose(one.logits(masks), other.logits(masks), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(1, 7))
def test_select_takes_the_rows_that_belong_to_the_samples(masks, mask):
    names = ("image", "text", "audio")
    batch = toy.make_batch(masks, names)
    batch.lengths = {"text": 4}
    keep = [place for place, has in enumerate(masks) if has & mask == mask]
    if not keep:
        return
    found = select(batch, keep, mask, names)
    assert found.ids == [batch.ids[place] for place in keep]
    assert found.masks == [mask] * len(keep)
    assert found.lengths == {"text": 4}
    assert torch.equal(found.labels, batch.labels[keep])
    assert set(found.inputs) == {name for bit, name in enumerate(names) if mask >> bit & 1}
    for name, values in found.inputs.items():
        where = {int(sample): place for place, sample in enumerate(batch.rows[name])}
        assert torch.equal(values, batch.inputs[name][[where[place] for place in keep]])
        assert found.rows[name].tolist() == list(range(len(keep)))


def test_rows_of_several_samples_are_averaged(model):
    reader = Toys(averaged=True)
    cache = run_passes(model, reader, "test", LoaderConfig(eval_batch_size=5))
    assert len(cache) == (COUNT + 1) // 2
    full = 2 ** len(reader.modalities) - 1
    found = direct(model, reader, [full] * COUNT)
    share = np.exp(found - found.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    logits = cache.logits([full] * len(cache))
    again = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(again[0] / again[0].sum(), share[:2].mean(0), rtol=0, atol=1e-12)


def test_samples_without_label_and_empty_splits_are_refused(model):
    with pytest.raises(UserError, match="sample s22 has no label"):
        empty_cache(Toys(unlabelled=True), "test")
    with pytest.raises(UserError, match="the val split is empty"):
        run_passes(model, Toys(), "val", LoaderConfig())
