"""Adapters in models: which layers, what is trained, that the function stays, what is refused."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from fedcore.adapters import find_adapters
from fedcore.lora import LoraLinear, RankError, inject
from fedcore.lora.injection import default_head, default_targets, head_parameters, target_layers
from fedcore.models import build
from fedcore.spec import ParamSpec
from polymodal.errors import UserError
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_lora_inject_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def layers_of(model):
    return [item.layer for item in find_adapters(model)]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def whole(model):
    """Modules that are trained whole."""
    return sorted({name.rpartition(".")[0] for name in trained(model) if ".lora_" not in name})


class Encoder(nn.Module):
    """Attention-like names, a convolution, an embedding, layers with and without bias, a head of two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.layers = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 6)}) for _ in "ab")
        self.proj = nn.Linear(6, 8, bias=False)
        self.classifier = nn.ModuleDict({"dense": nn.Linear(8, 8), "out_proj": nn.Linear(8, 3)})

    def forward(self, ids):
        x = self.conv(self.words(ids).mT).mT
        for layer in self.layers:
            x = x + torch.tanh(self.proj(layer["value"](layer["query"](x))))
        return self.classifier["out_proj"](torch.tanh(self.classifier["dense"](x.mean(dim=1))))


IDS = torch.arange(20).reshape(4, 5) % 10


@pytest.mark.parametrize("init", ["kaiming", "qr", "qr_scaled"])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_function_stays_and_the_model_too(init, rank):
    model = Encoder().double()
    before = copy.deepcopy(model.state_dict())
    adapted = inject(model, rank, init=init, init_rms=0.01, scaling=3.0)
    torch.testing.assert_close(adapted(IDS), model(IDS), rtol=0, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in model.parameters())
    assert not layers_of(model)


def test_defaults_of_an_encoder():
    adapted = inject(Encoder(), 2)
    assert layers_of(adapted) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
    assert whole(adapted) == ["classifier.dense", "classifier.out_proj"]
    assert ParamSpec.from_module(adapted).info("classifier.out_proj.weight").kind == "head"


def test_defaults_of_a_chain_are_its_hidden_layers():
    adapted = inject(toy.mlp(), 2)
    assert layers_of(adapted) == ["0"]
    assert whole(adapted) == ["2"]


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["value"], ["layers.0.value", "layers.1.value"]),
        (["1.query"], ["layers.1.query"]),
        (["layers.0.query", "proj"], ["layers.0.query", "proj"]),  # but not out_proj
        (["dense", "query"], ["layers.0.query", "layers.1.query"]),  # the head's dense is trained whole
    ],
)
def test_targets_by_the_end_of_their_name(targets, layers):
    assert layers_of(inject(Encoder(), 2, targets=targets)) == layers


def test_a_head_of_choice():
    adapted = inject(Encoder(), 2, head=["out_proj"], targets=["dense"])
    assert (layers_of(adapted), whole(adapted)) == (["classifier.dense"], ["classifier.out_proj"])
    adapted = inject(Encoder(), 2, head=["words", "classifier"])
    assert whole(adapted) == ["classifier.dense", "classifier.out_proj", "words"]


@pytest.mark.parametrize(
    "options", [{}, {"targets": ["query"], "head": ["out_proj"]}, {"targets": ["dense"], "head": ["proj"]}]
)
def test_what_would_be_trained_can_be_asked(options):
    model = Encoder()
    adapted = inject(model, 2, **options)
    assert target_layers(model, **options) == layers_of(adapted)
    assert {*head_parameters(model, options.get("head", ()))} == {n for n in trained(adapted) if ".lora_" not in n}


def test_ranks_by_layer():
    adapted = inject(Encoder(), {"query": 3, "0.query": 4, "proj": 2})
    ranks = {item.layer: item.rank for item in find_adapters(adapted)}
    assert ranks == {"layers.0.query": 4, "layers.1.query": 3, "proj": 2}
    with pytest.raises(UserError, match=r"no rank for the target layers\.0\.value"):
        inject(Encoder(), {"query": 3}, targets=["query", "value"])
    with pytest.raises(UserError, match="no layer is called keys"):
        inject(Encoder(), {"query": 3, "keys": 3}, targets=["query"])


@pytest.mark.parametrize("init", ["kaiming", "qr", "qr_scaled"])
def test_starts_are_nested_and_depend_on_nothing_else(init):
    model = Encoder()
    large, small = (dict(inject(model, r, init=init).named_parameters()) for r in (6, 2))
    torch.manual_seed(99)
    again = dict(inject(model, 2, init=init, targets=["value", "query"]).named_parameters())
    state = torch.get_rng_state()
    inject(model, 2, init=init)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in small.items():
        assert torch.equal(value, again[name])
        if "lora_A" in name or "lora_B" in name:
            cut = large[name][:2] if "lora_A" in name else large[name][:, :2]
            # scaled starts have one size at all ranks: the same directions
            factor = value.norm() / cut.norm() if init == "qr_scaled" else 1.0
            torch.testing.assert_close(value, cut * factor)
    a = [value for name, value in small.items() if "query.lora_A" in name]
    assert not torch.equal(*a)
    if init == "kaiming":
        other = dict(inject(model, 2, seed=1).named_parameters())
        assert not torch.equal(other["layers.0.query.lora_A.default.weight"], a[0])


def test_dropout_mode_and_copies_of_flags():
    model = Encoder()
    model.proj.eval()
    adapted = inject(model, 2, targets=["proj", "query"], dropout=0.5)
    assert not adapted.proj.lora_dropout["default"].training
    assert adapted.layers[0]["query"].lora_dropout["default"].training
    assert adapted.layers[0]["query"].lora_dropout["default"].p == 0.5


def test_shared_weights_come_apart_only_where_they_must():
    """A projection tied to the embedding: a split changes the projection alone."""
    model = nn.ModuleDict({"words": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False), "head": nn.Linear(6, 2)})
    model["out"].weight = model["words"].weight
    adapted = inject(model, 2, targets=["out"], init="qr", scaling=1.0)
    assert torch.equal(adapted["words"].weight, model["words"].weight)
    x = torch.randn(3, 4)
    torch.testing.assert_close(adapted["out"](x), model["out"](x))
    assert not torch.equal(adapted["out"].base_layer.weight, model["out"].weight)


def test_a_layer_that_is_held_twice_gets_one_adapter():
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(4, 2))
    adapted = inject(model, 2, init="qr")
    assert adapted[0] is adapted[2]
    assert isinstance(adapted[0], LoraLinear)
    x = torch.randn(3, 4)
    torch.testing.assert_close(adapted(x), model(x))
    assert layers_of(adapted) == ["0"]


def test_torchs_own_encoder_does_not_read_past_the_adapters():
    """In evaluation without gradients, its fused path takes ``linear1.weight`` itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 3)})
    adapted = inject(model, 2)
    assert layers_of(adapted) == [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    for part in adapted.modules():
        if isinstance(part, LoraLinear):
            part.load_factors(*(torch.randn(p.shape) for p in part.factors))
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = adapted["encoder"](x, src_key_padding_mask=padding)
    adapted.eval()
    with torch.no_grad():
        found = adapted["encoder"](x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :3], expected[1, :3])
    assert layer.activation_relu_or_gelu
    assert model["encoder"].use_nested_tensor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 7}, r"rank 7 of layer layers\.0\.value with a weight of 6x8; expected 1 <= rank <= 6"),
        ({"rank": 0}, "rank 0 of layer"),
        ({"targets": ["conv"]}, "target conv is Conv1d, which takes no adapter; name linear layers alone"),
        ({"targets": ["words"]}, "target words is Embedding, which takes no adapter"),
        ({"targets": ["layers.0"]}, r"target layers\.0 is ModuleDict.*name linear layers, e\.g\. layers\.0\.query"),
        ({"targets": ["quary"]}, "no layer is called quary .targets.; did you mean query.*end in query, value, proj"),
        ({"targets": ["query", "nothing"]}, "no layer is called nothing"),
        ({"targets": ["out_proj"]}, "targets out_proj lie in the head classifier, which is trained whole"),
        ({"head": ["score"]}, "no layer is called score .head."),
        ({"init": "pissa"}, "init='pissa'; expected one of kaiming, qr, qr_scaled"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(UserError, match=words) as caught:
        inject(Encoder(), **{"rank": 2, **options})
    assert "\n" not in str(caught.value)


def test_ranks_are_also_value_errors():
    with pytest.raises(RankError):
        inject(toy.mlp(), 6)


def test_models_that_are_refused():
    with pytest.raises(UserError, match="norm is BatchNorm1d, whose statistics move.*LayerNorm or GroupNorm"):
        inject(toy.Normed(), 2)
    with pytest.raises(UserError, match=r"0 has an adapter already; give the base model"):
        inject(inject(toy.mlp(), 2), 2)
    with pytest.raises(UserError, match="no linear layer but its head"):
        inject(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2)), 1)
    with pytest.raises(UserError, match="Conv1d has no linear layer"):
        inject(nn.Conv1d(2, 3, 1), 1)
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(UserError, match=r"target attn\.out_proj lies in nn\.MultiheadAttention"):
        inject(attention, 2, targets=["attn.out_proj"])
    assert layers_of(inject(attention, 2)) == ["up"]


def test_norms_without_statistics_are_fine():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    assert layers_of(inject(model, 2)) == ["0"]


# ---------------------------------------------------------------------------------------------- known models


def test_own_models():
    deit = build("deit_tiny", num_classes=3, input_shape=(3, 8, 8), dim=16, depth=2, heads=2)
    adapted = inject(deit, 2)
    assert layers_of(adapted) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert whole(adapted) == ["head"]
    assert find_adapters(adapted)[0].out_features == 48
    bag = inject(build("bag", num_classes=3, input_shape=(5,), vocabulary=9, hidden=8), 2)
    assert whole(bag) == ["head"]


def test_models_of_timm():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1, embed_dim=16, num_heads=2)
    adapted = inject(vit, 2)
    assert (layers_of(adapted), whole(adapted)) == (["blocks.0.attn.qkv"], ["head"])
    with pytest.raises(UserError, match=r"target patch_embed\.proj is Conv2d"):
        inject(vit, 2, targets=["proj"])
    assert layers_of(inject(vit, 2, targets=["attn.proj"])) == ["blocks.0.attn.proj"]
    deit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2)
    assert whole(inject(deit, 2)) == ["head", "head_dist"]


@pytest.mark.parametrize(
    ("kind", "targets", "head"),
    [
        ("Roberta", ("query", "value"), ["classifier.dense", "classifier.out_proj"]),
        ("Bert", ("query", "value"), ["classifier"]),
        ("DistilBert", ("q_lin", "v_lin"), ["classifier", "pre_classifier"]),
        ("GPT2", ("c_attn",), ["score"]),
        ("Llama", ("q_proj", "v_proj"), ["score"]),
    ],
)
def test_models_of_transformers(kind, targets, head):
    transformers = pytest.importorskip("transformers")
    own = {
        "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
        "Llama": {**SIZES, "pad_token_id": 0},
    }.get(kind, {**SIZES, "max_position_embeddings": 40})
    config = getattr(transformers, f"{kind}Config")(vocab_size=20, **own)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    for init in ("kaiming", "qr_scaled"):
        adapted = inject(model, 2, init=init, init_rms=0.01)
        assert {name.rpartition(".")[2] for name in layers_of(adapted)} == {*targets}
        assert whole(adapted) == head
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert default_targets(model) == targets
    assert default_head(model)[0] == head[0].partition(".")[0]
    if kind == "GPT2":
        assert all(item.transposed for item in find_adapters(adapted))
