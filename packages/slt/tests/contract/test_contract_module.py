"""The shared contract of task modules, held by the translation module for every fusion and both stages."""

from __future__ import annotations

import pytest
import torch
from polymodal import checks
from polymodal.cli import parse_config
from slt.data import READERS
from slt.methods import FUSIONS
from slt.settings import SLTConfig
from slt.train import build_module, data_module, make_tokenizer

# Stage 1 does not look at the fusion: one is enough.
CASES = [*((name, 2) for name in FUSIONS.names()), ("ssaw", 1)]
every_case = pytest.mark.parametrize(("fusion", "stage"), CASES, ids=lambda x: str(x))
every_fusion = pytest.mark.parametrize("fusion", FUSIONS.names())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The smoke preset on a world of twelve clips, a function of the fusion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        choices = {"data": READERS}

        def parse(fusion, *options):
            arguments = ["--config", "smoke", "--data.sizes", "[8, 4, 8]", "--model.fusion", fusion, *options]
            return parse_config(SLTConfig, arguments, presets="slt", choices=choices)

        parse("ssaw").data.check()
        yield parse


@pytest.fixture
def make(settings, fusion):
    config = settings(fusion)
    tokenizer = make_tokenizer(config)
    return lambda stage: build_module(config, tokenizer, stage)


def batches(settings, split, size, *, train=False):
    config = settings("ssaw", "--loader.batch_size", str(size), "--loader.eval_batch_size", str(size))
    data = data_module(config, make_tokenizer(config))
    return list(data.loader(split, train=train))


@pytest.fixture(scope="module")
def train_batch(settings):
    (batch,) = batches(settings, "train", 8, train=True)
    assert any(batch.questions)
    return batch


@pytest.fixture(scope="module")
def test_batch(settings):
    (batch,) = batches(settings, "test", 8)
    return batch


@every_case
def test_loss_is_pure(make, stage, train_batch):
    checks.check_loss_is_pure(make(stage), train_batch)


@every_case
def test_evaluation_is_deterministic(make, stage, test_batch):
    checks.check_deterministic_eval(make(stage), test_batch)


@every_case
def test_checkpoint_round_trip(make, stage, test_batch, tmp_path):
    checks.check_checkpoint_round_trip(lambda: make(stage), test_batch, tmp_path)


@every_case
def test_bf16_stays_finite(make, stage, train_batch):
    checks.check_bf16_stays_finite(make(stage), train_batch)


# Not for stage 1: its contrastive terms compare the clips of a batch with each other, so they depend on it by design.
@every_fusion
def test_evaluation_does_not_depend_on_the_batch_size(make, settings, test_batch):
    module = make(2)
    checks.check_one_batch_overfit(module, test_batch, steps=8, ratio=0.95, lr=1e-2)  # so that outputs differ
    checks.check_eval_batch_size(module, [test_batch], batches(settings, "test", 1), batches(settings, "test", 3))


# Stage 1 has a bound of its own: its contrastive terms start near their floor.
@every_case
def test_one_batch_is_learnt_by_heart(settings, fusion, stage, train_batch):
    options = ["--loss.label_smoothing", "0", "--loss.restore_smoothing", "0", "--loss.lambda_q", "0"]
    config = settings(fusion, *options, "--model.dropout", "0")
    module = build_module(config, make_tokenizer(config), stage)
    checks.check_one_batch_overfit(module, train_batch, steps=30, ratio=0.15 if stage == 2 else 0.45, lr=1e-2)
