"""fed-train on adapters of unequal ranks: presets, models of others, what it leaves, what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore import landscape_command
from fedcore.adapters import find_adapters
from fedcore.data import READERS
from fedcore.data.digits import Digits
from fedcore.landscape_command import load_trained
from fedcore.landscape_settings import LandscapeConfig
from fedcore.lora_settings import LoraConfig
from fedcore.settings import FedConfig
from polymodal.callbacks import load_checkpoint
from polymodal.cli import parse_config, preset_names
from polymodal.testing import manifest
from safetensors.torch import load_file

TINY = ["--lora.ranks", "2,4", "--rounds", "2", "--clients", "3", "--model.options", "{hidden: [12, 8]}"]
TINY += ["--lora.pretrain_epochs", "2", "--federation.flatness", "0", "--federation.client_samples", "20"]
RANKED = ("ilora", "fedit", "flora", "flexlora", "hetlora", "lora_head")
EQUAL = ("ffa_lora", "rolora", "fedex_lora", "lora_fair")


def trained(folder: Path) -> torch.nn.Module:
    return load_trained(folder, LandscapeConfig()).model.eval()


def some_pictures() -> torch.Tensor:
    return Digits(rotate=90).load("test").inputs[:50]


# ------------------------------------------------------------------ the default run


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> tuple[Path, str]:
    """Run folder of the preset with few rounds, and what was printed."""
    out = tmp_path_factory.mktemp("lora")
    import contextlib
    import io

    from fedcore import train

    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        quiet = ["--log.wandb", "off", "--trainer.progress", "none"]
        patch.setattr(sys, "argv", ["fed-train", *TINY, "--out", str(out), *quiet])
        assert train.main() == 0
    (folder,) = (out / "fedcore").iterdir()
    return folder, text.getvalue()


def test_a_run_leaves_its_base_and_what_was_trained(lora_run) -> None:
    folder, text = lora_run
    facts = manifest(folder)
    assert (facts["status"], facts["method"]) == ("finished", "ilora")
    lora = facts["data"]["lora"]
    assert (lora["ranks"], lora["layers"], lora["head"]) == ([2, 4], ["1", "3"], ["5"])
    assert len(load_file(folder / "base.safetensors")) == 6
    (line,) = [line for line in text.splitlines() if line.startswith("adapters ")]
    assert str(folder) in line
    state = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert "net.1.lora_A.default.weight" in state
    assert state["net.1.lora_A.default.weight"].shape == (4, 64), "of the largest rank"


def test_bytes_are_those_of_adapters_and_head(lora_run) -> None:
    folder, _ = lora_run
    head = 10 * 9
    least = sum(4 * (rank * (64 + 12 + 12 + 8) + head) for rank in (2, 4, 2))
    assert manifest(folder)["metrics"]["comm/up_bytes_total"] == 2 * least, "no variates in the preset"


@pytest.mark.parametrize("name", ["ilora", *(pytest.param(n, marks=pytest.mark.slow) for n in (*RANKED[1:], *EQUAL))])
def test_every_method_trains_and_is_left_in_a_form_for_others(fed_train, only_run, name: str) -> None:
    ranks = [] if name in RANKED else ["--lora.ranks", "3"]
    options = ["--algorithm_options.residual", "drop"] if name == "ilora" else []
    result = fed_train(*TINY, *ranks, "--algorithm", name, *options)
    assert result.code == 0, result.err
    folder = only_run()
    module, x = trained(folder), some_pictures()
    with torch.no_grad():
        expected = module(x)
    if (folder / "merged").is_dir():
        from fedcore.models import build

        plain = build("mlp", num_classes=10, input_shape=(1, 8, 8), hidden=[12, 8])
        plain.load_state_dict(load_file(folder / "merged" / "model.safetensors"))
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        assert "merged weights: the base moved too far" in result.out
    else:
        again = start_from(folder)
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)
        assert "PEFT, plain LoRA of rank" in result.out


@torch.no_grad()
def start_from(folder: Path) -> torch.nn.Module:
    """The run's base with the run's adapter on it."""
    from fedcore.algorithms import create
    from fedcore.lora.job import adapted
    from fedcore.models import build

    base = build("mlp", num_classes=10, input_shape=(1, 8, 8), hidden=[12, 8])
    base.load_state_dict(load_file(folder / "base.safetensors"))
    modules, (rank,) = adapted(base, LoraConfig(adapter=folder / "adapter"), create("fedit"), 1)
    return modules(rank).eval()


def test_the_landscape_of_a_run(lora_run, monkeypatch, capsys) -> None:
    folder, _ = lora_run
    monkeypatch.setattr(sys, "argv", ["fed-landscape", str(folder), "--points", "3", "--samples", "50"])
    assert landscape_command.main() == 0
    assert "ilora" in capsys.readouterr().out
    measured = json.loads((folder / "figures" / "landscape.json").read_text())
    assert np.isfinite(measured["hessian"]["eigenvalue"])
    tested = load_trained(folder, LandscapeConfig(split="test"))
    with torch.no_grad():
        right = (tested.model.eval()(tested.data.inputs).argmax(dim=1) == tested.data.targets).float().mean()
    assert float(right) == pytest.approx(manifest(folder)["metrics"]["test/accuracy"], abs=1e-6)


def test_a_dry_run_tells_ranks_and_layers(fed_train, tmp_path: Path) -> None:
    result = fed_train("--lora.ranks", "2,4,6", "--lora.pretrain_epochs", "1", "--dry_run", "true")
    assert result.code == 0, result.err
    assert "adapters    ranks 2,4,6 on 2 layers (1, 3); trained whole: 5; " in result.out
    assert "preset ilora (another one" in result.err
    assert not (tmp_path / "runs").exists()


def test_help_has_a_group(fed_train) -> None:
    result = fed_train("--help", "lora")
    assert result.code == 0
    for option in ("--lora.ranks", "--lora.targets", "--lora.adapter PATH", "--lora.pretrain_epochs"):
        assert option in result.out


@pytest.mark.parametrize("name", [name for name in preset_names("fedcore") if name.startswith("ilora")])
def test_presets_can_be_read(name: str) -> None:
    config = parse_config(FedConfig, ["--config", name], presets="fedcore", choices={"data": READERS})
    assert config.lora.ranks[:3] == [2, 4, 6]
    assert config.federation.weighting == "samples"
    for algorithm in config.defaults_by_algorithm:
        from fedcore.algorithms import create

        create(algorithm, **config.defaults_by_algorithm[algorithm])


# ------------------------------------------------------------------ other data, models, modules


def test_the_digits_by_name_and_plain_methods(fed_train, only_run) -> None:
    options = ["--data", "digits", "--lora.ranks", "4", "--algorithm", "fedavg", "--lr", "0.1", *TINY[2:]]
    result = fed_train(*options)
    assert result.code == 0, result.err
    assert manifest(only_run())["data"]["lora"]["ranks"] == [4]
    assert (only_run() / "adapter" / "adapter_config.json").is_file()


def test_a_model_of_transformers_comes_back_to_peft(fed_train, only_run, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=10, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    small = ["--rounds", "2", "--clients", "3", "--federation.max_steps", "2", "--federation.flatness", "0"]
    small += ["--lora.pretrain_epochs", "0", "--federation.client_samples", "0", "--model.options", "{}"]
    small += ["--algorithm_options.residual", "drop", "--lora.targets", "q_proj,v_proj"]
    result = fed_train("--data", "digits", "--lora.ranks", "2,4", "--model", f"hf:{tmp_path / 'vit'}", *small)
    assert result.code == 0, result.err
    folder = only_run()
    module = trained(folder)
    assert len(find_adapters(module)) == 4
    base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    x = Digits().load("test").inputs[:20]
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=x).logits, module(x), rtol=1e-5, atol=1e-5)
    named = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "vit")
    assert named["modules_to_save"] == ["classifier"]
    # and the other way: a run that starts from that adapter
    theirs.save_pretrained(tmp_path / "saved")
    start = ["--lora.adapter", tmp_path / "saved", "--lora.targets", "", "--rounds", "1", "--name", "again"]
    result = fed_train("--data", "digits", "--model", f"hf:{tmp_path / 'vit'}", *small, *start)
    assert result.code == 0, result.err
    again = next((tmp_path / "runs" / "fedcore").glob("again-*"))
    assert manifest(again)["data"]["lora"]["ranks"] == [8], "the adapter's own"


@pytest.mark.slow
def test_a_model_of_timm(fed_train, only_run) -> None:
    pytest.importorskip("timm")
    small = ["--rounds", "1", "--clients", "3", "--federation.max_steps", "1", "--federation.flatness", "0"]
    small += ["--lora.pretrain_epochs", "0", "--federation.client_samples", "0"]
    options = ["--model", "timm:test_vit", "--model.options", "{patch_size: 4}", "--lora.targets", "qkv"]
    result = fed_train("--data", "digits", "--lora.ranks", "2,4", *options, *small)
    assert result.code == 0, result.err
    assert all(layer.endswith("qkv") for layer in manifest(only_run())["data"]["lora"]["layers"])


OWN = '''
import torch
from polymodal.task import TaskModule
from torch.utils.data import TensorDataset


class Curve(TaskModule):
    """A task that fedcore knows nothing of: batches of (x, y)."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        self.head = torch.nn.Linear(16, 1)

    def loss(self, batch, generator):
        return (self.head(self.body(batch[0]).tanh()).squeeze(1) - batch[1]).pow(2).mean(), {}

    def evaluate(self, batch):
        wrong = (self.head(self.body(batch[0]).tanh()).squeeze(1) - batch[1]).abs()
        return {f"{float(x[0]):.6f}": float(e) for x, e in zip(batch[0], wrong)}

    def metrics(self, records):
        return {"error": sum(records.values()) / len(records)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def points(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, 0] * x[:, 1])


def clients(seed, base=True):
    found = {"clients": [points(30, i) for i in range(3)], "test": points(20, 9)}
    return found | ({"pretrain": points(60, 7)} if base else {})
'''


def test_a_module_of_ones_own(fed_train, only_run, tmp_path: Path) -> None:
    path = tmp_path / "own_task.py"
    path.write_text(OWN)
    options = ["--module", f"{path}:Curve", "--datasets", f"{path}:clients", "--lora.ranks", "2,4", "--rounds", "3"]
    options += ["--fraction", "1", "--lora.pretrain_epochs", "3", "--federation.local_epochs", "1"]
    result = fed_train(*options)
    assert result.code == 0, result.err
    facts = manifest(only_run())
    assert (facts["method"], facts["data"]["lora"]["layers"]) == ("ilora", ["body.0", "body.2"])
    assert (only_run() / "base.safetensors").is_file()
    assert "test/error" in facts["metrics"]


# ------------------------------------------------------------------ bad input


@pytest.fixture
def line(fed_train, complains) -> Callable[..., str]:
    """The only line of a call that must fail."""

    def call(*arguments: object) -> str:
        return complains(fed_train(*arguments), "fed-train: error: ")

    return call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora.ranks", "2,40"], "rank 40 of layer 1 with a weight of 12x64; expected 1 <= rank <= 12"),
        (["--lora.ranks", "2,x"], "lora.ranks=2,x; expected whole numbers of at least 1, e.g. 2,4,6"),
        (["--lora.targets", "query"], "no layer is called query (targets)"),
        (["--lora.head", "fc"], "no layer is called fc (head)"),
        (["--lora.alpha", "16"], "alpha=16 over ranks 2,4 scales clients differently; give lora.scaling"),
        (["--algorithm", "fedavg"], "FedAvg averages models of one shape, not of ranks 2,4; give one rank, or"),
        (["--algorithm", "rolora"], "RoLoRA needs clients of one rank, not 2, 4"),
        (["--lora.adapter", "/nowhere"], "/nowhere"),
        (["--lora.init", "pca"], "pca"),
        (["--lora.pretrain_labels", "0,11"], "no training sample has label 11"),
        (["--lora.pretrain_data", "{turn: 0}"], "digits has no option 'turn'"),
        (["--data.rotate", "45"], "rotate=45; expected 0 (as stored), 90, 180 or 270"),
        (["--model", "deit_tiny", "--model.options", "{dim: 6}", "--lora.targets", "patch_embed"], "takes no adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(line, tmp_path: Path, options: list[str], words: str) -> None:
    assert words in line(*TINY, "--lora.pretrain_epochs", "1", *options)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs" / "fedcore").glob("*")), "nothing was begun"


def test_adapters_need_ranks(line) -> None:
    assert "ILoRA trains adapters; give their ranks, e.g. --lora.ranks 2,4,6" in line("--algorithm", "ilora")


def test_a_base_of_clients_of_ones_own_needs_samples(line, tmp_path: Path) -> None:
    path = tmp_path / "own_task.py"
    path.write_text(OWN)
    options = ["--module", f"{path}:Curve", "--datasets", f"{path}:clients", "--datasets_options.base", "false"]
    found = line(*options, "--lora.ranks", "2,4", "--lora.pretrain_epochs", "3")
    assert "gives no samples for the base; return {clients: ..., pretrain: ...}" in found


def test_an_adapter_of_another_base(line, lora_run, tmp_path: Path) -> None:
    from fedcore.lora import export_plain, inject
    from fedcore.lora.adapter import save_adapter
    from fedcore.models import build

    base = build("mlp", num_classes=10, input_shape=(1, 8, 8), hidden=[9, 8])
    save_adapter(tmp_path / "other", inject(base, 2), export_plain(inject(base, 2), base))
    found = line(*TINY, "--lora.adapter", tmp_path / "other")
    assert "is of another base: 1 has a weight of 9x64 there, 12x64 here" in found


def test_a_run_goes_on_with_its_own_adapters_alone(line, lora_run) -> None:
    folder, _ = lora_run
    assert "a run with lora.ranks 2,4, not 2,6" in line("--resume", folder, "--lora.ranks", "2,6")
    assert "a run with lora.scaling 2.0,2.0, not 1.0,1.0" in line("--resume", folder, "--lora.scaling", "1.0")
    assert "a run with lora.targets 1,3, not 3" in line("--resume", folder, "--lora.targets", "3")
