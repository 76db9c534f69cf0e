"""The text transformer: an independent reference, padding, adapters, clients together."""

import numpy as np
import pytest
import torch
from fedcore import Simulation, algorithms
from fedcore.models import build
from fedcore.spec import ParamSpec
from polymodal.errors import UserError
from torch import nn
from torch.utils.data import TensorDataset

OPTIONS = {"num_classes": 3, "input_shape": (9,), "vocabulary": 30, "width": 8, "depth": 2, "heads": 2}


def small(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return build("text_transformer", **{**OPTIONS, **options}).to(dtype)


def louder(model):
    """The same model with larger weights, so that every part of it shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.embedding.weight[0] = 0
    return model


# ------------------------------------------------------------------ reference


def norm(x, weights, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def reference(weights, ids, heads, depth):
    """Logits of one text without padding, (length,) ids, in NumPy."""
    x = weights["embedding.weight"][ids]
    length, width = x.shape
    half = np.arange(width // 2)
    angles = np.arange(length)[:, None] / 10_000.0 ** (2 * half / width)
    x = x + 0.02 * np.sqrt(2) * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for block in range(depth):
        name = f"blocks.{block}"
        y = norm(x, weights, f"{name}.norm1")
        query, key, value = (linear(y, weights, f"{name}.attention.{part}") for part in ("query", "key", "value"))
        size, mixed = width // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / np.sqrt(size)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
        x = x + linear(np.concatenate(mixed, axis=1), weights, f"{name}.attention.output")
        y = norm(x, weights, f"{name}.norm2")
        x = x + linear(gelu(linear(y, weights, f"{name}.mlp.0")), weights, f"{name}.mlp.2")
    return linear(norm(x, weights, "norm").mean(0), weights, "classifier")


def test_logits_are_those_of_the_reference():
    model = louder(small())
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for text in ([4, 7, 7, 29, 1], [3], [5, 5, 2, 9, 11, 12, 1, 8, 20]):
        found = model(torch.tensor([text])).detach().numpy()[0]
        np.testing.assert_allclose(found, reference(weights, text, heads=2, depth=2), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ what it promises


def test_padding_changes_nothing_and_order_does():
    model = louder(small())
    ids = torch.tensor([[4, 7, 9, 0, 0], [1, 2, 3, 4, 5], [8, 0, 0, 0, 0]], dtype=torch.int32)
    found = model(ids)
    torch.testing.assert_close(found, model(torch.cat([ids, torch.zeros(3, 4, dtype=torch.int32)], dim=1)))
    for row, length in enumerate((3, 5, 1)):
        torch.testing.assert_close(found[row : row + 1], model(ids[row : row + 1, :length]))
    assert (model(ids[1:2].flip(1)) - found[1]).abs().max() > 1e-3
    empty = model(torch.zeros(1, 4, dtype=torch.int32))
    torch.testing.assert_close(empty[0], model.classifier.bias)  # a text without words
    empty.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for low in (torch.bfloat16, torch.float16):
        assert small(dtype=low)(torch.tensor([[4, 0], [0, 0]])).isfinite().all()


def test_the_same_seed_gives_the_same_model_and_training_mode_the_same_logits():
    one, other = small(5), small(5)
    ids = torch.tensor([[4, 7, 9]])
    assert torch.equal(one.train()(ids), other.eval()(ids))
    assert not torch.equal(small(6)(ids), one(ids))
    assert not list(one.buffers())
    assert one.embedding.weight[0].abs().sum() == 0


def test_sizes_are_as_told():
    model = small(width=6, depth=1, heads=3, mlp_ratio=2.0)
    block = 4 * 6 * 6 + 3 * 6 + 2 * (6 + 6) + (6 * 12 + 12) + (12 * 6 + 6)
    assert sum(p.numel() for p in model.parameters()) == 30 * 6 + block + 12 + (6 * 3 + 3)
    assert model(torch.ones(2, 70, dtype=torch.int32)).shape == (2, 3)  # longer than input_shape


def test_projections_are_found_by_what_they_are():
    kinds = {item.name: (item.kind, item.heads) for item in ParamSpec.from_module(small())}
    for block in (0, 1):
        for part in ("query", "key", "value"):
            assert kinds[f"blocks.{block}.attention.{part}.weight"] == (part, 2)
        assert kinds[f"blocks.{block}.attention.output.weight"][0] == "linear"
    assert kinds["embedding.weight"][0] == "embedding"
    assert kinds["classifier.weight"][0] == "head"


def test_it_learns_what_only_the_order_of_words_tells():
    ids = torch.tensor([[1, 2, 3], [2, 1, 3], [3, 1, 2], [3, 2, 1]])
    first = torch.tensor([0, 1, 0, 1])
    model = small(dtype=torch.float32, num_classes=2, width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(ids), first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(ids).argmax(dim=1).tolist() == first.tolist()


def texts(dtype=torch.int32):
    """Clients of unequal sizes and texts of unequal lengths."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for size in (5, 8, 3):
        ids = torch.randint(1, 30, (size, 7), generator=draw, dtype=dtype)
        lengths = torch.randint(1, 8, (size, 1), generator=draw)
        found.append(TensorDataset(ids * (torch.arange(7) < lengths), torch.randint(3, (size,), generator=draw)))
    return found


@pytest.mark.parametrize("name", ["fedavg", "fedadamw"])
def test_clients_are_computed_together(name):
    def trained(engine):
        options = {"batch_size": 4, "local_epochs": 2, "fraction": 1.0, "rounds": 2, "engine": engine}
        with Simulation(louder(small()), texts(), algorithms.create(name, lr=0.01), **options) as simulation:
            for _ in range(2):
                simulation.round()
            return simulation.params, simulation.engine

    together, how = trained("batched")
    alone, _ = trained("serial")
    assert how == "batched"
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-9, atol=1e-11)


def test_adapters_go_to_queries_and_values():
    inject = pytest.importorskip("fedcore.lora.injection").inject
    model = louder(small())
    adapted = inject(model, 2, targets=("query", "value"), init="qr")
    spec = ParamSpec.from_module(adapted)
    assert [info.layer for info in spec.adapters] == [
        f"blocks.{b}.attention.{p}" for b in (0, 1) for p in ("query", "value")
    ]
    assert {item.name for item in spec if item.kind not in ("lora_a", "lora_b")} == {
        "classifier.weight",
        "classifier.bias",
    }
    ids = torch.tensor([[4, 7, 9, 0, 0]])
    torch.testing.assert_close(adapted(ids), model(ids))
    assert ParamSpec.from_module(inject(model, 2)).adapters == spec.adapters  # by default


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input_shape": (3, 8, 8)}, r"text_transformer takes token ids \(length,\); inputs here are \(3, 8, 8\)"),
        ({"heads": 3}, r"width=8, depth=2, heads=3, mlp_ratio=2\.0; expected at least 1 each"),
        ({"width": 9, "heads": 3}, "an even width and heads that divide it"),
        ({"depth": 0}, "depth=0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio=0\.0"),
        ({"dim": 8}, r"model text_transformer has no option 'dim'; .*options: vocabulary, width, depth, heads"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        build("text_transformer", **{**OPTIONS, **options})
