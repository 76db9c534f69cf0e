"""What can be wrong with options, data, clients and run folders ends in one line with a remedy, and nothing is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from polymodal import files
from polymodal.callbacks import load_checkpoint
from polymodal.testing import manifest

SMALL = ["--config", "smoke", "--rounds", "2", "--model.options", "{hidden: [4]}", "--federation.flatness", "0"]


@pytest.fixture
def line(fed_train, complains) -> Callable[..., str]:
    """The only line of a call that must fail."""
    return lambda *arguments: complains(fed_train(*arguments), "fed-train: error: ")


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--algorithm", "fedmosva"], "unknown algorithm 'fedmosva'; did you mean fedmoswa"),
        (["--algorithm_options.roh", "0.5"], "did you mean rho"),
        (["--algorithm_options.rho", "1.5"], "rho=1.5; expected"),
        (["--algorithm_options.rho", "much"], "option rho='much'; expected a number"),
        (["--lr", "0"], "lr=0.0; expected more than 0"),
        (["--lr", "-1"], "lr=-1.0; expected more than 0"),
        (["--lr", "1e-300", "--federation.lr_decay", "1e-30"], "learning rate of round 0 is 0.0"),
        (["--fraction", "0"], "federation.fraction=0.0 leaves no client in a round"),
        (["--fraction", "1.5"], "expected 0 < fraction <= 1"),
        (["--rounds", "0"], "federation.rounds=0; expected at least 1"),
        (["--federation.batch_size", "0"], "federation.batch_size=0; expected at least 1"),
        (["--federation.local_epochs", "0"], "federation.local_epochs=0; expected at least 1"),
        (["--federation.max_steps", "-1"], "max_steps=-1; expected 0 (no cap) or more"),
        (["--federation.val_share", "1"], "federation.val_share=1.0; expected 0 <= val_share < 1"),
        (["--federation.target", "90"], "federation.target=90.0; expected 0..1"),
        (["--federation.workers", "0"], "federation.workers=0; expected at least 1"),
        (["--federation.val_share", "0", "--federation.test_with", "best"], "test_with=best needs a validation split"),
        (["--federation.val_share", "0", "--trainer.patience", "2"], "patience=2 needs a metric of a validation split"),
        (["--engine", "quick"], "quick"),
        (["--clients", "0"], "partition.clients=0; expected at least 1"),
        (["--clients", "5000"], "5000 clients for"),
        (["--alpha", "0"], "alpha=0.0; expected more than 0"),
        (["--partition", "column"], "no natural clients"),
        (["--partition", "dirichlet"], "dirichlet"),
        (["--partition.file", "/nowhere.json"], "/nowhere.json"),
        (["--model", "mpl"], "did you mean mlp"),
        (["--model.options", "{hiden: [4]}"], "no option 'hiden'"),
        (["--model", "deit_tiny", "--model.options", "{patch: 3}"], "expected a patch that divides both"),
        (["--trainer.clip_grad", "1"], "trainer.clip_grad=1.0: a round is one step of many clients"),
        (["--trainer.max_epochs", "3"], "set federation.rounds"),
        (["--trainer.accumulate", "2"], "trainer.accumulate=2"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision=bf16-mixed"),
        (["--trainer.devices", "2"], "clients share one device"),
        (["--trainer.accelerator", "mps"], "torch finds no such device here"),
        (["--data", "digts"], "did you mean digits"),
        (["--data", "cifar10"], "no root folder"),
        (["--data", "cifar10", "--data.root", "/nowhere"], "/nowhere"),
        (["--module", "nowhere.at.all:Task"], "no module nowhere; install it, or give FILE.py:Name"),
        (["--module", "/nowhere/task.py:Task"], "/nowhere/task.py: no such file"),
        (["--module", "torch.nn"], "expected PATH.TO:Name or FILE.py:Name"),
        (["--module", "torch.nn:Linaer"], "did you mean Linear"),
        (["--module", "torch.nn:Linear"], "--module needs in_features, out_features; give them in --module_options"),
        (["--module", "torch.nn:Linear", "--module_options.in", "3"], "--module has no 'in'"),
        (["--module", "torch:Generator"], "no torch module"),
        (["--datasets", "torch.nn:Linear"], "--datasets needs --module"),
        (["--out", "/proc/nowhere"], "--out"),
        (["--resume", "auto"], "no unfinished run of this configuration and seed"),
        (["--resume", "/nowhere"], "no such run folder or checkpoint"),
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(line, tmp_path: Path, options: list[str], words: str) -> None:
    base = [] if "--data" in options else SMALL
    assert words in line(*base, *options)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs" / "fedcore").glob("*")), "nothing was begun"


def test_shapes_that_do_not_match(line, tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("import torch\n\ndef narrow(): return torch.nn.Linear(3, 2)\n")
    assert "the model or loss does not take the clients' data" in line(*SMALL, "--module", f"{path}:narrow")


def test_clients_of_others_that_are_none(line, tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text(
        "import torch\n\ndef model(): return torch.nn.Linear(3, 2)\n\n\ndef nothing(): return {'clients': []}\n"
        "\n\ndef a_list(): return [1]\n\n\ndef empty(): return {'clients': [[]]}\n"
    )
    for name, words in (
        ("nothing", "expected a mapping with clients"),
        ("a_list", "it returned list"),
        ("empty", "no client has any data"),
    ):
        assert words in line("--module", f"{path}:model", "--datasets", f"{path}:{name}")


def test_a_configuration_file_with_mistakes(line, tmp_path: Path) -> None:
    for text, words in (
        ("modle:\n  name: mlp\n", "modle"),
        ("algorithm: [", "not valid YAML"),
        ("data: digts\n", "did you mean digits"),
        ("defaults_by_algorithm: {fedmoswa: [1]}\n", "defaults_by_algorithm.fedmoswa=[1]; expected a mapping"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        assert words in line("--config", tmp_path / "own.yaml")


def test_debug_shows_where_it_came_from(fed_train) -> None:
    result = fed_train(*SMALL, "--lr", "0", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("fed-train: error: lr=0.0")


# ------------------------------------------------------------------ clients that fail

FAILING = '''
import torch
from torch.utils.data import Dataset


class Points(Dataset):
    """Four samples; from the round on that the file says, they cannot be read."""

    def __init__(self, begin):
        self.begin = begin

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.begin < 0 or COUNT[0] > 4 * self.begin:
            raise OSError("the disk is gone")
        COUNT[0] += 1
        return torch.ones(3), torch.tensor(index % 2)


COUNT = [0]


def model():
    return torch.nn.Linear(3, 2)


def one_bad():
    COUNT[0] = 0
    return {"clients": [Points(9999), Points(9999), Points(-1)]}


def all_bad_later():
    COUNT[0] = 0
    return {"clients": [Points(6), Points(6)]}
'''


def test_a_client_that_fails_is_dropped_with_a_warning(fed_train, tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    options = ["--module", f"{path}:model", "--datasets", f"{path}:one_bad", "--algorithm", "fedavg"]
    result = fed_train(*options, "--fraction", "1", "--rounds", "3", "--federation.local_epochs", "1")
    assert result.code == 0, result.err
    assert result.err.count("client 2 dropped: OSError: the disk is gone") == 3
    assert "client 2 is left out of the metrics by client: OSError: the disk is gone" in result.err
    assert re.search(r"^\| clients dropped +\| +3 \|$", result.out, re.MULTILINE)


def test_when_all_clients_fail_the_last_checkpoint_stands(fed_train, only_run, tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    options = ["--module", f"{path}:model", "--datasets", f"{path}:all_bad_later", "--algorithm", "fedavg"]
    options += ["--fraction", "1", "--rounds", "9", "--federation.local_epochs", "1", "--engine", "serial"]
    result = fed_train(*options)
    assert result.code == 1
    last = result.err.rstrip().splitlines()[-1]
    assert "all 2 clients failed; first: OSError: the disk is gone" in last
    assert f"the last checkpoint stands: --resume {only_run()}" in last
    assert "Traceback" not in result.err
    assert manifest(only_run())["status"] == "failed"
    done = load_checkpoint(only_run() / "checkpoints" / "last.ckpt")["fedcore"]["round"]
    assert 0 < done < 9


# ------------------------------------------------------------------ run folders


def copied(fed_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fed_run, tmp_path / "runs" / "fedcore" / fed_run.name))


def test_a_run_is_continued_as_what_it_is(line, fed_run: Path, tmp_path: Path) -> None:
    folder = copied(fed_run, tmp_path)
    for options, words in (
        (["--algorithm", "fedavg"], "a run with algorithm fedmoswa, not fedavg"),
        (["--seed", "4"], "a run with seed 3, not 4"),
        (["--model", "resnet10_gn", "--model.options", "{}"], "a run with model mlp, not resnet10_gn"),
        (["--clients", "10"], "a run with clients 8, not 10"),
        (["--alpha", "0.5"], "its clients have other samples"),
        (["--data.test_samples", "100"], "its clients have other samples"),
        (["--engine", "batched"], "whose sums differ"),
    ):
        assert words in line("--resume", folder, *options)
    assert manifest(folder)["status"] == "failed", "the last one of them was refused when the checkpoint was read"


def test_states_of_clients_that_are_gone(line, fed_run: Path, tmp_path: Path) -> None:
    folder = copied(fed_run, tmp_path)
    for path in (folder / "checkpoints" / "clients").iterdir():
        path.unlink()
    assert "client states" in line("--resume", folder)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    fed_train, only_run, complains, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of clients of round 2 do not fit: the checkpoint of round 1 and its states stand."""
    original, calls = files.atomic_write, [0]

    def write(path: Path, writer) -> None:
        if path.suffix == ".safetensors":
            calls[0] += 1
            if calls[0] == 2:
                raise files._explain(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        original(path, writer)

    monkeypatch.setattr(files, "atomic_write", write)
    complains(fed_train(*SMALL, "--rounds", "4"), "disk full while writing", "continue with --resume")
    monkeypatch.setattr(files, "atomic_write", original)
    folder = only_run()
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]["round"] == 1
    assert manifest(folder)["status"] == "failed"
    assert fed_train("--resume", folder).code == 0
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]["round"] == 4
