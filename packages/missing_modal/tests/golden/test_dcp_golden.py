"""DCP against a slow float64 NumPy version: tables, dynamic prompts, features, logits, losses, gradients."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from missing_modal.backbones.base import TowerSpec
from missing_modal.classifier import Classifier
from missing_modal.methods.base import Context
from missing_modal.methods.dcp import DCP
from missing_modal.patterns import to_mask
from missing_modal.prompts import CorrelatedPrompts
from torch.nn import functional as F


def _load(path):
    spec = importlib.util.spec_from_file_location(f"mm_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load(Path(__file__).parents[1] / "_toy_towers.py")
reference = _load(Path(__file__).with_name("_dcp_reference.py"))

CODES, DEPTH, HEADS, CLASSES = [0, 1, 2, 0, 2, 1], 2, (2, 3), 3


@pytest.fixture(scope="module")
def case():
    """A classifier whose parameters are all far from their initial values, its weights as arrays, inputs."""
    model = Classifier(toy.two_towers(), DCP(length=6, depth=DEPTH, reduction=3), CLASSES).double()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.from_numpy(0.3 * rng.normal(size=tuple(value.shape))))
    inputs = toy.draw_inputs(len(CODES), seed=3)
    return model, toy.make_batch([to_mask(code) for code in CODES], inputs=inputs), inputs


def arrays(module):
    return {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}


def slow_logits(model, inputs, prompts=None, outputs=None, head=None):
    return reference.logits(
        [tower.weights for tower in model.towers],
        prompts or arrays(model.prompter.prompts),
        outputs or [arrays(output) for output in model.prompter.outputs],
        head or arrays(model.head),
        CODES,
        inputs,
        DEPTH,
        HEADS,
    )


def test_tables(case):
    model, _, _ = case
    weights = arrays(model.prompter.prompts)
    tables = model.prompter.prompts.tables([to_mask(code) for code in (2, 0, 1)])
    for place, code in enumerate((2, 0, 1)):
        deep, common = reference.prompt_tables(weights, code, DEPTH)
        for m in (0, 1):
            assert len(tables.deep[m]) == DEPTH
            for j in range(DEPTH):
                np.testing.assert_allclose(tables.deep[m][j][place].detach(), deep[m][j], rtol=0, atol=1e-12)
            np.testing.assert_allclose(tables.common[m][place].detach(), common[m], rtol=0, atol=1e-12)


def test_dynamic_prompts(case):
    model, _, inputs = case
    prompts, weights = model.prompter.prompts, arrays(model.prompter.prompts)
    for m, name in enumerate(("image", "text")):
        tokens = model.towers[m].embed(torch.from_numpy(inputs[name]))
        tables = prompts.tables([to_mask(code) for code in (0, 1, 2)])
        rows = prompts.enter(m, tokens, torch.tensor(CODES), tables)
        assert rows.shape == (len(CODES), prompts.rows(m), tokens.shape[2])
        for sample, code in enumerate(CODES):
            expected = reference.dynamic_prompts(weights, m, code, tokens[sample].numpy())
            np.testing.assert_allclose(rows[sample, 4:].detach(), expected, rtol=0, atol=1e-12)


def test_logits_and_losses(case):
    model, batch, inputs = case
    found, expected = model(batch).detach(), slow_logits(model, inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    assert float(F.cross_entropy(found, batch.labels)) == pytest.approx(
        reference.cross_entropy(expected, batch.labels.tolist()), abs=1e-12
    )
    targets = (np.arange(len(CODES) * CLASSES).reshape(len(CODES), CLASSES) % 2).astype(float)
    loss = F.binary_cross_entropy_with_logits(found, torch.from_numpy(targets))
    assert float(loss) == pytest.approx(reference.binary_cross_entropy(expected, targets), abs=1e-12)


def test_features_where_present_and_zero_where_not(case):
    model, batch, inputs = case
    features = model.features(batch)[0].detach().numpy()
    weights = arrays(model.prompter.prompts)
    for sample, code in enumerate(CODES):
        for m, name in enumerate(("image", "text")):
            part = features[sample, 5 * m : 5 * m + 5]
            if not reference.OBSERVED[code][m]:
                assert (part == 0).all()
                continue
            args = arrays(model.prompter.outputs[m]), m, code, inputs[name][sample], DEPTH, HEADS[m]
            expected = reference.feature(model.towers[m].weights, weights, *args)
            np.testing.assert_allclose(part, expected, rtol=0, atol=1e-11)


def test_gradients_by_central_differences(case):
    model, batch, inputs = case
    model.zero_grad()
    F.cross_entropy(model(batch), batch.labels).backward()
    groups = {
        "prompts": (arrays(model.prompter.prompts), model.prompter.prompts),
        "head": (arrays(model.head), model.head),
        **{f"output{m}": (arrays(output), output) for m, output in enumerate(model.prompter.outputs)},
    }
    rng = np.random.default_rng(0)

    def loss():
        outputs = [groups["output0"][0], groups["output1"][0]]
        z = slow_logits(model, inputs, groups["prompts"][0], outputs, groups["head"][0])
        return reference.cross_entropy(z, batch.labels.tolist())

    checked = 0
    for values, module in groups.values():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            flat = values[name].reshape(-1)
            place = int(rng.integers(flat.size))
            kept, step = flat[place], 1e-5
            flat[place] = kept + step
            above = loss()
            flat[place] = kept - step
            below = loss()
            flat[place] = kept
            got = float(parameter.grad.reshape(-1)[place])
            assert got == pytest.approx((above - below) / (2 * step), abs=2e-9), name
            checked += 1
    assert checked > 40


def test_official_sizes():
    """Counts of DCP 3.5 at CLIP ViT-B/16."""
    specs = tuple(
        TowerSpec(
            name, width, 12, 512, heads, torch.ones(width), torch.zeros(width), 1e-5, torch.zeros(width, 512), train
        )
        for name, width, heads, train in (("image", 768, 12, True), ("text", 512, 8, False))
    )
    for queries, count in (("frozen", 5_815_552), ("param", 5_861_632)):
        prompter = DCP(dynamic_queries=queries).build(Context(specs, (3, 1, 2)))
        assert sum(p.numel() for p in prompter.parameters() if p.requires_grad) == count
        if queries == "frozen":
            parts = {}
            for name, value in prompter.prompts.named_parameters():
                parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0) + value.numel()
            assert parts == {
                "static": 30_720,
                "common": 18_432,
                "generators": 1_882_560,
                "common_maps": 75_072,
                "attention": 3_412_992,
            }


@pytest.mark.parametrize("kind", ["table", "additive"])
def test_tables_of_three_modalities(kind):
    widths, blocks, depth = {"image": 8, "text": 6, "audio": 4}, [3, 4, 1], 3
    prompts = CorrelatedPrompts(widths, 6, depth, blocks=blocks, reduction=4, pattern_params=kind).double()
    rng = np.random.default_rng(2)
    with torch.no_grad():
        for value in prompts.parameters():
            value.add_(torch.from_numpy(0.3 * rng.normal(size=tuple(value.shape))))
    weights = arrays(prompts)
    # The complete pattern, then pairs, then single modalities, each by value of their bits.
    order = [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    masks = [7, 3, 5, 6, 1, 2, 4]
    tables = prompts.tables(masks)
    assert [len(deep) for deep in tables.deep] == [3, 3, 1]
    for place, present in enumerate(order):
        deep, common, queries = reference.tables_of_many(weights, present, order if kind == "table" else None, depth)
        for m, width in enumerate(widths.values()):
            for j, rows in enumerate(tables.deep[m]):
                np.testing.assert_allclose(rows[place].detach(), deep[m][j], rtol=0, atol=1e-12)
            np.testing.assert_allclose(tables.common[m][place].detach(), common[m], rtol=0, atol=1e-12)
            in_weight, in_bias = weights[f"attention.{m}.in_proj_weight"], weights[f"attention.{m}.in_proj_bias"]
            query = reference.linear(queries[m], in_weight[:width], in_bias[:width])
            probe = query @ in_weight[width : 2 * width] / np.sqrt(width)
            np.testing.assert_allclose(tables.probe[m][place].detach(), probe, rtol=0, atol=1e-12)
