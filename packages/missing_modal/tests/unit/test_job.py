"""What a run is made of: patterns from tables and real gaps, facts of the manifest, number formats, records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from missing_modal.data.base import MissingConfig, MMData, Sample
from missing_modal.job import Job, predict_records
from missing_modal.settings import BackboneConfig, LoaderConfig, MMConfig
from missing_modal.world import World
from polymodal.config import TrainerConfig
from polymodal.errors import UserError

TINY = BackboneConfig(width=8, depth=2, heads=2, features=4, steps=0)


@dataclass
class Gaps(MMData):
    """Rows of which some really lack something."""

    turned: bool = False

    name: ClassVar[str] = "gaps"

    def class_names(self):
        return ["a", "b"]

    def read_split(self, split):
        image, text = np.zeros((8, 4), np.float32), np.array([1, 2, 3, 4, 9])
        found = [
            Sample(
                f"{split}{n}",
                {"image": None if n % 5 == 0 else image + n, "text": None if n % 5 == 1 else text},
                n % 2,
                row=f"{split}-row{n // 2}" if self.average_rows else "",
            )
            for n in range({"train": 40, "val": 0, "test": 20}[split])
        ]
        return found[::-1] if self.turned else found

    def describe(self):
        return {"name": self.name, "fingerprint": "0" * 16}


def job_of(reader=None, method="head_only", **options):
    reader = reader or World(sizes=(40, 20, 20))
    return Job(MMConfig(method=method, data=reader, backbone=TINY, **options))


def test_patterns_are_what_is_there_less_what_the_table_takes():
    job = job_of(Gaps(), missing=MissingConfig(kind="both", ratio=0.5))
    drawn = 0
    for sample, mask in zip(job.reader.samples("train"), job.masks["train"], strict=True):
        natural = (sample.inputs["image"] is not None) + 2 * (sample.inputs["text"] is not None)
        table = job.tables["train"].masks[sample.id]
        assert mask
        assert mask & natural == mask
        assert mask == (natural & table or natural)
        drawn += natural == 3 and mask != 3
    assert drawn > 5
    assert "val" not in job.masks
    assert sum(job.counts("train").values()) == 40


def test_without_simulation_patterns_are_the_real_ones():
    job = job_of(Gaps(), missing=MissingConfig(kind="none"))
    assert job.counts("test") == {"complete": 12, "image": 4, "text": 4}
    assert job.missing_text("test") == "none"


def test_facts_name_the_tables():
    def tables(**options):
        reader = options.pop("reader", None)
        return job_of(reader, missing=MissingConfig(**options)).facts()["tables"]

    first = tables()
    assert first.keys() == {"train", "val", "test"}
    assert len(set(first.values())) == 3
    assert tables() == first
    assert tables(seed=1) != first
    assert tables(ratio=0.5)["train"] != first["train"]
    assert tables(reader=Gaps()) == tables(reader=Gaps(turned=True)), "the order of the samples does not matter"
    other = tables(test_kind="image")
    assert other["train"] == first["train"]
    assert other["test"] != first["test"]


def test_captions_leave_out_the_seed():
    for seed in (0, 1):
        missing = MissingConfig(kind="text", ratio=0.35, seed=seed)
        assert job_of(missing=missing).missing_text("test") == "text, 35 % of the rows"


@pytest.mark.parametrize(
    ("precision", "kept", "expected"),
    [
        ("32-true", "auto", None),
        ("32-true", "bfloat16", torch.bfloat16),
        ("64-true", "auto", torch.float64),
    ],
)
def test_number_formats_of_frozen_weights(precision, kept, expected):
    config = MMConfig(
        method="head_only",
        data=World(sizes=(4, 2, 2)),
        backbone=BackboneConfig(width=8, features=4, steps=0, dtype=kept),
        trainer=TrainerConfig(precision=precision, accelerator="cpu"),
    )
    assert Job(config).dtype() == expected


def test_bf16_on_a_cpu_keeps_float32():
    assert job_of(trainer=TrainerConfig(precision="bf16-mixed", accelerator="cpu")).dtype() is None


def test_what_a_checkpoint_says():
    meta = job_of(method="dcp", method_options={"length": 6, "depth": 2, "reduction": 4}).meta()
    assert meta["method_options"] == {"length": 6, "depth": 2, "reduction": 4}
    assert (meta["modalities"], meta["class_names"], meta["task"]) == (["image", "text"], ["minus", "plus"], "binary")
    assert {len(one["sha256"]) for one in meta["backbone"].values()} == {64}
    assert meta["backbone_config"]["width"] == 8


def test_records_are_those_of_the_module_in_any_batch():
    job = job_of(loader=LoaderConfig(eval_batch_size=7))
    module, data = job.build_module(), job.build_data()
    records = predict_records(module, data.loader("val", shard=False))
    assert list(records) == [sample.id for sample in job.reader.samples("val")]
    assert [record["mask"] for record in records.values()] == job.masks["val"]
    whole = module.evaluate(data.first("val", 99))
    for name, record in whole.items():
        assert np.allclose(record["logits"], records[name]["logits"], atol=1e-6)
    assert not module.training


def test_rows_are_averaged_where_the_reader_says_so(monkeypatch):
    monkeypatch.setattr(Gaps, "average_rows", True)
    job = job_of(Gaps(), missing=MissingConfig(kind="none"))
    assert job.build_module().rows["test7"] == "test-row3"
    assert len(job.tables["test"].masks) == 10


@pytest.mark.parametrize(
    ("split", "says"), [("train", "the train split is empty"), ("test", "the test split is empty")]
)
def test_empty_splits(split, says, monkeypatch):
    original = Gaps.read_split
    monkeypatch.setattr(Gaps, "read_split", lambda self, asked: [] if asked == split else original(self, asked))
    with pytest.raises(UserError, match=says):
        job_of(Gaps()).check()


def test_labels_are_needed(monkeypatch):
    original = Gaps.read_split
    blank = [Sample("x", {"image": np.zeros((8, 4), np.float32), "text": None}, None)]
    monkeypatch.setattr(Gaps, "read_split", lambda self, asked: original(self, asked) + blank * (asked == "test"))
    with pytest.raises(UserError, match="gaps test: sample x has no label"):
        job_of(Gaps()).check()
