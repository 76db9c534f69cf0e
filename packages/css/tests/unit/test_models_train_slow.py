"""Networks of other libraries through the whole of task 2-1 with ``css-train``; minutes."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow


def train(folder, network, *more):
    command = [sys.executable, "-c", "import sys; from css.train import main; sys.exit(main())", "--config", "smoke"]
    command += ["--network.name", network, "--trainer.max_epochs", "6", "--log.wandb", "off", "--out", str(folder)]
    env = dict(os.environ, OMP_NUM_THREADS="1", POLYMODAL_CACHE=str(folder / "cache"))
    done = subprocess.run([*command, *more], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "css").iterdir()
    return run


def values(run, name):
    with (run / "metrics.csv").open() as handle:
        return [float(row["value"]) for row in csv.DictReader(handle) if row["name"] == name]


def check(run):
    reports = [json.loads((run / "steps" / f"{step:02d}" / "report.json").read_text()) for step in range(3)]
    assert [len(report["classes"]) for report in reports] == [2, 3, 4]
    first = values(run, "val/miou_old")[:6]
    assert max(first[3:]) > first[0] + 1  # the base step learns: at first everything is background
    from css.checkpoint import load_network

    loaded = load_network(run)
    assert loaded.net.channels == (2, 1, 1)
    with torch.no_grad():
        assert loaded.net.full_logits(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_segformer_b0_of_mmsegmentation(tmp_path):
    pytest.importorskip("mmseg")
    rates = ("--optim.lr", "0.02", "--optim.later_lr", "0.005", "--optim.head_factor", "3")
    check(train(tmp_path, "mmseg:segformer_b0", *rates))


def test_resnet18_of_timm(tmp_path):
    pytest.importorskip("timm")
    rates = ("--optim.lr", "0.02", "--optim.head_factor", "1", "--network.output_stride", "8")
    check(train(tmp_path, "timm:resnet18", *rates))


def test_segformer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.SegformerConfig(
        hidden_sizes=[16, 32, 40, 64], num_attention_heads=[1, 2, 4, 4], depths=[1] * 4, decoder_hidden_size=64
    ).save_pretrained(tmp_path / "model")
    rates = ("--optim.lr", "0.1", "--optim.head_factor", "1")
    check(train(tmp_path / "out", f"hf:{tmp_path / 'model'}", *rates))
