"""What users get wrong: one line with the remedy, exit code 2, no run folder left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from missing_modal.tables import draw_table, save_table
from polymodal.testing import folder_of, manifest

TINY = ["--backbone.steps", "0", "--trainer.max_epochs", "1"]

OPTIONS = {
    "unknown method": (["--method", "dpc"], ["unknown method 'dpc'", "did you mean", "dcp"]),
    "unknown option": (["--method_options.lenght", "6"], ["has no option 'lenght'", "length"]),
    "length not divisible": (["--method_options.length", "8"], ["prompt length 8", "multiple of three"]),
    "too deep": (["--method_options.depth", "9"], ["9"]),
    "unknown data": (["--data", "wrld"], ["unknown name", "world"]),
    "unknown kind": (["--missing.kind", "imge"], ["missing kind 'imge'", "image"]),
    "ratio": (["--missing.ratio", "70"], ["ratio", "70"]),
    "negative seed of tables": (["--missing.seed", "-1"], ["seed"]),
    "unknown backbone": (["--backbone", "openclip:ViT-B-16"], ["backbone", "open_clip"]),
    "no weights": (["--backbone", "open_clip:ViT-B-16-quickgelu"], ["--backbone.weights"]),
    "heads": (["--backbone.heads", "3"], ["backbone.width=32", "backbone.heads=3"]),
    "sizes": (["--data.sizes", "[0, 1, 1]"], ["data.sizes"]),
    "batch": (["--loader.batch_size", "0"], ["loader.batch_size=0"]),
    "warm-up": (["--optim.warmup", "1.5"], ["optim.warmup=1.5"]),
    "rate": (["--optim.lr", "0"], ["optim.lr=0"]),
    "betas": (["--optim.betas", "[0.9, 1.5]"], ["optim.betas"]),
    "unknown preset": (["--config", "wrold"], ["no such file or preset", "world"]),
    "no run": (["--resume", "nowhere"], ["no such run folder"]),
    "no tables": (["--missing.tables", "nowhere"], ["nowhere", "missing tables"]),
}


@pytest.mark.parametrize(("options", "parts"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options(mm_train, complains, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    complains(mm_train(*TINY, *options), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_table_of_other_rows(mm_train, complains, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for split, count in (("train", 192), ("val", 96), ("test", 127)):
        ids = [f"world-{split}-{number:05d}" for number in range(count)]
        save_table(folder / f"{split}.json", draw_table(ids, "both", 0.7, 0, "world", split))
    result = mm_train(*TINY, "--data.sizes", "[192, 96, 128]", "--missing.tables", folder)
    complains(result, "test.json")
    assert not (tmp_path / "runs").exists()


def test_a_table_of_another_data_set(mm_train, complains, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    ids = [f"world-train-{number:05d}" for number in range(192)]
    save_table(folder / "train.json", draw_table(ids, "both", 0.7, 0, "mmimdb", "train"))
    result = mm_train(*TINY, "--data.sizes", "[192, 96, 128]", "--missing.tables", folder)
    complains(result, "train.json", "mmimdb", "world")


def manifest_of(tmp_path: Path, *lines: dict) -> Path:
    rows = [
        {"id": f"r{n}", "text": "a text", "tabular": [1.0, 2.0], "label": n % 2, "split": "train"} for n in range(6)
    ]
    rows += [{**row, "id": f"{split}{row['id']}", "split": split} for split in ("val", "test") for row in rows[:4]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *lines]))
    return path


ROWS = {
    "no modality": ({"id": "x", "label": 1, "split": "train"}, ["x", "no modality"]),
    "only nulls": ({"id": "x", "text": None, "tabular": None, "label": 1, "split": "test"}, ["x", "no modality"]),
    "no label": ({"id": "x", "text": "a", "label": None, "split": "test"}, ["x", "no label"]),
    "twice": ({"id": "r1", "text": "a", "label": 1, "split": "train"}, ["r1"]),
}
OWN = ["--backbone", "small", "--method_options", "{length: 6, depth: 2}", *TINY]


@pytest.mark.parametrize(("row", "parts"), ROWS.values(), ids=ROWS)
def test_bad_rows(mm_train, complains, tmp_path: Path, row: dict, parts: list[str]) -> None:
    complains(mm_train("--data", manifest_of(tmp_path, row), *OWN), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_broken_picture_is_named_with_its_sample(mm_train, complains, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    row = {"id": "bad", "image": "broken.png", "text": "a", "label": 1, "split": "train"}
    rows = [{"id": f"r{n}", "text": "a text", "image": None, "label": n % 2, "split": s} for n, s in
            enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, row]))
    result = mm_train("--data", path, *OWN, "--loader.num_workers", "0")
    complains(result, "sample bad, image", "broken.png")


def test_a_broken_test_picture_does_not_cost_the_training(mm_train, complains, tmp_path: Path) -> None:
    """It is met after the training; once it is mended, the run is tested and finished."""
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "later.png").write_bytes(b"\x89PNG no picture")
    rows = [{"id": f"r{n}", "image": "good.png", "text": f"text {n}", "label": n % 2, "split": split}
            for n, split in enumerate(["train"] * 8 + ["val"] * 4 + ["test"] * 4)]  # fmt: skip
    rows[-1]["image"] = "later.png"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", path, *OWN, "--loader.num_workers", "0", "--trainer.accumulate", "1"]
    complains(mm_train(*options), "sample r15, image", "later.png", "copy it again")
    folder = folder_of(tmp_path)
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    Image.new("RGB", (40, 40), (0, 200, 0)).save(tmp_path / "later.png")
    result = mm_train(*options, "--resume", folder)
    assert result.code == 0, result.err
    assert manifest(folder)["status"] == "finished"
    assert (folder / "report.json").is_file()


def test_weights_of_another_model(mm_train, complains, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"layer.weight": torch.zeros(2, 2)}, path)
    pytest.importorskip("open_clip")
    result = mm_train("--backbone", "open_clip:ViT-B-32-quickgelu", "--backbone.weights", path)
    complains(result, "ViT-B-32-quickgelu")
    assert not (tmp_path / "runs").exists()


def test_a_file_of_encoders_of_other_modalities(mm_train, complains, tmp_path: Path) -> None:
    from missing_modal.backbones.small import small_tabular
    from missing_modal.backbones.weights import save_towers

    save_towers(tmp_path / "t.safetensors", [small_tabular(4, width=8, features=4)])
    result = mm_train("--backbone", "small", "--backbone.weights", tmp_path / "t.safetensors")
    complains(result, "no encoder for image")
    (tmp_path / "note.safetensors").write_bytes(b"nothing")
    complains(mm_train("--backbone", "small", "--backbone.weights", tmp_path / "note.safetensors"), "cannot be read")
