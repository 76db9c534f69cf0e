"""Every rival's logits against a slow float64 NumPy version, and MSP's penalty."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from missing_modal.classifier import Classifier
from missing_modal.methods import create
from missing_modal.patterns import to_mask
from torch.nn import functional as F


def _load(path):
    spec = importlib.util.spec_from_file_location(f"mm_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load(Path(__file__).parents[1] / "_toy_towers.py")
ref = _load(Path(__file__).with_name("_dcp_reference.py"))
rivals = _load(Path(__file__).with_name("_rivals_reference.py"))

CODES, DEPTH, BLOCKS, HEADS = [0, 1, 2, 2, 0, 1], 2, 3, (2, 3)
SIZES = {"length": 4, "depth": DEPTH}


def arrays(module):
    return {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}


def of_method(name, options, p, m, code):
    """Insert function and keys of tower m for a sample of this type."""
    if name in ("deep_prompts", "vpt", "coop"):
        key = f"prompts.{m}"
        return (rivals.replaced(p[key]) if key in p else rivals.no_rows), None
    if name == "mmp_input":
        rule = rivals.accumulated if options.get("insertion") == "accumulate" else rivals.replaced
        return rule(p[f"prompts.{m}.value"][code]), None
    if name == "mmp_attention":
        return rivals.no_rows, rivals.halves(p[f"prompts.{m}.value"][code])
    if name == "maple":
        return rivals.replaced(rivals.maple_tables(ref, p, DEPTH)[m]), None
    if name == "msp":
        return rivals.replaced(rivals.msp_table(p[f"prompts.{m}"], ref.OBSERVED[code])), None
    return rivals.no_rows, None


def slow_logits(model, name, options, inputs):
    p, head = arrays(model.prompter), arrays(model.head)
    outputs = [arrays(output) for output in model.prompter.outputs]
    weights = [tower.weights for tower in model.towers]
    held = [tower.placeholder(1)[0].numpy() for tower in model.towers]

    def feature(m, code, x):
        insert, keys = of_method(name, options, p, m, code)
        return rivals.encode(ref, weights[m], outputs[m], x, BLOCKS, HEADS[m], insert, keys)

    features = []
    for sample, code in enumerate(CODES):
        parts = []
        for m, modality in enumerate(("image", "text")):
            if ref.OBSERVED[code][m]:
                parts.append(feature(m, code, inputs[modality][sample]))
            elif name == "zero_imputation":
                parts.append(feature(m, code, held[m]))
            elif name == "mean_imputation":
                there = [i for i, other in enumerate(CODES) if ref.OBSERVED[other][m]]
                parts.append(np.mean([feature(m, CODES[i], inputs[modality][i]) for i in there], axis=0))
            else:
                parts.append(np.zeros(5))
        features.append(np.concatenate(parts))
    return ref.linear(np.stack(features), head["weight"], head["bias"])


CASES = {
    "head_only": ("head_only", {}),
    "deep_prompts": ("deep_prompts", SIZES),
    "deep_prompts_text": ("deep_prompts", {**SIZES, "towers": "text"}),
    "vpt_deep": ("vpt", SIZES),
    "vpt_shallow": ("vpt", {**SIZES, "deep": False}),
    "coop": ("coop", {"length": 3}),
    "mmp_input": ("mmp_input", SIZES),
    "mmp_input_stacked": ("mmp_input", {**SIZES, "insertion": "accumulate"}),
    "mmp_attention": ("mmp_attention", SIZES),
    "maple": ("maple", SIZES),
    "msp": ("msp", SIZES),
    "zero_imputation": ("zero_imputation", {}),
    "mean_imputation": ("mean_imputation", {}),
}


def case_of(name, options):
    """A model off its initial values, a batch, and the batch's inputs."""
    model = Classifier(toy.two_towers(BLOCKS), create(name, **options), 3).double()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.from_numpy(0.4 * rng.normal(size=tuple(value.shape))))
    inputs = toy.draw_inputs(len(CODES), seed=2)
    batch = toy.make_batch([to_mask(code) for code in CODES], inputs=inputs)
    model.prepare([batch])
    return model, batch, inputs


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    name, options = CASES[case]
    model, batch, inputs = case_of(name, options)
    np.testing.assert_allclose(model(batch).detach(), slow_logits(model, name, options, inputs), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", ["deep_prompts", "coop", "mmp_input_stacked", "mmp_attention", "maple", "msp"])
def test_gradients_by_central_differences(case):
    """Along a random direction of each trained tensor; MSP's penalty is part of its loss."""
    name, options = CASES[case]
    model, batch, inputs = case_of(name, options)
    logits, tables = model.with_tables(batch)
    (F.cross_entropy(logits, batch.labels) + sum(model.prompter.penalty(tables).values())).backward()

    def loss():
        penalty = rivals.msp_penalty([v.detach().numpy() for v in model.prompter.prompts]) if name == "msp" else 0.0
        return ref.cross_entropy(slow_logits(model, name, options, inputs), batch.labels.tolist()) + penalty

    rng = np.random.default_rng(3)
    for key, value in model.named_parameters():
        if not value.requires_grad:
            continue
        way = torch.from_numpy(rng.normal(size=tuple(value.shape)))
        ends = []
        for step in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                value.add_(way, alpha=step)
            ends.append(loss())
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((value.grad * way).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8), key


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_penalty_of_msp(weight):
    model = Classifier(toy.two_towers(BLOCKS), create("msp", **SIZES, orthogonality=weight), 3).double()
    batch = toy.make_batch([3, 1, 2])
    _, tables = model.with_tables(batch)
    terms = model.prompter.penalty(tables)
    expected = rivals.msp_penalty([value.detach().numpy() for value in model.prompter.prompts])
    assert terms.keys() == {"orthogonality"}
    assert terms["orthogonality"].item() == pytest.approx(weight * expected, abs=1e-13)
    terms["orthogonality"].backward()
    assert all(value.grad.abs().max() > 0 for value in model.prompter.prompts)
