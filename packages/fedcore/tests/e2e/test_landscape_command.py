"""``fed-landscape`` on runs of ``fed-train``."""

import json
import sys

import pytest
import torch
from fedcore import landscape_command
from fedcore import train as train_command
from fedcore.data.digits import Digits
from fedcore.landscape_settings import LandscapeConfig, gather_runs
from polymodal.errors import UserError

SMALL = [
    "--config=digits",
    "--federation.rounds=2",
    "--federation.local_epochs=1",
    "--federation.flatness=0",
    "--federation.engine=serial",
    "--partition.clients=8",
    "--model.options={hidden: [8]}",
    "--trainer.progress=none",
    "--log.wandb=off",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, FedAvg and FedMoSWA."""
    out = tmp_path_factory.mktemp("runs")
    for algorithm in ("fedavg", "fedmoswa"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(out)
            patch.setattr(
                sys, "argv", ["fed-train", *SMALL, f"--algorithm={algorithm}", f"--out={out}", f"--name={algorithm}"]
            )
            assert train_command.main() == 0
    return [next((out / "fedcore").glob(f"{name}-*")) for name in ("fedavg", "fedmoswa")]


@pytest.fixture
def fed_landscape(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fed-landscape", *map(str, arguments)])
        code = landscape_command.main()
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def test_a_row_and_files_for_each_run(fed_landscape, runs):
    code, out, err = fed_landscape(*runs, "--points", 5, "--samples", 200)
    assert code == 0, err
    assert [name in out for name in ("fedavg", "fedmoswa")] == [True, True]
    for folder in runs:
        measured = json.loads((folder / "figures" / "landscape.json").read_text())
        assert measured["samples"] == 200
        assert measured["round"] == 2
        assert measured["hessian"]["eigenvalue"] > 0
        # the middle of the surface is the model itself
        assert measured["surface"]["loss"][2][2] == pytest.approx(measured["loss"], rel=1e-6)
        assert (folder / "figures" / "surface.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_the_model_that_was_trained(fed_landscape, runs, tmp_path):
    """Loss on the test split, over all samples, from the weights in the file by hand."""
    code, _, err = fed_landscape(
        runs[1] / "checkpoints" / "last.ckpt", "--split=test", "--samples=0", "--points=0", f"--out={tmp_path}"
    )
    assert code == 0, err
    (file,) = tmp_path.glob("*.json")
    measured = json.loads(file.read_text())
    weights = torch.load(runs[1] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    first, second = sorted({name.rpartition(".")[0] for name in weights})
    test = Digits().load("test")
    hidden = torch.relu(test.inputs.flatten(1) @ weights[f"{first}.weight"].T + weights[f"{first}.bias"])
    logits = hidden @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]
    assert measured["samples"] == len(test)
    assert measured["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, test.targets).item(), rel=1e-5)
    assert "surface" not in measured


def test_an_unfinished_power_iteration_is_said(fed_landscape, runs, tmp_path):
    code, out, err = fed_landscape(runs[0], "--iterations=1", "--points=0", f"--out={tmp_path}", "--tolerance=1e-9")
    assert code == 0
    assert "(not converged)" in out
    assert "raise --iterations" in err


def test_bad_input_is_one_line(fed_landscape, runs, tmp_path):
    for arguments, said in (
        ([], "no run given"),
        ([tmp_path], "no run folder of fed-train"),
        ([runs[0], "--points=4"], "points=4"),
        ([runs[0], "--radius=0"], "radius=0"),
        ([runs[0], "--split=dev"], "split"),
    ):
        code, _, err = fed_landscape(*arguments)
        assert code == 2
        assert said in err.splitlines()[-1]
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    code, _, err = fed_landscape(broken)
    assert code == 2
    assert "no checkpoint" in err
    (broken / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("- 8", "- 9"))
    (broken / "checkpoints" / "last.ckpt").write_bytes((runs[0] / "checkpoints" / "last.ckpt").read_bytes())
    code, _, err = fed_landscape(broken)
    assert code == 2
    assert "do not fit" in err


def test_words_without_a_name_are_runs():
    assert gather_runs(["a", "--points", "5", "b", "--debug"]) == ["--points", "5", "--debug", '--runs=["a", "b"]']
    with pytest.raises(UserError, match="samples=-1"):
        LandscapeConfig(samples=-1)
