"""SSUL, DKD, image replay and their variants with memory: degenerate cases and what their parts promise."""

import pytest
import torch
from css.data.batch import Batch
from css.methods import METHODS
from css.methods.base import StepContext
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from css.ops.decomposed import classwise_bce, decompose, distil_binary
from hypothesis import given, settings
from hypothesis import strategies as st


def _context(method, step=1):
    torch.manual_seed(0)
    net = CSSNet(
        TinyExtractor(4), [2], detach_background=method.detach_background, head=method.head, unknown=method.unknown
    )
    ctx = StepContext(0, net, 0, 2)
    for t in range(1, step + 1):
        old = net.frozen_copy()
        net.add_head(1)
        ctx = StepContext(t, net, 1 + t, 1, old)
        method.init_new_head(ctx)
        net.freeze_norm()
    return ctx


def _batch(labels, saliency=None, seed=0):
    images = torch.randn(len(labels), 3, *labels.shape[1:], generator=torch.Generator().manual_seed(seed))
    return Batch([""] * len(labels), images, labels, saliency, torch.zeros(len(labels), dtype=torch.bool))


def _labels(channel=3, size=16):
    labels = torch.zeros(2, size, size, dtype=torch.long)
    labels[0, 4:12, 4:12] = channel
    labels[:, 0] = 255
    return labels


def _loss(method, ctx, batch):
    return method.loss(ctx, batch, torch.Generator())[0]


# ------------------------------------------------------------------ variants with memory


@pytest.mark.parametrize(("with_memory", "plain"), [("replay", "pl"), ("ssul_m", "ssul"), ("dkd_m", "dkd")])
def test_a_memory_changes_the_pictures_and_not_the_loss(with_memory, plain):
    a, b = METHODS.create(with_memory), METHODS.create(plain)
    assert (a.uses_memory(), b.uses_memory()) == (True, False)
    batch = _batch(_labels(), torch.rand(2, 16, 16) < 0.5)
    assert torch.equal(_loss(a, _context(a), batch), _loss(b, _context(b), batch))


@pytest.mark.parametrize("name", ["replay", "ssul_m", "dkd_m"])
def test_labels_of_old_classes_in_stored_pictures(name):
    method = METHODS.create(name)
    ctx = _context(method)
    known, unknown = (_loss(method, ctx, _batch(_labels(channel))) for channel in (1, 0))
    assert torch.isfinite(known)
    if name == "dkd_m":  # an old class is a negative for new ones, as background is
        assert torch.equal(known, unknown)
    else:
        assert not torch.equal(known, unknown)


@pytest.mark.parametrize("name", ["joint", "replay"])
def test_fine_tuning_is_what_is_left(name):
    method, plain = METHODS.create(name), METHODS.create("ft")
    options = {"threshold": 1.1} if name == "replay" else {}
    method = METHODS.create(name, **options)
    batch = _batch(_labels())
    assert torch.equal(_loss(method, _context(method), batch), _loss(plain, _context(plain), batch))


# ------------------------------------------------------------------ SSUL


def _step(method, ctx, batch):
    """One large optimizer step with the method's rates; names of the parameters that moved, with how far."""
    factors = method.trainable(ctx)
    before = {name: p.detach().clone() for name, p in ctx.net.named_parameters()}
    groups = [
        {"params": [p], "lr": factors.get(p, 1.0)}
        for p in ctx.net.parameters()
        if p.requires_grad and factors.get(p, 1.0) > 0
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    _loss(method, ctx, batch).backward()
    optimizer.step()
    return {n: (p - before[n]).abs().max().item() for n, p in ctx.net.named_parameters() if not p.equal(before[n])}


def test_ssul_trains_the_newest_head_unknown_and_a_little_of_the_background():
    method = METHODS.create("ssul")
    ctx = _context(method, step=2)
    labels = _labels(4)
    moved = _step(method, ctx, _batch(labels, (labels == 0) & (torch.rand(2, 16, 16) < 0.5)))
    families = {name.rsplit(".", 2)[0] for name in moved}
    assert families == {"heads.0", "heads.3", "unknown"}
    largest = {family: max(v for n, v in moved.items() if n.startswith(family)) for family in families}
    assert 0 < largest["heads.0"] < 1e-3 * largest["heads.3"]


def test_ssul_without_background_rate_freezes_it():
    method = METHODS.create("ssul", background_factor=0.0)
    ctx = _context(method)
    factors = method.trainable(ctx)
    assert all(factors[p] == 0 for p in ctx.net.heads[0].parameters())
    assert not any(p in factors for p in ctx.net.heads[-1].parameters())


def test_new_classes_of_ssul_start_as_unknown():
    method = METHODS.create("ssul")
    ctx = _context(method)
    ctx.net.eval()
    output = ctx.net(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(output.logits[:, -1:], output.unknown)


def test_ssul_without_saliency_teaches_unknown_to_be_off():
    method = METHODS.create("ssul")
    ctx, labels = _context(method), _labels()
    nothing = torch.zeros_like(labels, dtype=torch.bool)
    assert torch.equal(_loss(method, ctx, _batch(labels)), _loss(method, ctx, _batch(labels, nothing)))
    bias = ctx.net.unknown[-1].bias
    (gradient,) = torch.autograd.grad(_loss(method, ctx, _batch(labels)), bias)
    assert gradient > 0, "descent lowers it"


def test_saliency_matters_on_background_alone():
    method = METHODS.create("ssul")
    ctx, labels = _context(method, step=0), _labels(2)
    salient = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = _loss(method, ctx, _batch(labels, salient))
    assert torch.equal(plain, _loss(method, ctx, _batch(labels, salient | (labels != 0))))
    assert not torch.equal(plain, _loss(method, ctx, _batch(labels, ~salient)))


def test_what_the_old_network_calls_unknown_is_no_pseudo_label():
    method = METHODS.create("ssul", threshold=0.0)
    ctx, batch = _context(method), _batch(torch.zeros(2, 16, 16, dtype=torch.long))
    with torch.no_grad():
        ctx.old.heads[1][-1].bias[0] = 50.0
        certain = _loss(method, ctx, batch)
        ctx.old.unknown[-1].bias[0] = 100.0
        hidden = _loss(method, ctx, batch)
    never = _loss(METHODS.create("ssul", threshold=1.1), ctx, batch)
    assert torch.equal(hidden, never)
    assert not torch.equal(certain, never)


# ------------------------------------------------------------------ DKD


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), classes=st.integers(1, 4), width=st.integers(1, 6))
def test_reasons_add_up_to_the_logit(seed, classes, width):
    draw = torch.Generator().manual_seed(seed)
    feature = torch.randn(2, width, 3, 3, generator=draw, dtype=torch.float64).relu()
    weight = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    positive, negative = decompose(feature, weight)
    torch.testing.assert_close(positive + negative, torch.einsum("bdhw,cd->bchw", feature, weight))
    assert positive.min() >= 0
    assert negative.max() <= 0


def test_distillation_is_at_its_minimum_where_both_agree():
    old = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    new = old.clone().requires_grad_()
    least = distil_binary(new, old)
    least.backward()
    assert new.grad.abs().max() < 1e-12
    assert distil_binary(old + 0.1, old) > least
    assert distil_binary(old - 0.1, old) > least


def test_bce_of_no_pixel_is_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = classwise_bce(logits, torch.zeros_like(logits), valid=torch.zeros(2, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_dkd_at_the_start_pulls_at_new_classes_alone():
    """Old and new network agree on old classes then, so that their heads get no gradient."""
    method = METHODS.create("dkd")
    ctx = _context(method)
    _loss(method, ctx, _batch(_labels())).backward()
    assert ctx.net.heads[1].weight.grad.abs().max() < 1e-6
    assert ctx.net.heads[2].weight.grad.abs().max() > 1e-3
    assert ctx.net.heads[0].weight.grad.abs().max() > 1e-4


def test_terms_of_dkd_can_be_switched_off():
    off = {"logits": 0.0, "positive": 0.0, "negative": 0.0, "auxiliary": 0.0}
    method = METHODS.create("dkd", **off)
    ctx, batch = _context(method), _batch(_labels())
    loss, terms = method.loss(ctx, batch, torch.Generator())
    assert set(terms) == {"bce"}
    assert torch.equal(loss, terms["bce"])
    one = METHODS.create("dkd", **{**off, "positive": 2.0})
    found, terms = one.loss(ctx, batch, torch.Generator())
    assert set(terms) == {"bce", "pos"}
    torch.testing.assert_close(found, loss + 2 * terms["pos"])


def test_auxiliary_unit_does_not_shape_features():
    method = METHODS.create("dkd", auxiliary=1000.0)
    quiet = METHODS.create("dkd", auxiliary=0.0)
    gradients = []
    for m in (method, quiet):
        ctx = _context(m, step=0)
        _loss(m, ctx, _batch(_labels(2))).backward()
        gradients.append([p.grad.clone() for p in ctx.net.extractor.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
