"""Blocks of the second moment, and the uses of tensors that they follow from."""

import logging

import pytest
import torch
from fedcore.ops.blocks import hessian_blocks, tensor_blocks
from fedcore.spec import ParamInfo, ParamSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

KINDS = ("linear", "conv", "query", "key", "value", "qkv", "embedding", "position", "token", "head", "lora_a", "lora_b")


@st.composite
def specs(draw):
    """Layouts of one to five tensors of any kind, with rows that heads divide or do not."""
    items, start = [], 0
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from([*KINDS, "vector", "other"]))
        shape = draw(st.sampled_from([(12, 4), (6, 2), (5, 3), (9, 1), (6, 2, 3, 3)]))
        shape = shape[:1] if kind == "vector" else shape
        size = int(torch.Size(shape).numel())
        heads = draw(st.sampled_from([0, 1, 2, 3]))
        items.append(
            ParamInfo(f"p{i}", shape, start, start + size, kind, heads, draw(st.sampled_from([None, "query"])))
        )
        start += size
    return ParamSpec(tuple(items), torch.float64)


def moments(blocks, *lead, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(*lead, blocks.numel, generator=draw, dtype=torch.float64)


def scattered(blocks, flat):
    """Block means by number, the slow way."""
    total = torch.zeros(len(blocks), dtype=flat.dtype).index_add_(0, blocks.ids, flat)
    return total / blocks.sizes


@settings(max_examples=60, deadline=None)
@given(specs(), st.sampled_from([hessian_blocks, tensor_blocks]))
def test_blocks_partition_the_vector_and_keep_every_sum(spec, divide):
    blocks = divide(spec)
    flat = moments(blocks)
    means, expanded = blocks.mean(flat), blocks.expand(blocks.mean(flat))
    assert blocks.numel == spec.numel == int(blocks.sizes.sum())
    assert len(blocks) == sum(row.blocks for row in blocks.rows) == int(blocks.ids.max()) + 1
    torch.testing.assert_close(means, scattered(blocks, flat), rtol=1e-13, atol=0)
    torch.testing.assert_close(means * blocks.sizes, scattered(blocks, expanded) * blocks.sizes, rtol=1e-13, atol=0)
    assert torch.equal(expanded, means[blocks.ids])
    torch.testing.assert_close(blocks.expand(blocks.mean(expanded)), expanded, rtol=1e-14, atol=0)
    assert (means >= 0).all()


@settings(max_examples=30, deadline=None)
@given(specs())
def test_clients_together_are_clients_apart(spec):
    blocks = hessian_blocks(spec)
    flat = moments(blocks, 3)
    together = blocks.mean(flat)
    torch.testing.assert_close(together, torch.stack([blocks.mean(one) for one in flat]), rtol=1e-14, atol=0)
    assert torch.equal(blocks.expand(together), torch.stack([blocks.expand(one) for one in together]))
    one = blocks.mean(flat[0])
    assert torch.equal(blocks.expand(one, flat), blocks.expand(one).expand(3, -1))


@settings(max_examples=30, deadline=None)
@given(specs(), st.integers(0, 1000))
def test_order_inside_a_block_does_not_matter(spec, seed):
    """Any permutation that stays within blocks: columns of a row, rows of a head."""
    blocks = hessian_blocks(spec)
    flat = moments(blocks)
    key = blocks.ids + torch.rand(blocks.numel, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(blocks.mean(flat[key.argsort()]), blocks.mean(flat), rtol=1e-13, atol=0)


def one(shape, kind, heads=0, host=None):
    size = int(torch.Size(shape).numel())
    return hessian_blocks(ParamSpec((ParamInfo("p", shape, 0, size, kind, heads, host),), torch.float64))


def test_a_fused_weight_has_heads_of_q_and_k_and_rows_of_v():
    blocks = one((36, 12), "qkv", 3)
    assert len(blocks) == 3 + 3 + 12
    assert blocks.sizes.tolist() == [4 * 12] * 6 + [12] * 12
    rows = blocks.ids.view(36, 12)[:, 0]
    assert rows.tolist() == [i // 4 for i in range(24)] + [6 + i for i in range(12)]
    flat = moments(blocks).view(36, 12)
    swapped = flat[[1, 0, *range(2, 24), 25, 24, *range(26, 36)]]
    before, after = blocks.mean(flat.view(-1)), blocks.mean(swapped.view(-1))
    torch.testing.assert_close(after[:6], before[:6], rtol=1e-13, atol=0)
    assert torch.equal(after[[7, 6, *range(8, 18)]], before[6:])


@pytest.mark.parametrize(
    ("shape", "kind", "heads", "host", "sizes"),
    [
        ((6, 4), "query", 3, None, [8] * 3),
        ((6, 4), "key", 2, None, [12] * 2),
        ((6, 4), "value", 3, None, [4] * 6),
        ((6, 4), "linear", 0, None, [4] * 6),
        ((6, 2, 3, 3), "conv", 0, None, [18] * 6),
        ((6, 4), "embedding", 0, None, [4] * 6),
        ((6, 4), "head", 0, None, [4] * 6),
        ((1, 5, 4), "position", 0, None, [4] * 5),
        ((5, 4), "position", 0, None, [4] * 5),
        ((1, 1, 4), "token", 0, None, [4]),
        ((7,), "vector", 0, None, [7]),
        ((2, 8), "lora_a", 0, "query", [8] * 2),
        ((6, 2), "lora_b", 3, "query", [4] * 3),
        ((6, 2), "lora_b", 3, "value", [2] * 6),
        ((6, 2), "lora_b", 0, "linear", [2] * 6),
        ((18, 2), "lora_b", 3, "qkv", [4] * 6 + [2] * 6),
        ((6, 4), "query", 4, None, [4] * 6),
        ((6, 4), "qkv", 0, None, [4] * 6),
        ((6, 4), "other", 0, None, [4] * 6),
    ],
)
def test_rules(shape, kind, heads, host, sizes):
    assert one(shape, kind, heads, host).sizes.tolist() == sizes


def test_tensors_of_unknown_use_are_named_once(caplog):
    with caplog.at_level(logging.WARNING, logger="fedcore.ops.blocks"):
        one((6, 4), "linear")
        assert not caplog.records
        one((6, 4), "other")
    assert [record.getMessage() for record in caplog.records] == ["use of 1 tensors unknown, one block per row: p"]


def test_table_names_every_tensor():
    blocks = hessian_blocks(ParamSpec.from_module(nn.TransformerEncoderLayer(12, 3, 24)))
    lines = blocks.table().splitlines()
    assert lines[0].split() == ["parameter", "shape", "kind", "one", "block", "per", "blocks"]
    assert lines[1].split() == ["self_attn.in_proj_weight", "36x12", "qkv", "head,", "head,", "row", "18"]
    assert lines[2].split() == ["self_attn.in_proj_bias", "36", "vector", "tensor", "1"]
    assert lines[-1].split() == ["total", str(blocks.numel), str(len(blocks))]
    assert len(lines) == 2 + 12


def test_blocks_of_one_element_are_the_identity():
    spec = ParamSpec((ParamInfo("p", (6, 1), 0, 6, "linear"),), torch.float64)
    blocks = hessian_blocks(spec)
    flat = moments(blocks)
    assert torch.equal(blocks.expand(blocks.mean(flat)), flat)


# ---------------------------------------------------------------------- what tensors are for


def uses(module):
    return {item.name: (item.kind, item.heads) for item in ParamSpec.from_module(module)}


def test_multihead_attention_with_and_without_fused_weights():
    assert uses(nn.MultiheadAttention(12, 3))["in_proj_weight"] == ("qkv", 3)
    apart = uses(nn.MultiheadAttention(12, 3, kdim=5, vdim=7))
    assert [apart[f"{x}_proj_weight"] for x in "qkv"] == [("query", 3), ("key", 3), ("value", 3)]


class Grouped(nn.Module):
    """Two key heads for four query heads, as in Llama: only the size of a head is declared."""

    def __init__(self, **declared):
        super().__init__()
        for name, value in declared.items():
            setattr(self, name, value)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize("declared", [{"head_dim": 4}, {"head_dim": 4, "num_heads": 4}])
def test_keys_may_have_fewer_heads_than_queries(declared):
    found = uses(nn.Sequential(Grouped(**declared), nn.Linear(8, 2)))
    assert (found["0.q_proj.weight"], found["0.k_proj.weight"]) == (("query", 4), ("key", 2))


def test_names_alone_make_no_attention():
    found = uses(nn.Sequential(Grouped(), nn.Linear(8, 2)))
    assert {found[f"0.{x}_proj.weight"] for x in "qkv"} == {("linear", 0)}


class Fused(nn.Module):
    """A fused projection named ``layer``."""

    def __init__(self, layer="qkv", rows=24, linear=nn.Linear, **declared):
        super().__init__()
        for name, value in {"num_heads": 2, **declared}.items():
            setattr(self, name, value)
        setattr(self, layer, linear(8, rows))


class Transposed(nn.Module):
    """GPT-2's linear layer: weight (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))


@pytest.mark.parametrize(
    ("module", "heads"),
    [
        (Fused(), 2),
        (Fused(head_dim=4), 2),
        (Fused(head_first=True), 0),
        (Fused(key_dim=4), 0),
        (Fused(rows=16, head_dim=4), 0),
        (Fused(rows=20), 0),
        (Fused("query_key_value"), 0),
        (Fused("c_attn"), 2),
        (Fused("c_attn", linear=Transposed), 0),
    ],
)
def test_fused_rows_are_divided_only_where_their_order_is_known(module, heads):
    name = next(name for name, _ in module.named_parameters())
    assert uses(nn.Sequential(module, nn.Linear(8, 2)))[f"0.{name}"] == ("qkv", heads)


class Adapter(nn.Module):
    """A layer with an adapter as LoRA libraries name them."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})


def test_adapters_know_their_host():
    attention = nn.ModuleDict({name: Adapter(8, 8) for name in ("query", "value", "dense")})
    attention.num_attention_heads = 2
    qkv = Fused(linear=Adapter)
    spec = ParamSpec.from_module(nn.ModuleDict({"self": attention, "fused": qkv}))
    found = {item.name: (item.kind, item.host, item.heads) for item in spec}
    assert found["self.query.lora_A.default.weight"] == ("lora_a", "query", 0)
    assert found["self.query.lora_B.default.weight"] == ("lora_b", "query", 2)
    assert found["self.value.lora_B.default.weight"] == ("lora_b", "value", 2)
    assert found["self.dense.lora_B.default.weight"] == ("lora_b", "linear", 0)
    assert found["fused.qkv.lora_B.default.weight"] == ("lora_b", "qkv", 2)
    by_name = {row.name: row.blocks for row in hessian_blocks(spec).rows}
    assert [by_name[f"self.{x}.lora_B.default.weight"] for x in ("query", "value", "dense")] == [2, 8, 8]
    assert by_name["fused.qkv.lora_B.default.weight"] == 2 + 2 + 8


def test_deit_tiny_has_as_many_means_as_its_rows_and_heads():
    """The small DeiT: 2.71 M parameters in 80 tensors. A layer has 3 + 3 heads and 192 + 192 + 768 + 192 rows."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 100}
    spec = ParamSpec.from_module(timm.create_model("deit_tiny_patch16_224", **options))
    layer = (3 + 3 + 192) + 192 + 768 + 192 + 8
    outside = 1 + (64 + 1) + (192 + 1) + 2 + (100 + 1)
    assert spec.numel == 2_710_948
    assert len(hessian_blocks(spec)) == 6 * layer + outside == 8510
    assert len(tensor_blocks(spec)) == 80


@pytest.mark.parametrize(("model", "heads"), [("roberta", 4), ("vit", 4), ("llama", 4)])
def test_transformers_are_read_from_their_modules(model, heads):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": heads, "intermediate_size": 64}
    config, network = {
        "roberta": (transformers.RobertaConfig(**small, vocab_size=50), transformers.RobertaForSequenceClassification),
        "vit": (transformers.ViTConfig(**small, image_size=32, patch_size=8), transformers.ViTForImageClassification),
        "llama": (
            transformers.LlamaConfig(**small, vocab_size=50, num_key_value_heads=2),
            transformers.LlamaForCausalLM,
        ),
    }[model]
    spec = ParamSpec.from_module(network(config))
    found = {item.kind: item.heads for item in spec if item.kind in ("query", "key", "value")}
    assert found == {"query": 4, "key": 2 if model == "llama" else 4, "value": 2 if model == "llama" else 4}
    assert "other" not in {item.kind for item in spec}
