"""Which tensors are orthogonalised, as which matrices, and where they lie."""

import logging
import math

import pytest
import torch
from fedcore.ops import matrices
from fedcore.ops.matrices import add_product_, gather, matrix_layout, pieces, scatter_
from fedcore.spec import ParamInfo, ParamSpec
from torch import nn


def spec_of(*shapes, kinds=()):
    params, at = [], 0
    for i, shape in enumerate(shapes):
        size = math.prod(shape)
        params.append(ParamInfo(f"p{i}", shape, at, at + size, kinds[i] if kinds else "other"))
        at += size
    return ParamSpec(tuple(params))


class Transformer(nn.Module):
    """One block with everything that ``hidden`` leaves to AdamW."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.words = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.fc1 = nn.Linear(8, 16)
        self.conv = nn.Conv1d(16, 4, 3)
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(16, 3)


def chosen(layout):
    return {matrix.info.name for group in layout.groups for matrix in group}


def test_classes():
    spec = ParamSpec.from_module(Transformer())
    every = {item.name for item in spec if len(item.shape) > 1}
    assert chosen(matrix_layout(spec)) == every
    assert {"cls_token", "pos_embed", "head.weight", "words.weight", "patch_embed.weight"} < every
    hidden = chosen(matrix_layout(spec, "hidden"))
    assert hidden == {
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "fc1.weight",
        "conv.weight",
        "lora_A.weight",
        "lora_B.weight",
    }
    with pytest.raises(ValueError, match="all2d, hidden"):
        matrix_layout(spec, "some")


def test_frozen_tensors_are_in_no_class():
    model = Transformer()
    model.fc1.requires_grad_(False)
    layout = matrix_layout(ParamSpec.from_module(model))
    assert "fc1.weight" not in chosen(layout)
    assert layout.num_matrix + layout.num_rest == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_tied_weights_are_one_matrix():
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "out": nn.Linear(4, 7, bias=False)})
    model["out"].weight = model["words"].weight
    layout = matrix_layout(ParamSpec.from_module(model))
    assert layout.num_matrix == 28
    assert chosen(layout) == {"words.weight"}


def test_shapes_scales_and_groups():
    layout = matrix_layout(
        spec_of((6, 4), (4, 6), (3, 5, 2), (8, 2, 1, 2), (2, 3, 2, 2, 2), (5,), (4, 1, 3, 2), (1, 6))
    )
    found = {m.info.name: (m.batch, m.rows, m.cols) for group in layout.groups for m in group}
    assert found == {
        "p0": (1, 6, 4),
        "p1": (1, 4, 6),
        "p2": (3, 5, 2),
        "p3": (1, 8, 4),
        "p4": (1, 2, 24),
        "p6": (1, 4, 6),
        "p7": (1, 1, 6),
    }
    groups = [{m.info.name for m in group} for group in layout.groups]
    assert groups == [{"p0", "p1", "p6"}, {"p2"}, {"p3"}, {"p4"}, {"p7"}]
    tensors = {m.info.name: m for group in layout.groups for m in group}
    assert tensors["p0"].scale("flattened") == tensors["p0"].scale("official") == pytest.approx(1.5**0.5)
    assert tensors["p3"].scale("flattened") == pytest.approx(2**0.5)
    assert tensors["p3"].scale("official") == 1.0  # kernel 1 x 2
    assert tensors["p6"].scale("official") == pytest.approx(1.5**0.5)  # kernel 3 x 2
    assert tensors["p6"].scale("flattened") == tensors["p1"].scale("flattened") == 1.0
    assert tensors["p0"].scale("none") == 1.0
    assert layout.shapes[:3] == [(1, 6, 4), (1, 4, 6), (3, 5, 2)]


@pytest.mark.parametrize("lead", [(), (3,)])
def test_all_matrices_of_a_shape_in_one_call(lead):
    spec = spec_of((6, 4), (7,), (4, 6), (3, 4, 6), (2, 2))
    layout, calls = matrix_layout(spec), []
    flat = torch.randn(*lead, spec.numel)

    def double(stack):
        calls.append(tuple(stack.shape))
        return 2 * torch.eye(stack.shape[-2]).expand(*stack.shape[:-1], stack.shape[-2]), stack

    for matrix, left, right in layout.factors(flat, double):
        part = matrix.info.view(flat)
        part = part.mT if matrix.rows > matrix.cols else part
        assert torch.equal((left @ right).reshape(part.shape), 2 * part)
    assert calls == [(*lead, 5, 4, 6), (*lead, 1, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_products_are_added_to_tensors_in_place(lead, dtype):
    spec = spec_of((6, 4), (3, 4, 6), (5,))
    flat = torch.randn(*lead, spec.numel)
    before = flat.clone()
    for group in matrix_layout(spec).groups:
        for matrix in group:
            left, right = torch.randn(*lead, matrix.batch, 4, 4), torch.randn(*lead, matrix.batch, 4, 6)
            left, right = left.to(dtype), right.to(dtype)
            add_product_(matrix.view(flat), left, right, beta=0.5, alpha=-2.0)
            wanted = 0.5 * matrix.view(before) - 2 * (left.float() @ right.float())
            near = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
            torch.testing.assert_close(matrix.view(flat), wanted, **near)
    assert torch.equal(flat[..., -5:], before[..., -5:])


def test_small_gaps_are_bridged_and_large_ones_are_not(monkeypatch):
    spec = spec_of((10, 10), (10,), (10, 10), (200,), (10, 10), (9, 10), (11,))
    assert matrix_layout(spec).segments == matrix_layout(spec).matrices  # these are few
    monkeypatch.setattr(matrices, "FEW", 2)
    matrices._layout.cache_clear()
    layout = matrix_layout(spec)
    assert layout.matrices == ((0, 100), (110, 210), (410, 600))
    assert layout.rest == ((100, 110), (210, 410), (600, 611))
    assert layout.segments == ((0, 210), (410, 600))
    assert layout.places == ((0, 100), (110, 210), (210, 400))
    assert (layout.num_matrix, layout.num_rest, layout.num_segment) == (390, 221, 400)
    assert layout.gaps == ((100, 110),)
    work = torch.arange(800.0).view(2, 400)
    assert layout.to_wire(work)[1].tolist() == [*range(400, 500), *range(510, 800)]
    matrices._layout.cache_clear()


def test_without_gaps_nothing_is_copied():
    layout = matrix_layout(spec_of((3, 4), (4, 4)))
    work = torch.randn(28)
    assert layout.to_wire(work) is work


@pytest.mark.parametrize("shapes", [[(5,)], [(3, 4)], [(0, 3), (2,)]])
def test_models_of_one_class_only(shapes):
    spec = spec_of(*shapes)
    layout, flat = matrix_layout(spec), torch.randn(2, spec.numel)
    assert layout.num_matrix + layout.num_rest == spec.numel
    assert gather(flat, layout.rest).shape == (2, layout.num_rest)
    assert layout.to_wire(flat[:, : layout.num_segment]).shape == (2, layout.num_matrix)


def test_spans_are_gathered_and_scattered():
    flat, spans = torch.arange(24.0).view(2, 12), ((1, 3), (5, 9))
    found = gather(flat, spans)
    assert found[0].tolist() == [1, 2, 5, 6, 7, 8]
    target = torch.zeros(2, 12)
    scatter_(target, spans, found)
    assert torch.equal(gather(target, spans), found)
    assert float(target.sum()) == float(found.sum())
    assert list(pieces(spans, 2, 6)) == [(2, 3, 1), (5, 6, 2)]
    assert list(pieces(spans, 9, 12)) == []


def test_classes_are_logged_once(caplog):
    spec = spec_of((13, 3), (17,))
    with caplog.at_level(logging.DEBUG, logger="fedcore.ops.matrices"):
        matrix_layout(spec)
        matrix_layout(spec)
    assert [r.getMessage() for r in caplog.records] == [
        "p0 (13, 3): orthogonalised",
        "p1 (17,): AdamW",
        "1 tensors orthogonalised in 1 shapes, 1 by AdamW",
    ]
