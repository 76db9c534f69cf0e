"""Whole losses of the rivals against slow float64 references, on networks that return given tensors."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from css.data.batch import Batch
from css.methods import METHODS
from css.methods.base import StepContext
from css.models.base import Output
from css.models.network import CSSNet
from torch import nn

_spec = importlib.util.spec_from_file_location("css_rivals_reference", Path(__file__).with_name("_rivals_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SIZE, OLD, NEW, WIDTH = (8, 10), 2, 2, 4


class Given(nn.Module):
    """A network with given outputs at half the resolution of the image."""

    upsample = staticmethod(CSSNet.upsample)
    full_logits = CSSNet.full_logits

    def __init__(self, seed, channels):
        super().__init__()
        rng = np.random.default_rng(seed)
        half = (SIZE[0] // 2, SIZE[1] // 2)
        self.num_channels = channels
        self.logits, self.unknown, self.feature, *self.stages = (
            nn.Parameter(torch.from_numpy(rng.normal(size=(2, count, *shape)) * scale))
            for count, shape, scale in (
                (channels, half, 2.5),
                (1, half, 2.5),
                (WIDTH, half, 1.0),
                (3, (7, 9), 1.0),
                (WIDTH, half, 1.0),
            )
        )
        self.rows = nn.Parameter(torch.from_numpy(rng.normal(size=(channels, WIDTH))))

    def forward(self, x):
        return Output(self.logits, self.feature, list(self.stages), self.unknown)

    def class_weights(self):
        return self.rows

    def at_size(self, name="logits"):
        return reference.bilinear(getattr(self, name).detach().numpy(), SIZE)


def _case(step):
    """Context, batch and labels of a step; ignored pixels and a picture without new classes included."""
    rng = np.random.default_rng(20 + step)
    first = 1 + OLD if step else 1
    labels = rng.integers(0, first + NEW, (2, *SIZE))
    labels[labels < first] = 0
    labels[1][labels[1] > first] = 0
    labels[:, 0, :3] = 255
    net = Given(1, first + NEW)
    old = Given(2, first) if step else None
    batch = Batch(
        ["a", "b"], torch.zeros(2, 3, *SIZE), torch.from_numpy(labels), None, torch.zeros(2, dtype=torch.bool)
    )
    return StepContext(step, net, first - 1, NEW, old), batch, labels


def _loss(method, ctx, batch):
    method.prepare(ctx, [batch])
    loss, terms = method.loss(ctx, batch, torch.Generator())
    assert all(math.isfinite(value) for value in terms.values())
    return loss.item()


@pytest.mark.parametrize("name", ["joint", "replay"])
@pytest.mark.parametrize("step", [0, 1])
def test_joint_and_replay(name, step):
    ctx, batch, labels = _case(step)
    if name == "replay" and step:
        labels = reference.sure_labels(labels, ctx.old.at_size(), 0.6)
    options = {"threshold": 0.6} if name == "replay" else {}
    want = reference.binary(ctx.net.at_size(), labels)
    assert _loss(METHODS.create(name, **options), ctx, batch) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_mib(step, weight):
    ctx, batch, labels = _case(step)
    new = ctx.net.at_size()
    want = reference.cross_entropy(new, labels, 1 + ctx.num_old)
    if step:
        want += weight * reference.unbiased_distillation(new, ctx.old.at_size())
    assert _loss(METHODS.create("mib", distillation=weight), ctx, batch) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("pod", [0.0, 0.01])
def test_plop(step, pod):
    ctx, batch, labels = _case(step)
    if not step:
        want = reference.cross_entropy(ctx.net.at_size(), labels)
    else:
        old = ctx.old.at_size()
        thresholds = reference.medians(reference.background_samples(old, labels), 1 + OLD, 100, 0.001)
        completed, factor = reference.entropy_labels(labels, old, thresholds)
        assert set(np.unique(completed)) > {0, 255}
        want = reference.cross_entropy(ctx.net.at_size(), completed, factor=factor)
        stages = [
            pod * reference.pod(a.detach().numpy(), b.detach().numpy())
            for a, b in zip(ctx.net.stages, ctx.old.stages, strict=True)
        ]
        small = reference.folded(ctx.net.logits.detach().numpy(), 1 + OLD)
        stages.append(0.003 * reference.pod(small, ctx.old.logits.detach().numpy()))
        if pod:
            want += sum(stages) / len(stages) * math.sqrt((1 + OLD + NEW) / NEW)
    method = METHODS.create("plop", pod=pod, pod_logits=0.003)
    assert _loss(method, ctx, batch) == pytest.approx(want, abs=1e-7)  # the share of kept pixels is float32


@pytest.mark.parametrize("name", ["ssul", "ssul_m"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("salient", [False, True])
def test_ssul(name, step, salient):
    ctx, batch, labels = _case(step)
    saliency = np.random.default_rng(5).random(labels.shape) < 0.5 if salient else None
    batch.saliency = None if saliency is None else torch.from_numpy(saliency)
    if step:
        labels = reference.sure_labels(labels, ctx.old.at_size(), 0.6, ctx.old.at_size("unknown"))
    want = reference.binary(ctx.net.at_size(), labels, saliency, ctx.net.at_size("unknown"))
    assert _loss(METHODS.create(name, threshold=0.6), ctx, batch) == pytest.approx(want, abs=1e-9)


WEIGHTS = {"logits": 5.0, "positive": 3.0, "negative": 2.0, "auxiliary": 0.7}


@pytest.mark.parametrize("name", ["dkd", "dkd_m"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("off", [None, "logits", "positive", "negative", "auxiliary"])
def test_dkd(name, step, off):
    ctx, batch, labels = _case(step)
    weights = WEIGHTS | ({off: 0.0} if off else {})
    method = METHODS.create(name, pos_weight=2.0, later_pos_weight=1.5, **weights)
    new, first, valid = ctx.net.at_size(), 1 + ctx.num_old, labels != 255
    target = reference.own_targets(labels, first, NEW)
    want = reference.by_class(new[:, first:], target, 1.5 if step else 2.0, valid)
    want += weights["auxiliary"] * reference.by_class(new[:, :1], np.zeros_like(new[:, :1]), valid=valid)
    if step:
        old = ctx.old.at_size()
        want += weights["logits"] * reference.by_class(new[:, 1:first], reference.soft(old[:, 1:]))
        parts, old_parts = (
            reference.reasoning(net.feature.detach().numpy(), net.rows.detach().numpy()[1:first])
            for net in (ctx.net, ctx.old)
        )
        for key, part, old_part in zip(("positive", "negative"), parts, old_parts, strict=True):
            want += weights[key] * reference.by_class(part, reference.soft(old_part))
    assert _loss(method, ctx, batch) == pytest.approx(want, abs=1e-9)
