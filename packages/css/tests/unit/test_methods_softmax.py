"""MiB and PLOP: degenerate cases, thresholds, and what their parts promise."""

import pytest
import torch
from css.data.batch import Batch
from css.methods import METHODS
from css.methods.base import StepContext
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from css.ops.entropy import entropy_histogram, median_thresholds, normalised_entropy
from css.ops.pod import local_pod, pod_distance
from css.ops.softmax import softmax_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch.nn import functional as F


def _context(method, new=1):
    torch.manual_seed(0)
    net = CSSNet(TinyExtractor(4), [2], detach_background=False)
    old = net.frozen_copy()
    net.add_head(new)
    ctx = StepContext(1, net, 2, new, old)
    method.init_new_head(ctx)
    net.freeze_norm()
    return ctx


def _batch(labels, seed=0):
    images = torch.randn(len(labels), 3, *labels.shape[1:], generator=torch.Generator().manual_seed(seed))
    return Batch([""] * len(labels), images, labels, None, torch.zeros(len(labels), dtype=torch.bool))


def _labels(size=16):
    labels = torch.zeros(2, size, size, dtype=torch.long)
    labels[0, 4:12, 4:12] = 3
    labels[:, 0] = 255
    return labels


# ------------------------------------------------------------------ cross-entropy


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), channels=st.integers(2, 7), data=st.data())
def test_merged_background_is_the_softmax_of_merged_logits(seed, channels, data):
    background = data.draw(st.integers(1, channels))
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, channels, 3, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, channels, (2, 3, 4), generator=draw)
    merged = torch.cat([logits[:, :background].logsumexp(1, keepdim=True), logits[:, background:]], 1)
    found = softmax_loss(logits, labels, background)
    torch.testing.assert_close(found, F.cross_entropy(merged, (labels - background + 1).clamp(min=0)))
    assert found >= 0
    assert found <= softmax_loss(logits, labels) + 1e-12, "old labels ask for no more than their share of the mass"


def test_old_labels_count_as_background():
    logits = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1], [2, 255]]])
    loss = softmax_loss(logits, labels, background=3)
    torch.testing.assert_close(loss, softmax_loss(logits, labels.masked_fill(labels < 3, 0), background=3))
    loss.backward()
    assert not logits.grad[..., 1, 1].any()


def test_large_logits_in_half_precision_stay_finite():
    logits = torch.tensor([300.0, -300.0, 250.0, 300.0]).bfloat16()[None, :, None, None].requires_grad_()
    for label in (0, 3, 255):
        loss = softmax_loss(logits, torch.tensor([[[label]]]), background=2)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------ MiB


def test_mib_without_distillation_is_its_cross_entropy():
    method = METHODS.create("mib", distillation=0.0)
    ctx, batch = _context(method), _batch(_labels())
    loss, terms = method.loss(ctx, batch, torch.Generator())
    assert torch.equal(loss, softmax_loss(ctx.net.full_logits(batch.images), batch.labels, 3))
    assert set(terms) == {"ce"}


def test_mib_at_the_start_agrees_with_the_old_network():
    """The new heads take their mass from the background, so that the distillation has no slope but in the background.

    Summed up as MiB does, old and new network agree exactly: the gradient of the distillation is that of a minimum.
    """
    method = METHODS.create("mib", distillation=1.0)
    ctx, batch = _context(method, new=2), _batch(torch.full((2, 16, 16), 255))
    loss, _ = method.loss(ctx, batch, torch.Generator())
    loss.backward()
    largest = max(p.grad.abs().max().item() for p in ctx.net.parameters() if p.grad is not None)
    assert largest < 1e-6


# ------------------------------------------------------------------ PLOP


def test_thresholds_come_from_one_pass_over_the_background():
    method = METHODS.create("plop")
    ctx = _context(method)
    batches = [_batch(_labels(), seed) for seed in range(3)]
    passes = []
    method.prepare(ctx, (passes.append(1) or batch for batch in batches))
    assert len(passes) == 3
    first = method.thresholds.clone()
    assert first.shape == (3,)
    joined = Batch(
        [""] * 6,
        torch.cat([b.images for b in batches]),
        torch.cat([b.labels for b in batches]),
        None,
        torch.zeros(6, dtype=torch.bool),
    )
    method.prepare(ctx, [joined])
    assert torch.equal(method.thresholds, first), "however the pictures are batched"
    logits = ctx.old.full_logits(joined.images)
    for label, same in ((3, True), (255, True), (0, False)):
        changed = torch.where((joined.labels == label)[:, None], 9 * torch.randn_like(logits), logits)
        ctx.old.full_logits = lambda images, changed=changed: changed
        method.prepare(ctx, [joined])
        assert torch.equal(method.thresholds, first) == same, "only what is background in the labels is looked at"


def test_step_0_reads_no_pictures():
    method = METHODS.create("plop")
    net = CSSNet(TinyExtractor(4), [2])

    def pictures():
        pytest.fail("pictures were read")
        yield

    method.prepare(StepContext(0, net, 0, 2), pictures())
    assert method.thresholds is None


def test_a_later_step_needs_thresholds():
    method = METHODS.create("plop")
    ctx = _context(method)
    with pytest.raises(RuntimeError, match="prepare"):
        method.loss(ctx, _batch(_labels()), torch.Generator())


def test_without_sure_pixels_only_new_classes_are_left():
    method = METHODS.create("plop", pod=0.0)
    ctx, batch = _context(method), _batch(_labels())
    method.thresholds = torch.zeros(3)
    loss, _ = method.loss(ctx, batch, torch.Generator())
    assert loss == 0, "no background was kept, so that each picture's factor is 0"
    batch.labels = torch.full((2, 16, 16), 3)
    loss, _ = method.loss(ctx, batch, torch.Generator())
    want = softmax_loss(ctx.net.full_logits(batch.images), batch.labels)
    torch.testing.assert_close(loss, want, msg="without any background the factor is 1")


def test_pod_is_zero_with_zero_gradient_where_both_agree():
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    distance = pod_distance(x, x.detach())
    distance.backward()
    assert distance == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_pod_leaves_out_scales_that_do_not_fit():
    x = torch.randn(2, 3, 3, 8)
    assert torch.equal(local_pod(x, (1, 2, 4)), local_pod(x, (1, 2)))


@pytest.mark.parametrize("options", [{"bins": 0}, {"scales": []}, {"scales": [0, 1]}])
def test_options_of_plop(options):
    with pytest.raises(UserError, match="bin"):
        METHODS.create("plop", **options)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), bins=st.integers(1, 50))
def test_about_half_of_the_histogram_lies_below_the_median(seed, bins):
    draw = torch.Generator().manual_seed(seed)
    entropy, classes = normalised_entropy(3 * torch.randn(1, 3, 9, 9, generator=draw))
    assert 0 <= entropy.min() <= entropy.max() <= 1 + 1e-6
    histogram = entropy_histogram(entropy, classes, torch.ones_like(classes, dtype=torch.bool), 3, bins)
    thresholds = median_thresholds(histogram, 0.0)
    for row, threshold in zip(histogram, thresholds, strict=True):
        if row.sum():
            inside = min(int(threshold * bins - 1e-9), bins - 1)
            assert row[:inside].sum() <= row.sum() / 2 <= row[: inside + 1].sum() + 1e-9
