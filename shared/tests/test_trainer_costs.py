"""What a step does not pay for: look-ups and contexts that Lightning repeats although nothing changed."""

import inspect
import os

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from polymodal.config import LoggingConfig, RunConfig, TrainerConfig
from polymodal.run import Run
from polymodal.task import TaskModule
from polymodal.trainer import build_trainer


class Task(TaskModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def loss(self, batch, generator):
        return self.weight.sum(), {}

    def evaluate(self, batch):
        return {}

    def metrics(self, records):
        return {}


@pytest.fixture
def trainer(tmp_path):
    def make(**extra):
        settings = TrainerConfig(accelerator="cpu", progress="none", extra=extra)
        config = RunConfig(out=tmp_path, trainer=settings, log=LoggingConfig(wandb="off"))
        with Run.start("costs", config) as run:
            return build_trainer(settings, run)

    return make


def test_no_profiler_opens_one_context_for_all_hooks_and_a_users_profiler_wins(trainer):
    plain = trainer()
    with plain.profiler.profile("a") as first, plain.profiler.profile("b"):
        assert first is None
    assert plain.profiler.profile("a") is plain.profiler.profile("b")
    assert isinstance(trainer(profiler="simple").profiler, SimpleProfiler)


def test_the_stored_signature_is_the_real_one_and_that_of_an_override_is_its_own():
    class Other(Task):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    own = inspect.getfullargspec(TaskModule.training_step).args
    code = TaskModule.training_step.__code__
    assert tuple(own) == code.co_varnames[: code.co_argcount] == ("self", "batch", "batch_idx")
    assert is_param_in_hook_signature(Task().training_step, "batch_idx", min_args=2)
    assert not is_param_in_hook_signature(Other().training_step, "batch_idx", min_args=2)


def test_attributes_are_still_registered():
    task = Task()
    task._current_fx_name = "training_step"
    task.part = torch.nn.Linear(1, 1)
    task.extra = torch.nn.Parameter(torch.ones(2))
    assert task._current_fx_name == "training_step"
    assert [name for name, _ in task.named_parameters()] == ["weight", "extra", "part.weight", "part.bias"]
    del task._current_fx_name
    assert not hasattr(task, "_current_fx_name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Lightning's check stays as it is")
def test_without_a_gpu_no_step_searches_for_the_management_library(trainer, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    trainer()
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()

    def searched():
        raise AssertionError("searched for NVML")

    monkeypatch.setattr(torch.cuda, "_device_count_nvml", searched)
    optimizer.step()
    assert float(weight.detach()[0]) < 1
