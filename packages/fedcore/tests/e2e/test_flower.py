"""Flower as it is deployed: a SuperLink and two SuperNodes on loopback, and its simulation on this machine."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from polymodal.callbacks import load_checkpoint
from polymodal.nested import difference

pytest.importorskip("flwr")

from fedcore.flower import SWITCHES

PROGRAMS = Path(sys.executable).parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
QUIET = ["--log.wandb", "off", "--trainer.progress", "none"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def state_of(folder: Path) -> dict:
    """What a run has learnt: vectors, server state, buffers, and the states of its clients."""
    saved = load_checkpoint(folder / "checkpoints" / "last.ckpt")["fedcore"]
    found = {name: saved["simulation"][name] for name in ("flat", "server", "buffers", "round")}
    from safetensors.torch import load_file

    clients: dict[str, torch.Tensor] = {}
    shards = {
        name: load_file(folder / "checkpoints" / "clients" / name) for name in saved["client_states"]["checksums"]
    }
    for client, shard in saved["client_states"]["shard_of"].items():
        clients |= {name: value for name, value in shards[shard].items() if name.startswith(f"{client}/")}
    return {**found, "clients": clients}


def curves(folder: Path) -> dict[tuple[str, str], str]:
    with (folder / "metrics.csv").open() as handle:
        rows = {(row["step"], row["name"]): row["value"] for row in csv.DictReader(handle)}
    return {key: value for key, value in rows.items() if not key[1].startswith(("perf/", "time/"))}


class Deployment:
    """A SuperLink and its SuperNodes, with a Flower home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "home"
        home.mkdir()
        text = (
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (home / "config.toml").write_text(text)
        self.trap = socket.create_server(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{self.trap.getsockname()[1]}"
        self.env = {
            **os.environ,
            **SWITCHES,
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
            "FLWR_HOME": str(home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        self.processes[name] = subprocess.Popen(
            [str(PROGRAMS / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.env,
            stdout=log,
            stderr=log,
            start_new_session=True,  # as machines of their own: Linux shares a busy processor out by session
        )

    def link(self) -> None:
        options = ["--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        self.start("superlink", "flower-superlink", *options, "--disable-runtime-dependency-installation")
        self.wait(self.listens)

    def listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def node(self, partition: int, name: str = "") -> None:
        config = f"partition-id={partition} num-partitions=2"
        at = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        self.start(name or f"node{partition}", "flower-supernode", "--insecure", *at, "--node-config", config)

    def flwr(self, *arguments: str) -> str:
        """What the ``flwr`` command prints."""
        command = [str(PROGRAMS / "flwr"), *arguments]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def run(self, app: Path, **config: str | int) -> str:
        """Submit an app; Flower's number of the run."""
        text = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items()
        )
        printed = self.flwr("run", str(app), "here", "--run-config", text)
        return printed.partition("Successfully started run ")[2].split()[0]

    def finished(self, out: Path, seconds: float = 600) -> Path:
        """The run folder, when its manifest says that the run is over."""

        def over() -> bool:
            found = list(out.glob("fedcore/*/manifest.json"))
            return bool(found) and json.loads(found[0].read_text())["status"] != "running"

        self.wait(over, seconds)
        (folder,) = (out / "fedcore").iterdir()
        return folder

    def wait(self, true: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log")))

    def kill(self, name: str) -> None:
        """As if the machine had lost its power: the node and all that it started."""
        process = psutil.Process(self.processes.pop(name).pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        process.wait(10)

    def reached_out(self) -> bool:
        """Whether anything asked for an address that is not on loopback; such requests end in a trap."""
        self.trap.setblocking(False)
        try:
            self.trap.accept()
        except BlockingIOError:
            return False
        return True

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)
        self.trap.close()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    made.link()
    for partition in (0, 1):
        made.node(partition)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def serial(tmp_path: Path) -> Callable[..., Path]:
    """Run folder of ``fed-train`` with the serial engine."""

    def run(*options: str) -> Path:
        out = tmp_path / f"serial-{options[3]}"
        command = [str(PROGRAMS / "fed-train"), *options, *QUIET, "--out", str(out), "--engine", "serial"]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        (folder,) = (out / "fedcore").iterdir()
        return folder

    return run


@pytest.mark.slow
def test_a_superlink_and_two_supernodes_train_digits_as_the_serial_engine_does(
    deployment: Deployment, serial: Callable[..., Path]
) -> None:
    """FedMoSWA, whose server has a state, and FedAdamW, which sends moments; both in the same deployment."""
    for algorithm in ("fedmoswa", "fedadamw"):
        options = ["--config", "smoke", "--algorithm", algorithm, "--rounds", "2"]
        out = deployment.folder / algorithm
        deployment.run(EXAMPLE, options=" ".join([*options, *QUIET, "--out", str(out)]), nodes=2)
        folder = deployment.finished(out)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["status"], manifest["engine"]) == ("finished", "flower"), deployment.logs()
        reference = serial(*options)
        assert not difference(state_of(reference), state_of(folder))
        assert curves(reference) == curves(folder)
    assert not deployment.reached_out(), "telemetry, update check"


SLOW_DATA = '''
"""Four clients; once a file says so, the data of clients 1 and 3 keeps whoever reads it waiting."""

import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

HERE = Path(__file__).parent


class Slow:
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator):
        if (HERE / "wait").exists():
            (HERE / "waiting").touch()
            time.sleep(600)
        return self.dataset[indices]


def clients(seed):
    draw = torch.Generator().manual_seed(seed)
    data = [TensorDataset(torch.randn(8, 4, generator=draw), torch.randint(2, (8,), generator=draw)) for _ in range(4)]
    return {"clients": [Slow(d) if i % 2 else d for i, d in enumerate(data)], "test": data[0]}


def model():
    return nn.Linear(4, 2)
'''


@pytest.mark.slow
def test_a_node_killed_in_a_round_is_missing_there_and_the_run_goes_on(deployment: Deployment) -> None:
    source = deployment.folder / "slow_data.py"
    source.write_text(SLOW_DATA)
    out = deployment.folder / "runs"
    options = [
        "--module", f"{source}:model", "--datasets", f"{source}:clients", "--algorithm", "scaffold", "--fraction", "1",
        "--rounds", "5", "--federation.val_share", "0", "--federation.client_samples", "0",
        "--federation.flatness", "0", *QUIET, "--out", str(out),
    ]  # fmt: skip
    number = deployment.run(EXAMPLE, options=" ".join(options), nodes=2, timeout=60)

    def rounds() -> list[float]:
        found = list(out.glob("fedcore/*/metrics.csv"))
        if not found:
            return []
        return [float(v) for (_, name), v in curves(found[0].parent).items() if name == "train/clients"]

    deployment.wait(lambda: len(rounds()) >= 1)
    (deployment.folder / "wait").touch()
    deployment.wait((deployment.folder / "waiting").exists)
    deployment.kill("node1")
    (deployment.folder / "wait").unlink()
    deployment.node(1, "successor")
    folder = deployment.finished(out)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished", deployment.logs()
    found = rounds()
    assert len(found) == 5, deployment.logs()
    assert found[0] == 4
    assert 2 in found, "the clients of the node that was killed"
    assert found[-1] == 4, "the node that took its place"
    assert set(found) == {2, 4}
    assert "client 1 dropped: node" in deployment.flwr("log", number, "here", "--show")


@pytest.mark.slow
def test_fed_train_runs_flowers_simulation_on_this_machine(tmp_path: Path, serial: Callable[..., Path]) -> None:
    options = ["--config", "smoke", "--algorithm", "scaffold", "--rounds", "3"]
    command = [str(PROGRAMS / "fed-train"), *options, *QUIET, "--engine", "flower", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "did not start" not in done.stderr
    (folder,) = (tmp_path / "runs" / "fedcore").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["engine"] == "flower"
    reference = serial(*options)
    assert not difference(state_of(reference), state_of(folder))
    assert curves(reference) == curves(folder)
