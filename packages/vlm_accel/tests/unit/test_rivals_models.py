"""Rival methods end to end on tiny random models: identity, counts, batches, padding, generation, scores of layers."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from vlm_accel import accelerate
from vlm_accel.methods import create
from vlm_accel.methods._features import share

_path = Path(__file__).parents[1] / "golden" / "_rivals_reference.py"
_spec = importlib.util.spec_from_file_location("vlm_rivals_models_reference", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

AFTER = ("visionzip", "prumerge", "prumerge_plus", "hired", "fastervlm", "vispruner", "divprune")
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "pact")
# anyres tiles of SigLIP, without a class row; the other families are slow tests
FAST = ("llava_onevision",)
SLOW = tuple(name for name in tiny.VLMS if name not in FAST)
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@functools.cache
def _model(family, attn="sdpa"):
    return tiny.build(family, attn)


@functools.cache
def _inputs(family, batch=2, pad=0):
    return tiny.inputs(family, _model(family), batch=batch, pad=pad)


@functools.cache
def _plain(family):
    return _run(_model(family), _inputs(family))


def _run(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def _sample(inputs, number, batch=2):
    """One sample of a batch: every tensor holds equal parts for all samples."""
    return {key: tensor.chunk(batch)[number] for key, tensor in inputs.items()}


def _accelerated(family, method, inputs, **options):
    with accelerate(_model(family), method, **options) as handle:
        logits = _run(_model(family), inputs)
    return logits, handle


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_is_bit_equal(family):
    for method in AFTER + INSIDE:
        logits, _ = _accelerated(family, method, _inputs(family), ratio=1.0)
        assert torch.equal(logits, _plain(family)), method
    assert torch.equal(_run(_model(family), _inputs(family)), _plain(family))


def _expected(family, method, ratio):
    """Image tokens of each layer, where the count is known beforehand."""
    count = tiny.image_tokens(family)
    tiles = 2 if family in ("smolvlm", "idefics3") else 1
    if method in INSIDE:
        layers, left = [], [count // tiles] * tiles
        steps = {step.layer: step for part in create(method, ratio=ratio).schedule() for step in _steps(part)}
        for layer in range(6):
            left = [steps[layer].count(n) for n in left] if layer in steps else left
            layers.append(sum(left))
        return layers
    return [share(count // tiles, ratio) * tiles] * 6


def _steps(part):
    return part.steps(6) if hasattr(part, "steps") else [part]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", AFTER + INSIDE)
def test_half_of_the_tokens(family, method):
    """Counts as promised, finite logits of the rows left, generation, a batch as its samples alone."""
    model, inputs = _model(family), _inputs(family)
    first = 2 if family == "qwen3_vl" else 1
    logits, handle = _accelerated(family, method, inputs, ratio=0.5)
    record = handle._session.prefills[-1]
    assert torch.isfinite(logits).all()
    assert logits.shape[1] == record.rows[-1]
    if first == 1 and (method in INSIDE or family not in ("llava_next", "llava_onevision")):
        assert record.survivors == _expected(family, method, 0.5)
    for number in range(2):
        alone, _ = _accelerated(family, method, _sample(inputs, number), ratio=0.5)
        torch.testing.assert_close(logits[number, -5:], alone[0, -5:], atol=1e-5, rtol=0)
    assert not torch.equal(logits[:, -1], _plain(family)[:, -1])
    with accelerate(model, method, ratio=0.5), torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus", "hired", "visionzip", "sparsevlm", "pact"])
def test_published_defaults(family, method):
    """As published: counts that the picture decides differ in a batch, and agree with single runs all the same."""
    inputs = _inputs(family)
    logits, handle = _accelerated(family, method, inputs)
    assert handle._session.prefills[-1].survivors[-1] >= 1
    for number in range(2):
        alone, _ = _accelerated(family, method, _sample(inputs, number))
        torch.testing.assert_close(logits[number, -5:], alone[0, -5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava_next", pytest.param("llava_onevision", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ratio", [0.03, 0.1])
def test_a_tile_of_which_nothing_is_left(family, ratio):
    """HiRED with a small budget: some tiles give no token, beams and maps work all the same."""
    model, inputs = _model(family), _inputs(family)
    method = create("hired", ratio=ratio)
    logits, handle = _accelerated(family, method, inputs, trace=True)
    assert torch.isfinite(logits).all()
    assert min(handle._session.prefills[-1].survivors) >= 1
    assert len(handle.maps) == 2
    with accelerate(model, method), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "hired", "fastv", "pyramiddrop", "sparsevlm", "pact"])
def test_left_padding_changes_nothing(method):
    padded = _inputs("llava", 2, 3)
    alone = {key: tensor[:1, 3:] if key != "pixel_values" else tensor[:1] for key, tensor in padded.items()}
    logits, _ = _accelerated("llava", method, padded)
    single, _ = _accelerated("llava", method, alone)
    torch.testing.assert_close(logits[0, -5:], single[0, -5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", AFTER + INSIDE)
def test_maps_lead_from_patches_to_survivors(method):
    _, handle = _accelerated("llava", method, _inputs("llava"), ratio=0.5, trace=True)
    assert len(handle.maps) == 2
    for found in handle.maps:
        owner = found.owner(len(found.steps) - 1) if found.steps else found.owner(-1)
        assert owner.shape[0] == 16
        assert owner.max() < handle._session.prefills[-1].survivors[-1]


def test_fastv_is_drop_with_one_step():
    from vlm_accel import Step

    fastv, _ = _accelerated("llava", "fastv", _inputs("llava"))
    drop, _ = _accelerated("llava", "drop", _inputs("llava"), schedule=[Step("llm", 2, ratio=0.5)])
    assert torch.equal(fastv, drop)


def test_pyramiddrop_is_drop_with_score_self():
    """16 tokens: int() and round() agree."""
    from vlm_accel import Step

    method = create("drop", llm_score="self")
    steps = [Step("llm", layer, ratio=0.5) for layer in (2, 3, 4)]
    drop, handle = _accelerated("llava", method, _inputs("llava"), schedule=steps)
    pyramid, _ = _accelerated("llava", "pyramiddrop", _inputs("llava"))
    assert handle._session.prefills[-1].survivors == [16, 16, 8, 4, 2, 2]
    assert torch.equal(pyramid, drop)


# ---- scores against attention maps of the unmodified model


def _watched(monkeypatch, method):
    """The first scores that ``llm_scores`` gives."""
    kept = []
    original = type(create(method)).llm_scores

    def llm_scores(self, view):
        kept.append(original(self, view))
        return kept[-1]

    monkeypatch.setattr(type(create(method)), "llm_scores", llm_scores)
    return kept


def _inner(model):
    return model.model.language_model


def _caught(model, inputs, module):
    """What ``module`` is called with in a plain forward, and the attention maps."""
    kept = {}

    def hook(_module, args, kwargs):
        kept["x"] = args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    handle.remove()
    return kept["x"], out.attentions


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_sparsevlm_scores_are_attention_of_the_raters(family, monkeypatch):
    model, inputs = _model(family, "eager"), _inputs(family)
    embeds, maps = _caught(model, inputs, _inner(model).layers[0])
    kept = _watched(monkeypatch, "sparsevlm")
    with accelerate(model, "sparsevlm", ratio=0.5):
        _run(model, inputs)
    image = (inputs["input_ids"] == tiny.IMAGE).numpy()
    for i in range(2):
        rows = reference.raters(embeds[i].double().numpy(), image[i], np.ones_like(image[i]))
        expected = maps[0][i][:, rows].double().mean((0, 1))  # the step stands before layer 1 of 6
        torch.testing.assert_close(kept[0][i][image[i]].double(), expected[image[i]], atol=1e-6, rtol=0)


def test_pact_scores_are_importance_in_its_own_layer(monkeypatch):
    model, inputs = _model("llava", "eager"), _inputs("llava")
    layer = _inner(model).layers[4]
    x, _ = _caught(model, inputs, layer)
    kept = _watched(monkeypatch, "pact")
    with accelerate(model, "pact"):
        _run(model, inputs)
    image = (inputs["input_ids"] == tiny.IMAGE).numpy()
    with torch.inference_mode():
        normed = layer.input_layernorm(x)
        queries, keys = (
            p(normed).unflatten(-1, (-1, 16)).transpose(1, 2).double().numpy()
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
    for i in range(2):
        expected = reference.pact_importance(queries[i], keys[i], x[i].double().numpy(), image[i])
        np.testing.assert_allclose(kept[0][i].double().numpy()[image[i]], expected[image[i]], atol=1e-5)


# ---- what reaches the decoder against attention, keys and features of the unmodified encoder


@functools.cache
def _encoder():
    """(features of block L - 2, attention maps, queries and keys by block) of the plain CLIP, class row included."""
    model, inputs = _model("llava", "eager"), _inputs("llava")
    tower = model.model.vision_tower
    with torch.inference_mode():
        out = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        heads = []
        for layer, x in zip(_layers(tower), out.hidden_states, strict=False):
            normed = layer.layer_norm1(x)
            both = (layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed))
            heads.append([part.unflatten(-1, (4, 8)).double().numpy() for part in both])
    return out.hidden_states[-2], [a.double().numpy() for a in out.attentions], heads


def _layers(tower):
    return next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))


def _expected_rows(method, i):
    """Rows before the projector (after it for DivPrune) and their positions, by the reference."""
    features, maps, heads = _encoder()
    x = features[i, 1:].double().numpy()
    cls = maps[2][i, :, 0, 1:]  # block L - 2 of 4
    if method == "fastervlm":
        return reference.fastervlm(x, cls, 8)
    if method == "vispruner":
        return reference.vispruner(x, cls, 8)
    if method == "visionzip":
        return reference.visionzip(x, cls, heads[2][1][i, 1:], 7, 1)
    if method == "divprune":
        with torch.inference_mode():
            projected = _model("llava", "eager").model.multi_modal_projector(features[i : i + 1, 1:])[0]
        return reference.divprune(projected.double().numpy(), 8)
    queries, keys = heads[3]  # the last block, though the features are of the one before
    return reference.prumerge(x, keys[i, 1:], queries[i, 0], keys[i, 0])


@pytest.mark.parametrize("method", ["fastervlm", "vispruner", "visionzip", "divprune", "prumerge"])
def test_the_decoder_gets_what_the_rule_says(method):
    """From pixels to the rows that enter layer 0: blocks, class row, keys and places are the right ones."""
    model, inputs = _model("llava", "eager"), _inputs("llava")
    caught = []

    def hook(_module, args, kwargs):
        caught.append(args[0] if args else kwargs["hidden_states"])

    options = {} if method == "prumerge" else {"ratio": 0.5}
    with accelerate(model, method, trace=True, **options) as handle:
        _run(model, inputs)
        handle_kept = [step.kept for found in handle.maps for step in found.steps if step.stage == "features"]
        watch = _inner(model).layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        _run(model, inputs)
        watch.remove()
    for i in range(2):
        rows, kept = _expected_rows(method, i)
        assert handle_kept[i].tolist() == kept
        rows = torch.from_numpy(rows).float()
        with torch.inference_mode():
            wanted = rows if method == "divprune" else model.model.multi_modal_projector(rows)
        # five words of text, the image, five words; shorter samples are padded in front
        torch.testing.assert_close(caught[0][i, -5 - len(kept) : -5], wanted, atol=1e-4, rtol=1e-4)
