"""Methods after the encoder of LLaVA models, refusals, restoration, records."""

from dataclasses import dataclass

import pytest
import torch
import transformers as tf
import vlm_tiny as tiny
from polymodal.errors import UserError
from vlm_accel import Step, accelerate, methods
from vlm_accel.methods.base import TokenMethod
from vlm_llava import FAMILIES, STEPS, Pick, batch_of, first_layer, generate, model_of, plain_modules, run


@pytest.mark.parametrize("name", FAMILIES)
def test_methods_after_the_encoder_see_the_attention_of_eager_and_keep_what_they_say(name):
    model, batch, box = model_of(name, "eager"), batch_of(name), []
    with torch.no_grad():
        pixels = batch["pixel_values"].flatten(0, -4) if batch["pixel_values"].ndim == 5 else batch["pixel_values"]
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    prefix = int(name != "llava_onevision")
    used = 2 if prefix else 3
    with accelerate(model_of(name), Pick(seen=(box,)), trace=True) as handle:
        logits = run(model_of(name), batch).logits
    (features,) = box
    for block in (0, used):
        attention = out.attentions[block]
        expected = attention[:, :, 0, 1:] if prefix else attention.mean(2)
        assert torch.allclose(features.cls_attention[block], expected, atol=1e-6)
        assert features.cls_query[block].shape == (len(pixels), 4, 8)
    assert (features.has_cls, features.grid) == (bool(prefix), (4, 4))
    assert torch.allclose(features.x, out.hidden_states[used + 1][:, prefix:], atol=1e-5)
    assert features.groups == (None if name == "llava" else [(0, [1, 2], (1, 2))])
    (one,) = handle.maps
    assert [step.stage for step in one.steps] == ["features", "splice"]
    alive = one.survivors().reshape(-1, 16)
    assert alive.sum(1).tolist() == ([2] if name == "llava" else [2, 3, 4])
    assert handle._session.vision[-1].left == alive.sum(1).tolist()
    if name == "llava":
        assert logits.shape[1] == 10 + 2
        assert (
            alive[0].nonzero()[0].tolist()
            == features.cls_attention[used][0].mean(0).topk(2).indices.sort().values.tolist()
        )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "method", ["visionzip", "prumerge", "prumerge_plus", "hired", "fastervlm", "vispruner", "divprune"]
)
def test_published_methods_shorten_the_prompt_and_generate(name, method):
    model, batch = model_of(name), batch_of(name, 2, 1)
    plain = run(model, batch).logits.shape[1]
    made = methods.create(method, **({"dominant": 4, "contextual": 2} if method == "visionzip" else {}))
    with accelerate(model, made, trace=True) as handle:
        short = run(model, batch).logits.shape[1]
        assert generate(model, batch).shape[1] == batch["input_ids"].shape[1] + 4
    assert 10 < short < plain
    for one in handle.maps:
        assert one.steps[-1].stage == "splice"
        assert len(one.owner()) == one.patches


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("even", [True, False])
def test_vision_steps_and_a_method_after_the_encoder_combine(name, even):
    model, batch, box = model_of(name), batch_of(name), []
    with accelerate(model, [Pick(even, (box,)), "drop"], schedule=STEPS, trace=True) as handle:
        run(model, batch)
    (features,) = box
    assert features.x.shape[1] == 9
    assert features.grid is None
    assert all(part.shape[-1] == 9 for part in features.cls_attention.values())
    (one,) = handle.maps
    assert [step.stage for step in one.steps] == ["vision", "vision", "features", "splice"]
    alive = one.survivors().reshape(-1, 16)
    assert alive.sum(1).tolist() == [3 if even else 2 + image for image in range(len(alive))]
    # attention of block 0 is that of the rows which are left: their places among the 16 patches
    whole = []
    with accelerate(model, Pick(seen=(whole,))):
        run(model, batch)
    places = torch.from_numpy(one.positions(1)).reshape(-1, 9) % 16
    expected = torch.stack([whole[0].cls_attention[0][i][:, places[i]] for i in range(len(places))])
    assert torch.allclose(features.cls_attention[0], expected, atol=1e-6)


# ---- towers


def test_features_of_several_layers_are_gathered_to_the_rows_that_are_left():
    torch.manual_seed(0)
    base = model_of("llava").config.to_dict() | {"vision_feature_layer": [-4, -2]}
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**base)).eval()
    batch, seen = batch_of("llava"), []
    plain = run(model, batch).logits
    with accelerate(model, "drop", schedule=[Step("vision", 1, ratio=1.0)]):
        assert torch.equal(run(model, batch).logits, plain)
    with accelerate(model, "drop", schedule=STEPS, trace=True) as handle:
        hook = model.model.multi_modal_projector.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        run(model, batch)
        hook.remove()
    with torch.no_grad():
        whole = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert seen[0].shape == (1, 9, 64)
    places = torch.from_numpy(handle.maps[0].positions())
    assert torch.allclose(seen[0][0, :, :32], whole[-4][0, 1 + places], atol=1e-6)


def test_a_class_row_that_reaches_the_language_model_is_kept():
    base = model_of("llava").config.to_dict() | {"vision_feature_select_strategy": "full"}
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**base)).eval()
    ids = torch.tensor([[3, 4, *[tiny.IMAGE] * 17, 5, 6]])
    batch = {"input_ids": ids, "pixel_values": batch_of("llava")["pixel_values"]}
    plain = run(model, batch).logits
    with accelerate(model, "drop", schedule=[Step("vision", 1, ratio=1.0)]):
        assert torch.equal(run(model, batch).logits, plain)
    for method, left in (("drop", 9), (Pick(), 2)):
        schedule = STEPS if method == "drop" else None
        with accelerate(model, method, schedule=schedule, trace=True) as handle:
            run(model, batch)
        rows = first_layer(handle)[0].tolist()
        assert rows[:3] == [0, 1, 2]
        assert len(rows) == 4 + 1 + left
        assert handle.maps[0].positions()[0] == -1


def test_a_first_patch_that_would_be_cut_off_and_an_unknown_tower_are_refused():
    model = tiny.build("llava_onevision")
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UserError, match="'full'"), accelerate(model, "drop", schedule=STEPS):
        pass
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "head_dim": 8, "image_size": 56, "patch_size": 14}
    base = model_of("llava").config.to_dict() | {"vision_config": vision, "vision_feature_layer": -1}
    other = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**base)).eval()
    with pytest.raises(UserError, match="no vision part"), accelerate(other, "drop", schedule=STEPS):
        pass
    with pytest.raises(UserError, match=r"pixtral.*CLIP and SigLIP"), accelerate(other, Pick()):
        pass
    with accelerate(other, "drop", schedule=[Step("llm", 2, ratio=0.5)]):
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_undone_after_an_exception(name):
    model, batch = tiny.build(name), batch_of(name)
    run(model, batch)
    before = plain_modules(model)

    @dataclass(frozen=True)
    class Broken(TokenMethod):
        def reduce(self, tokens, keep):
            raise RuntimeError("broken")

    for layout in ("scatter", "pseudo_grid"):
        opened = accelerate(model, Broken(), schedule=STEPS, layout=layout)
        with pytest.raises(RuntimeError, match="broken"), opened:
            run(model, batch)
        assert plain_modules(model) == before
    with accelerate(model, "drop", schedule=STEPS), pytest.raises(UserError, match="no_grad"):
        model(**batch)
    assert plain_modules(model) == before


def test_records_say_what_each_block_worked_on():
    model, batch = model_of("llava_next"), batch_of("llava_next", 2, 1)
    with accelerate(model, "recycle", schedule=STEPS) as handle:
        run(model, batch)
    (record,) = handle._session.vision
    assert (record.images, record.left) == (6, [9] * 6)
    assert (record.tokens, record.mlp_tokens) == ([102, 102, 78, 60], [102, 78, 60, 60])
    assert (record.lengths, record.full) == ([[17], [17], [13], [10]], [102] * 4)
