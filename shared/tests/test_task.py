"""The interface between a model and what trains it."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from polymodal.task import TaskModule, gather_records


@dataclass
class Batch:
    ids: list[str]


class Task(TaskModule):
    """Draws once from the given generator and once from the global one."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.draws = []

    def loss(self, batch, generator):
        self.draws.append((torch.rand(1, generator=generator).item(), torch.rand(1).item()))
        return (self.weight - 1).square().sum(), {"term": torch.tensor(2.0)}

    def evaluate(self, batch):
        return {name: 1.0 for name in batch.ids}

    def metrics(self, records):
        return {"count": len(records)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def draws(seed: int, *steps: tuple[int, int]) -> list[tuple[float, float]]:
    task = Task(seed)
    for epoch, index in steps:
        type(task).current_epoch = property(lambda self, epoch=epoch: epoch)
        task.training_step(Batch(["a"]), index)
    del Task.current_epoch
    return task.draws


def test_the_draws_of_a_step_are_a_function_of_seed_epoch_and_batch() -> None:
    state = torch.get_rng_state()
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = draws(0, *steps)
    assert len({value for pair in found for value in pair}) == 8, "every draw is another one"
    assert draws(0, *reversed(steps)) == found[::-1], "whatever was drawn before"
    assert not set(draws(1, *steps)) & set(found)
    torch.set_rng_state(state)


def test_a_step_keeps_its_terms_for_the_log() -> None:
    task = Task()
    loss = task.training_step(Batch(["a"]), 0)
    assert loss.requires_grad
    assert {name: float(value) for name, value in task.train_logs.items()} == {"loss": 3.0, "term": 2.0}
    assert not task.train_logs["loss"].requires_grad


def test_records_are_collected_by_id_and_forgotten_after_a_split() -> None:
    task = Task()
    for start, step, end, split in (
        (task.on_validation_epoch_start, task.validation_step, task.on_validation_epoch_end, "val"),
        (task.on_test_epoch_start, task.test_step, task.on_test_epoch_end, "test"),
    ):
        for _ in range(2):
            start()
            step(Batch(["a", "b"]), 0)
            step(Batch(["b", "c"]), 1)
            end()
            assert task.last_metrics == {f"{split}/count": 3.0}
            assert list(task.records) == ["a", "b", "c"]


def test_batches_are_counted_and_named() -> None:
    task = Task()
    assert task.batch_size(Batch(["a", "b"])) == 2
    assert task.batch_size((torch.zeros(5, 2), torch.zeros(5))) == 5
    assert task.describe_batch(Batch(["a", "b"])) == "a, b"
    assert task.describe_batch(Batch(list("abcdef"))) == "a, b, c, d, …"
    assert task.describe_batch((torch.zeros(5, 2),)) == "no sample ids"


@pytest.mark.parametrize("limit", [None, 0, 0.5, 100.0])
def test_clipping_keeps_the_norm_it_saw(limit) -> None:
    task = Task()
    optimizer = task.configure_optimizers()
    task.loss(Batch([]), torch.Generator())[0].backward()
    task.configure_gradient_clipping(optimizer, limit)
    norm = 2 * 3**0.5
    after = float(task.weight.grad.norm())
    if not limit:
        assert task.grad_norm is None
        assert after == pytest.approx(norm)
    else:
        assert float(task.grad_norm) == pytest.approx(norm)
        assert after == pytest.approx(min(norm, limit), rel=1e-4)


def _rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    records = {f"r{rank}": rank, "both": rank}
    merged = gather_records(records)
    (Path(folder) / f"{rank}.txt").write_text(repr(merged))
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_records_of_all_ranks_fall_together_by_id(tmp_path: Path) -> None:
    assert gather_records({"a": 1}) == {"a": 1}
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for rank in range(2):
        merged = eval((tmp_path / f"{rank}.txt").read_text())
        assert merged == {"r0": 0, "both": 1, "r1": 1}
        assert list(merged) == ["r0", "both", "r1"], "the same order on every rank"
