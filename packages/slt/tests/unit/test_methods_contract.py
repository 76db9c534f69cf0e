"""What every fusion of the table promises, on random input in float64."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from slt.methods import FUSIONS
from slt.methods.base import Fusion

DIM, HEADS = 8, 2
CASES = [(name, {}) for name in FUSIONS.names()] + [
    ("ssaw", {"granularity": "token"}),
    ("ssaw", {"mode": "attention"}),
    ("cross_attention", {"bias": False}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x) if x else "")
close = {"rtol": 0, "atol": 1e-12}


def create(name, options, seed=0):
    """A float64 module with every parameter drawn, so that no bias hides behind a zero."""
    module = FUSIONS.create(name, DIM, HEADS, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def batch(seed, size=4, questions=3, signs=5):
    generator = torch.Generator().manual_seed(seed)
    question = torch.randn(size, questions, DIM, generator=generator, dtype=torch.float64)
    sign = torch.randn(size, signs, DIM, generator=generator, dtype=torch.float64)
    question_mask = torch.rand(size, questions, generator=generator) < 0.6
    sign_mask = torch.rand(size, signs, generator=generator) < 0.7
    return question, question_mask, sign, sign_mask


def longer(tokens, mask, extra, value):
    """The same tokens with padding of arbitrary content appended, and old padding overwritten."""
    tokens = torch.cat([tokens, torch.zeros(len(tokens), extra, DIM, dtype=tokens.dtype)], dim=1)
    mask = torch.cat([mask, torch.zeros(len(mask), extra, dtype=torch.bool)], dim=1)
    return tokens.masked_fill(~mask[..., None], value), mask


def test_the_table_matches_the_classes():
    assert FUSIONS.names() == ["ssaw", "concat", "none", "question_only", "cross_attention", "gbt"]
    for info in FUSIONS:
        cls = FUSIONS.load(info.name)
        module = importlib.import_module(info.target.partition(":")[0])
        assert issubclass(cls, Fusion)
        assert info.paper
        assert info.summary
        assert info.fidelity == ("code" if info.name == "none" else "reconstruction")
        assert "Source:" in cls.__doc__
        assert "our reading" in cls.__doc__
        assert module.__doc__
        config_class = getattr(module, f"{cls.__name__}Config", None) or module.SSAWConfig
        assert config_class.__dataclass_params__.frozen
        assert config_class.__doc__


@pytest.mark.parametrize("name", FUSIONS.names())
def test_constructor_and_config_have_the_same_options_and_defaults(name):
    module = FUSIONS.create(name, DIM, HEADS)
    options = list(inspect.signature(type(module)).parameters.values())
    assert [p.name for p in options[:2]] == ["dim", "num_heads"]
    defaults = {p.name: p.default for p in options[2:]}
    assert defaults == dataclasses.asdict(module.config)
    assert module.config == type(module.config)()


def test_listing_and_importing_stay_light():
    code = """
import sys
import slt.methods
assert "torch" not in sys.modules, "listing methods loads torch"
import slt.ops.lengths, slt.ops.corrupt
assert "torch" not in sys.modules, "lengths or corrupt load torch"
import slt.ops.contrastive, slt.ops.ssaw
for name in slt.methods.FUSIONS.names():
    slt.methods.FUSIONS.load(name)
heavy = {"lightning", "wandb", "transformers", "polymodal.trainer"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_names_and_options():
    with pytest.raises(UserError, match="did you mean concat"):
        FUSIONS.create("concatt", DIM, HEADS)
    for name in FUSIONS.names():
        with pytest.raises(UserError, match="no option 'gate'"):
            FUSIONS.create(name, DIM, HEADS, gate=1)
        with pytest.raises(UserError, match=r"dim=8.*num_heads=3"):
            FUSIONS.create(name, 8, 3)
    with pytest.raises(UserError, match="mode='gates'; expected one of gate, attention"):
        FUSIONS.create("ssaw", DIM, HEADS, mode="gates")
    with pytest.raises(UserError, match="granularity='head'; expected one of channel, token"):
        FUSIONS.create("ssaw", DIM, HEADS, granularity="head")


@every_case
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), value=st.sampled_from([3.0, float("nan"), float("inf"), -1e300]))
def test_padding_changes_nothing(name, options, seed, value):
    module = create(name, options, seed)
    question, question_mask, sign, sign_mask = batch(seed)
    zeroed = longer(question, question_mask, 0, 0.0) + longer(sign, sign_mask, 0, 0.0)
    padded = longer(question, question_mask, 2, value) + longer(sign, sign_mask, 3, value)
    tokens, mask, _ = module(*zeroed)
    more_tokens, more_mask, _ = module(*padded)
    assert torch.equal(mask.sum(dim=1), more_mask.sum(dim=1))
    torch.testing.assert_close(more_tokens[more_mask], tokens[mask], **close)
    assert (more_tokens[~more_mask] == 0).all()
    assert torch.isfinite(more_tokens).all()


@every_case
def test_padded_inputs_get_no_gradient(name, options):
    module = create(name, options)
    question, question_mask, sign, sign_mask = batch(1)
    question, question_mask = longer(question, question_mask, 2, float("nan"))
    sign, sign_mask = longer(sign, sign_mask, 3, float("inf"))
    question.requires_grad_()
    sign.requires_grad_()
    tokens, _, weights = module(question, question_mask, sign, sign_mask)
    total = tokens.square().sum() + (0 if weights is None else weights.square().sum())
    total.backward()
    for tensor, mask in ((question, question_mask), (sign, sign_mask)):
        if tensor.grad is not None:
            assert (tensor.grad[~mask] == 0).all()
            assert torch.isfinite(tensor.grad).all()
    assert any(t.grad is not None and (t.grad != 0).any() for t in (question, sign))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


@every_case
def test_a_batch_equals_its_samples(name, options):
    module = create(name, options)
    arrays = batch(2)
    tokens, mask, weights = module(*arrays)
    for i in range(len(tokens)):
        alone_tokens, alone_mask, alone_weights = module(*(x[i : i + 1] for x in arrays))
        torch.testing.assert_close(alone_tokens[0], tokens[i], **close)
        assert torch.equal(alone_mask[0], mask[i])
        if weights is not None:
            torch.testing.assert_close(alone_weights[0], weights[i], **close)


@every_case
def test_without_a_question(name, options):
    module = create(name, options)
    question, question_mask, sign, sign_mask = batch(3)
    absent = torch.zeros_like(question_mask)
    empty, empty_mask = question[:, :0], question_mask[:, :0]
    tokens, mask, _ = module(question, absent, sign, sign_mask)
    short_tokens, short_mask, _ = module(empty, empty_mask, sign, sign_mask)
    torch.testing.assert_close(short_tokens[short_mask], tokens[mask], **close)
    assert torch.isfinite(tokens).all()
    assert short_tokens.shape[1] == (0 if name == "question_only" else sign.shape[1])
    if name in ("none", "cross_attention", "gbt"):
        assert torch.equal(tokens, sign.masked_fill(~sign_mask[..., None], 0.0))


@every_case
def test_rows_without_a_valid_token_stay_finite(name, options):
    module = create(name, options)
    question, question_mask, sign, sign_mask = batch(4)
    question_mask[0], sign_mask[0] = False, False
    question.requires_grad_()
    sign.requires_grad_()
    tokens, mask, weights = module(question, question_mask, sign, sign_mask)
    tokens.sum().backward()
    assert not mask[0].any()
    assert (tokens[0] == 0).all()
    assert weights is None or torch.isfinite(weights).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
    nothing = module(question[:, :0], question_mask[:, :0], sign[:, :0], sign_mask[:, :0])
    assert nothing[0].shape == (4, 0, DIM)
    nobody = module(question[:0], question_mask[:0], sign[:0], sign_mask[:0])
    assert nobody[0].shape[0] == 0


@every_case
def test_gradients_are_right(name, options):
    module = create(name, options)
    question, question_mask, sign, sign_mask = batch(5, size=2, questions=2, signs=3)
    inputs = (question.requires_grad_(), sign.requires_grad_(), *(p for p in module.parameters() if p.requires_grad))
    assert torch.autograd.gradcheck(
        lambda q, s, *_: [x for x in module(q, question_mask, s, sign_mask) if x is not None and x.is_floating_point()],
        inputs,
    )


@every_case
def test_state_round_trip_and_trainable_parameters_all_get_gradients(name, options):
    module, other = create(name, options), create(name, options, seed=9)
    other.load_state_dict(module.state_dict())
    arrays = batch(6)
    tokens, _, _ = module(*arrays)
    assert torch.equal(tokens, other(*arrays)[0])
    if any(True for _ in module.parameters()):
        tokens.square().sum().backward()
    for key, parameter in module.named_parameters():
        # A key's bias shifts all softmax scores of a query alike, so its gradient is 0 up to rounding.
        assert (parameter.grad is not None) == parameter.requires_grad, key


@every_case
def test_bfloat16(name, options):
    arrays = batch(7)
    full = create(name, options)
    expected, mask, _ = full(*arrays)
    half = create(name, options).bfloat16()
    narrow = [x.bfloat16() if x.is_floating_point() else x for x in arrays]
    tokens, _, _ = half(*narrow)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens[mask].double(), expected[mask], rtol=0.1, atol=0.15)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _, weights = create(name, options).float()(*(x.float() if x.is_floating_point() else x for x in arrays))
    assert tokens.dtype == torch.float32
    assert weights is None or weights.dtype == torch.float32
    torch.testing.assert_close(tokens[mask].double(), expected[mask], rtol=0.1, atol=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, qm, s, sm: (q[..., :4], qm, s, sm),
            r"has shape \(4, 3, 4\); expected \(batch, tokens, 8\)",
        ),
        (lambda q, qm, s, sm: (q, qm.float(), s, sm), r"question_mask is torch.float32 .*mask.bool\(\)"),
        (lambda q, qm, s, sm: (q, qm, s, sm[:, :2]), r"sign_mask is torch.bool of shape \(4, 2\)"),
        (lambda q, qm, s, sm: (q[:2], qm[:2], s, sm), "2 questions with 4 clips"),
    ],
)
@pytest.mark.parametrize("name", FUSIONS.names())
def test_bad_shapes_raise(name, change, message):
    with pytest.raises(ValueError, match=message):
        create(name, {})(*change(*batch(8)))
