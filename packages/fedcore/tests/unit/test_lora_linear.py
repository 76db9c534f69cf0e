"""The adapted layer: PEFT's names and values, frozen base, what the package sees of it; adapter files."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from fedcore.adapters import AdapterInfo, find_adapters
from fedcore.lora import LoraLinear, RankError, adapter_state, inject, load_adapter_state
from fedcore.spec import ParamSpec
from polymodal.errors import UserError
from torch import nn
from torch.func import functional_call, grad, vmap


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora_linear_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")


def filled(layer, seed=0):
    """An adapter that does something."""
    draw = torch.Generator().manual_seed(seed)
    layer.load_factors(*(torch.randn(p.shape, generator=draw) for p in layer.factors))
    return layer


def test_a_new_adapter_changes_nothing_and_can_be_trained():
    base = nn.Linear(6, 4)
    expected = base(torch.ones(3, 6))
    layer = LoraLinear(base, 2, scaling=2.0)
    assert torch.equal(layer(torch.ones(3, 6)), expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    layer(torch.randn(3, 6)).square().sum().backward()
    assert layer.factors[1].grad.any()
    assert base.weight.grad is None


def test_what_it_computes():
    layer = filled(LoraLinear(nn.Linear(6, 4), 3, scaling=0.5))
    a, b = layer.factors
    x = torch.randn(2, 5, 6)
    expected = x @ (layer.weight + 0.5 * b @ a).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta_weight(), 0.5 * b @ a)
    assert (layer.rank, layer.in_features, layer.out_features) == (3, 6, 4)
    assert "rank=3, scaling=0.5" in repr(layer)


def test_names_and_values_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model = toy.mlp()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], modules_to_save=["2"], lora_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours = inject(model, 2, scaling=2.0)
    for layer in ours.modules():
        if isinstance(layer, LoraLinear):
            filled(layer)
    state = adapter_state(ours)
    assert list(state) == list(peft.get_peft_model_state_dict(theirs))
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    raw = {name.removeprefix("base_model.model.") for name, _ in theirs.base_model.model.named_parameters()}
    assert {name for name, _ in ours.named_parameters() if name.startswith("0.")} == {
        name for name in raw if name.startswith("0.")
    }
    mine, other = find_adapters(ours), find_adapters(theirs.base_model.model)
    assert mine == other == (AdapterInfo("0", *(f"0.{n}.weight" for n in NAMES), 2, 2.0, 5, 6),)


NAMES = ("lora_A.default", "lora_B.default", "base_layer")


def test_the_layout_knows_the_factors():
    class Attention(nn.Module):
        num_attention_heads = 2

        def __init__(self):
            super().__init__()
            self.query, self.value = nn.Linear(6, 4), nn.Linear(6, 4)
            self.classifier = nn.Linear(4, 3)

    spec = ParamSpec.from_module(inject(Attention(), 2))
    found = {item.name: (item.kind, item.heads, item.host) for item in spec}
    assert found["query.lora_A.default.weight"] == ("lora_a", 0, "query")
    assert found["query.lora_B.default.weight"] == ("lora_b", 2, "query")
    assert found["value.lora_B.default.weight"] == ("lora_b", 2, "value")
    assert found["classifier.weight"] == ("head", 0, None)
    assert [(item.layer, item.rank, item.scaling) for item in spec.adapters] == [("query", 2, 2.0), ("value", 2, 2.0)]
    assert "query.base_layer.weight" in spec.frozen


def test_weights_stored_the_other_way_round():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(4, 6)  # 6 inputs, 4 outputs
    layer = filled(LoraLinear(base, 2, scaling=2.0))
    a, b = layer.factors
    assert (a.shape, b.shape, layer.fan_in_fan_out) == ((2, 6), (4, 2), True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ (base.weight + layer.delta_weight()) + base.bias)
    (info,) = find_adapters(layer)
    assert (info.transposed, info.out_features, info.in_features, info.layer) == (True, 4, 6, "")


def test_under_torch_func():
    layer = filled(LoraLinear(nn.Linear(4, 3), 2, scaling=2.0))
    params = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    stack = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    x = torch.randn(2, 5, 4)

    def loss(params, x):
        return functional_call(layer, params, (x,)).square().mean()

    both = vmap(grad(loss))(stack, x)
    for i in range(2):
        alone = grad(loss)({name: p[i] for name, p in stack.items()}, x[i])
        for name, value in alone.items():
            torch.testing.assert_close(both[name][i], value)


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    layer = filled(LoraLinear(nn.Linear(50, 4), 2, scaling=1.0, dropout=0.5))
    x = torch.randn(3, 50)
    layer.eval()
    plain = layer(x)
    assert torch.equal(layer(x), plain)
    layer.train()
    assert not torch.equal(layer(x), plain)
    layer.load_factors(torch.zeros(2, 50), torch.zeros(4, 2))
    assert torch.equal(layer(x), layer.base_layer(x))


def test_it_can_be_copied_pickled_and_moved():
    layer = filled(LoraLinear(nn.Linear(6, 4), 2, scaling=2.0, adapter_name="mine"))
    x = torch.randn(3, 6)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert layer.double()(x.double()).dtype == torch.float64
    assert "lora_A.mine.weight" in dict(layer.named_parameters())


def test_factors_that_are_given_leave_the_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    base = nn.utils.skip_init(nn.Linear, 6, 4)
    LoraLinear(base, 2, factors=(torch.ones(2, 6), torch.zeros(4, 2)))
    assert torch.equal(torch.rand(1), expected)


def test_half_precision_is_kept():
    layer = LoraLinear(nn.Linear(6, 4, dtype=torch.bfloat16), 2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: LoraLinear(nn.Conv2d(3, 4, 3), 2), "Conv2d is no linear layer"),
        (lambda: LoraLinear(nn.Embedding(9, 4), 2), "Embedding is no linear layer"),
        (lambda: LoraLinear(nn.Linear(6, 4), 5), "rank 5 with a weight of 4x6; expected 1 <= rank <= 4"),
        (lambda: LoraLinear(nn.Linear(6, 4), 0), "rank 0"),
        (lambda: LoraLinear(nn.Linear(6, 4), 2, dropout=1.0), "dropout=1.0; expected 0 <= dropout < 1"),
    ],
)
def test_what_takes_no_adapter(made, words):
    with pytest.raises(UserError, match=words):
        made()


def test_integer_weights_take_no_adapter():
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"torch\.int8 take no adapter"):
        LoraLinear(base, 2)


def test_factors_of_another_shape():
    layer = LoraLinear(nn.Linear(6, 4), 2)
    with pytest.raises(ValueError, match=r"factor of shape \(3, 6\); expected \(2, 6\)"):
        layer.load_factors(torch.ones(3, 6), torch.ones(4, 2))
    assert issubclass(RankError, ValueError)


# ---------------------------------------------------------------------------------------------- adapter files


def test_adapter_state_goes_round(tmp_path):
    from safetensors.torch import load_file, save_file

    model = toy.mlp()
    one, other = (inject(model, 2, init="qr_scaled", init_rms=0.1) for _ in range(2))
    for parameter in one.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    x = toy.clients()[0].tensors[0]
    assert not torch.equal(one(x), other(x))
    save_file(adapter_state(one), tmp_path / "adapter.safetensors")
    load_adapter_state(other, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(one(x), other(x))
    prefix = "base_model.model."
    assert sorted(adapter_state(one)) == [
        f"{prefix}0.lora_A.weight",
        f"{prefix}0.lora_B.weight",
        f"{prefix}2.bias",
        f"{prefix}2.weight",
    ]
    state = adapter_state(one)
    state[f"{prefix}2.bias"].zero_()  # a copy
    assert one[2].bias.any()


def test_adapter_states_that_do_not_fit():
    model = inject(toy.mlp(), 2)
    before = adapter_state(model)
    cases = {
        "the adapter state lacks base_model.model.2.bias": {k: v for k, v in before.items() if "bias" not in k},
        "the model has no place for base_model.model.7.bias": {**before, "base_model.model.7.bias": torch.ones(1)},
        r"0\.lora_A\.weight is \(3, 6\) in the adapter state and \(2, 6\)": adapter_state(inject(toy.mlp(), 3)),
    }
    for words, state in cases.items():
        with pytest.raises(UserError, match=words):
            load_adapter_state(model, {name: value + 1 for name, value in state.items()})
    for name, value in adapter_state(model).items():
        assert torch.equal(value, before[name])
