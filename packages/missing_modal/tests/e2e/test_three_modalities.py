"""Drawings, sounds and numbers: the example at a small size, then every command on what it left behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from missing_modal.checkpoint import load_trained
from missing_modal.data.manifest import Manifest
from missing_modal.datamodule import Row, collate
from missing_modal.export import load, read
from missing_modal.inputs import input_transforms
from missing_modal.patterns import all_masks, mask_name
from missing_modal.report import read_report
from missing_modal.tables import combine, load_table, natural_mask
from polymodal.testing import folder_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "three_modalities.py"
NAMES = ("image", "audio", "tabular")
PATTERNS = [mask_name(mask, NAMES) for mask in all_masks(NAMES)]
SMALL = ["--backbone.steps", "6", "--backbone.width", "8", "--backbone.features", "8", "--backbone.depth", "2"]
SMALL += ["--trainer.max_epochs", "1", "--log.wandb", "off", "--trainer.progress", "none"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("three_modalities", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(example, tmp_path_factory) -> Path:
    """Folder of the example after one small call: the files, the manifest, the run, and what was printed."""
    folder = tmp_path_factory.mktemp("instruments")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.txt").open("w") as printed:
        patch.setenv("POLYMODAL_CACHE", str(folder / "cache"))
        patch.setattr(sys, "argv", ["three_modalities.py"])  # the example puts its command there
        patch.setattr(sys, "stdout", printed)
        assert example.main([str(folder), "--rows", "240", *SMALL]) == 0
    return folder


@pytest.fixture
def run_folder(home) -> Path:
    return folder_of(home)


def rows_of(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "manifest.jsonl").read_text().splitlines()]


def reader_of(home: Path) -> Manifest:
    return Manifest(root=home / "manifest.jsonl")


# ------------------------------------------------------------------ the example's own promises


def test_the_data_is_the_same_for_the_same_seed_and_has_what_is_said(example, home: Path, tmp_path: Path) -> None:
    rows = rows_of(home)
    example.write_data(tmp_path, 240)
    assert rows_of(tmp_path) == rows
    named = [row["image"] or row["audio"] for row in rows if row["image"] or row["audio"]]
    assert all((home / name).read_bytes() == (tmp_path / name).read_bytes() for name in named)
    example.write_data(tmp_path / "other", 240, seed=1)
    assert rows_of(tmp_path / "other") != rows
    lacking = [sum(row[name] is None for name in NAMES) for row in rows]
    assert set(lacking) == {0, 1, 2}
    assert {row["label"] for row in rows} == set(example.CLASSES)
    assert {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")} == {
        "train": 120, "val": 48, "test": 72,
    }  # fmt: skip


def test_no_modality_tells_the_classes_and_any_two_do(example) -> None:
    said = [list(zip(example.SHAPES, range(4), strict=True)), list(zip(example.SWEEPS, range(4), strict=True))]
    said.append(list(zip(example.SIZES, range(4), strict=True)))
    looks = [[value for value, _ in one] for one in said]
    assert [len(set(one)) for one in looks] == [3, 3, 3]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len(set(zip(looks[first], looks[second], strict=True))) == 4


def test_the_run_has_all_its_files_and_its_table_all_seven_patterns(home: Path, run_folder: Path) -> None:
    assert {path.name for path in run_folder.iterdir()} == {
        "calibration.json", "checkpoints", "config.yaml", "export", "manifest.json", "metrics.csv", "report.json",
        "samples", "tables", "towers.safetensors",
    }  # fmt: skip
    report = read_report(run_folder)
    assert [row.pattern for row in report.rows] == ["all", *PATTERNS]
    assert report.rows[0].samples == sum(row.samples for row in report.rows[1:]) == 72
    printed = (home / "printed.txt").read_text()
    assert "mm-train --data" in printed
    assert all(f"| {name} " in printed for name in PATTERNS)
    facts = json.loads((run_folder / "manifest.json").read_text())
    assert set(facts["backbone"]) == set(NAMES)
    assert {name for name in facts["metrics"] if name.startswith("test/accuracy/")} == {
        f"test/accuracy/{name}" for name in PATTERNS
    }


# ------------------------------------------------------------------ real nulls and the simulator


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_real_nulls_are_the_pattern_and_the_table_only_removes_more(home: Path, run_folder: Path, split: str) -> None:
    samples = reader_of(home).samples(split)
    ids = [sample.id for sample in samples]
    table = load_table(run_folder / "tables" / f"{split}.json", ids, "manifest", split, NAMES)
    really = [natural_mask(sample.inputs, NAMES) for sample in samples]
    left = [combine(mask, table.masks[sample.id]) for mask, sample in zip(really, samples, strict=True)]
    by_id = {row["id"]: row for row in rows_of(home)}
    for sample, mask, kept in zip(samples, really, left, strict=True):
        assert mask == sum((by_id[sample.id][name] is not None) << bit for bit, name in enumerate(NAMES))
        assert kept
        assert kept & ~mask == 0, "nothing that is null comes back"
        if table.masks[sample.id] == 7:
            assert kept == mask
    assert sum(a != b for a, b in zip(really, left, strict=True)) > len(samples) // 5
    facts = json.loads((run_folder / "manifest.json").read_text())["data"]["patterns"][split]
    assert facts == {
        name: left.count(mask) for mask, name in zip(all_masks(NAMES), PATTERNS, strict=True) if mask in left
    }


def test_without_a_simulator_only_the_nulls_are_missing(home: Path, run_folder: Path, tmp_path: Path, call) -> None:
    result = call("mm-eval", run_folder, "--missing.kind", "none")
    assert result.code == 0, result.err
    found = {row.pattern: row.samples for row in read_report(folder_of(tmp_path)).rows[1:]}
    held = [natural_mask(sample.inputs, NAMES) for sample in reader_of(home).samples("test")]
    assert found == {mask_name(mask, NAMES): held.count(mask) for mask in all_masks(NAMES) if mask in held}
    assert found["complete"] < 72


@pytest.mark.parametrize("lost", ["audio", "tabular"])
def test_another_table_takes_one_modality_from_all_that_have_others(home, run_folder, tmp_path, call, lost) -> None:
    result = call("mm-eval", run_folder, "--missing.kind", f"only:{lost}", "--missing.ratio", "1.0")
    assert result.code == 0, result.err
    report = read_report(folder_of(tmp_path))
    assert report.missing == f"only:{lost}, 100 % of the rows"
    held = [natural_mask(sample.inputs, NAMES) for sample in reader_of(home).samples("test")]
    bit = 1 << NAMES.index(lost)
    left = [mask & ~bit or mask for mask in held]  # no row is emptied: what stands alone stays
    assert lost == "audio" or bit in held
    assert {row.pattern: row.samples for row in report.rows[1:]} == {
        mask_name(mask, NAMES): left.count(mask) for mask in all_masks(NAMES) if mask in left
    }


# ------------------------------------------------------------------ use


def test_one_sample_with_and_without_a_modality(home: Path, run_folder: Path, call) -> None:
    row = next(row for row in rows_of(home) if all(row[name] for name in NAMES))
    image, audio = home / row["image"], home / row["audio"]
    values = ",".join(map(str, row["tabular"]))
    given = ["--image", image, "--audio", audio, "--tabular", values]
    lines = {}
    for arguments, present in ((given, "image+audio+tabular"), (given[2:], "audio+tabular"), (given[:2], "image")):
        result = call("mm-predict", run_folder, *arguments)
        assert result.code == 0, result.err
        lines[present] = result.out.split("\t")
        assert lines[present][:2] == ["sample", present]
    result = call("mm-predict", run_folder, *given, "--without", "image")
    assert result.out.split("\t")[2:] == lines["audio+tabular"][2:], "left out is the same as not given"
    result = call("mm-predict", run_folder, "--sample", row["id"], "--without", "image")
    assert result.out.split("\t")[1:] == lines["audio+tabular"][1:]


def test_sounds_and_numbers_that_cannot_be_read_are_named_as_such(home, run_folder, tmp_path, call, complains) -> None:
    (tmp_path / "noise.wav").write_bytes(b"RIFF no sound")
    complains(call("mm-predict", run_folder, "--audio", tmp_path / "noise.wav"), "audio: sound", "pcm_s16le")
    complains(call("mm-predict", run_folder, "--tabular", "1,2,3"), "tabular: tabular", "3 numbers", "have 4")
    rows = tmp_path / "rows.jsonl"
    for row, part in (
        ({"audio": "gone.wav"}, "sound "),
        ({"tabular": "gone.npy"}, "array "),
        ({"image": "no.png"}, "image "),
    ):
        rows.write_text(json.dumps(row) + "\n")
        complains(call("mm-predict", run_folder, "--jsonl", rows), f"{part}{tmp_path}", "No such file")


def _batch(home: Path, trained):
    """A batch in which every pattern occurs."""
    transforms = input_transforms(trained.model.towers, {name: name for name in NAMES})
    samples = [s for s in reader_of(home).samples("test") if natural_mask(s.inputs, NAMES) == 7][:14]
    rows = []
    for number, sample in enumerate(samples):
        mask = number % 7 + 1
        inputs = {name: transforms[name](sample.inputs[name]) for bit, name in enumerate(NAMES) if mask >> bit & 1}
        rows.append(Row(sample.id, mask, inputs, sample.label))
    assert {row.mask for row in rows} == set(range(1, 8))
    return collate(rows, NAMES, "multiclass")


@torch.no_grad()
def test_the_baked_file_gives_the_logits_of_the_checkpoint(home: Path, run_folder: Path) -> None:
    trained = load_trained(run_folder)
    batch = _batch(home, trained)
    want = trained.model(batch)
    baked = load_trained(run_folder / "export" / "baked.safetensors")
    about, tensors = read(run_folder / "export" / "baked.safetensors")
    assert (about["kind"], about["stored"], about["modalities"]) == ("baked", "float16", list(NAMES))
    assert sorted(about["baked"]["masks"]) == list(range(1, 8))
    assert not any("generators" in name or "static" in name for name in tensors)
    torch.testing.assert_close(baked.model(batch), want, atol=2e-2, rtol=0)
    again = load(run_folder / "export" / "baked.safetensors", trained.model.towers)
    assert torch.equal(again.model(batch), baked.model(batch))
    assert baked.temperatures is not None
    assert baked.temperatures.by_mask == trained.temperatures.by_mask
    exact = load_trained(run_folder / "export" / "trainable.safetensors")
    assert torch.equal(exact.model(batch), want)


@torch.no_grad()
def test_what_is_missing_cannot_change_the_answer(home: Path, run_folder: Path) -> None:
    trained = load_trained(run_folder)
    batch = _batch(home, trained)
    whole = trained.model(batch)
    for place in range(len(batch.masks)):
        held = {name: row.tolist().index(place) for name, row in batch.rows.items() if place in row.tolist()}
        inputs = {name: batch.inputs[name][at : at + 1] for name, at in held.items()}
        alone = type(batch)(
            [batch.ids[place]], [batch.masks[place]], inputs, {name: torch.tensor([0]) for name in held}
        )
        np.testing.assert_allclose(trained.model(alone)[0], whole[place], atol=1e-5)
