"""The published settings at full size, on files in the exact official layouts, with random weights: two steps each.

ResNet-101 under DeepLabV3's head, crops of 512 x 512, every class of the data set, EIR with its memory. Batches of two
and a few pictures: what is tested is that it runs, in which memory, and that nothing is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from css.memory import InstanceMemory
from css.report import read_reports
from css.steps import load_weights
from torchvision.models import resnet101

PROGRAM = Path(sys.executable).parent / "css-train"
SIZE = (375, 500)
"""height and width of most pictures of VOC"""
BUDGETS = {"voc_15-1": 100, "ade_100-50": 300}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A file as torchvision's weights come in, with random ones.

    Every residual branch starts at zero: with statistics of normalisation that two batches have hardly moved, and that
    are frozen from the second step on, a hundred layers of plain random weights would answer with numbers of 10^7.
    """
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet101.pth"
    torch.save(resnet101(zero_init_residual=True).state_dict(), path)
    return path


def by_number(prefix: str, classes: Sequence[Sequence[int]]) -> Mapping[str, Sequence[int]]:
    return {f"{prefix}{number:06d}": found for number, found in enumerate(classes)}


def voc(layouts: ModuleType, folder: Path) -> Path:
    """Each class of 1..15 once, each of 16..20 twice; one picture to test."""
    train = [(1 + i, 1 + (i + 5) % 15) for i in range(0, 15, 2)] + [(c, o) for c in range(16, 21) for o in (1, c - 14)]
    test = by_number("2008_", [(1, 16, 17, 18, 19, 20)])
    layouts.write_voc(folder, by_number("2007_", train), test, size=SIZE)
    return folder / "VOCdevkit" / "VOC2012"


def ade(layouts: ModuleType, folder: Path) -> Path:
    """Pictures with two of the base classes and one of the later ones, as ``_layouts`` makes them."""
    layouts.write_ade(folder, 12, 2, size=(512, 683))
    return folder / "ADEChallengeData2016"


CASES = {"voc_15-1": (voc, "voc", [15, 1, 1, 1, 1, 1]), "ade_100-50": (ade, "ade20k", [100, 50])}


@pytest.mark.slow
@pytest.mark.parametrize("preset", CASES)
def test_paper_shape(preset: str, tmp_path: Path, layouts: ModuleType, backbone: Path) -> None:
    write: Callable[[ModuleType, Path], Path]
    write, reader, sizes = CASES[preset]
    root = write(layouts, tmp_path / "data")
    done = subprocess.run(
        [
            PROGRAM, "--config", preset, "--data.root", root, "--network.weights", backbone,
            "--trainer.accelerator", "cpu",
            "--trainer.precision", "32-true", "--trainer.max_steps", "2", "--loader.batch_size", "2",
            "--loader.eval_batch_size", "1", "--loader.num_workers", "0", "--trainer.log_every_steps", "1",
            "--trainer.checkpoint_every_epochs", "100", "--threads", "2", "--log.wandb", "off",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=3000,
        env=os.environ | {"POLYMODAL_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "css").iterdir()
    facts = json.loads((run / "manifest.json").read_text())
    sys.stdout.write(f"{preset}: peak {facts['peak_mib']:.0f} MiB, {facts['wall_s']:.0f} s\n")
    assert (facts["status"], facts["method"], facts["data"]["name"]) == ("finished", "eir", reader)
    # The network alone has 59 million weights, with momentum and gradients three times: 0.7 GiB.
    assert 1024 < facts["peak_mib"] < 12 * 1024
    reports = read_reports(run / "steps")
    assert [len(report.classes) for report in reports] == [sum(sizes[: step + 1]) for step in range(len(sizes))]
    for step in range(len(sizes)):
        folder = run / "steps" / f"{step:02d}"
        assert json.loads((folder / "done.json").read_text())["optimizer_steps"] == 2 * (step + 1)
        if step:
            memory = InstanceMemory.load(folder / "memory")
            assert 0 < len(memory.entries) <= memory.budget == BUDGETS[preset]
            assert set(memory.slots) <= set(range(1, sum(sizes[:step]) + 1))
    state, meta = load_weights(run / "steps" / f"{len(sizes) - 1:02d}" / "weights.safetensors")
    assert meta["channels"] == sizes
    assert sum(value.numel() for name, value in state.items() if "running" not in name) > 55e6
    names = {line.split(",")[2] for line in (run / "metrics.csv").read_text().splitlines()}
    assert {"train/bce", "train/kd", "train/pasted", "test/miou_harmonic"} <= names
    shutil.rmtree(run)
