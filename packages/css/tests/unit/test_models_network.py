"""CSSNet: sizes, gradients, growing, freezing; heads start as their rules say."""

import copy
import math

import numpy as np
import pytest
import torch
from css.models import heads
from css.models.base import FeatureExtractor, Features
from css.models.network import CSSNet
from css.models.tiny import TinyExtractor
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch import nn

STEPS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
KINDS = st.sampled_from(["linear", "ssul"])


class Toy(FeatureExtractor):
    """A convolution, a norm, dropout; every kind of thing that freezing must reach."""

    out_channels, stride = 6, 2

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.GroupNorm(1, 5))
        self.neck = nn.Sequential(nn.Conv2d(5, 6, 1), nn.Dropout(0.5), nn.ReLU())

    def forward(self, x):
        stage = self.body(x)
        return Features(self.neck(stage), [stage])

    def backbone_parameters(self):
        return self.body.parameters()

    def neck_parameters(self):
        return self.neck.parameters()


def images(batch=2, side=12, seed=0):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def make(channels=(2, 1), seed=0, **options):
    torch.manual_seed(seed)
    return CSSNet(Toy(), channels, **options)


@settings(deadline=None, max_examples=20)
@given(channels=STEPS, kind=KINDS, unknown=st.booleans())
def test_sizes_and_names(channels, kind, unknown):
    net = make(channels, head=kind, unknown=unknown).eval()
    total = 1 + sum(channels)
    out = net(images(side=10))
    assert net.channels == tuple(channels)
    assert net.num_channels == total
    assert out.logits.shape == (2, total, 5, 5)
    assert out.feature.shape == (2, 6, 5, 5)
    assert [tuple(s.shape) for s in out.stages] == [(2, 5, 5, 5)]
    assert (out.unknown is not None) == unknown
    assert net.full_logits(images(side=10)).shape == (2, total, 10, 10)
    prefixes = {"extractor", "heads"} | ({"unknown"} if unknown else set())
    assert {name.split(".")[0] for name in net.state_dict()} == prefixes
    assert net.class_weights().shape == (total, 6)


def test_logits_are_heads_in_order_of_steps():
    net = make((2, 3)).eval()
    out = net(images())
    expected = torch.cat([head(out.feature) for head in net.heads], dim=1)
    assert torch.equal(out.logits, expected)
    assert [heads.classifier(head).out_channels for head in net.heads] == [1, 2, 3]


def test_class_weights_give_the_logits_of_linear_heads():
    net = make((2, 3)).eval()
    out = net(images())
    bias = torch.cat([heads.classifier(head).bias for head in net.heads])
    logits = torch.einsum("bdhw,sd->bshw", out.feature, net.class_weights()) + bias[:, None, None]
    assert torch.allclose(logits, out.logits, atol=1e-5)


@pytest.mark.parametrize("channels", [(), (2, 0)])
def test_refuses_steps_without_classes(channels):
    with pytest.raises(ValueError, match="classes of each step"):
        make(channels)
    with pytest.raises(ValueError, match="at least one class"):
        make().add_head(0)


def bilinear(array, height, width):
    """Float64 reference of a resize with corners not aligned: (H, W) -> (height, width)."""
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            weights = []
            for place, size, new in ((i, array.shape[0], height), (j, array.shape[1], width)):
                at = max(0.0, (place + 0.5) * size / new - 0.5)
                low = min(math.floor(at), size - 1)
                high = min(low + 1, size - 1)
                weights.append(((low, 1 - (at - low)), (high, at - low)))
            result[i, j] = sum(wi * wj * array[a, b] for a, wi in weights[0] for b, wj in weights[1])
    return result


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_upsample_is_bilinear_without_aligned_corners(h, w, height, width):
    maps = torch.randn(1, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))
    out = CSSNet.upsample(maps, (height, width))
    for channel in range(2):
        assert np.allclose(out[0, channel].numpy(), bilinear(maps[0, channel].numpy(), height, width), atol=1e-12)


def test_upsample_leaves_maps_of_the_size_alone():
    maps = torch.randn(1, 2, 4, 4)
    assert CSSNet.upsample(maps, torch.Size((4, 4))) is maps


def test_full_logits_follow_the_mode():
    net = make().train()
    before = net.extractor.body[1].running_mean.clone()
    net.full_logits(images())
    assert net.training
    assert not torch.equal(before, net.extractor.body[1].running_mean)
    net.eval()
    assert torch.equal(net.full_logits(images()), net.full_logits(images()))


@pytest.mark.parametrize("detach", [True, False])
def test_background_shapes_features_only_where_it_is_not_detached(detach):
    net = make(detach_background=detach)
    net(images()).logits[:, 0].sum().backward()
    assert (net.extractor.body[0].weight.grad.abs().sum() == 0) == detach
    assert net.heads[0].weight.grad.abs().sum() > 0
    net.zero_grad()
    net(images()).logits[:, 1:].sum().backward()
    assert net.extractor.body[0].weight.grad.abs().sum() > 0


def test_detaching_does_not_change_the_logits():
    a, b = make(detach_background=True).eval(), make(detach_background=False).eval()
    assert torch.equal(a(images()).logits, b(images()).logits)


# --- growing ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(channels=STEPS, new=st.integers(1, 4), kind=KINDS)
def test_old_logits_stay_when_the_head_grows(channels, new, kind):
    net = make(channels, head=kind).eval()
    before = net(images()).logits
    net.add_head(new)
    after = net(images()).logits
    assert net.channels == (*channels, new)
    assert torch.equal(before, after[:, : before.shape[1]])
    assert not net.heads[-1].training


@settings(deadline=None, max_examples=15)
@given(channels=STEPS, new=st.integers(1, 4), kind=KINDS)
def test_a_network_takes_over_the_earlier_one(channels, new, kind):
    earlier = make(channels, seed=1, head=kind, unknown=True).eval()
    net = make((*channels, new), seed=2, head=kind, unknown=True).eval()
    start = copy.deepcopy(net.heads[-1].state_dict())
    net.load_earlier(earlier.state_dict())
    assert torch.equal(earlier(images()).logits, net(images()).logits[:, : earlier.num_channels])
    assert all(torch.equal(value, start[name]) for name, value in net.heads[-1].state_dict().items())


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: make((3, 1)), "another shape"),
        (lambda: make((2, 1, 1, 1)), "unknown"),
        (lambda: CSSNet(TinyExtractor(3), (2,)), "missing"),
        (lambda: make((2,), unknown=True), "unknown"),
    ],
)
def test_weights_of_another_network_are_refused(build, word):
    net = make((2, 1, 1))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=word):
        net.load_earlier(build().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_new_head_has_type_and_mode_of_the_others():
    net = make(head="ssul").double()
    net.freeze_norm()
    net.add_head(2)
    assert net.heads[-1][0].weight.dtype == torch.float64
    assert not net.heads[-1].training
    assert not any(parameter.requires_grad for parameter in net.heads[-1][1].parameters())


# --- freezing ---------------------------------------------------------------------------------------------------


def test_frozen_norms_keep_their_statistics_and_dropout_is_off():
    net = make(head="ssul", unknown=True)
    net.train()
    net(images())
    net.freeze_norm()
    net.train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    first = net(images()).logits
    assert torch.equal(first, net(images()).logits)  # no dropout, no batch statistics
    assert torch.equal(first, net.eval()(images()).logits)
    net.train()
    assert net.training
    loss = net(images()).logits.square().mean() + net(images()).unknown.square().mean()
    loss.backward()
    optimizer.step()
    norms = ("extractor.body.1.", "extractor.body.3.", "heads.0.1.", "heads.1.1.", "heads.2.1.", "unknown.1.")
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(norms) for name in changed)
    assert {name for name in before if not name.startswith(norms)} == changed


def test_training_mode_is_usual_before_freezing():
    net = make().train()
    assert all(module.training for module in net.modules())
    assert not any(module.training for module in net.eval().modules())


def test_frozen_copy_is_apart_from_its_source():
    net = make().train()
    teacher = net.frozen_copy()
    assert net.training
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net.heads[0].weight.zero_()
    assert teacher.heads[0].weight.abs().sum() > 0


@settings(deadline=None, max_examples=10)
@given(channels=STEPS, kind=KINDS, unknown=st.booleans())
def test_groups_hold_every_parameter_once(channels, kind, unknown):
    net = make(channels, head=kind, unknown=unknown)
    groups = net.parameter_groups()
    assert list(groups) == ["backbone", "neck", "heads", "new_head"]
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    assert {id(p) for p in groups["new_head"]} == {id(p) for p in net.heads[-1].parameters()}
    assert {id(p) for p in groups["backbone"]} == {id(p) for p in net.extractor.body.parameters()}
    in_heads = {id(p) for p in groups["heads"]} | {id(p) for p in groups["new_head"]}
    assert {id(p) for p in net.head_parameters()} == in_heads


# --- how heads start ----------------------------------------------------------------------------------------------


def row(head, k=0):
    last = heads.classifier(head)
    return last.weight[k].flatten().clone(), last.bias[k].clone()


def varied(net):
    """Every parameter and statistic distinct, so that a copy of the wrong one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return net.eval()


@pytest.mark.parametrize("kind", ["linear", "ssul"])
def test_copy_background_makes_new_classes_answer_as_the_background(kind):
    net = varied(make((2, 3), head=kind))
    old = net(images()).logits[:, :3]
    heads.copy_background(net)
    logits = net(images()).logits
    assert torch.equal(logits[:, :3], old)
    # A convolution may add up its channels in different orders, depending on the processor.
    torch.testing.assert_close(logits[:, 3:], logits[:, :1].expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "ssul"])
def test_from_unknown_makes_new_classes_answer_as_unknown(kind):
    net = varied(make((2, 3), head=kind, unknown=True))
    heads.from_unknown(net)
    out = net(images())
    torch.testing.assert_close(out.logits[:, 3:], out.unknown.expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)


def test_from_unknown_needs_that_head():
    with pytest.raises(ValueError, match="unknown=True"):
        heads.from_unknown(make())


@pytest.mark.parametrize("new", [1, 3])
def test_balanced_bias_shares_the_probability_of_the_background(new):
    net = varied(make((2, new)))
    weight, bias = row(net.heads[0])
    before = net(images()).logits[:, :3].softmax(1)
    heads.balanced_bias(net)
    for k in range(new):
        new_weight, new_bias = row(net.heads[-1], k)
        assert torch.equal(new_weight, weight)
        assert torch.allclose(new_bias, bias - math.log(new + 1))
    assert torch.equal(row(net.heads[0])[0], weight)
    assert torch.allclose(row(net.heads[0])[1], bias - math.log(new + 1))
    after = net(images()).logits.softmax(1)
    assert torch.allclose(after[:, 0] + after[:, 3:].sum(1), before[:, 0], atol=1e-6)
    assert torch.allclose(after[:, 1:3], before[:, 1:], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "ssul"])
def test_constant_is_the_same_everywhere(kind):
    net = varied(make((2, 3), head=kind))
    old = net(images()).logits[:, :3]
    heads.constant(net, -4.0)
    logits = net(images()).logits
    assert torch.equal(logits[:, :3], old)
    assert torch.equal(logits[:, 3:], torch.full_like(logits[:, 3:], -4.0))
    heads.constant(net, 1.0, weight=0.5)
    assert torch.equal(heads.classifier(net.heads[-1]).weight, torch.full((3, 6, 1, 1), 0.5))


def test_random_is_a_function_of_its_generator():
    net = make((2, 3))
    others = [copy.deepcopy(head.state_dict()) for head in list(net.heads)[:-1]]
    heads.random(net, -2.0, torch.Generator().manual_seed(5))
    first = row(net.heads[-1])
    heads.random(net, -2.0, torch.Generator().manual_seed(5))
    assert torch.equal(first[0], row(net.heads[-1])[0])
    assert first[1] == -2.0
    for head, before in zip(list(net.heads)[:-1], others, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_heads_start_kaiming_normal_without_bias():
    torch.manual_seed(0)
    head = heads.make_head(256, 200)
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=0.002)
    assert head.bias.abs().sum() == 0


def test_state_survives_a_round_trip_to_the_bit():
    net = varied(make((2, 1), head="ssul", unknown=True))
    other = make((2, 1), seed=9, head="ssul", unknown=True)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images()).logits, other.eval()(images()).logits)
