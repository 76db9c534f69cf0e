"""Loaders: what is missing is neither decoded nor in the batch; draws are functions of (seed, epoch, sample)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from missing_modal.backbones.small import small_text
from missing_modal.data.base import MMData, Sample
from missing_modal.datamodule import MMDataModule, MMDataset, Row, collate
from missing_modal.inputs import ArrayInput
from missing_modal.settings import LoaderConfig
from polymodal.errors import UserError

NAMES = ("image", "text")


@dataclass
class Rows(MMData):
    """Samples given as they are."""

    held: dict = field(default_factory=dict)

    name: ClassVar[str] = "rows"

    def class_names(self):
        return ["a", "b", "c"]

    def read_split(self, split):
        return self.held.get(split, [])

    def describe(self):
        return {"name": "rows", "fingerprint": "0" * 16}


class Counting(ArrayInput):
    """Remembers what was decoded."""

    def __init__(self):
        self.seen = Counter()

    def __call__(self, value):
        self.seen[int(value[0])] += 1
        return torch.as_tensor(value)


def sample(number, length=6):
    ids = np.zeros(length, np.int64)
    ids[: 2 + number % 4] = [9] * (1 + number % 4) + [10]
    return Sample(f"s{number}", {"image": np.full(3, number, np.float32), "text": ids}, number % 3)


def module_of(masks, samples=None, size=4, **options):
    samples = samples or [sample(number) for number in range(len(masks))]
    transforms = {"image": Counting(), "text": ArrayInput()}
    config = LoaderConfig(batch_size=size, eval_batch_size=size)
    reader = Rows(held={"train": samples, "test": samples})
    return MMDataModule(reader, {"train": masks, "test": masks}, transforms, config, **options)


def test_a_batch_holds_what_is_there_in_the_order_of_the_samples():
    data = module_of([3, 1, 2, 3, 2, 1])
    first, second = data.test_dataloader()
    assert first.ids == ["s0", "s1", "s2", "s3"]
    assert first.masks == [3, 1, 2, 3]
    assert first.rows["image"].tolist() == [0, 1, 3]
    assert first.rows["text"].tolist() == [0, 2, 3]
    assert first.inputs["image"][:, 0].tolist() == [0.0, 1.0, 3.0]
    assert first.labels.tolist() == [0, 1, 2, 0]
    assert (second.rows["image"].tolist(), second.rows["text"].tolist()) == ([1], [0])


def test_what_is_missing_is_not_decoded():
    data = module_of([1, 2, 2, 3])
    list(data.test_dataloader())
    assert data.transforms["image"].seen == {0: 1, 3: 1}


def test_a_batch_without_a_modality_has_no_entry_for_it():
    (batch,) = module_of([1, 1]).test_dataloader()
    assert set(batch.inputs) == set(batch.rows) == {"image"}


def test_several_labels_are_float_and_none_is_none():
    image = {"image": torch.zeros(2)}
    batch = collate([Row("a", 1, image, (1, 0)), Row("b", 1, image, (0, 0))], NAMES, "multilabel")
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [[1, 0], [0, 0]]
    assert collate([Row("a", 1, image, 1), Row("b", 1, image, None)], NAMES, "multiclass").labels is None


def test_rows_of_different_shapes_are_refused():
    rows = [Row(str(n), 1, {"image": torch.zeros(n)}, 0) for n in (2, 3)]
    with pytest.raises(UserError, match="image: samples of shapes"):
        collate(rows, NAMES, "multiclass")


def test_an_error_names_the_sample_and_the_modality():
    data = MMDataset([Sample("s7", {"text": "words"}, 0)], [2], NAMES, {"text": ArrayInput()})
    with pytest.raises(UserError, match="sample s7, text: a text where this encoder takes arrays"):
        data[0, 0]


# ------------------------------------------------------------------ simulate_missing


def simulated(epochs=40, seed=0, masks=(3,) * 30 + (1,) * 5):
    samples = [sample(number) for number in range(len(masks))]
    data = MMDataset(
        samples, masks, NAMES, {"image": ArrayInput(), "text": ArrayInput()}, seed=seed, simulate=True
    )  # fmt: skip
    return np.array([[data[index, epoch].mask for index in range(len(masks))] for epoch in range(epochs)])


def test_complete_samples_draw_any_pattern_in_each_epoch_and_others_none():
    found = simulated()
    shares = np.array([(found[:, :30] == mask).mean() for mask in (1, 2, 3)])
    assert np.abs(shares - 1 / 3).max() < 0.05
    assert (found[:, 30:] == 1).all(), "nothing comes back"
    assert len({row.tobytes() for row in found}) == 40


def test_draws_are_functions_of_seed_epoch_and_sample():
    assert (simulated() == simulated()).all()
    assert (simulated() != simulated(seed=1)).any()


def test_evaluation_simulates_nothing():
    data = module_of([3] * 40, simulate=True)
    assert {mask for batch in data.test_dataloader() for mask in batch.masks} == {3}
    assert {mask for batch in data.plain_batches() for mask in batch.masks} == {3}
    data.setup("fit")
    assert {mask for batch in data.train_dataloader() for mask in batch.masks} == {1, 2, 3}


# ------------------------------------------------------------------ lengths, splits


def test_the_last_end_of_text_is_known_before_the_batch_leaves_the_host():
    tower = small_text(11, 6, width=4, depth=1, heads=1, features=2)
    data = module_of([3, 3, 1, 2], towers=(tower,))
    batch = data.on_before_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert batch.lengths == {"text": 5}, "sample 3 ends at position 4"
    assert batch.inputs["text"].shape == (3, 6), "all positions stay: dynamic prompts look at them"
    assert data.with_lengths(next(iter(module_of([1, 1], towers=(tower,)).test_dataloader()))).lengths == {}


def test_no_validation_split_is_an_empty_list():
    assert module_of([3, 3]).val_dataloader() == []


def test_every_training_sample_comes_once_an_epoch_small_last_batch_too():
    data = module_of([3] * 10)
    data.setup("fit")
    orders = []
    for epoch in range(2):
        data.train_sampler.set_epoch(epoch)
        batches = list(data.train_dataloader())
        assert [len(batch) for batch in batches].count(4) == 2
        orders.append([name for batch in batches for name in batch.ids])
        assert sorted(orders[-1]) == sorted(f"s{n}" for n in range(10))
    assert orders[0] != orders[1]
