"""What single rivals promise beyond what every method does: dropout, imputation, stacked rows, keys, couplings."""

import importlib.util
from pathlib import Path

import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.classifier import Classifier
from missing_modal.methods import create
from missing_modal.methods.base import Context
from polymodal.errors import UserError
from torch.nn import functional as F

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

SIZES = {"length": 4, "depth": 2}


def model_of(name, frozen=None, **options):
    return Classifier(frozen or toy.two_towers(), create(name, **options), 3).double()


def count(model):
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def test_sizes_of_the_small_experiment():
    """Parameters of the table in DCP 8: width 32, 3 blocks, e = 16, n = 2, J = 2, r = 4, two classes."""
    towers = [toy.ToyTower(name, 32, 3, 16, 2) for name in ("image", "text")]
    sizes = {"length": 6, "depth": 2, "train_out": False}
    rows = {
        ("head_only",): {},
        ("deep_prompts",): sizes,
        ("mmp_input",): sizes,
        ("dcp",): {**sizes, "reduction": 4},
        ("dcp", "blind"): {**sizes, "reduction": 4, "blind": True},
    }
    found = [count(Classifier(towers, create(key[0], **options), 2)) for key, options in rows.items()]
    assert found == [66, 834, 2370, 17_298, 17_298]


# ------------------------------------------------------------------ modality dropout


def thinned(model, masks, seed=0):
    batch = toy.make_batch(masks)
    return batch, model.prompter.thin(batch, torch.Generator().manual_seed(seed))


def test_dropout_drops_at_the_rate_and_never_all():
    model, masks = model_of("modality_dropout", rate=0.3), [3] * 4000 + [1] * 500 + [2] * 500
    _, thin = thinned(model, masks)
    assert thin.masks[4000:] == masks[4000:]
    shares = [thin.masks[:4000].count(mask) / 4000 for mask in (3, 1, 2)]
    assert shares == pytest.approx([0.49, 0.255, 0.255], abs=0.03)
    assert thinned(model, masks)[1].masks == thin.masks
    assert thinned(model, masks, seed=1)[1].masks != thin.masks


def test_dropout_packs_what_is_left():
    model = model_of("modality_dropout", rate=0.6)
    batch, thin = thinned(model, [3, 1, 3, 2, 3, 3])
    assert thin.masks != batch.masks
    for bit, name in enumerate(("image", "text")):
        have = [i for i, mask in enumerate(thin.masks) if mask >> bit & 1]
        assert thin.rows[name].tolist() == have
        places = [batch.rows[name].tolist().index(i) for i in have]
        assert torch.equal(thin.inputs[name], batch.inputs[name][places])


def test_dropout_of_nothing_changes_nothing():
    batch, thin = thinned(model_of("modality_dropout", rate=0.0), [3, 1, 2])
    assert thin.masks == batch.masks
    assert all(thin.inputs[name] is batch.inputs[name] for name in batch.inputs)
    other = model_of("head_only")
    assert other.prompter.thin(batch, torch.Generator()) is batch


def test_fine_tuning_trains_copies():
    towers = toy.two_towers()
    before = [state_hash(tower) for tower in towers]
    model, batch = model_of("modality_dropout", towers), toy.make_batch([3, 1, 2])
    same = model_of("head_only", towers, train_out=True)
    torch.testing.assert_close(model(batch), same(batch), rtol=0, atol=0)
    first = model(batch).detach()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.5)
    F.cross_entropy(model(batch), batch.labels).backward()
    optimizer.step()
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert {"tuned.0.0_in_weight", "tuned.1.embedding", "prompter.outputs.1.projection"} <= trained
    assert not torch.equal(model(batch), first)
    assert [state_hash(tower) for tower in towers] == before
    assert all(tower.net["0_in_weight"].grad is None for tower in towers)
    fresh = model_of("modality_dropout", towers)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batch), model(batch))


def test_a_tower_without_a_trainable_copy_says_so(monkeypatch):
    monkeypatch.delattr(toy.ToyTower, "tuned")
    with pytest.raises(UserError, match="toy:image: this tower cannot be fine-tuned"):
        model_of("modality_dropout")
    assert not len(model_of("modality_dropout", tune=False).tuned)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_rates_that_are_none(rate):
    with pytest.raises(UserError, match="expected a probability"):
        model_of("modality_dropout", rate=rate)


# ------------------------------------------------------------------ imputation


def test_mean_imputation_wants_its_means():
    model = model_of("mean_imputation")
    assert torch.isfinite(model(toy.make_batch([3, 3]))).all(), "complete rows need none"
    with pytest.raises(UserError, match="call Classifier.prepare"):
        model(toy.make_batch([3, 1]))


def test_means_are_those_of_the_samples_that_have_the_modality():
    model = model_of("mean_imputation")
    batches = [toy.make_batch([3, 1, 1], seed=1), toy.make_batch([2, 3], seed=2)]
    plain = model_of("head_only")
    features = torch.cat([plain.features(batch)[0] for batch in batches]).detach()
    model.prepare(batches)
    expected = torch.cat([features[[0, 1, 2, 4], :5].mean(0), features[[0, 3, 4], 5:].mean(0)])
    found = model.features(toy.make_batch([1, 2], seed=3))[0]
    torch.testing.assert_close(found[0, 5:], expected[5:], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, :5], expected[:5], rtol=0, atol=1e-12)
    again = model_of("mean_imputation")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batches[0]), model(batches[0]))
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["head.weight", "head.bias"]


def test_zero_imputation_needs_no_input_of_a_kind_at_all():
    model = model_of("zero_imputation")
    alone = model(toy.make_batch([1, 1]))
    mixed = model(toy.make_batch([1, 1, 3], inputs=_with_one_more()))
    torch.testing.assert_close(alone, mixed[:2], rtol=0, atol=1e-12)


def _with_one_more():
    first, more = toy.draw_inputs(2), toy.draw_inputs(3, seed=5)
    for name, value in more.items():
        value[:2] = first[name]
    return more


# ------------------------------------------------------------------ prompts


def test_stacked_rows_and_keys():
    stacked = model_of("mmp_input", **SIZES, insertion="accumulate")
    assert stacked.num_prefix_tokens == {"image": 8, "text": 8}
    assert model_of("mmp_input", **SIZES).num_prefix_tokens == {"image": 4, "text": 4}
    keys = model_of("mmp_attention", **SIZES)
    assert keys.num_prefix_tokens == {"image": 0, "text": 0}
    assert count(keys) == count(stacked)
    tables = keys.prompter.tables([3, 1])
    got = keys.prompter.extra(0, 1, torch.tensor([1, 0]), tables)
    assert torch.equal(torch.cat(got, dim=1), tables[0][:, 1][[1, 0]])
    assert keys.prompter.extra(0, 2, torch.tensor([1, 0]), tables) is None


def test_towers_that_get_prompts():
    assert model_of("vpt", **SIZES).num_prefix_tokens == {"image": 4, "text": 0}
    assert model_of("coop", length=4).num_prefix_tokens == {"image": 0, "text": 4}
    assert model_of("deep_prompts", **SIZES, towers="text").num_prefix_tokens == {"image": 0, "text": 4}
    with pytest.raises(UserError, match="prompts for 'audio'; the towers are image, text"):
        model_of("vpt", tower="audio")


@pytest.mark.parametrize("name", ["deep_prompts", "coop", "mmp_input", "mmp_attention", "maple", "msp"])
def test_rows_of_length_zero_are_no_rows(name):
    sizes = {"length": 0} if name == "coop" else {"length": 0, "depth": 2}
    model, plain = model_of(name, **sizes), model_of("head_only")
    batch = toy.make_batch([3, 1, 2])
    torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=1e-13)
    assert not model.prompter.penalty(model.prompter.tables([3]))


def test_more_modalities_than_two():
    towers = [*toy.two_towers(), toy.ToyTower("audio", 4, 1, 3, 2, 8), toy.FeatureTower()]
    names, masks = ("image", "text", "audio", "table"), [15, 1, 2, 4, 8, 9, 6, 7]
    for name in ("deep_prompts", "mmp_input", "mmp_attention", "maple", "msp", "zero_imputation", "mean_imputation"):
        options = {**SIZES, "depth": 3} if "imputation" not in name else {}
        model = model_of(name, towers, **options)
        batch = toy.make_batch(masks, names)
        model.prepare([batch])
        logits, tables = model.with_tables(batch)
        (F.cross_entropy(logits, batch.labels) + sum(model.prompter.penalty(tables).values())).backward()
        wants = {key for key, value in model.named_parameters() if value.requires_grad}
        assert {key for key, value in model.named_parameters() if value.grad is not None} == wants, name
        model.skip = False
        torch.testing.assert_close(model(batch), logits, rtol=0, atol=1e-12)


def test_maple_from_another_source():
    model = model_of("maple", **SIZES, source="image")
    image, text = model.prompter.tables([3])
    layer = model.prompter.couplings[1][0]
    torch.testing.assert_close(text[0, 0], layer(image[0, 0]), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mmp_attention", {"length": 5}, "expected an even number"),
        ("mmp_input", {"insertion": "append"}, "expected replace or accumulate"),
        ("msp", {"orthogonality": -1.0}, "expected a weight"),
        ("deep_prompts", {"length": -1}, "prompt length -1"),
        ("maple", {"source": "audio"}, "prompts for 'audio'"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(UserError, match=message):
        model_of(name, **{**SIZES, **options})


def test_towers_without_blocks_take_no_prompts():
    spec = toy.FeatureTower().spec
    with pytest.raises(UserError, match="choose head_only"):
        create("deep_prompts").build(Context((spec,), (1,)))


# ------------------------------------------------------------------ batches


def test_a_batch_cannot_get_back_what_it_lacks():
    batch = toy.make_batch([3, 1])
    for masks in ([3, 3], [3, 0], [3]):
        with pytest.raises(ValueError, match="non-empty part"):
            batch.restrict(masks, ("image", "text"))
    only = batch.restrict([1, 1], ("image", "text"))
    assert "text" not in only.inputs
    assert only.inputs["image"] is batch.inputs["image"]
    assert batch.masks == [3, 1]
