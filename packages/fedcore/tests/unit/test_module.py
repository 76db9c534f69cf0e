"""A simulation on the shared trainer: a round is a step, checkpoints hold everything, states of clients lie beside."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fedcore import Simulation, algorithms
from fedcore.module import FederatedModule, RoundsData, rounds_trainer
from fedcore.settings import RoundsTrainer
from polymodal.callbacks import load_checkpoint
from polymodal.config import LoggingConfig, RunConfig, TrainerConfig
from polymodal.errors import UserError
from polymodal.run import Run
from polymodal.trainer import evaluate_fitted, fit, load_best
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

CLIENTS, ROUNDS = 6, 5


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("POLYMODAL_SHARED_RUN", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=draw)
    return TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] ** 2 > 0).long())


class Unreadable(torch.utils.data.Dataset):
    """A client whose samples cannot be read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        raise OSError("the disk is gone")


def simulation(name: str = "fedmoswa", *, norm: bool = False, clients=None, **options) -> Simulation:
    torch.manual_seed(3)
    layers = [
        nn.Linear(5, 6),
        nn.BatchNorm1d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(6, 2),
    ]
    clients = clients or [samples(size, i) for i, size in enumerate((7, 8, 10, 11, 12, 14))]
    method = {"lr": 0.1, **({"share": 0.8} if name == "server_swa" else {})}
    settings = {"batch_size": 4, "fraction": 0.5, "seed": 1, "rounds": ROUNDS, "engine": "serial", **options}
    return Simulation(nn.Sequential(*layers), clients, algorithms.create(name, **method), **settings)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[FederatedModule, Run]]:
    """Fit a module in a run folder; ``resume`` goes on from one, ``stop_at`` ends the process before that round."""

    def call(
        sim: Simulation,
        *,
        resume: Path | None = None,
        stop_at: int = 0,
        monitor: str | None = None,
        beside: bool = True,
        every: int = 1,
        **options,
    ) -> tuple[FederatedModule, Run]:
        config = RunConfig(
            out=tmp_path / "runs", log=LoggingConfig(wandb="off"), resume=None if resume is None else str(resume)
        )
        trainer_config = rounds_trainer(RoundsTrainer(progress="none", checkpoint_every_epochs=every), ROUNDS)
        with Run.start("fedcore", config, name="toy", data={"name": "toy"}, step_name="round") as run:
            module = FederatedModule(
                sim,
                {"val": samples(40, 90), "test": samples(60, 91)},
                rounds=ROUNDS,
                checkpoints=run.folder / "checkpoints" if beside else None,
                **options,
            )

            def end() -> None:
                if stop_at and sim.done == stop_at:
                    raise RuntimeError("killed")

            module.on_train_epoch_start = end
            trainer = fit(module, RoundsData(), trainer_config, run, monitor=monitor)
            assert trainer.global_step == sim.done, "a round is a step"
            assert trainer.current_epoch == sim.done, "and an epoch"
            run.finish(evaluate_fitted(module, RoundsData(), trainer))
        return module, run

    return call


def rows(run: Run, name: str) -> list[tuple[int, float]]:
    with (run.folder / "metrics.csv").open() as handle:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(handle) if row["name"] == name]


def same(left: Simulation, right: Simulation) -> None:
    """Bit for bit: parameters, buffers, server state, client states."""
    assert torch.equal(left.flat, right.flat)
    assert left.client_states.keys() == right.client_states.keys()
    pairs = [(left.buffers, right.buffers), (left.server_state, right.server_state)]
    pairs += [(left.client_states[i], right.client_states[i]) for i in left.client_states]
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ rounds are steps


def test_global_step_is_the_number_of_rounds_and_training_is_the_simulations(start) -> None:
    alone = simulation(norm=True)
    history = alone.run(ROUNDS, test=samples(60, 91), val=samples(40, 90))
    module, run = start(simulation(norm=True))
    same(module.simulation, alone)
    for name in ("comm/up_bytes", "comm/down_bytes", "val/accuracy", "test/accuracy", "test/loss"):
        assert rows(run, name) == history.curve(name), name
    for name in ("loss", "lr", "clients", "local_steps"):
        assert rows(run, f"train/{name}") == history.curve(name), name
    assert module.totals["up_bytes"] == sum(row["comm/up_bytes"] for row in history)
    assert module.totals["clients"] == 3 * ROUNDS
    assert run.manifest["metrics"]["test/accuracy"] == history.last("test/accuracy")


def test_samples_a_second_count_what_clients_trained_on(start) -> None:
    module, run = start(simulation(local_epochs=2, max_steps=3, cohorts=[[0, 5]] * ROUNDS))
    # Batches of 4: client 0 has 7 samples in 2 batches an epoch, client 5 has 14 in 4; three steps each.
    assert module.batch_size("train") == (7 + 4) + 12
    rate, step_ms = rows(run, "perf/samples_per_s"), rows(run, "perf/step_ms")
    for (_, samples_per_s), (_, ms) in zip(rate, step_ms, strict=True):
        assert samples_per_s == pytest.approx(23 * 1000 / ms)


@pytest.mark.parametrize(
    ("every", "curve", "found"), [(1, True, [1, 2, 3, 4, 5]), (2, True, [2, 4, 5]), (3, False, [5])]
)
def test_evaluation_every_so_many_rounds_and_after_the_last(start, every: int, curve: bool, found: list[int]) -> None:
    module, run = start(simulation("fedavg"), eval_every=every, test_curve=curve)
    assert [step for step, _ in rows(run, "test/accuracy")] == found
    assert [step for step, _ in rows(run, "val/accuracy")] == ([3, 5] if every == 3 else found)
    assert module.tested_step == (ROUNDS if curve else None)


def test_evaluation_leaves_training_as_it_is(start) -> None:
    """Server-side averages are evaluated, not trained on; tensors of inference mode could not be trained on at all."""
    alone = simulation("server_swa", norm=True)
    alone.run(ROUNDS)
    module, _ = start(simulation("server_swa", norm=True))
    same(module.simulation, alone)
    assert not torch.equal(module.simulation.evaluation_flat, module.simulation.flat)


def test_dropped_clients_are_counted(start) -> None:
    clients = [*(samples(8, i) for i in range(CLIENTS - 1)), Unreadable(8)]
    module, _ = start(simulation("fedavg", clients=clients, fraction=1.0))
    assert module.totals["dropped"] == ROUNDS
    assert module.totals["clients"] == (CLIENTS - 1) * ROUNDS


def test_what_a_round_has_of_its_own_is_refused_around_it() -> None:
    for option in ({"precision": "bf16-mixed"}, {"clip_grad": 1.0}, {"accumulate": 2}, {"devices": 2}):
        (name,) = option
        with pytest.raises(UserError, match=f"trainer.{name}="):
            rounds_trainer(TrainerConfig(**{"clip_grad": 0, **option}), 3)
        with pytest.raises(UserError, match=f"trainer.{name}="):
            RoundsTrainer(**option)
    for option in ({"max_epochs": 3}, {"max_steps": 3}, {"val_every_epochs": 2}):
        with pytest.raises(UserError, match="set federation"):
            RoundsTrainer(**option)


# ------------------------------------------------------------------ weights


def test_checkpoints_hold_the_weights_that_are_evaluated(start) -> None:
    module, run = start(simulation("server_swa", norm=True))
    state = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["state_dict"]
    named = module.simulation.learner.spec.unflatten(module.simulation.evaluation_flat)
    assert {f"net.{name}" for name in named} < state.keys()
    assert all(torch.equal(state[f"net.{name}"], value) for name, value in named.items())
    assert torch.equal(state["net.1.running_mean"], module.simulation.buffers["1.running_mean"])


def test_the_best_weights_are_measured_without_touching_the_simulation(start) -> None:
    module, run = start(simulation(norm=True), monitor="val/accuracy")
    best = load_checkpoint(run.folder / "checkpoints" / "best.ckpt")
    assert best["fedcore"].keys() == {"schema_version", "round"}, "weights alone"
    curve = dict(rows(run, "val/accuracy"))
    first_best = next(round for round, value in curve.items() if value == max(curve.values()))
    assert best["fedcore"]["round"] == first_best
    before = module.simulation.state_dict()
    last = module.measure(samples(40, 90))
    load_best(module, run)
    assert module.measure(samples(40, 90))["accuracy"] == max(curve.values())
    module.export()
    assert all(torch.equal(module.net.state_dict()[n], best["state_dict"][f"net.{n}"]) for n in module.net.state_dict())
    after = module.simulation.state_dict()
    assert torch.equal(before["flat"], after["flat"])
    assert all(torch.equal(before["buffers"][name], after["buffers"][name]) for name in before["buffers"])
    module.on_train_start()
    assert module.measure(samples(40, 90)) == last


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("fedmoswa", True),
        ("fedmoswa", False),
        ("server_swa", True),
        pytest.param("fedavg", True, marks=pytest.mark.slow),
        pytest.param("fedacg", False, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed(start, tmp_path: Path, name: str, beside: bool) -> None:
    whole, whole_run = start(simulation(name, norm=True), beside=beside)
    with pytest.raises(RuntimeError, match="killed"):
        start(simulation(name, norm=True), beside=beside, stop_at=3)
    (folder,) = [path for path in (tmp_path / "runs" / "fedcore").iterdir() if path != whole_run.folder]
    again, run = start(simulation(name, norm=True), beside=beside, resume=folder)
    same(again.simulation, whole.simulation)
    assert again.totals == whole.totals
    for metric in ("train/loss", "val/accuracy", "test/accuracy", "comm/up_bytes"):
        assert rows(run, metric) == rows(whole_run, metric)
    assert run.manifest["metrics"] == whole_run.manifest["metrics"]


def test_a_finished_run_is_tested_again_as_it_was(start) -> None:
    module, run = start(simulation())
    again, run_again = start(simulation(), resume=run.folder)
    same(again.simulation, module.simulation)
    assert run_again.manifest["metrics"] == run.manifest["metrics"]
    assert len(rows(run, "test/accuracy")) == ROUNDS, "no row twice"


def test_a_run_keeps_its_engine(start) -> None:
    _, run = start(simulation())
    checkpoint = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    assert checkpoint["fedcore"]["simulation"]["engine"] == "serial"
    again, _ = start(simulation(engine="auto"), resume=run.folder)
    assert again.simulation.engine == "serial"
    with pytest.raises(UserError, match="engine=batched: the run was begun with serial"):
        start(simulation(engine="batched"), resume=run.folder)


def test_checkpoints_that_do_not_fit(start) -> None:
    module, run = start(simulation(), monitor="val/accuracy")
    with pytest.raises(UserError, match="weights alone"):
        start(simulation(), resume=run.folder / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match="state of FedMoSWA, not of FedAvg"):
        start(simulation("fedavg"), resume=run.folder)
    entry = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    entry["fedcore"]["schema_version"] = 99
    with pytest.raises(UserError, match="schema version 99; update"):
        module.on_load_checkpoint(entry)


# ------------------------------------------------------------------ client states beside the checkpoint


def shards(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints" / "clients").glob("*")}


def named(folder: Path, checkpoint: str) -> set[str]:
    entry = load_checkpoint(folder / "checkpoints" / f"{checkpoint}.ckpt")["fedcore"]
    assert entry["simulation"]["clients"] == {}
    return set(entry["client_states"]["shard_of"].values())


def test_only_files_that_a_checkpoint_names_stay(start) -> None:
    _, run = start(simulation(cohorts=[[0, 1], [2, 3], [0, 1], [0, 4], [5, 4]]))
    last, previous = named(run.folder, "last"), named(run.folder, "previous")
    assert shards(run.folder) == last | previous
    rounds = {int(name.split("-")[1]) for name in last}
    assert rounds == {2, 3, 4, 5}, "client 1 is of round 3, clients 2 and 3 of round 2, and nobody of round 1"


def test_a_file_has_the_states_that_changed_since_the_checkpoint_before(start) -> None:
    _, run = start(simulation(cohorts=[[0, 1], [1, 2], [3], [0, 4], [2]]), every=2)
    members = {}
    for path in (run.folder / "checkpoints" / "clients").iterdir():
        with safe_open(path, framework="pt") as handle:
            assert handle.metadata()["schema"] == "fedcore.client_states"
        members[int(path.name.split("-")[1])] = {int(key.split("/")[0]) for key in load_file(path)}
    assert members == {2: {0, 1, 2}, 4: {0, 3, 4}, 5: {2}}


def test_methods_without_client_state_write_no_files(start) -> None:
    _, run = start(simulation("fedavg"))
    assert not (run.folder / "checkpoints" / "clients").exists()


def test_a_file_that_is_lost_or_damaged_is_one_line(start) -> None:
    _, run = start(simulation())
    name = sorted(named(run.folder, "last"))[-1]
    path = run.folder / "checkpoints" / "clients" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"client states .*{name} are damaged"):
        start(simulation(), resume=run.folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"client states .*{name}: No such file"):
        start(simulation(), resume=run.folder)


def test_going_on_from_an_older_checkpoint_keeps_what_the_newer_one_names(start) -> None:
    """The newer one becomes the previous one at the next save, and must still be whole."""
    cohorts = [[0, 1], [2, 3], [0, 1], [0, 4], [5, 4]]
    whole, whole_run = start(simulation(cohorts=cohorts))
    again, run = start(simulation(cohorts=cohorts), resume=whole_run.folder / "checkpoints" / "previous.ckpt")
    same(again.simulation, whole.simulation)
    assert shards(run.folder) >= named(run.folder, "last") | named(run.folder, "previous")
