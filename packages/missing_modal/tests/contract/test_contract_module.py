"""The shared contract of task modules, held by every method on small encoders."""

from __future__ import annotations

import pytest
import torch
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.classifier import Classifier
from missing_modal.datamodule import MMDataModule
from missing_modal.inputs import ArrayInput
from missing_modal.methods import METHODS
from missing_modal.module import MMModule
from missing_modal.settings import LoaderConfig, OptimConfig
from missing_modal.tables import draw_masks
from missing_modal.world import CONTEXT, VOCABULARY, World
from polymodal import checks

NAMES = [name for name in METHODS.names() if name != "mmp_vilt"]  # its encoder is one of its own
every_method = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name, **options):
    """The module of a method, always the same one."""
    sizes = {"width": 8, "depth": 2, "heads": 2, "features": 6}
    towers = (small_patches(8, 4, **sizes), small_text(VOCABULARY, CONTEXT, **sizes))
    cls = METHODS.load(name)
    known = {key for key in ("length", "depth") if key in cls.__dataclass_fields__}
    options = {key: {"length": 6, "depth": 2}[key] for key in known} | options
    options |= {"reduction": 4} if name == "dcp" else {}
    model = Classifier(towers, METHODS.create(name, **options), 2)
    module = MMModule(model, OptimConfig(), task="binary", total_steps=9)
    if name == "mean_imputation":
        module.model.prepare(iter(batches("train", 24)))
    return module


def batches(split, size, ratio=0.7):
    """Batches of a small world, 24 samples a split."""
    reader = World(sizes=(24, 24, 24))
    masks = {name: draw_masks(24, "both", ratio, 0, "world", name).tolist() for name in ("train", "val", "test")}
    config = LoaderConfig(batch_size=size, eval_batch_size=size)
    data = MMDataModule(reader, masks, {"image": ArrayInput(), "text": ArrayInput()}, config)
    data.setup("fit")
    return list(data.train_dataloader() if split == "train" else data.loader(split))


@every_method
def test_loss_is_pure(name):
    checks.check_loss_is_pure(make(name), batches("train", 12)[0])


@every_method
def test_evaluation_is_deterministic(name):
    checks.check_deterministic_eval(make(name), batches("test", 12)[0])


@every_method
def test_evaluation_does_not_depend_on_the_batch_size(name):
    module = make(name)
    with torch.no_grad():
        module.model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    checks.check_eval_batch_size(module, *(batches("test", size) for size in (24, 1, 7)), tolerance=1e-5)


@every_method
def test_checkpoint_round_trip(name, tmp_path):
    checks.check_checkpoint_round_trip(lambda: make(name), batches("test", 12)[0], tmp_path)


@every_method
def test_bf16_stays_finite(name):
    checks.check_bf16_stays_finite(make(name), batches("train", 24)[0])


@pytest.mark.parametrize(
    ("name", "ratio"), [("dcp", 0.4), ("mmp_input", 0.4), ("modality_dropout", 0.5), ("head_only", 0.9)]
)
def test_one_batch_is_learnt_by_heart(name, ratio):
    options = {"rate": 0.0} if name == "modality_dropout" else {}
    module = make(name, **options)
    checks.check_one_batch_overfit(module, batches("train", 24, ratio=0.5)[0], steps=120, ratio=ratio, lr=2e-2)
