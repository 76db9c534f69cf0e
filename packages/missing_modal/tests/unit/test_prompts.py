"""Invariants of correlated prompts (DCP 8) beyond those that every method goes through."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.classifier import Classifier
from missing_modal.draws import Draws
from missing_modal.methods.dcp import DCP, DCPPrompter
from missing_modal.patterns import all_masks
from missing_modal.prompts import BakedPrompts, CorrelatedPrompts, DynamicAttention, PatternParameter
from polymodal.errors import UserError
from torch import nn

_spec = importlib.util.spec_from_file_location("mm_toy_towers", Path(__file__).parents[1] / "_toy_towers.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

SIZES = {"length": 6, "depth": 2, "reduction": 3}
MASKS = [3, 1, 2, 3, 2]


def model_of(towers=None, noise=0.2, **options):
    """A classifier whose parameters were moved off their initial values."""
    model = Classifier(towers or toy.two_towers(), DCP(**{**SIZES, **options}), 3).double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(noise * torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return model


def grads_of(model, batch):
    model.zero_grad()
    nn.functional.cross_entropy(model(batch), batch.labels).backward()
    return {name: value.grad for name, value in model.named_parameters()}


def plain_features(model, batch):
    """The towers by themselves: what encode_image and encode_text would give."""
    found = []
    for tower, output in zip(model.towers, model.prompter.outputs, strict=True):
        x = batch.inputs[tower.spec.name]
        h = tower.embed(x)
        for block in range(tower.spec.depth):
            h = tower.block(block, h, tower.mask(h.shape[1], h))
        row = h[torch.arange(len(h)), tower.pool_rows(x)]
        row = nn.functional.layer_norm(row, row.shape[-1:], output.norm_weight, output.norm_bias, 1e-5)
        found.append(row @ output.projection)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"correlated": False, "common": False, "dynamic": False}], ids=["length", "groups"]
)
def test_without_prompts_it_is_the_plain_towers(options):
    model, batch = model_of(**options), toy.make_batch([3, 3, 3])
    assert model.num_prefix_tokens == {"image": 0, "text": 0}
    assert not list(model.prompter.prompts.parameters())
    torch.testing.assert_close(model.features(batch)[0], plain_features(model, batch), rtol=0, atol=1e-12)
    with_prompts = model_of()
    gap = with_prompts.features(batch)[0] - plain_features(with_prompts, batch)
    assert (gap.abs().amax(1) > 1e-3).all()


def test_the_learner_names_its_rows_in_front():
    assert CorrelatedPrompts([8, 6], 12, 2).num_prefix_tokens == {"image": 12, "text": 12}
    learner = CorrelatedPrompts({"text": 8, "audio": 6, "tabular": 4}, 6, 2, blocks=[3, 1, 0], dynamic=False)
    assert learner.num_prefix_tokens == {"text": 4, "audio": 4, "tabular": 0}


def test_depth_one_uses_the_first_generators_only():
    model = model_of(depth=1)
    prompts = model.prompter.prompts
    assert [len(steps) for steps in prompts.generators] == [1, 1]
    tables = prompts.tables([3, 1, 2])
    assert [len(deep) for deep in tables.deep] == [1, 1]
    h = torch.randn(2, 12, 8, dtype=torch.float64)
    assert prompts.before(0, 1, h, torch.tensor([0, 1]), tables) is h


def test_later_blocks_replace_the_correlated_rows_only():
    prompts = model_of(depth=3).prompter.prompts
    tables, which = prompts.tables([1, 3]), torch.tensor([1, 0, 1])
    h = torch.randn(3, 12, 8, dtype=torch.float64)
    found = prompts.before(0, 2, h, which, tables)
    torch.testing.assert_close(found[:, :2], tables.deep[0][2][which], rtol=0, atol=0)
    assert torch.equal(found[:, 2:], h[:, 2:])
    assert found is not h


def test_only_text_trains_no_image_part_that_ends_in_the_image():
    model = model_of(depth=2)
    grads = grads_of(model, toy.make_batch([2, 2, 2]))
    dead = {name for name, value in grads.items() if value is None or not value.any()}
    gone = ("queries.0", "attention.0", "generators.0.1", "outputs.0", "common_maps.0")
    assert {name for name in grads if any(part in name for part in gone)} <= dead
    live = [name for name in grads if "generators.0.0" in name]
    assert live
    assert not dead & set(live), "V_0 still feeds the text's second prompts"
    assert grads["prompter.prompts.static.0"][0].abs().max() == 0
    assert grads["prompter.prompts.static.0"][1].abs().max() > 0, "what stands for the missing image is trained"


def test_what_stands_for_missing_text_reaches_the_image():
    model, batch = model_of(), toy.make_batch([1, 1])
    before = model(batch).detach()
    with torch.no_grad():
        model.prompter.prompts.static[1][1] += 1.0
    assert ((model(batch) - before).abs().amax(1) > 1e-6).all()
    with torch.no_grad():
        model.prompter.prompts.static[1][0] += 1.0
        model.prompter.prompts.static[1][1] -= 1.0
    torch.testing.assert_close(model(batch), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", ["correlated", "common", "dynamic"])
def test_a_group_switched_off_takes_its_rows_away(group):
    model = model_of(**{group: False})
    assert model.num_prefix_tokens == {"image": 4, "text": 4}
    parts = {"correlated": "generators", "common": "common_maps", "dynamic": "attention"}
    names = " ".join(name for name, _ in model.named_parameters())
    assert {other: part in names for other, part in parts.items()} == {other: other != group for other in parts}
    grads = grads_of(model, toy.make_batch(MASKS))
    assert all(
        value is not None and value.any() for name, value in grads.items() if name.startswith("prompter.prompts")
    )


def test_frozen_queries_are_saved_but_not_trained():
    frozen, trained = model_of(dynamic_queries="frozen"), model_of()
    names = {name for name, _ in frozen.named_parameters()}
    assert {name for name, _ in trained.named_parameters()} - names == {
        f"prompter.prompts.queries.{place}.value" for place in (0, 1)
    }
    assert frozen.state_dict().keys() == trained.state_dict().keys()


def test_official_copies_start_equal():
    def weights(init):
        prompts = CorrelatedPrompts((8, 6), 6, 3, reduction=3, init=init)
        return [[step[1].weight for step in steps] for steps in prompts.generators]

    for first, *others in weights("official"):
        assert all(torch.equal(first, other) for other in others)
    for first, *others in weights("independent"):
        assert not any(torch.equal(first, other) for other in others)


def test_blind_gives_every_pattern_the_complete_prompts():
    blind, seeing = model_of(blind=True), model_of()
    assert sum(p.numel() for p in blind.parameters()) == sum(p.numel() for p in seeing.parameters())
    tables = blind.prompter.tables([1, 3])
    assert torch.equal(tables.deep[0][1][0], tables.deep[0][1][1])
    full = seeing.prompter.tables([3])
    torch.testing.assert_close(tables.common[1][0], full.common[1][0], rtol=0, atol=1e-14)
    torch.testing.assert_close(blind(toy.make_batch([3, 3])), seeing(toy.make_batch([3, 3])), rtol=0, atol=1e-13)
    assert ((blind(toy.make_batch([1, 2])) - seeing(toy.make_batch([1, 2]))).abs() > 1e-6).any()


@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"correlated": False}, {"common": False}])
def test_baked_prompts_are_exact(options):
    model, batch = model_of(**options), toy.make_batch(MASKS)
    expected = model(batch).detach()
    model.prompter = model.prompter.bake()
    assert isinstance(model.prompter.prompts, BakedPrompts)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-12)
    assert not any(value.requires_grad for value in model.prompter.parameters())
    again = DCPPrompter(model.context, model.prompter.prompts).bake()
    assert isinstance(again.prompts, BakedPrompts)


def test_baked_prompts_have_the_promised_size():
    model = model_of()
    values = sum(value.numel() for value in model.prompter.bake().prompts.buffers())
    n, wide, depth = 2, 8 + 6, 2
    probes, maps = 3 * n * wide, 8 * 8 + 8 + 6 * 6 + 6
    assert values == 3 * (depth + 1) * n * wide + probes + maps


def test_a_pattern_that_was_not_baked_is_refused():
    baked = model_of().prompter.prompts.bake([3, 1])
    with pytest.raises(UserError, match="no prompts were exported for pattern 10"):
        baked.tables([2])


@settings(deadline=None, max_examples=15)
@given(masks=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_mixture_of_patterns_is_the_loop_over_samples(masks, seed):
    model, inputs = MODEL, toy.draw_inputs(len(masks), seed)
    together = model(toy.make_batch(masks, inputs=inputs)).detach()
    for i, mask in enumerate(masks):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        torch.testing.assert_close(model(toy.make_batch([mask], inputs=one))[0], together[i], rtol=0, atol=1e-12)


MODEL = model_of()


def test_dynamic_attention_is_multihead_attention_with_one_head():
    ours = DynamicAttention(8, Draws(0, "test"), "A").double()
    theirs = nn.MultiheadAttention(8, 1, batch_first=True).double()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in ours.parameters():
            value.add_(torch.randn(value.shape, generator=draw, dtype=value.dtype))
    theirs.load_state_dict(ours.state_dict())
    queries, tokens = torch.randn(3, 2, 8, generator=draw).double(), torch.randn(3, 7, 8, generator=draw).double()
    share = (ours.probe(queries) @ tokens.transpose(1, 2)).softmax(-1)
    expected, weights = theirs(queries, tokens, tokens)
    torch.testing.assert_close(share, weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours(share @ tokens), expected, rtol=0, atol=1e-13)
    matrix, shift = ours.affine()
    torch.testing.assert_close((share @ tokens) @ matrix.T + shift, expected, rtol=0, atol=1e-13)


def test_parameters_by_pattern():
    names = ("image", "text", "audio")
    table = PatternParameter(Draws(0, "test"), "p", names, (2, 3), "table")
    assert table.value.shape == (7, 2, 3)
    assert torch.equal(table([7, 4]), torch.stack([table.value[0], table.value[all_masks(names).index(4)]]))
    shared = PatternParameter(Draws(0, "test"), "p", names, (2, 3), "additive")
    assert shared.value.shape == (3, 2, 3)
    torch.testing.assert_close(shared([5])[0], (shared.value[0] + shared.value[2]) / 2)
    masks = [1, 7, 6]
    whole = torch.stack([torch.stack([shared.value[p] for p in range(3) if m >> p & 1]).mean(0) for m in masks])
    torch.testing.assert_close(shared(masks), whole)
    with torch.autocast("cpu", torch.bfloat16):  # thirds would lose their digits
        torch.testing.assert_close(shared(masks), whole)
    assert PatternParameter(Draws(0, "test"), "p", ("a", "b", "c", "d"), (1,)).value.shape == (15, 1)
    assert PatternParameter(Draws(0, "test"), "p", ("a", "b", "c", "d", "e"), (1,)).value.shape == (5, 1)


@pytest.mark.parametrize("kind", ["table", "additive"])
def test_three_modalities_with_a_short_tower_and_one_without_blocks(kind):
    names = ("image", "text", "audio", "table")
    towers = [*toy.two_towers(), toy.ToyTower("audio", 4, 1, 3, 2, 8, project=False), toy.FeatureTower()]
    model = model_of(towers, depth=3, pattern_params=kind)
    assert model.num_prefix_tokens == {"image": 6, "text": 6, "audio": 6, "table": 0}
    prompts = model.prompter.prompts
    assert prompts.depths == [3, 3, 1, 0]
    assert [len(steps) for steps in prompts.generators] == [3, 3, 2, 2], "the recursion runs on; its end is not needed"
    masks = [15, 1, 2, 4, 8, 9, 6, 7]
    inputs = toy.draw_inputs(len(masks))
    batch = toy.make_batch(masks, names, inputs=inputs)
    grads = grads_of(model, batch)
    logits = model(batch).detach()
    assert {name for name, value in grads.items() if value is None} == {
        name for name, value in model.named_parameters() if not value.requires_grad
    }
    for i, mask in enumerate(masks):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        torch.testing.assert_close(model(toy.make_batch([mask], names, inputs=one))[0], logits[i], rtol=0, atol=1e-12)
    model.skip = False
    torch.testing.assert_close(model(batch), logits, rtol=0, atol=1e-12)
    again = grads_of(model, batch)
    for name, value in grads.items():
        if value is not None:
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-12)
    model.prompter = model.prompter.bake()
    torch.testing.assert_close(model(batch), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 7}, "prompt length 7; expected a multiple of three"),
        ({"depth": 4}, "the image tower has 3 blocks"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"dynamic_queries": "none"}, "dynamic_queries='none'"),
        ({"pattern_params": "tables"}, "pattern_params='tables'"),
        ({"reduction": 0}, "reduction 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        model_of(**options)


def test_bare_widths_are_image_and_text():
    assert CorrelatedPrompts((8, 6), 6, 2).modalities == ("image", "text")
    with pytest.raises(UserError, match="3 widths without names"):
        CorrelatedPrompts((8, 6, 4), 6, 2)
