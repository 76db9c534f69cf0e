"""SSAW, gated fusion and cross-attention against slow float64 references."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from slt.methods import FUSIONS

_spec = importlib.util.spec_from_file_location("slt_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

DIM, HEADS = 12, 3


def batch(seed, questions=4, signs=7):
    rng = np.random.default_rng(seed)
    question, sign = rng.normal(size=(4, questions, DIM)), rng.normal(size=(4, signs, DIM))
    question_mask, sign_mask = rng.random((4, questions)) < 0.6, rng.random((4, signs)) < 0.7
    question_mask[0] = False  # a sample without a question
    question_mask[1], sign_mask[1] = True, True
    sign_mask[:, 0] = True
    return question, question_mask, sign, sign_mask


def filled(name, seed, **options):
    """A float64 module whose parameters are all drawn, biases and gate too, so that no term is hidden by a zero."""
    module = FUSIONS.create(name, DIM, HEADS, **options).double()
    rng = np.random.default_rng(seed + 1000)
    params = {key: rng.normal(size=value.shape) * 0.5 for key, value in module.state_dict().items()}
    module.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()})
    return module, params


def call(module, arrays):
    tokens, mask, weights = module(*(torch.from_numpy(x) for x in arrays))
    return tokens.detach().numpy(), mask.numpy(), None if weights is None else weights.detach().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("questions", [4, 0])
@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("mode", ["gate", "attention"])
def test_ssaw(mode, granularity, questions, seed):
    module, params = filled("ssaw", seed, mode=mode, granularity=granularity)
    arrays = batch(seed, questions)
    tokens, mask, weights = call(module, arrays)
    expected, expected_mask, expected_weights = reference.ssaw(params, *arrays, HEADS, mode)
    assert weights.shape == expected_weights.shape
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gated_fusion(seed):
    module, params = filled("gbt", seed)
    arrays = batch(seed)
    tokens, mask, weights = call(module, arrays)
    expected, gates = reference.gated_fusion(params, *arrays)
    np.testing.assert_array_equal(mask, arrays[3])
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(weights, gates, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_is_multihead_attention_plus_residual(bias):
    module, params = filled("cross_attention", 3, bias=bias)
    question, question_mask, sign, sign_mask = (torch.from_numpy(x) for x in batch(3))
    tokens, _, weights = module(question, question_mask, sign, sign_mask)
    other = torch.nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    state = {
        "in_proj_weight": np.concatenate([params[f"{n}_proj.weight"] for n in "qkv"]),
        "out_proj.weight": params["out_proj.weight"],
    }
    if bias:
        state["in_proj_bias"] = np.concatenate([params[f"{n}_proj.bias"] for n in "qkv"])
        state["out_proj.bias"] = params["out_proj.bias"]
    other.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    asked = question_mask.any(dim=1)
    expected, expected_weights = other(
        sign[asked],
        question[asked],
        question[asked],
        key_padding_mask=~question_mask[asked],
        average_attn_weights=False,
    )
    valid = sign_mask[asked]
    torch.testing.assert_close(tokens[asked][valid], (sign[asked] + expected)[valid], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        weights[asked].transpose(1, 2)[valid], expected_weights.transpose(1, 2)[valid], rtol=0, atol=1e-10
    )
    assert torch.equal(tokens[~asked], sign[~asked] * sign_mask[~asked][..., None])
