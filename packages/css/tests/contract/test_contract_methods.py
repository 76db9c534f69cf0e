"""What every method of the table keeps to, on tiny networks."""

import hashlib

import numpy as np
import pytest
import torch
from css.data.batch import Batch
from css.methods import METHODS
from css.methods.base import StepContext
from css.models.base import FeatureExtractor, Features
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from css.ops.labels import one_hot
from css.ops.losses import soft_binary_loss
from css.task import Task
from torch import nn
from torch.nn import functional as F

NAMES = METHODS.names()
TASK = Task("2-1", 4)
WITHOUT_DISTILLATION = {
    "eir": {"w_kd": 0.0},
    "mib": {"distillation": 0.0},
    "plop": {"pod": 0.0},
    "dkd": {"logits": 0.0, "positive": 0.0, "negative": 0.0},
    "dkd_m": {"logits": 0.0, "positive": 0.0, "negative": 0.0},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Pointwise(FeatureExtractor):
    """No pixel sees another one."""

    stride = 1

    def __init__(self, width=6):
        super().__init__()
        self.out_channels = width
        self.first, self.second = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        stage = self.second(F.relu(self.first(x)))
        return Features(F.relu(stage), [stage])

    def backbone_parameters(self):
        return self.parameters()

    def neck_parameters(self):
        return iter(())


def _context(method, step, extractor=None, task=TASK):
    """Networks of a step as the steps make them: a frozen copy, a new head with its start values, frozen statistics."""
    channels = [len(task.channels(t)) for t in range(step + 1)]
    net = CSSNet(
        extractor or TinyExtractor(4),
        channels[:1],
        detach_background=method.detach_background,
        head="linear" if isinstance(extractor, Pointwise) else method.head,
        unknown=method.unknown,
    )
    ctx = StepContext(0, net, 0, channels[0])
    for t in range(1, step + 1):
        old = net.frozen_copy()
        net.add_head(channels[t])
        ctx = StepContext(t, net, task.num_old(t), channels[t], old)
        method.init_new_head(ctx)
        if method.freeze_norm:
            net.freeze_norm()
    net.train()
    return ctx


def _batch(labels, images=None, seed=0):
    count, height, width = labels.shape
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, generator=draw) if images is None else images
    saliency = torch.rand(labels.shape, generator=draw) < 0.3
    return Batch([str(i) for i in range(count)], images, labels, saliency, torch.zeros(count, dtype=torch.bool))


def _labels(step, count=2, size=16, seed=0, task=TASK):
    """Blocks of background and of the step's classes; some pixels ignored."""
    rng = np.random.default_rng(seed)
    own = np.array([0, *task.channels(step)])
    labels = own[rng.integers(0, len(own), (count, size // 4, size // 4))].repeat(4, 1).repeat(4, 2)
    labels[:, 5:8, :6] = 255
    return torch.from_numpy(labels)


def _ready(name, step, labels=None, extractor=None, **options):
    method = METHODS.create(name, **options)
    ctx = _context(method, step, extractor)
    batch = _batch(_labels(step) if labels is None else labels)
    method.prepare(ctx, [batch])
    return method, ctx, batch


def _loss(method, ctx, batch, seed=3):
    return method.loss(ctx, batch, torch.Generator().manual_seed(seed))


def _digest(module):
    state = b"".join(v.numpy().tobytes() for v in module.state_dict().values())
    return hashlib.sha256(state).hexdigest()


# ------------------------------------------------------------------ step 0


def _plain(name, method, net, batch):
    """Training that knows of no steps, written out."""
    output = net(batch.images)
    size = batch.images.shape[-2:]
    logits = net.upsample(output.logits, size)
    if method.softmax:
        return F.cross_entropy(logits, batch.labels, ignore_index=255, reduction="none").mean()
    target = one_hot(batch.labels, logits.shape[1])
    if name.startswith("dkd"):
        target[:, 0] = 0
        weight = torch.tensor([1.0, 2.0, 2.0])[:, None, None]
        losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        return losses.sum(1)[batch.labels != 255].mean()
    if method.unknown:
        hidden = batch.saliency & (batch.labels == 0)
        target[:, 0][hidden] = 0
        target = torch.cat([target, hidden[:, None]], 1)
        logits = torch.cat([logits, net.upsample(output.unknown, size)], 1)
    return soft_binary_loss(logits, target)


@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_plain_training(name):
    method, ctx, batch = _ready(name, 0)
    assert ctx.old is None
    loss, _ = _loss(method, ctx, batch)
    torch.testing.assert_close(loss, _plain(name, method, ctx.net, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_step_0_gives_every_parameter_its_own_rate(name):
    method, ctx, _ = _ready(name, 0)
    assert method.trainable(ctx) == {}


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_no_future_label_reaches_the_loss(name, step):
    masks = torch.from_numpy(np.random.default_rng(4).integers(0, 5, (2, 4, 4)).repeat(4, 1).repeat(4, 2))
    future = masks > TASK.channels(step)[-1]
    assert future.any()
    table = torch.from_numpy(TASK.train_lut(step)).long()
    losses = []
    for shown in (masks, masks.masked_fill(future, 0)):
        torch.manual_seed(1)
        method, ctx, batch = _ready(name, step, labels=table[shown])
        assert set(batch.labels.unique().tolist()) <= {0, *TASK.channels(step)}
        losses.append(_loss(method, ctx, batch)[0])
    assert torch.equal(*losses)
    # and the labels do matter where they are shown
    method, ctx, other = _ready(name, step, labels=table[masks].roll(5, 2))
    assert not torch.equal(_loss(method, ctx, other)[0], losses[0])


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_change_nothing(name, step):
    """Whatever they show, the loss is the same. Distillation looks at all pixels, so it is switched off here."""
    method, ctx, batch = _ready(name, step, extractor=Pointwise(), **WITHOUT_DISTILLATION.get(name, {}))
    ignored = batch.labels == 255
    assert ignored.any()
    other = batch.images + 5 * ignored[:, None]
    method.prepare(ctx, [batch])
    found = []
    for images in (batch.images, other):
        batch.images = images.clone().requires_grad_()
        loss, _ = _loss(method, ctx, batch)
        loss.backward()
        found.append(loss)
        assert not batch.images.grad[ignored[:, None].expand_as(images)].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_label_is_finite(name, step):
    method, ctx, batch = _ready(name, step, labels=torch.full((2, 16, 16), 255))
    loss, _ = _loss(method, ctx, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in ctx.net.parameters() if p.grad is not None)


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize("name", NAMES)
def test_old_network_and_inputs_stay_as_they_are(name):
    method, ctx, batch = _ready(name, 1)
    before, norms = _digest(ctx.old), _buffers(ctx.net)
    images, labels, saliency = batch.images.clone(), batch.labels.clone(), batch.saliency.clone()
    random_state = torch.get_rng_state()
    trained = _optimizer(method, ctx)
    for _ in range(3):
        loss, _ = _loss(method, ctx, batch)
        trained.zero_grad()
        loss.backward()
        trained.step()
    assert _digest(ctx.old) == before
    assert all(p.grad is None for p in ctx.old.parameters())
    assert not ctx.old.training
    assert norms
    assert all(torch.equal(a, b) for a, b in zip(norms, _buffers(ctx.net), strict=True))
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.labels, labels)
    assert torch.equal(batch.saliency, saliency)
    assert torch.equal(torch.get_rng_state(), random_state), "draws come from the generator that is given"
    assert _digest(ctx.net) != _digest(_context(method, 1).net)


def _buffers(net):
    return [b.clone() for b in net.buffers()]


def _optimizer(method, ctx, lr=1e-2):
    factors = method.trainable(ctx)
    groups = [
        {"params": [p], "lr": lr * factors.get(p, 1.0)}
        for p in ctx.net.parameters()
        if p.requires_grad and factors.get(p, 1.0) > 0
    ]
    return torch.optim.Adam(groups, lr=lr)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_function_of_its_arguments(name):
    method, ctx, batch = _ready(name, 1)
    first, terms = _loss(method, ctx, batch)
    second, again = _loss(method, ctx, batch)
    assert torch.equal(first, second)
    assert first.shape == ()
    assert first.requires_grad
    assert terms
    assert all(torch.equal(terms[key], again[key]) and not terms[key].requires_grad for key in terms)
    assert all(term.shape == () for term in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_new_heads_leave_the_logits_of_old_classes(name):
    """Old classes are the same to the bit; MiB's and PLOP's background gives a share of its bias away."""
    method, ctx, batch = _ready(name, 1)
    ctx.net.eval()
    with torch.no_grad():
        new, old = ctx.net(batch.images).logits, ctx.old(batch.images).logits
    start = 1 if method.softmax else 0
    assert torch.equal(new[:, start : old.shape[1]], old[:, start:])
    if method.softmax:
        mass = new.softmax(1)[:, [0, *range(old.shape[1], new.shape[1])]].sum(1)
        torch.testing.assert_close(mass, old.softmax(1)[:, 0])


# ------------------------------------------------------------------ sizes and precision


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_in_bfloat16(name, scale, step):
    method, ctx, batch = _ready(name, step)
    batch.images *= scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = _loss(method, ctx, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(term) for term in terms.values())
    grads = {n: p.grad for n, p in ctx.net.named_parameters() if p.grad is not None}
    assert grads
    assert not [n for n, grad in grads.items() if not torch.isfinite(grad).all()]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_batch_of_one(name, step):
    method, ctx, batch = _ready(name, step, labels=_labels(step, count=1, size=20)[:, :12])
    loss, _ = _loss(method, ctx, batch)
    loss.backward()
    assert torch.isfinite(loss)
    predicted = method.predict(ctx.net.full_logits(batch.images))
    assert predicted.shape == batch.labels.shape
    assert predicted.dtype == torch.int64
    assert 0 <= predicted.min() <= predicted.max() < ctx.net.num_channels


@pytest.mark.parametrize("name", NAMES)
def test_several_new_classes(name):
    task = Task("2-2", 6)
    method = METHODS.create(name)
    ctx = _context(method, 2, task=task)
    batch = _batch(_labels(2, task=task))
    method.prepare(ctx, [batch])
    loss, _ = _loss(method, ctx, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in ctx.net.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in ctx.net.heads[-1].parameters())


# ------------------------------------------------------------------ it learns


def _coloured(masks, seed=0):
    """Pictures in which each class has a colour of its own."""
    colours = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
    noise = 0.1 * torch.randn(*masks.shape, 3, generator=torch.Generator().manual_seed(seed))
    return (colours[masks] + noise).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_overfits_one_batch_in_both_steps(name):
    """Old and later classes are in the pictures, unlabelled; the classes of the step are learnt all the same."""
    method = METHODS.create(name)
    ctx = _context(method, 0, TinyExtractor(8, stride=2))
    masks = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (2, 6, 6)).repeat(4, 1).repeat(4, 2))
    for step in (0, 1):
        batch = _batch(torch.from_numpy(TASK.train_lut(step)).long()[masks], _coloured(masks))
        batch.saliency = None
        if step:
            old = ctx.net.frozen_copy()
            ctx.net.add_head(1)
            ctx = StepContext(1, ctx.net, 2, 1, old)
            method.init_new_head(ctx)
            ctx.net.freeze_norm()
        method.prepare(ctx, [batch])
        losses = _fit(method, ctx, batch, steps=100)
        assert losses[-1] < losses[0]
        ctx.net.eval()
        predicted = method.predict(ctx.net.full_logits(batch.images))
        found = [_iou(predicted, masks, channel) for channel in TASK.channels(step)]
        assert min(found) > 0.8, (step, found, losses[0], losses[-1])
        old_classes = [_iou(predicted, masks, channel) for channel in (1, 2)]
        # Fine-tuning (and joint training, which has no later step) is told that old classes are background.
        forgets = step == 1 and name in ("ft", "joint")
        assert max(old_classes) < 0.5 if forgets else min(old_classes) > 0.9
        ctx.net.train()


def _fit(method, ctx, batch, steps):
    optimizer, losses = _optimizer(method, ctx), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss, _ = method.loss(ctx, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _iou(predicted, masks, channel):
    a, b = predicted == channel, masks == channel
    return ((a & b).sum() / (a | b).sum()).item()
