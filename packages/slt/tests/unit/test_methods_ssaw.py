"""The exact checks of SSAW: degenerate weights, permutations, ranges, narrow types."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slt.methods.concat import Concat
from slt.methods.ssaw import SigmoidSelfAttentionWeighting
from slt.ops.ssaw import sigmoid_attention, softmax_context, split_heads

DIM, HEADS = 8, 2
MODES = [{"mode": "gate"}, {"mode": "gate", "granularity": "token"}, {"mode": "attention"}]


def batch(seed, questions=4, signs=6):
    generator = torch.Generator().manual_seed(seed)
    question = torch.randn(3, questions, DIM, generator=generator, dtype=torch.float64)
    sign = torch.randn(3, signs, DIM, generator=generator, dtype=torch.float64)
    question_mask = torch.tensor([[True] * questions, [True] * 2 + [False] * (questions - 2), [False] * questions])
    sign_mask = torch.tensor([[True] * 3 + [False] * (signs - 3), [True] * signs, [True] * signs])
    return question, question_mask[:, :questions], sign, sign_mask


def module(seed=0, **options):
    torch.manual_seed(seed)
    result = SigmoidSelfAttentionWeighting(DIM, HEADS, **options).double()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return result


def joined(model, question, question_mask, sign, sign_mask):
    tokens = torch.cat([question + model.type_embedding[0], sign + model.type_embedding[1]], dim=1)
    return tokens * torch.cat([question_mask, sign_mask], dim=1)[..., None]


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize(("bias", "factor"), [(0.0, 0.5), (50.0, 1.0)])
def test_constant_gates(granularity, bias, factor):
    model = module(granularity=granularity)
    torch.nn.init.zeros_(model.gate_proj.weight)
    torch.nn.init.constant_(model.gate_proj.bias, bias)
    arrays = batch(0)
    tokens, _, weights = model(*arrays)
    torch.testing.assert_close(tokens, factor * joined(model, *arrays), rtol=0, atol=1e-12)
    assert weights.shape == (3, 10, DIM if granularity == "channel" else 1)


def test_an_open_gate_is_concat():
    model = module()
    torch.nn.init.zeros_(model.gate_proj.weight)
    torch.nn.init.constant_(model.gate_proj.bias, 50.0)
    concat = Concat(DIM).double()
    concat.load_state_dict({"type_embedding": model.type_embedding})
    arrays = batch(1)
    torch.testing.assert_close(model(*arrays)[0], concat(*arrays)[0], rtol=0, atol=1e-12)


def test_scores_of_zero_give_one_over_one_plus_n():
    model = module(mode="attention")
    for layer in (model.q_proj, model.k_proj):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    question, question_mask, sign, sign_mask = batch(2)
    _, mask, weights = model(question, question_mask, sign, sign_mask)
    assert weights.shape == (3, HEADS, 10, 10)
    for i, count in enumerate([7, 8, 6]):
        assert mask[i].sum() == count
        torch.testing.assert_close(
            weights[i], (mask[i].double() / (1 + count)).expand(HEADS, 10, 10), rtol=0, atol=1e-12
        )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(MODES))
def test_permuting_question_tokens_permutes_the_output(seed, options):
    model = module(seed, **options)
    question, question_mask, sign, sign_mask = batch(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    full = torch.cat([order, torch.arange(4, 10)])
    tokens, _, weights = model(question, question_mask, sign, sign_mask)
    moved, mask, moved_weights = model(question[:, order], question_mask[:, order], sign, sign_mask)
    torch.testing.assert_close(moved, tokens[:, full], rtol=0, atol=1e-12)
    if options["mode"] == "gate":
        torch.testing.assert_close(moved_weights, weights[:, full], rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(moved_weights, weights[:, :, full][..., full], rtol=0, atol=1e-12)
    assert mask.shape == (3, 10)


@pytest.mark.parametrize("options", MODES)
def test_equal_type_vectors_make_the_modalities_exchangeable(options):
    model = module(**options)
    question, question_mask, sign, sign_mask = batch(3)
    swapped = (sign, sign_mask, question, question_mask)
    order = torch.cat([torch.arange(6, 10), torch.arange(6)])
    different = model(question, question_mask, sign, sign_mask)[0] - model(*swapped)[0][:, order]
    assert different.abs().max() > 0.01
    with torch.no_grad():
        model.type_embedding[1] = model.type_embedding[0]
    tokens = model(question, question_mask, sign, sign_mask)[0]
    torch.testing.assert_close(model(*swapped)[0][:, order], tokens, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(MODES))
def test_weights_are_between_zero_and_one_and_zero_at_padding(seed, options):
    _, mask, weights = module(seed, **options)(*batch(seed))
    assert weights.min() >= 0
    assert weights.max() <= 1
    if options["mode"] == "gate":
        assert (weights[~mask] == 0).all()
        assert (weights[mask] > 0).all()
    else:
        assert (weights.transpose(1, 3)[~mask] == 0).all()
        assert (weights.transpose(1, 3)[mask] > 0).all()  # rows of padded queries are left alone


@pytest.mark.parametrize("options", MODES)
def test_no_question_equals_signs_alone(options):
    model = module(**options)
    question, question_mask, sign, sign_mask = batch(4)
    tokens, mask, _ = model(question[:, :0], question_mask[:, :0], sign, sign_mask)
    assert torch.equal(mask, sign_mask)
    padded, _, _ = model(question, torch.zeros_like(question_mask), sign, sign_mask)
    torch.testing.assert_close(padded[:, 4:], tokens, rtol=0, atol=1e-12)
    assert (padded[:, :4] == 0).all()


def test_promised_submodules_and_start():
    model = SigmoidSelfAttentionWeighting(DIM, HEADS)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        **{f"{n}_proj.weight": (DIM, DIM) for n in ("q", "k", "v", "out", "gate")},
        **{f"{n}_proj.bias": (DIM,) for n in ("q", "k", "v", "out", "gate")},
        "type_embedding": (2, DIM),
    }
    assert SigmoidSelfAttentionWeighting(DIM, HEADS, granularity="token").gate_proj.weight.shape == (1, DIM)
    _, mask, weights = model(*(x.float() if x.is_floating_point() else x for x in batch(5)))
    opening = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weights[mask], torch.full_like(weights[mask], opening), rtol=0, atol=0.05)


def test_the_gate_is_frozen_where_it_is_not_used():
    assert not any(
        p.requires_grad for p in SigmoidSelfAttentionWeighting(DIM, HEADS, "attention").gate_proj.parameters()
    )
    assert all(p.requires_grad for p in SigmoidSelfAttentionWeighting(DIM, HEADS, "gate").parameters())


def test_scores_of_narrow_inputs_are_exact_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 5, 4, generator=generator).mul(6).bfloat16() for _ in range(3))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    full = (q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        context = softmax_context(q, k, v, mask)
        attended, weights = sigmoid_attention(q, k, v, mask)
    assert context.dtype == attended.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(context, softmax_context(*full, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights, sigmoid_attention(*full, mask)[1], rtol=0, atol=1e-6)


def test_heads_split_the_channels_in_order():
    x = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
    assert torch.equal(split_heads(x, 2)[1, 1], x[1, :, 4:])
