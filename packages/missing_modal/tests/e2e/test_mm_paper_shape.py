"""The three published settings at full size, on files in the exact official layouts, with random weights: two steps.

ViT-B/16 towers of open_clip, 36 prompts over 6 blocks, all classes. Few rows and batches of two: what is tested is that
it runs, in which memory, with how many trained values, and that nothing is left out.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("mm_layouts_paper", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


def write_food(folder: Path, **options: object) -> Path:
    """Food-101 whose index has all 101 classes; the rows show three of them."""
    root: Path = layouts.write_food101(folder, **options)
    path = root / "class_idx.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {f"dish {number}": number for number in range(len(index), 101)}))
    return root


CASES = {
    "mmimdb": (layouts.write_mmimdb, {"size": (256, 380)}, 23, "test/f1_macro"),
    "food101": (write_food, {"size": (512, 384)}, 101, "test/accuracy"),
    "hatememes": (layouts.write_hatememes, {"size": (550, 400), "inside": "data"}, 2, "test/auroc"),
}
PROMPTS = 5_861_632
"""trained values without the head, queries trained (DCP 3.5)"""
BAKED = 1_617_664
"""values of the tables, dynamic maps, norms and projection without the head (DCP 9: 1.62 M)"""
HEADER = 40_000
"""most bytes of a file that are no values: names, shapes, class names, hashes"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", CASES)
def test_paper_shape(preset: str, tmp_path: Path) -> None:
    write, options, classes, metric = CASES[preset]
    root = write(tmp_path / "data", **options)
    code = "import sys; from missing_modal.train import main; sys.exit(main())"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable, "-c", code, "--config", preset, "--data.root", root, "--backbone.weights", "random",
            "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2",
            "--trainer.accumulate", "1", "--trainer.log_every_steps", "1", "--loader.batch_size", "2",
            "--loader.eval_batch_size", "2", "--loader.num_workers", "0", "--threads", "2", "--log.wandb", "off",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False,
        env=os.environ | {"POLYMODAL_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (run,) = (tmp_path / "runs" / "missing_modal").iterdir()
    facts = json.loads((run / "manifest.json").read_text())
    sys.stdout.write(f"{preset}: peak {facts['peak_mib']:.0f} MiB, {facts['wall_s']:.0f} s, CPU {spent:.0f} s\n")
    assert (facts["status"], facts["method"], facts["data"]["name"]) == ("finished", "dcp", preset)
    assert metric in facts["metrics"]
    assert math.isfinite(facts["metrics"]["test/nll"])
    # 149.6 million frozen values in float32 are 571 MiB; torch and both libraries come on top.
    assert 571 < facts["peak_mib"] < 3 * 1024
    head = 1024 * classes + classes
    for name, expected, width in (("trainable", PROMPTS + head, 4), ("baked", BAKED + head, 2)):
        values, size = stored(run / "export" / f"{name}.safetensors")
        sys.stdout.write(f"  {name}: {values:,} values, {size / 1e6:.2f} MB\n")
        assert values == expected
        assert width * values < size < width * values + HEADER
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 100e6  # the backbone is not in it


def stored(path: Path) -> tuple[int, int]:
    """Values in a safetensors file, and its bytes."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return values, path.stat().st_size


@pytest.mark.slow
def test_rows_in_front_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 prompts in front of CLS and 196 patches, and of 77 positions of text: 233 and 113 rows in each block."""
    import torch
    from missing_modal.backbones.load import load_towers
    from missing_modal.batch import Batch
    from missing_modal.classifier import Classifier
    from missing_modal.methods import METHODS
    from missing_modal.module import MMModule
    from missing_modal.settings import OptimConfig

    towers = load_towers("open_clip:ViT-B-16-quickgelu", "random")
    seen: dict[str, set[int]] = {tower.spec.name: set() for tower in towers}
    for tower in towers:
        block, rows = tower.block, seen[tower.spec.name]
        monkeypatch.setattr(tower, "block", lambda i, h, *rest, b=block, r=rows: (r.add(h.shape[1]), b(i, h, *rest))[1])
    model = Classifier(towers, METHODS.create("dcp"), 23, cut=False)
    module = MMModule(model, OptimConfig(), task="multilabel")
    assert module.num_prefix_tokens == model.num_prefix_tokens == {"image": 36, "text": 36}
    assert model.prompter.prompts.num_prefix_tokens == {"image": 36, "text": 36}
    inputs = {tower.spec.name: tower.placeholder(1) for tower in towers}
    batch = Batch(["a"], [3], inputs, dict.fromkeys(inputs, torch.zeros(1, dtype=torch.long)), None)
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(batch)).all()
    assert seen == {"image": {36 + 197}, "text": {36 + 77}}
