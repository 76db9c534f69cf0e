"""Gradients as functions of a flat vector: where they are taken, what a second call leaves alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from fedcore.batches import ClientData
from fedcore.learner import Learner
from fedcore.spec import ParamSpec
from fedcore.tasks import as_task
from torch import nn


def _load(name):
    spec = importlib.util.spec_from_file_location(f"fedcore_learner{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load("_toy")


def learner(model):
    return Learner(as_task(model, nn.functional.cross_entropy))


def batch(size=8):
    return toy.clients((size,))[0].tensors


def test_gradient_is_autograds_at_any_vector():
    model = toy.mlp()
    ours, (x, y) = learner(model), batch()
    point = torch.randn(ours.spec.numel, requires_grad=True)
    names = ours.spec.unflatten(point)
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, names, (x,)), y)
    expected = torch.autograd.grad(loss, point)[0]
    grad, value = ours(point.detach(), (x, y), rng=0)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(value, loss.detach())


def test_a_vector_changed_in_place_is_seen():
    ours = learner(toy.mlp())
    params = ours.start.clone()
    first, _ = ours(params, batch(), rng=0)
    params.mul_(0.5)
    second, _ = ours(params, batch(), rng=0)
    fresh, _ = learner(toy.mlp())(params.clone(), batch(), rng=0)
    assert torch.equal(second, fresh)
    assert not torch.equal(first, second)


def test_the_other_point_of_a_second_call_leaves_the_first_vector():
    ours = learner(toy.mlp())
    params = ours.start.clone()
    kept = params.clone()
    ours(params, batch(), rng=0)
    ours(params + 1.0, batch(), rng=0, update_buffers=False)
    assert torch.equal(params, kept)


def test_dropout_draws_repeat_with_the_seed():
    ours = learner(toy.mlp(dropout=0.5, hidden=50))
    params = ours.start.clone()
    first, again, other = (ours(params, batch(), rng=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_second_call_leaves_running_statistics():
    ours = learner(toy.Normed())
    params = ours.start.clone()
    ours(params, batch(), rng=0)
    kept = ours.buffers
    ours(params, batch(), rng=0, update_buffers=False)
    assert all(torch.equal(v, ours.buffers[k]) for k, v in kept.items())
    ours(params, batch(), rng=0)
    assert not torch.equal(kept["norm.running_mean"], ours.buffers["norm.running_mean"])


def test_full_gradient_is_in_eval_mode_over_all_samples():
    model = toy.mlp(dropout=0.5)
    ours = learner(model)
    x, y = batch(30)
    model.eval()
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    model.train()
    found = ours.full_gradient(ours.start.clone(), ClientData(torch.utils.data.TensorDataset(x, y)))
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]))
    assert model.training


@pytest.mark.parametrize(("batches", "indices"), [(1, [4, 1]), (2, [4, 1, 0, 3]), (3, range(5)), (6, range(5))])
def test_full_gradient_of_some_batches_is_their_mean_within_one_pass(batches, indices):
    model = toy.mlp()
    ours = learner(model)
    x, y = batch(5)
    order = [torch.tensor(rows) for rows in ([4, 1], [0, 3], [2], [2, 0], [1, 3], [4])]
    some = torch.tensor(list(indices))
    loss = nn.functional.cross_entropy(model(x[some]), y[some])
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    data = ClientData(torch.utils.data.TensorDataset(x, y))
    torch.testing.assert_close(ours.full_gradient(ours.start.clone(), data, order, batches), expected)


def test_missing_spans_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(3, 3), toy.mlp()

        def forward(self, x):
            return self.used(x)

    ours = learner(Unused())
    grad, _ = ours(ours.start.clone(), batch(), rng=0)
    assert ours.missing == ((0, 9), (9, 12))
    assert not bool(grad[:12].any())
    assert bool(grad[12:].any())


def test_layout_of_a_model_with_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    model = nn.ModuleDict(
        {"attn": Attention(), "emb": nn.Embedding(5, 8), "conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 2)}
    )
    spec = ParamSpec.from_module(model)
    kinds = {item.name: (item.kind, item.heads) for item in spec}
    assert kinds["attn.qkv.weight"] == ("qkv", 4)
    assert kinds["attn.proj.weight"][0] == "linear"
    assert kinds["emb.weight"][0] == "embedding"
    assert kinds["conv.weight"][0] == "conv"
    assert kinds["fc.weight"][0] == "head"
    assert kinds["fc.bias"][0] == "vector"
    flat = torch.arange(float(spec.numel))
    assert torch.equal(spec.flatten(spec.unflatten(flat)), flat)
    stacked = torch.stack([flat, flat + 1])
    assert spec.info("conv.weight").view(stacked).shape == (2, 8, 3, 3, 3)


def test_several_number_formats_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="several number formats"):
        ParamSpec.from_module(model)
