"""LLaVA 1.5, NeXT and OneVision through the whole model: identity, positions, layouts, video, feature methods."""

import functools
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
import vlm_tiny as tiny
from polymodal.errors import UserError
from vlm_accel import Step, accelerate, methods
from vlm_accel.methods.base import FeatureMethod, Reduced, TokenMethod

FAMILIES = ("llava", "llava_next", "llava_onevision")
STEPS = [Step("vision", 1, keep=12), Step("vision", 2, keep=9)]


@functools.cache
def model_of(name, attn="sdpa"):
    return tiny.build(name, attn)


def batch_of(name, batch=1, images=1, **options):
    return tiny.inputs(name, model_of(name), batch=batch, images=images, **options)


def many(name, batch, images):
    """Several images a sample; OneVision then gives each one tile (``batch_num_images``)."""
    made = batch_of(name, batch, images)
    if name == "llava_onevision" and images > 1:
        run, text = torch.full((17,), tiny.IMAGE), torch.arange(10, 15)
        row = torch.cat([text] + [part for _ in range(images) for part in (run, text)])
        made["input_ids"] = row.repeat(batch, 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        made["pixel_values"] = made["pixel_values"][:, :1]
        made["batch_num_images"] = torch.full((batch,), images)
    return made


def run(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options)


def generate(model, batch, **options):
    return model.generate(**batch, **({"max_new_tokens": 4, "do_sample": False} | options))


def plain_modules(model):
    """Instance attributes and hooks of every module."""
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), id(m.__dict__.get("config")))
        for name, m in model.named_modules()
    ]


def first_layer(handle):
    """(B, n) logical positions that the first decoder layer has cached, -1 for padding."""
    return handle._session.cache.layers[0].index


@dataclass(frozen=True)
class First(TokenMethod):
    """Keeps the patches of the smallest number that ``order`` gives them (a permutation of 16), whatever they hold."""

    order: tuple = tuple(range(16))

    def score(self, stage):
        return "none"

    def reduce(self, tokens, keep):
        rank = torch.tensor(self.order)[tokens.index]
        kept = rank.argsort(dim=1)[:, :keep].sort(1).values
        return Reduced(tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[2])), kept)


@dataclass(frozen=True)
class Pick(FeatureMethod):
    """Keeps (number of the image + 2) patches with most CLS attention; writes down what it was given."""

    even: bool = False
    seen: tuple = ()
    keep_all: bool = False

    def blocks(self, depth, used):
        return (0, used)

    def select(self, features):
        for box in self.seen:
            box.append(features)
        answers = []
        for image in range(len(features.x)):
            count = features.x.shape[1] if self.keep_all else 3 if self.even else 2 + image
            attention = features.cls_attention[max(features.cls_attention)][image].mean(0)
            kept = attention.argsort(descending=True, stable=True)[:count].sort().values[None]
            assign = torch.full((1, features.x.shape[1]), -1).scatter(1, kept, torch.arange(count)[None])
            answers.append(Reduced(features.x[image : image + 1, kept[0]], kept, assign=assign))
        return answers


# ---- identity


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_keeping_all_is_bit_equal_and_so_is_the_model_afterwards(name, attn):
    model = model_of(name, attn)
    cases = [(many(name, 2, 2), {})]
    if name == "llava_onevision":
        cases += [(batch_of(name, 2, 1, video=3), {}), (batch_of(name, 1, 0, video=2), {})]
    for batch, options in cases:
        plain = run(model, batch, **options).logits
        greedy, beams = generate(model, batch), generate(model, batch, num_beams=3)
        before = plain_modules(model)
        whole = [Step("vision", 1, ratio=1.0), Step("vision", 2, keep=16)]
        for layout in ("scatter", "pseudo_grid"):
            with accelerate(model, "recycle", schedule=whole, layout=layout, trace=True) as handle:
                assert torch.equal(run(model, batch, **options).logits, plain)
                assert torch.equal(generate(model, batch), greedy)
                assert torch.equal(generate(model, batch, num_beams=3), beams)
            assert all((one.owner() >= 0).all() for one in handle.maps)
        with accelerate(model, Pick(keep_all=True)):
            assert torch.equal(run(model, batch, **options).logits, plain)
        with accelerate(model, "recycle", schedule=STEPS):
            assert not torch.equal(run(model, batch, **options).logits, plain)
        assert plain_modules(model) == before
        assert torch.equal(run(model, batch, **options).logits, plain)


# ---- where survivors stand


def test_survivors_of_llava_keep_the_positions_of_their_placeholders_and_all_text_stays():
    model, batch = model_of("llava"), batch_of("llava", 1, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with accelerate(model, First(tuple(order.tolist())), schedule=STEPS, trace=True) as handle:
        out = run(model, batch)
    alive = (order < 9).nonzero().flatten().tolist()
    text = [*range(5), *range(21, 26), *range(42, 47)]  # image-text-image-text: all of it
    expected = sorted(text + [5 + patch for patch in alive] + [26 + patch for patch in alive])
    assert first_layer(handle)[0].tolist() == expected
    assert out.logits.shape[1] == len(expected)
    assert [one.positions().tolist() for one in handle.maps] == [alive, alive]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_survivors_of_tiles_stand_where_the_packing_puts_them_and_lines_keep_their_newline(name):
    model, batch = model_of(name), batch_of(name)
    order = (3, 9, 1, 12, 0, 2, 15, 4, 11, 10, 13, 14, 5, 6, 7, 8)  # last line of patches: 5 6 7 8 stay, third: none
    with accelerate(model, First(order), schedule=STEPS, trace=True) as handle:
        run(model, batch)
    alive = [place for place, rank in enumerate(order) if rank < 9]
    expected = [5 + place for place in alive]  # the base tile comes first
    for line in range(4):
        start = 5 + 16 + 9 * line
        cells = [start + 4 * tile + place % 4 for tile in (0, 1) for place in alive if place // 4 == line]
        expected += cells + ([start + 8] if cells else [])
    assert alive == [0, 2, 4, 5, 7, 12, 13, 14, 15]
    assert [row for row in first_layer(handle)[0].tolist() if 5 <= row < 57] == expected
    (one,) = handle.maps
    assert one.grid == (3, 4, 4)
    assert one.steps[-1].stage == "splice"
    assert one.survivors().reshape(3, 16).nonzero()[1].tolist() == alive * 3
    assert (one.positions() == -1).sum() == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_features_at_the_surviving_rows_are_the_projected_survivors(name):
    """What the language model reads at each row is the projection of the tower's row at that patch."""
    model, batch = model_of(name), batch_of(name)
    states, embeds = [], []
    handles = [
        model.model.vision_tower.register_forward_hook(lambda _m, _i, out: states.append(out)),
        model.model.language_model.register_forward_pre_hook(
            lambda _m, _i, kw: embeds.append(kw["inputs_embeds"]), with_kwargs=True
        ),
    ]
    with accelerate(model, "recycle", schedule=STEPS, trace=True) as handle:
        run(model, batch)
    for one in handles:
        one.remove()
    config = model.config
    rows = states[0].hidden_states[config.vision_feature_layer]
    rows = rows[:, 1:] if config.vision_feature_select_strategy == "default" else rows
    with torch.no_grad():
        projected = model.model.multi_modal_projector(rows)
    (one,) = handle.maps
    assert rows.shape[1] == 9
    placed = one.steps[-1].kept
    logical = [row for row in first_layer(handle)[0].tolist() if batch["input_ids"][0, row] == tiny.IMAGE]
    assert len(logical) == len(placed)
    for row, source in zip(logical, placed, strict=True):
        expected = model.model.image_newline if source < 0 else projected.flatten(0, 1)[source]
        assert torch.allclose(embeds[0][0, row], expected, atol=1e-6)


# ---- batches


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["scatter", "pseudo_grid"])
def test_a_batch_equals_single_runs_with_left_padding_and_beams(name, layout):
    model = model_of(name)
    batch = batch_of(name, 2, 1, pad=3)
    options = {"schedule": STEPS, "layout": layout}
    with accelerate(model, "recycle", **options):
        logits = run(model, batch).logits
        greedy, beams = generate(model, batch), generate(model, batch, num_beams=3)
    length = batch["input_ids"].shape[1]
    for sample, skip in ((0, 3), (1, 0)):
        parts = {"pixel_values", "image_sizes", "batch_num_images"} & set(batch)
        alone = {key: batch[key][sample : sample + 1] for key in parts}
        alone |= {key: batch[key][sample : sample + 1, skip:] for key in ("input_ids", "attention_mask")}
        with accelerate(model, "recycle", **options, trace=True):
            assert torch.allclose(run(model, alone).logits[0, -1], logits[sample, -1], atol=1e-5)
            assert torch.equal(generate(model, alone)[0, length - skip :], greedy[sample, length:])
            assert torch.equal(generate(model, alone, num_beams=3)[0, length - skip :], beams[sample, length:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_changes_nothing_and_maps_lead_to_the_rows_of_the_decoder(name):
    model, batch = model_of(name), many(name, 2, 2)
    steps = [*STEPS, Step("llm", 2, ratio=0.5)]
    with accelerate(model, "recycle", schedule=steps):
        plain = run(model, batch).logits
    with accelerate(model, "recycle", schedule=steps, trace=True) as handle:
        assert torch.equal(run(model, batch).logits, plain)
    assert len(handle.maps) == 4
    for one in handle.maps:
        assert [step.stage for step in one.steps] == ["vision", "vision", "splice", "llm"]
        assert len(one.owner()) == one.patches
        sums = one.source_weights().row_sums()
        assert all(abs(total - 1) < 1e-5 or total <= 1 for total in sums)


# ---- video


def test_every_frame_of_a_video_keeps_cells_and_is_a_segment():
    model, batch = model_of("llava_onevision"), batch_of("llava_onevision", 2, 1, video=3)
    seen = []
    with accelerate(model, "drop", schedule=STEPS, trace=True) as handle:
        hook = model.model.language_model.register_forward_pre_hook(
            lambda *_: seen.append((dict(handle._session.image_rows), dict(handle._session.segments))), prepend=True
        )
        run(model, batch)
        hook.remove()
    if not seen[0][0]:
        pytest.fail("the decoder took the rows before the language model ran")
    rows, segments = seen[0]
    assert segments == {"image": [52, 52], "video": [4, 4, 5, 4, 4, 5]}
    # 9 of 16 patches left, a 3 x 3 grid pooled to 2 x 2: all four cells of a frame stay, and the newline
    assert rows["video"].all()
    with accelerate(model, "drop", schedule=[Step("vision", 1, keep=4)], trace=True) as handle:
        run(model, batch)
    video = [one for one in handle.maps if one.grid == (1, 4, 4)]
    # 2 x 2 pooled to one cell
    assert [one.steps[-1].n_out for one in video] == [1, 1, 2, 1, 1, 2]
    for one in video:
        block = set((one.positions(0) // 8 * 2 + one.positions(0) % 4 // 2).tolist())
        assert one.positions()[0] // 8 * 2 + one.positions()[0] % 4 // 2 in block


def test_pooled_video_reads_filled_cells():
    model, batch = model_of("llava_onevision"), batch_of("llava_onevision", 1, 0, video=2)
    states = []
    plain = model.model.apply_pooling
    with accelerate(model, "rank1", schedule=[Step("vision", 1, keep=7)], trace=True) as handle:
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda _m, args, out: states.append((args[0], out))
        )
        run(model, batch)
        hook.remove()
    with accelerate(model, "rank1", schedule=[Step("vision", 1, keep=7)]), torch.no_grad():
        pooled = model.model.get_video_features(batch["pixel_values_videos"]).pooler_output
    with torch.no_grad():
        survivors = model.model.multi_modal_projector(states[0][0])
        grid = torch.stack([
            survivors[frame, torch.from_numpy(one.owner(0))] for frame, one in enumerate(handle.maps)
        ])  # fmt: skip
        expected = plain(grid).flatten(0, 1)
    assert survivors.shape[:2] == (2, 7)
    assert torch.allclose(pooled.reshape(-1, 64)[:8], expected, atol=1e-6)  # behind them a newline (not yet in 5.3)


# ---- layouts


def test_a_pseudo_grid_is_the_models_packing_of_the_survivors_spread_over_the_run():
    model, batch = model_of("llava_next"), batch_of("llava_next")
    inputs = []
    with accelerate(model, First(), schedule=STEPS, layout="pseudo_grid", trace=True) as handle:
        hook = model.model.multi_modal_projector.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
        with torch.no_grad():
            dense = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
        run(model, batch)
        hook.remove()
    with torch.no_grad():
        survivors = model.model.multi_modal_projector(inputs[0])  # (3, 9, D): a 3 x 3 grid a tile
    lines = survivors[1:].reshape(2, 3, 3, -1).permute(1, 0, 2, 3).flatten(1, 2)
    newline = model.model.image_newline.expand(3, 1, -1)
    small = torch.cat([survivors[0], torch.cat([lines, newline], 1).flatten(0, 1)])
    filled = (dense.abs().sum(1) > 0).nonzero().flatten()
    assert torch.allclose(dense[filled], small, atol=1e-6)
    assert len(filled) == 9 + 3 * 7
    assert dense.shape[0] == 52
    middle = [int((cell + 0.5) * 4 // 3) for cell in range(3)]
    assert filled[:9].tolist() == [4 * y + x for y in middle for x in middle]
    assert filled[9:16].tolist() == [16 + 9 * middle[0] + int((c + 0.5) * 8 // 6) for c in range(6)] + [16 + 8]
    assert [row - 5 for row in first_layer(handle)[0].tolist() if 5 <= row < 57] == filled.tolist()


def test_a_pseudo_grid_needs_a_square():
    model = model_of("llava_next")
    with accelerate(model, "drop", schedule=[Step("vision", 1, keep=8)], layout="pseudo_grid"):
        with pytest.raises(UserError, match=r"square.*not 8.*scatter"):
            run(model, batch_of("llava_next"))
        with pytest.raises(UserError, match="square"):
            model.generate(**batch_of("llava_next"), max_new_tokens=2)
    with accelerate(model_of("llava"), "drop", schedule=[Step("vision", 1, keep=8)], layout="pseudo_grid") as handle:
        run(model_of("llava"), batch_of("llava"))  # LLaVA 1.5 has no grid behind its projector
    assert handle._session.vision[-1].left == [8]


def test_scatter_asked_for_gives_consumers_a_dense_grid_and_auto_leaves_zeros():
    model, batch = model_of("llava"), batch_of("llava")
    made = {}
    for layout in ("auto", "scatter"):
        with accelerate(model, "rank1", schedule=STEPS, layout=layout), torch.no_grad():
            made[layout] = model.get_image_features(batch["pixel_values"]).pooler_output[0]
    assert made["auto"].shape == made["scatter"].shape == (16, 64)
    alive = made["auto"].abs().sum(1) > 0
    assert alive.sum() == 9
    assert torch.equal(made["auto"][alive], made["scatter"][alive])
    assert (made["scatter"].abs().sum(1) > 0).all()


def test_many_tiles_are_pooled_from_filled_cells():
    model, batch = tiny.build("llava_onevision"), batch_of("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    size = run_length(model, batch)
    start, end = batch["input_ids"][:, :5], batch["input_ids"][:, -5:]
    batch["input_ids"] = torch.cat([start, torch.full((1, size), tiny.IMAGE), end], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    plain = run(model, batch).logits
    with accelerate(model, "recycle", schedule=[Step("vision", 2, ratio=1.0)]):
        assert torch.equal(run(model, batch).logits, plain)
    with accelerate(model, "recycle", schedule=STEPS, trace=True) as handle:
        run(model, batch)
    (one,) = handle.maps
    small = run_length(model, batch, 3)
    kept = one.steps[-1].kept
    assert size == 16 + 2 * (5 + 1)  # 4 x 8 cells pooled to 2 x 5
    assert (kept[9:] >= 0).sum() == small  # as many cells as a grid of 3 x 6 would give
    assert len(one.owner()) == 48


def run_length(model, batch, side=None):
    """Rows of the picture, or (with side) pooled cells of tiles of side x side patches."""
    from vlm_accel.encoders.grids import Grids, Picture

    picture = Picture("tiles", (1, 2), (56, 112), (("vision_aspect_ratio", "anyres_max_1"),))
    if side is None:
        with torch.no_grad():
            return len(model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0])
    lines, columns = Grids(model.model).packing(picture, (side, side)).size
    return lines * columns


# ---- methods after the encoder


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
