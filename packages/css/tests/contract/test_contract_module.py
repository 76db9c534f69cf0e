"""The shared contract of task modules, held by EIR with a memory at step 1 and by plain training at step 0."""

from __future__ import annotations

import pytest
import torch
from css.data.datamodule import CSSDataModule
from css.data.options import LoaderConfig
from css.data.shapes import Shapes
from css.memory import InstanceMemory, make_memory
from css.memory.bank import InstanceBank
from css.methods import METHODS
from css.methods.base import StepContext
from css.models.build import build_network
from css.module import CSSModule
from css.settings import NetworkConfig, OptimConfig
from css.task import Task
from polymodal import checks

TASK = Task("2-1", 3)
CASES = [("ft", 0), ("eir", 1)]
every_case = pytest.mark.parametrize(("method", "step"), CASES, ids=lambda x: str(x))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Shapes(images=(24, 4, 8), classes=3)
        made.check()
        yield made


@pytest.fixture(scope="module")
def memory(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "memory"
    return make_memory(
        "instances", folder, reader=reader, task=TASK, fingerprint=reader.fingerprint(), step=1, setting="overlap",
        previous=None, budget=6, seed=1, split_seed=0,
    )  # fmt: skip


@pytest.fixture
def make(memory: InstanceMemory):
    """Builds the module of a step, always the same one."""

    def build(name, step, **options):
        method = METHODS.create(name, **options)
        torch.manual_seed(2)
        net = build_network(NetworkConfig(name="tiny", width=6), [2], method=method)
        ctx = StepContext(0, net, 0, 2)
        if step:
            old = net.frozen_copy()
            net.add_head(1)
            ctx = StepContext(1, net, 2, 1, old, InstanceBank(memory))
            method.init_new_head(ctx)
            net.freeze_norm()
        return CSSModule(ctx, method, OptimConfig(), base=2, total_steps=10, meta={"step": step})

    return build


@pytest.fixture
def batches(reader, memory):
    """Batches of a split at a step."""

    def load(step, split, size):
        loader = LoaderConfig(batch_size=size, eval_batch_size=size, crop=32)
        replay = memory.entries if step else []
        data = CSSDataModule(reader, TASK, "overlap", step, loader, replay=replay)
        data.setup("fit")
        return list(data.train_dataloader() if split == "train" else data.loader(split))

    return load


@every_case
def test_loss_is_pure(make, batches, method, step):
    batch = batches(step, "train", 12)[0]
    assert bool(batch.replayed.any()) == bool(step), "instance pictures are among the new ones"
    module = make(method, step)
    checks.check_loss_is_pure(module, batch)
    if step:
        assert module.method.loss(module.ctx, batch, torch.Generator())[1]["pasted"] > 0


@every_case
def test_evaluation_is_deterministic(make, batches, method, step):
    checks.check_deterministic_eval(make(method, step), batches(step, "test", 8)[0])


@every_case
def test_evaluation_does_not_depend_on_the_batch_size(make, batches, method, step):
    module = make(method, step)
    with torch.no_grad():
        for head in module.net.heads:
            head.weight.normal_(0, 3)
    checks.check_eval_batch_size(module, *(batches(step, "test", size) for size in (8, 1, 3)))
    assert (module.confusion.sum(0) > 0).all(), "every class is predicted somewhere"


@every_case
def test_checkpoint_round_trip(make, batches, method, step, tmp_path):
    checks.check_checkpoint_round_trip(lambda: make(method, step), batches(step, "test", 8)[0], tmp_path)


@every_case
def test_bf16_stays_finite(make, batches, method, step):
    checks.check_bf16_stays_finite(make(method, step), batches(step, "train", 8)[0])


@pytest.mark.parametrize(
    ("method", "step", "options", "ratio"),
    [
        ("ft", 0, {}, 0.25),
        ("eir", 1, {"paste": False, "init": "zero", "w_kd": 0.0}, 0.25),
        # The pictures are others at each step, as instances and their places are drawn.
        ("eir", 1, {"lam": 1.0, "augment": False, "init": "zero", "w_kd": 0.0}, 0.45),
    ],
    ids=["ft", "eir without pasting", "eir"],
)
def test_one_batch_is_learnt_by_heart(make, batches, method, step, options, ratio):
    module = make(method, step, **options)
    batch = batches(step, "train", 4)[0]
    checks.check_one_batch_overfit(module, batch, steps=120, ratio=ratio, lr=1e-2)
