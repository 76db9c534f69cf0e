"""One step on the shared layer: groups of the optimizer, schedule, evaluation, what a checkpoint says."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from css.data.batch import Batch
from css.methods import METHODS
from css.methods.base import StepContext
from css.metrics import segmentation_report
from css.models.base import Features
from css.models.build import build_network
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from css.module import CSSModule
from css.settings import NetworkConfig, OptimConfig
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

OPTIM = OptimConfig(lr=0.5, later_lr=0.02, head_factor=10, weight_decay=0.1)


class Necked(TinyExtractor):
    """The tiny backbone with a neck of its own, as larger networks have one."""

    def __init__(self):
        super().__init__(4)
        self.neck = torch.nn.Conv2d(self.out_channels, self.out_channels, 1)

    def forward(self, x):
        found = super().forward(x)
        return Features(self.neck(found.feature), found.stages)

    def backbone_parameters(self):
        return self.blocks.parameters()

    def neck_parameters(self):
        return self.neck.parameters()


def module_of(step=1, method="ft", optim=OPTIM, necked=False, **more):
    """Two base classes, then one a step."""
    torch.manual_seed(0)
    made = METHODS.create(method)
    channels = [2, 1, 1][: step + 1]
    if necked:
        net = CSSNet(Necked(), channels)
    else:
        net = build_network(NetworkConfig(name="tiny", width=4), channels, method=made)
    old = net.frozen_copy() if step else None
    ctx = StepContext(step, net, step + 1 if step else 0, 1 if step else 2, old)
    if step and made.freeze_norm:
        net.freeze_norm()
    return CSSModule(ctx, made, optim, base=2, total_steps=100, **more)


def batch_of(count=3, size=16, channels=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(channels, (count, size, size), generator=draw)
    labels[:, 0] = 255
    images = torch.randn(count, 3, size, size, generator=draw)
    return Batch([f"p{seed}-{i}" for i in range(count)], images, labels, None, torch.zeros(count, dtype=torch.bool))


# ------------------------------------------------------------------ optimizer


def groups_of(module):
    return {group["name"]: group for group in module.parameter_groups()}


def test_rates_are_one_to_ten_and_everything_decays_in_step_0():
    groups = groups_of(module_of(0, necked=True))
    assert {name: group["lr"] for name, group in groups.items()} == {
        "backbone": 0.5, "neck": 5.0, "heads": 5.0, "new_head": 5.0,
    }  # fmt: skip
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


def test_later_steps_have_their_own_rate_and_only_the_new_head_decays():
    groups = groups_of(module_of(2, necked=True))
    assert {name: pytest.approx(group["lr"]) for name, group in groups.items()} == {
        "backbone": 0.02, "neck": 0.2, "heads": 0.2, "new_head": 0.2,
    }  # fmt: skip
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "backbone": 0.0, "neck": 0.0, "heads": 0.0, "new_head": 0.1,
    }  # fmt: skip
    decays = groups_of(module_of(2, optim=OptimConfig(decay_later="all", weight_decay=0.3)))
    assert {group["weight_decay"] for group in decays.values()} == {0.3}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_trained_parameter_is_in_one_group(step):
    module = module_of(step, necked=True)
    grouped = [p for group in module.parameter_groups() for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for p in grouped} == trained
    names = {name for name, p in module.net.named_parameters() if id(p) not in trained}
    norms = {
        f"{name}.{kind}"
        for name, layer in module.net.named_modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert names == (norms if step else set()), "normalisation alone is frozen, in later steps alone"


def test_factors_of_a_method_freeze_and_slow_down():
    module = module_of(1, "ssul")
    groups = module.parameter_groups()
    new = sum(1 for group in groups for _ in group["params"] if group["name"] == "new_head")
    assert new == len([p for p in module.net.heads[-1].parameters() if p.requires_grad])
    assert not any(group["name"] in ("backbone", "neck") for group in groups)
    assert not any(p.requires_grad for p in module.net.extractor.parameters())
    rates = sorted({group["lr"] for group in groups})
    assert rates == pytest.approx([0.2 * 1e-4, 0.2])


def test_the_old_network_is_no_part_of_the_module():
    module = module_of(1)
    old = {id(p) for p in module.ctx.old.parameters()}
    assert not old & {id(p) for p in module.parameters()}
    assert all(name.startswith("net.") for name in module.state_dict())
    assert not any(p.requires_grad for p in module.ctx.old.parameters())


@given(st.integers(1, 1000), st.data())
def test_the_schedule_falls_from_one_to_zero(total, data):
    module = CSSModule.__new__(CSSModule)
    torch.nn.Module.__init__(module)
    module.optim = OptimConfig(schedule="poly", power=0.9)
    step = data.draw(st.integers(0, total))
    assert module.rate(step, total) == pytest.approx((1 - step / total) ** 0.9)
    assert module.rate(step, total) >= module.rate(step + 1, total)
    module.optim = OptimConfig(schedule="constant")
    assert module.rate(step, total) == 1


def test_warm_up_rises_in_equal_steps_and_then_falls():
    module = module_of(optim=OptimConfig(schedule="warm_poly", warmup=0.2, power=1.0))
    assert [module.rate(step, 10) for step in range(3)] == [0.5, 1.0, 1.0]
    assert [module.rate(step, 10) for step in range(2, 11)] == pytest.approx([1 - step / 8 for step in range(9)])
    assert module.rate(12, 10) == 0


def test_rates_follow_the_schedule_in_all_groups():
    module = module_of(1)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, True)}
    for _ in range(50):
        optimizer.step()
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["backbone"] == pytest.approx(0.02 * 0.5**0.9)
    assert rates["new_head"] == pytest.approx(0.2 * 0.5**0.9)


# ------------------------------------------------------------------ evaluation


def test_metrics_are_those_of_one_confusion_matrix_over_all_pictures():
    module = module_of(1).eval()
    batches = [batch_of(seed=seed) for seed in range(2)]
    records, expected = {}, np.zeros((4, 4), int)
    with torch.no_grad():
        for batch in batches:
            records |= module.evaluate(batch)
            guess = module.method.predict(module.net.full_logits(batch.images))
            for truth, found in zip(batch.labels.flatten().tolist(), guess.flatten().tolist(), strict=True):
                if truth != 255:
                    expected[truth, found] += 1
    metrics = module.metrics(records)
    assert (module.confusion == expected).all()
    report = segmentation_report(expected, 2, 1)
    assert metrics == {f"miou_{name}": report[name] for name in ("old", "all", "new", "harmonic")}


def test_step_0_has_no_new_classes_and_joint_training_has_all():
    assert set(module_of(0).eval().metrics({})) == {"miou_old", "miou_all"}
    joint = module_of(0)
    joint.net.add_head(2)
    joint.base = 2
    assert set(joint.metrics({})) == {"miou_old", "miou_all", "miou_new", "miou_harmonic"}


@pytest.mark.parametrize("method", ["ft", "mib"])
def test_prediction_follows_the_method(method):
    """Sigmoid methods leave channel 0 alone and need more than 0.5; softmax methods take the largest of all."""
    module = module_of(1, method).eval()
    batch = batch_of()
    with torch.no_grad():
        logits = module.net.full_logits(batch.images)
        module.net.heads[0].bias += 100.0
        raised = module.method.predict(module.net.full_logits(batch.images))
        before = module.method.predict(logits)
    if method == "mib":
        assert not raised.any()
        assert torch.equal(before, logits.argmax(1))
    else:
        assert torch.equal(raised, before)
        assert torch.equal(before > 0, logits[:, 1:].max(1).values > 0)


# ------------------------------------------------------------------ on Lightning


def test_checkpoints_say_what_they_belong_to_and_keep_the_last_validation():
    module = module_of(1, meta={"task": "2-1"})
    module.val_metrics = {"val/miou_all": 12.5}
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"css": {"task": "2-1"}, "css_val": {"val/miou_all": 12.5}}
    other = module_of(1)
    other.on_load_checkpoint(checkpoint)
    assert other.val_metrics == {"val/miou_all": 12.5}
    other.on_load_checkpoint({})
    assert other.val_metrics == {}


def loader_of(*seeds):
    return DataLoader([batch_of(seed=seed) for seed in seeds], batch_size=None)


class Data(L.LightningDataModule):
    """Two batches of each kind; counts how often all pictures are looked at before a step."""

    looked = 0

    def train_dataloader(self):
        return loader_of(1, 2)

    def val_dataloader(self):
        return loader_of(3)

    def test_dataloader(self):
        return loader_of(4, 5)

    def plain_batches(self):
        self.looked += 1
        return iter([batch_of(seed=1)])


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec.*")
def test_a_fit_and_a_test(tmp_path):
    seen = []

    def after(module):
        seen.append((module.confusion.sum(), len(module.records)))
        return {"forgetting": 4.0}

    module = module_of(1, after_test=after)
    module.total_steps = None
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    data, asked = Data(), []
    module.method.prepare = lambda ctx, batches: asked.extend(batches)
    old = {name: value.clone() for name, value in module.ctx.old.state_dict().items()}
    trainer.fit(module, datamodule=data)
    assert data.looked == len(asked) == 1, "the pictures are read only where the method asks for them"
    assert module.fitted_steps == 6
    assert set(module.val_metrics) == {"val/miou_old", "val/miou_all", "val/miou_new", "val/miou_harmonic"}
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert all(torch.equal(module.ctx.old.state_dict()[name], value) for name, value in old.items())
    trainer.test(module, datamodule=data, verbose=False)
    assert seen == [(6 * 15 * 16, 6)]
    assert module.last_metrics["test/forgetting"] == 4.0
    assert module.last_metrics["task"] == 1.0
    assert module.fitted_steps == 6
    assert module.val_metrics.keys() == {"val/miou_old", "val/miou_all", "val/miou_new", "val/miou_harmonic"}
