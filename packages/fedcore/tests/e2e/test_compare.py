"""``fed-compare`` from its command line: cells, resuming, picking, warnings, bad input."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from fedcore import compare as compare_command
from fedcore.compare_settings import settings_hash

RUN = "import sys; from fedcore.compare import main; sys.exit(main())"
SMALL = {
    "name": "small",
    "data": "digits",
    "partition": {"clients": 8, "samples": 10},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "rounds": 3,
    "local_epochs": 1,
    "fraction": 0.25,
    "tail": 2,
    "methods": {"fedavg": {"lr": [0.05, 0.3]}, "swa": {"algorithm": "fedswa", "lr": [0.05, 0.3]}},
    "seeds": [0, 1],
    "target": 0.1,
}


@pytest.fixture
def fed_compare(tmp_path, monkeypatch, capsys):
    """Run the command on a YAML file in a clean folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **settings):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **settings}))
        monkeypatch.setattr(sys, "argv", ["fed-compare", "--config", str(path), *arguments])
        code = compare_command.main()
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def cells(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def test_cells_table_and_curves_then_nothing_is_run_twice(fed_compare, tmp_path):
    code, out, err = fed_compare()
    assert code == 0, err
    folder = tmp_path / "results" / "small"
    found = cells(folder)
    assert sorted(found) == sorted(
        f"{label}-lr{rate}-seed{seed}.json" for label in ("fedavg", "swa") for rate in (0.05, 0.3) for seed in (0, 1)
    )
    record = found["swa-lr0.3-seed1.json"]
    assert record["status"] == "finished"
    assert (record["algorithm"], record["rate"], record["seed"]) == ("fedswa", 0.3, 1)
    assert record["rounds"]["round"] == [1, 2, 3]
    for split in ("val", "test"):
        assert len(record["rounds"][f"{split}/accuracy"]) == 3
        assert record["metrics"][f"{split}/accuracy"] == pytest.approx(record["rounds"][f"{split}/accuracy"][-1], 1e-3)
    # two clients a round, 8 (65 * 8 + 10 * 9 parameters of four bytes) each way
    parameters = 65 * 8 + 10 * 9
    assert record["parameters"] == parameters
    assert record["metrics"]["comm/up_bytes_total"] == 3 * 2 * 4 * parameters
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text() in out
    assert "WARNING" not in out
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    code, again, err = fed_compare()
    assert (code, again) == (0, out)
    assert "8 of them done before" in err
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_only_cells_of_other_settings_are_run_again(fed_compare, tmp_path):
    fed_compare()
    folder = tmp_path / "results" / "small"
    (folder / "swa-lr0.3-seed0.json").write_text("{broken")
    methods = {"fedavg": {"lr": [0.05, 0.3]}, "swa": {"algorithm": "fedswa", "lr": [0.05, 0.3], "rho": 0.5}}
    code, out, _ = fed_compare("--dry_run", "true", methods=methods)
    assert code == 0
    assert out.split() == [
        word for seed in (0, 1) for rate in (0.05, 0.3) for word in ("would", "run", f"swa-lr{rate}-seed{seed}")
    ]
    _, out, err = fed_compare("--dry_run", "true")
    assert out == "would run swa-lr0.3-seed0\n"
    assert "cannot be read and is run again" in err


def test_an_option_that_is_new_since_the_run_counts_only_where_it_is_used(fed_compare, tmp_path):
    methods = {"fedavg": {"lr": 0.3}}
    fed_compare(methods=methods, seeds=[0])
    (file,) = (tmp_path / "results" / "small").glob("*.json")
    record = json.loads(file.read_text())
    del record["settings"]["options"]["clip_grad"], record["settings"]["partition"]["shards"]
    record["settings_hash"] = settings_hash(record["settings"])
    file.write_text(json.dumps(record))
    _, out, _ = fed_compare("--dry_run=true", methods=methods, seeds=[0])
    assert out == "nothing left to run\n"
    _, out, _ = fed_compare("--dry_run=true", methods={"fedavg": {"lr": 0.3, "clip_grad": 1.0}}, seeds=[0])
    assert out == "would run fedavg-lr0.3-seed0\n"


def test_a_record_of_a_newer_version_is_refused(fed_compare, tmp_path):
    fed_compare(methods={"fedavg": {"lr": 0.3}}, seeds=[0])
    (file,) = (tmp_path / "results" / "small").glob("*.json")
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 99', 1))
    code, _, err = fed_compare(methods={"fedavg": {"lr": 0.3}}, seeds=[0])
    assert code == 2
    assert "schema version 99" in err


@pytest.mark.slow
def test_jobs_give_the_same_cells(fed_compare, tmp_path):
    fed_compare()
    alone = cells(tmp_path / "results" / "small")
    code, _, err = fed_compare("--jobs", "2", "--results", "other")
    assert code == 0, err
    together = cells(tmp_path / "other")
    assert alone.keys() == together.keys()
    for name, record in alone.items():
        for key in ("metrics", "settings_hash", "status"):
            assert record[key] == together[name][key]
        assert record["rounds"]["loss"] == together[name]["rounds"]["loss"]


def test_other_engines_agree_and_only_other_bits_are_other_cells(fed_compare, tmp_path):
    fed_compare(methods={"fedavg": {"lr": 0.3}}, seeds=[0])
    _, out, _ = fed_compare("--engine=pool", "--dry_run=true", methods={"fedavg": {"lr": 0.3}}, seeds=[0])
    assert out == "nothing left to run\n"
    code, _, err = fed_compare("--engine=batched", "--results=batched", methods={"fedavg": {"lr": 0.3}}, seeds=[0])
    assert code == 0, err
    (serial,), (batched,) = (list(cells(tmp_path / f).values()) for f in ("results/small", "batched"))
    assert serial["settings_hash"] != batched["settings_hash"]
    assert serial["rounds"]["loss"] == pytest.approx(batched["rounds"]["loss"], rel=1e-4)


def test_picking_on_the_test_split_warns_everywhere(fed_compare, tmp_path):
    code, out, err = fed_compare("--pick", "test")
    assert code == 0
    assert "WARNING: rates were picked on the test samples" in out
    assert "WARNING: rates were picked on the test samples" in err
    assert "THE TEST SPLIT" in (tmp_path / "results" / "small" / "table.md").read_text()


def test_pick_none_shows_every_rate(fed_compare):
    code, out, _ = fed_compare("--pick", "none", "--against", "swa", seeds=[0])
    assert code == 0
    labels = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert labels[2:] == ["fedavg 0.05", "fedavg 0.3", "swa 0.05", "swa 0.3"]
    assert "difference to swa" in out


def test_a_diverged_rate_is_out_of_the_choice(fed_compare, tmp_path):
    code, out, err = fed_compare(methods={"fedavg": {"lr": [0.05, 1e30], "clip_grad": 0.0}}, seeds=[0])
    assert code == 0, err
    record = cells(tmp_path / "results" / "small")["fedavg-lr1e+30-seed0.json"]
    assert record["status"] == "diverged"
    assert record["error"].startswith("round ")
    assert "diverged in some seed and out of the choice: fedavg at 1e+30" in out
    assert "| 0.05 |" in out
    code, out, _ = fed_compare(methods={"fedavg": {"lr": 1e30, "clip_grad": 0.0}}, seeds=[0])
    assert code == 0
    assert "–" in out


def test_landscape_is_measured_where_asked(fed_compare, tmp_path):
    code, out, err = fed_compare("--landscape", "true", methods={"fedavg": {"lr": 0.1}}, seeds=[0])
    assert code == 0, err
    (record,) = cells(tmp_path / "results" / "small").values()
    assert record["metrics"]["landscape/hessian"] > 0
    assert "largest Hessian eigenvalue" in out


def test_screening_leaves_out_what_is_far_from_the_best(fed_compare, tmp_path):
    methods = {"fedavg": {"lr": [0.0001, 0.001, 0.01, 0.1, 0.5]}}
    _, planned, _ = fed_compare("--dry_run=true", methods=methods, seeds=[0, 1, 2], screen=1)
    assert len(planned.splitlines()) == 5
    code, out, err = fed_compare(methods=methods, seeds=[0, 1, 2], screen=1)
    assert code == 0, err
    found = cells(tmp_path / "results" / "small")
    assert 9 <= len(found) < 15
    assert "the whole grid was run on seed 0; all seeds were run at the best point" in out
    _, again, err = fed_compare(methods=methods, seeds=[0, 1, 2], screen=1)
    assert again == out
    assert f"{len(found)} of them done before" in err


PRIVATE = {
    "methods": {"open": {"algorithm": "fedavg"}, "dp": {"algorithm": "dp_fedavg", "privacy.clip": [0.1, 1.0]}},
    "rates": [0.1],
    "fraction": 0.5,
    "exact_steps": True,
    "max_steps": 2,
    "privacy": {"noise_multiplier": 0.8, "delta": 0.01},
    "seeds": [0],
}


def test_a_private_comparison_keeps_and_shows_its_promise(fed_compare, tmp_path):
    from fedcore.privacy import epsilon

    code, out, err = fed_compare(**PRIVATE)
    assert code == 0, err
    found = cells(tmp_path / "results" / "small")
    assert sorted(found) == ["dp-lr0.1-clip0.1-seed0.json", "dp-lr0.1-clip1-seed0.json", "open-lr0.1-seed0.json"]
    record = found["dp-lr0.1-clip0.1-seed0.json"]
    assert record["settings"]["privacy"]["clip"] == record["privacy"]["clip"] == 0.1
    assert record["privacy"]["epsilon"] == pytest.approx(epsilon(0.5, 0.8, 3, 0.01), rel=1e-6)
    assert "loss" not in record["rounds"]
    assert "clients" not in record["rounds"]  # how many came is not public
    assert "privacy" not in found["open-lr0.1-seed0.json"]
    head = next(line for line in out.splitlines() if line.startswith("| method"))
    assert [word.strip() for word in head.split("|")[2:7]] == ["rate", "epsilon", "delta", "sigma", "C"]
    _, out, _ = fed_compare("--dry_run=true", **PRIVATE)
    assert out == "nothing left to run\n"
    _, out, _ = fed_compare("--dry_run=true", "--privacy.noise_multiplier=0.9", **PRIVATE)
    assert out == "would run dp-lr0.1-clip0.1-seed0\nwould run dp-lr0.1-clip1-seed0\n"


ADAPTED = {
    "model": {"name": "mlp", "options": {"hidden": [8, 8]}},
    "partition": {"scheme": "dirichlet_label", "clients": 4, "alpha": 1.0},
    "lora": {"ranks": [2, 3], "pretrain_epochs": 1},
    "methods": {"fedit": {}, "start": {"algorithm": "fedit", "lora.init": ["qr", "kaiming"]}},
    "rates": [0.01],
    "fraction": 1.0,
    "seeds": [0, 1],
}


def test_adapters_of_unequal_ranks_are_compared_on_one_base(fed_compare, tmp_path):
    code, out, err = fed_compare(**ADAPTED)
    assert code == 0, err
    found = cells(tmp_path / "results" / "small")
    assert len(found) == 6
    same, start = found["fedit-lr0.01-seed1.json"], found["start-lr0.01-initkaiming-seed1.json"]
    assert same["rounds"]["test/accuracy"] == start["rounds"]["test/accuracy"]  # kaiming is FedIT's own start
    assert same["settings"]["lora"]["ranks"] == [2, 3]
    assert same["samples_by_client"]["most"] < 1437
    assert "adapters of ranks 2, 3 in turn over the clients" in out
    head = next(line for line in out.splitlines() if line.startswith("| method"))
    assert head.split("|")[3].strip() == "init"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": {"fedavg": {"privacy.clip": [1.0]}}}, "which is not private"),
        ({"methods": {"fedavg": {"lora.rank": 4}}}, "no option lora.rank"),
        ({"methods": {"fedavgg": {}}}, "unknown algorithm 'fedavgg'"),
        ({"methods": {"fedavg": {"rho": 1.0}}}, "no option 'rho'"),
        ({"methods": {"fedavg": {"lr": ["1e-3"]}}}, "write 0.001"),
        ({"methods": {"fedavg": {"lr": [0.0, 0.1]}}}, "lr=0.0"),
        ({"against": "fedprox"}, "against=fedprox"),
        ({"val_share": 0.0}, "pick=val with val_share=0"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]"),
        ({"screen": -1}, "screen=-1"),
        ({"rounds": 0}, "rounds=0"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"model": {"name": "mpl"}}, "unknown model 'mpl'"),
        ({"partition": {"scheme": "column"}}, "no natural clients"),
        ({"no_such_key": 1}, "no_such_key"),
        pytest.param(
            {"device": "mps"},
            "device=mps",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is there"),
        ),
    ],
)
def test_bad_input_is_one_line(fed_compare, settings, said):
    code, out, err = fed_compare(**settings)
    last = err.strip().splitlines()[-1]
    assert code == 2, err
    assert last.startswith("fed-compare: error: ")
    assert said in last
    assert not out


@pytest.mark.parametrize(
    "seeds", [["--seeds", "3", "4"], ["--seeds=3,4"], ["--seeds", "[3,", "4]"], ["--seeds=[3, 4]"]]
)
def test_lists_are_taken_as_one_types_them(fed_compare, seeds):
    code, out, err = fed_compare("--dry_run=true", *seeds, "--algorithms", "fedavg", "--rates", "0.5", methods={})
    assert code == 0, err
    assert out.splitlines() == ["would run fedavg-lr0.5-seed3", "would run fedavg-lr0.5-seed4"]


def test_methods_are_listed_and_help_is_short(fed_compare):
    code, out, _ = fed_compare("--list-methods")
    assert code == 0
    assert "fedmoswa" in out
    code, out, _ = fed_compare("--help")
    assert code == 0
    assert out.startswith("usage: fed-compare")
    assert len(out.splitlines()) < 80


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, "rounds": 60, "seeds": list(range(6))}))
    arguments = [sys.executable, "-c", RUN, "--config", "small.yaml", "--jobs", "2"]
    first = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "results" / "small"
    deadline = time.monotonic() + 120
    while not list(folder.glob("fedavg*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    done = cells(folder)
    assert 0 < len(done) < 24
    second = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert f"{len(done)} of them done before" in second.stderr
    assert len(cells(folder)) == 24
