"""fed-train on files in the official layouts: what each data set is reported by, and every preset at its full size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from fedcore.train import DEFAULT_PRESETS
from polymodal.cli import preset_names
from polymodal.testing import manifest


def load_layouts(file: str) -> ModuleType:
    """A module of files' writers beside the tests."""
    spec = importlib.util.spec_from_file_location(f"fed_train{file[:-3]}", Path(__file__).parents[1] / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layouts, texts = load_layouts("_data_layouts.py"), load_layouts("_text_layouts.py")

LITTLE = ["--rounds", "2", "--clients", "2", "--fraction", "1", "--federation.batch_size", "4"]
LITTLE += ["--federation.local_epochs", "1", "--partition.samples", "4", "--federation.flatness", "8"]
WRITE: dict[str, Callable[[Path], object]] = {
    "fashion_mnist": lambda folder: layouts.fashion(folder),
    "cifar10": lambda folder: layouts.cifar10(folder, each=40),
    "cifar100": lambda folder: layouts.cifar100(folder),
    "tiny_imagenet": lambda folder: layouts.tiny_imagenet(folder, each=40),
    "text_domains": lambda folder: layouts.text_domains(folder),
    "glue": lambda folder: layouts.glue(folder),
    "mnist": lambda folder: layouts.fashion(folder),
    "svhn": lambda folder: layouts.svhn(folder),
    "stl10": lambda folder: layouts.stl10(folder),
    "domainnet": lambda folder: layouts.domainnet(folder),
    **texts.WRITERS,
}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


SMALL = {
    "fashion_mnist": ("mlp", {"test/accuracy", "test/loss"}),
    "cifar10": ("mlp", {"test/accuracy", "test/loss"}),
    **{name: ("mlp", {"test/accuracy", "test/loss"}) for name in ("mnist", "svhn", "stl10", "domainnet")},
    "text_domains": ("bag", {"test/accuracy", "test/loss"}),
    **{name: ("bag", {"test/accuracy", "test/loss"}) for name in texts.WRITERS},
    "hatexplain": ("text_transformer", {"test/accuracy", "test/loss"}),
    "glue:cola": ("bag", {"test/accuracy", "test/matthews", "test/loss"}),
    "glue:mrpc": ("bag", {"test/accuracy", "test/f1", "test/loss"}),
    "glue:stsb": ("bag", {"test/pearson", "test/spearman", "test/loss"}),
    "glue:mnli": ("bag", {"test/accuracy", "test/accuracy_mismatched", "test/loss", "test/loss_mismatched"}),
}


FAST = ("cifar10", "glue:mnli", "glue:stsb", "hatexplain", "domainnet")
OPTIONS = {"bag": "{dim: 8}", "mlp": "{hidden: [8]}", "text_transformer": "{width: 8, depth: 1, heads: 2}"}


@pytest.mark.parametrize(
    "data", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_official_files_are_trained_on(fed_train, only_run, tmp_path: Path, data: str) -> None:
    model, metrics = SMALL[data]
    written = WRITE[data.partition(":")[0]](tmp_path / "files")
    root = written[0] if isinstance(written, tuple) else written
    options = ["--model", model, "--model.options", OPTIONS[model]]
    text = ["--data.buckets", "64"] if model != "mlp" else ["--data.image_size", "16"] if data == "domainnet" else []
    validate = ["--federation.val_share", "0"] if data.startswith("glue") else []  # three lines a task
    result = fed_train("--data", data, "--data.root", root, *LITTLE, *options, *text, *validate, "--partition", "iid")
    assert result.code == 0, result.err
    assert f"preset {DEFAULT_PRESETS[data]} " in result.err
    facts = manifest(only_run())
    assert facts["status"] == "finished"
    found = {name for name in facts["metrics"] if name.startswith("test/")}
    assert metrics <= found
    assert {name for name in found if not name.endswith(("_best", "_mean10", "_to_target"))} == metrics
    assert facts["data"]["clients"] == 2


PUBLISHED = sorted(name for name in preset_names("fedcore") if name.startswith(("fedswa_", "fedadamw_c", "fedmuon_")))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_at_their_full_size_take_two_steps(
    fed_train, only_run, tmp_path: Path, record_property, preset
) -> None:
    """Full-size model and client files, a cohort of two clients of a hundred, one step each."""
    data = next(name for name in ("cifar100", "cifar10", "tiny_imagenet") if name in preset)
    written = WRITE[data](tmp_path / "files")
    root = written[0] if isinstance(written, tuple) else written
    few = ["--rounds", "1", "--fraction", "0.02", "--federation.max_steps", "1", "--federation.flatness", "0"]
    few += ["--federation.client_samples", "0", "--engine", "serial"]
    result = fed_train("--config", preset, "--data.root", root, *few)
    assert result.code == 0, result.err
    facts = manifest(only_run())
    record_property("peak_mib", facts["peak_mib"])
    assert facts["data"]["clients"] == 100
    parameters = {"resnet18": 11_000_000, "deit_tiny": 2_700_000}["deit_tiny" if "deit" in preset else "resnet18"]
    # FedMoSWA and FedMuon send a second vector up, FedAdamW only means of blocks.
    vectors = 1 if "fedadamw" in preset else 2
    assert facts["metrics"]["comm/up_bytes_total"] == pytest.approx(2 * vectors * 4 * parameters, rel=0.05)
    assert 8 * parameters / 2**20 < facts["peak_mib"] < 6000
