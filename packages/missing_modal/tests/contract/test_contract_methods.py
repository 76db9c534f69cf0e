"""The shared contract of method tables, and what every method promises in the classifier's loop."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.classifier import Classifier
from missing_modal.methods import METHODS, create
from missing_modal.methods.base import Method
from polymodal import checks
from polymodal.errors import UserError
from torch.nn import functional as F

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

OPTIONS = {
    "dcp": {"length": 6, "depth": 2, "reduction": 3},
    "head_only": {"train_out": True},
    "deep_prompts": {"length": 4, "depth": 2},
    "vpt": {"length": 4, "depth": 2},
    "coop": {"length": 4},
    "mmp_input": {"length": 4, "depth": 2},
    "mmp_attention": {"length": 4, "depth": 2},
    "maple": {"length": 4, "depth": 2},
    "msp": {"length": 4, "depth": 2},
    "zero_imputation": {"train_out": True},
    "mean_imputation": {},
    "modality_dropout": {"rate": 0.5},
}
MASKS = [3, 1, 2, 3, 2, 1, 1]
every_method = pytest.mark.parametrize("name", list(OPTIONS))


def make(name, seed=0, towers=None, **options):
    model = Classifier(towers or toy.two_towers(), create(name, **{**OPTIONS[name], **options}), 3, seed).double()
    model.prepare([toy.make_batch([3, 1, 2, 3], seed=9)])
    return model


def run(model, batch):
    """Logits, and all gradients of a loss by name (zeros where there is none)."""
    model.zero_grad()
    logits, tables = model.with_tables(batch)
    (F.cross_entropy(logits, batch.labels) + sum(model.prompter.penalty(tables).values())).backward()
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }
    return logits.detach(), grads


def same(first, second, atol=1e-12):
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=atol)
    for name in first[1]:
        torch.testing.assert_close(first[1][name], second[1][name], rtol=0, atol=atol, msg=name)


def test_table_of_methods():
    checks.check_registry(METHODS, (), OPTIONS, base=Method)
    checks.check_registry(METHODS, (), base=Method)
    two_towers = {row.name for row in METHODS if "fused" not in row.tags}  # ViLT's has tests of its own
    assert two_towers == set(OPTIONS), "a new method needs options here, to go through these checks"


def test_listing_loads_no_torch():
    script = "import sys; from missing_modal.methods import METHODS; METHODS.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@every_method
def test_skipping_a_missing_tower_is_exact(name):
    model, batch = make(name), toy.make_batch(MASKS)
    fast = run(model, batch)
    model.skip = False
    same(fast, run(model, batch))


@every_method
def test_content_of_placeholders_does_not_count(name, monkeypatch):
    model, batch = make(name), toy.make_batch(MASKS)
    model.skip = False
    before = model(batch).detach()
    other = toy.draw_inputs(len(MASKS), seed=77)
    monkeypatch.setattr(
        toy.ToyTower, "placeholder", lambda tower, count: torch.from_numpy(other[tower.spec.name][:count])
    )
    changed = (model(batch).detach() - before).abs().amax(1)
    lacking = torch.tensor([mask != 3 for mask in MASKS])
    if name == "zero_imputation":  # the one that encodes them
        assert (changed[lacking] > 1e-6).all()
        assert (changed[~lacking] < 1e-12).all()
    else:
        assert (changed == 0).all()


@every_method
def test_text_cut_is_exact(name):
    model, batch = make(name), toy.make_batch(MASKS)
    whole = torch.from_numpy(toy.draw_inputs(len(MASKS))["text"]).argmax(-1)
    assert int(whole.max()) + 1 < toy.POSITIONS, "the inputs must have something to cut"
    cut = run(model, batch)
    batch.lengths["text"] = int(batch.inputs["text"].argmax(-1).max()) + 1
    same(cut, run(model, batch))
    model.cut = False
    same(cut, run(model, batch))


@every_method
def test_batch_is_the_loop_over_samples_in_any_order(name):
    model, inputs = make(name), toy.draw_inputs(len(MASKS))
    logits = model(toy.make_batch(MASKS, inputs=inputs)).detach()
    for order in ([4, 2, 6, 0, 1, 5, 3], *([i] for i in range(len(MASKS)))):
        picked = {key: value[order] for key, value in inputs.items()}
        found = model(toy.make_batch([MASKS[i] for i in order], inputs=picked)).detach()
        torch.testing.assert_close(found, logits[order], rtol=0, atol=1e-12)


@every_method
def test_a_sample_does_not_see_what_others_lack(name):
    model, inputs = make(name), toy.draw_inputs(len(MASKS))
    logits = model(toy.make_batch([3] * 4 + [1, 2, 1], inputs=inputs)).detach()
    other = model(toy.make_batch([3, 2, 3, 1, 1, 1, 3], inputs=inputs)).detach()
    kept = torch.tensor([True, False, True, False, True, False, False])
    torch.testing.assert_close(logits[kept], other[kept], rtol=0, atol=1e-12)
    assert ((logits - other).abs().amax(1)[~kept] > 1e-6).all()


@every_method
def test_training_leaves_the_towers_alone(name):
    towers = toy.two_towers()
    before = [state_hash(tower) for tower in towers]
    model, batch = make(name, towers=towers), toy.make_batch(MASKS)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    start = {key: value.detach().clone() for key, value in trained.items()}
    frozen = {value.data_ptr() for tower in towers for value in tower.state().values()}
    assert not frozen & {value.data_ptr() for value in model.state_dict().values()}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2, weight_decay=0.0)
    for _ in range(2):
        _, grads = run(model, batch)
        optimizer.step()
    assert [state_hash(tower) for tower in towers] == before
    assert all(not value.requires_grad for tower in towers for value in tower.net.values())
    still = {key for key in start if torch.equal(start[key], trained[key])}
    assert not still, "a trained parameter that never gets a gradient"
    assert all((grads[key] == 0).all() for key in grads if key not in trained)


@every_method
def test_built_from_the_seed_alone(name):
    torch.manual_seed(1)
    first, state = make(name).state_dict(), torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(5)
    second = make(name).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "building must not draw from the global generator"
    other = make(name, seed=1).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@every_method
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(name, how):
    kind = torch.bfloat16 if how == "weights" else torch.float32
    towers = [tower.to("cpu", kind) for tower in toy.two_towers()]
    model = Classifier(towers, create(name, **OPTIONS[name]), 3).float()
    batch = toy.make_batch(MASKS)
    model.prepare([batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits, tables = model.with_tables(batch)
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits, batch.labels) + sum(model.prompter.penalty(tables).values())
    loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
    exact = Classifier(toy.two_towers(), create(name, **OPTIONS[name]), 3).double()
    exact.prepare([batch])
    torch.testing.assert_close(logits.double(), exact(batch), rtol=0, atol=0.05)


@every_method
def test_rows_in_front(name):
    model = make(name)
    for number, tower in enumerate(model.towers):
        tokens = tower.embed(torch.from_numpy(toy.draw_inputs(2)[tower.spec.name]))
        inserted = model.prompter.enter(number, tokens, torch.tensor([0, 1]), model.prompter.tables([1, 3]))
        assert model.num_prefix_tokens[tower.spec.name] == (0 if inserted is None else inserted.shape[1])


@pytest.mark.parametrize("name", ["dcp", "deep_prompts", "vpt", "mmp_input", "mmp_attention", "maple", "msp"])
def test_deeper_than_the_tower_is_refused(name):
    with pytest.raises(UserError, match="has 3 blocks"):
        make(name, depth=4)
    with pytest.raises(UserError, match="prompt depth 0"):
        make(name, depth=0)
