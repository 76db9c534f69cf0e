"""LLaVA 1.5, NeXT and OneVision through the whole model: identity, positions, layouts, video."""

import pytest
import torch
import vlm_tiny as tiny
from polymodal.errors import UserError
from vlm_accel import Step, accelerate
from vlm_llava import FAMILIES, STEPS, First, Pick, batch_of, first_layer, generate, many, model_of, plain_modules, run

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
