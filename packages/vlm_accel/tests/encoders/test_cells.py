"""Encoders with cells: identity, counts, packing, methods after the encoder, the way to the decoder."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from hypothesis import given as example
from hypothesis import settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vlm_accel import Step, accelerate, methods, resolve
from vlm_accel.encoders.cells import cell_order
from vlm_accel.families import family_of, load_encoder
from vlm_accel.methods.base import FeatureMethod, Reduced, TokenMethod

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*QWEN, "internvl", "smolvlm", "idefics3")
AFTER = ("visionzip", "prumerge", "prumerge_plus", "hired", "fastervlm", "vispruner", "divprune")


@cache
def model(name: str, attn: str = "sdpa") -> Any:
    return tiny.build(name, attn)


@cache
def batch(name: str, samples: int = 1, images: int = 2, video: int = 0) -> dict[str, Tensor]:
    return tiny.inputs(name, model(name), batch=samples, images=images, video=video)


def layers(name: str) -> tuple[int, int]:
    return (1, 3) if name == "qwen2_5_vl" else (1, 2)


def steps(name: str, ratio: float = 0.6) -> list[Step]:
    return [Step("vision", layer, ratio=ratio) for layer in layers(name)]


def pictures(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in given.items() if key.startswith(("pixel", "image_grid", "video_grid"))}


def encode(net: Any, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(P, D) features and those of DeepStack."""
    given = pictures(given)
    kind = "video" if "video_grid_thw" in given else "image"
    with torch.no_grad():
        out = getattr(net.model, f"get_{kind}_features")(**given)
    taps = [
        tap if torch.is_tensor(tap) else torch.cat(tap)  # whole in transformers 5.3, split by image since
        for tap in getattr(out, "deepstack_features", None) or []
    ]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output]), taps


def fingerprint(net: Any) -> list[Any]:
    """Hooks and instance attributes of all modules."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__), id(m.__dict__.get("config")))
        for m in net.modules()
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_is_bit_equal(name: str, attn: str) -> None:
    net, given = model(name, attn), batch(name)
    with torch.no_grad():
        plain, before = encode(net, given), net(**given).logits
    for method in ("recycle", "rank1", "drop", "tome", "evit"):
        with accelerate(net, method, schedule=steps(name, 1.0)) as handle, torch.no_grad():
            found, logits = encode(net, given), net(**given).logits
            assert not handle._session.image_rows
        assert torch.equal(found[0], plain[0])
        assert all(map(torch.equal, found[1], plain[1]))
        assert torch.equal(logits, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_is_undone_even_after_an_error(name: str) -> None:
    net, given = model(name), batch(name)
    plain, before = encode(net, given)[0], fingerprint(net)

    class Broken(TokenMethod):
        def reduce(self, tokens: Any, keep: int) -> Reduced:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), accelerate(net, Broken(), schedule=steps(name)):
        encode(net, given)
    assert fingerprint(net) == before
    with accelerate(net, "recycle", schedule=steps(name)):
        assert not torch.equal(encode(net, given)[0], plain)
    assert fingerprint(net) == before
    assert torch.equal(encode(net, given)[0], plain)


def test_cells_are_counted_as_promised() -> None:
    """iLLaVA 8: 1296 patches at ratio .85, group 4."""
    net = model("qwen2_vl")
    pixels = torch.randn(1296, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    schedule = [Step("vision", layer, ratio=0.85) for layer in range(4)]
    with accelerate(net, "recycle", schedule=schedule) as handle:
        encode(net, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 36, 36]])})
        record, rows = handle._session.vision[-1], handle._session.image_rows["image"]
        stats = handle.stats
    assert record.mlp_tokens == [1100, 932, 792, 672] == resolve(schedule, 1296, group=4)
    assert record.tokens == [1296, 1100, 932, 792]
    assert record.full == [1296] * 4
    assert record.left == [672]
    assert rows.sum().item() == 672 // 4
    assert stats["ideal/vision_speedup"] > 1.5


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_agree_with_the_flop_counter(name: str) -> None:
    """Blocks shortened by a rule without scores, and as they are: exactly half of the floating-point operations."""
    net, given = model(name, "eager"), pictures(batch(name))
    block = re.compile(r"(blocks|encoder\.layers?)\.\d+$")

    def counted() -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.model.get_image_features(**given)
        found = counter.get_flop_counts()
        return sum(sum(found[key].values()) for key in found if block.search(key)) / 2

    with accelerate(net, "stride", schedule=steps(name)) as handle:
        short = counted()
        stats = handle.stats
    assert stats["macs/vision"] == short
    assert stats["macs/vision_plain"] == counted()
    assert short < 0.7 * stats["macs/vision_plain"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["recycle", "tome", "pool", "stride"])
def test_images_in_one_call_equal_each_alone(name: str, method: str) -> None:
    """Sequences packed with other images (of other sizes, for Qwen) and batches of tiles change nothing."""
    net = model(name)
    if name in QWEN:
        size = 16 if name == "qwen3_vl" else 14
        grid = torch.tensor([[1, 8, 8], [1, 4, 10], [1, 8, 8]])
        pixels = torch.randn(168, 3 * 2 * size * size, generator=torch.Generator().manual_seed(5))
        parts = pixels.split([64, 40, 64])
        given = {"pixel_values": pixels, "image_grid_thw": grid}
        alone = [{"pixel_values": part, "image_grid_thw": grid[i : i + 1]} for i, part in enumerate(parts)]
    else:
        given = pictures(batch(name))
        whole = given["pixel_values"]
        rows = whole.unbind(0) if name == "internvl" else whole[0].unbind(0)
        alone = [{"pixel_values": row[None] if name == "internvl" else row[None, None]} for row in rows]
    with accelerate(net, method, schedule=steps(name)) as handle:
        together, taps = encode(net, given)
        rows_together = handle._session.image_rows["image"]
        singles = [(encode(net, one), handle._session.image_rows["image"]) for one in alone]
    assert torch.equal(rows_together, torch.cat([rows for _, rows in singles]))
    torch.testing.assert_close(together, torch.cat([one[0] for one, _ in singles]), rtol=1e-5, atol=2e-6)
    for number, tap in enumerate(taps):
        torch.testing.assert_close(tap, torch.cat([one[1][number] for one, _ in singles]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_and_sdpa_agree(name: str) -> None:
    found = []
    for attn in ("sdpa", "eager"):
        net = model(name, attn)
        with accelerate(net, "tome", schedule=steps(name)):
            found.append(encode(net, batch(name))[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_every_slice_of_a_video_keeps_its_share(name: str) -> None:
    net, given = model(name), batch(name, images=1, video=3)
    with accelerate(net, "recycle", schedule=steps(name)) as handle, torch.no_grad():
        with_video = net.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
        session = handle._session
        assert session.segments == {"video": [16, 16, 16]}
        assert session.image_rows["video"].view(3, 16).sum(1).tolist() == [5, 5, 5]
        assert [len(part) for part in with_video.pooler_output] == [48]
        net(**given)
        assert session.prefills[-1].survivors == [20] * 6
        assert session.vision[-1].left == [20, 20, 20]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["recycle", "tome", "visionzip"])
def test_tracing_changes_nothing_and_maps_lead_to_the_rows(name: str, method: str) -> None:
    net, given = model(name), batch(name, samples=2, images=1)
    schedule = None if method == "visionzip" else steps(name)
    chosen = methods.create("visionzip", ratio=0.5) if method == "visionzip" else method
    found = []
    for trace in (False, True):
        with accelerate(net, chosen, schedule=schedule, trace=trace) as handle, torch.no_grad():
            features = encode(net, given)[0]  # its maps are replaced by those of the next call
            rows = handle._session.image_rows["image"].clone()
            found.append((features, net(**given).logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    side = 8
    order = cell_order(side, side, 2).view(16, 4)
    offset = 0
    for one in handle.maps:
        assert one.grid == (1, side, side)
        splice = next(i for i, step in enumerate(one.steps) if step.stage == "splice")
        cells = rows[offset : offset + 16].nonzero()[:, 0]
        wanted = torch.zeros(side * side, dtype=torch.bool)
        wanted[order[cells].flatten()] = True
        assert torch.equal(torch.from_numpy(one.survivors(splice)), wanted)
        if method != "visionzip":  # its contextual rows are sums, not means
            np.testing.assert_allclose(one.source_weights(splice).row_sums(), 1, atol=1e-5)
        offset += 16
    assert offset == len(rows)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", AFTER)
def test_methods_after_the_encoder_choose_cells(name: str, method: str) -> None:
    net, given = model(name), batch(name)
    plain = encode(net, given)[0]
    chosen: Any = methods.create(method, ratio=0.5)
    with accelerate(net, chosen) as handle:
        features, taps = encode(net, given)
        rows = handle._session.image_rows["image"]
        record = handle._session.vision[-1]
    count = chosen.count(16)
    assert record.left == [int(part.sum()) * 4 for part in rows.split(16)]
    if count is not None:
        assert [int(part.sum()) for part in rows.split(16)] == [count] * (len(rows) // 16)
    assert not features[~rows].any()
    assert all(not tap[~rows].any() for tap in taps)
    if method in ("hired", "fastervlm", "vispruner", "divprune"):  # these only drop
        assert torch.equal(features[rows], plain[rows])
    with accelerate(net, methods.create(method, ratio=1.0)) as handle:
        assert torch.equal(encode(net, given)[0], plain)
        assert not handle._session.image_rows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_most_attended_cells_survive_fastervlm(name: str) -> None:
    """Attention of the last block, by hand: of the class row for InternVL, the mean received elsewhere."""
    net, given = model(name, "eager"), batch(name)
    encoder: Any = load_encoder(family_of(net), net)
    seen: list[Tensor] = []
    block = encoder.blocks[-1]
    attention = next(getattr(block, part) for part in ("attn", "attention", "self_attn") if hasattr(block, part))
    module = sys.modules[type(attention).__module__]
    kernel = module.eager_attention_forward

    def spy(owner: Any, *args: Any, **kwargs: Any) -> Any:
        out = kernel(owner, *args, **kwargs)
        if owner is attention:
            seen.append(out[1])
        return out

    module.eager_attention_forward = spy
    try:
        encode(net, given)
    finally:
        module.eager_attention_forward = kernel
    weights = torch.cat(seen)
    scores = weights[:, :, 0, 1:].mean(1) if name == "internvl" else weights.mean((1, 2))
    order = torch.arange(64) if name in QWEN else cell_order(8, 8, 2)
    scores = scores[:, order].view(-1, 16, 4).mean(2)
    if name == "qwen2_5_vl":
        places = encoder.windows(given["image_grid_thw"]).order
        scores = scores.flatten()[places.argsort()].view(-1, 16)
    with accelerate(net, methods.create("fastervlm", ratio=0.25)) as handle:
        encode(net, given)
        rows = handle._session.image_rows["image"].view(-1, 16)
    wanted = torch.zeros_like(rows).scatter(1, scores.topk(4, 1).indices, True)
    assert torch.equal(rows, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_and_a_method_after_the_encoder_combine(name: str) -> None:
    net, given = model(name), batch(name)
    chosen = ["recycle", methods.create("fastervlm", ratio=0.5)]
    with accelerate(net, chosen, schedule=steps(name), trace=True) as handle, torch.no_grad():
        net(**given)
        assert [(step.stage, step.n_in, step.n_out) for step in handle.maps[0].steps][:4] == [
            ("vision", 16, 9), ("vision", 9, 5), ("features", 5, 3), ("splice", 3, 3),
        ]  # fmt: skip
        assert set(handle._session.vision[-1].left) == {12}
        assert handle._session.prefills[-1].survivors[0] == 3 * len(handle.maps)


class Early(FeatureMethod):
    """Keeps three cells; remembers what the first block and the last one showed of those left."""

    needs_keys = True

    def blocks(self, depth: int, used: int) -> tuple[int, ...]:
        return (0, used)

    def select(self, features: Any) -> list[Reduced]:
        self.seen = features
        kept = torch.arange(3)[None]
        return [Reduced(x=features.x[i : i + 1, :3], kept=kept) for i in range(len(features.x))]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_earlier_blocks_belongs_to_the_cells_left(name: str) -> None:
    net, given = model(name), batch(name)
    alone, after = Early(), Early()
    with accelerate(net, alone):
        encode(net, given)
    with accelerate(net, "recycle", schedule=steps(name)) as handle:
        encode(net, given)
        rows = handle._session.image_rows["image"].view(-1, 16)
    with accelerate(net, ["recycle", after], schedule=steps(name)):
        encode(net, given)
    left = rows.nonzero()[:, 1].view(len(rows), 5)
    for what in ("cls_attention", "keys", "queries"):
        first, short = getattr(alone.seen, what)[0], getattr(after.seen, what)[0]
        wanted = first.gather(2, left[:, None].expand(-1, 4, -1)) if what == "cls_attention" else None
        if wanted is None:
            wanted = first.gather(1, left[..., None, None].expand(-1, -1, *first.shape[2:]))
        assert torch.equal(short, wanted)
        assert getattr(after.seen, what)[len(load_encoder(family_of(net), net).blocks) - 1].shape == short.shape  # type: ignore[union-attr]
    assert after.seen.has_cls == (name == "internvl")
    sums = alone.seen.cls_attention[0].sum(2) * 4
    assert (sums < 1).all() if name == "internvl" else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("after", [False, True])
def test_the_decoder_sees_survivors_at_their_places(name: str, after: bool) -> None:
    """The logits are those of the plain decoder on spliced rows with the positions of the full prompt (M-RoPE too)."""
    net, given = model(name), batch(name)
    chosen: Any = methods.create("visionzip", ratio=0.4) if after else "recycle"
    with accelerate(net, chosen, schedule=None if after else steps(name)) as handle, torch.no_grad():
        features, taps = encode(net, given)
        rows = handle._session.image_rows["image"].clone()
        short = net(**given).logits[:, -1]
    ids = given["input_ids"]
    is_image = ids[0] == tiny.IMAGE
    stays = ~is_image
    stays[is_image] = rows
    with torch.no_grad():
        embeds = net.get_input_embeddings()(ids)
        embeds[0, is_image] = features
        positions = torch.arange(ids.shape[1])[None]
        extra: dict[str, Any] = {}
        if name in QWEN:
            positions, _ = net.model.get_rope_index(ids, given["mm_token_type_ids"], given["image_grid_thw"])
        if taps:
            extra = {"visual_pos_masks": is_image[stays][None], "deepstack_visual_embeds": [tap[rows] for tap in taps]}
        decoder = getattr(net.model, "language_model", None) or net.model.text_model
        out = decoder(inputs_embeds=embeds[:, stays], position_ids=positions[..., stays], **extra)
        wanted = net.lm_head(out.last_hidden_state)[:, -1]
    torch.testing.assert_close(short, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_in_a_padded_batch_equals_single_runs(name: str) -> None:
    net = model(name)
    given = tiny.inputs(name, net, batch=2, images=2, pad=3)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with accelerate(net, "recycle", schedule=steps(name)):
        both = net.generate(**given, **options)[:, given["input_ids"].shape[1] :]
        for sample in range(2):
            one = {}
            for key, value in given.items():
                each = len(value) // 2
                one[key] = value[sample * each : (sample + 1) * each]
            real = one["attention_mask"][0].bool()
            for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if key in one:
                    one[key] = one[key][:, real]
            single = net.generate(**one, **options)[:, one["input_ids"].shape[1] :]
            assert torch.equal(single[0], both[sample])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_slices_are_segments_without_encoder_steps_too(name: str) -> None:
    net, given = model(name), batch(name, images=1, video=3)
    plain = encode(net, {key: value for key, value in given.items() if "video" not in key})[0]
    with accelerate(net, "lightvlm", schedule=[Step("llm", 2, ratio=0.5)]) as handle, torch.no_grad():
        net.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
        found = encode(net, {key: value for key, value in given.items() if "video" not in key})[0]
        assert handle._session.segments == {"image": [16], "video": [16, 16, 16]}
        assert not handle._session.image_rows
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_the_decoder_alone_start_at_the_patches(name: str) -> None:
    net, given = model(name), batch(name)
    with accelerate(net, "drop", schedule=[Step("llm", 3, ratio=0.5)], trace=True) as handle, torch.no_grad():
        net(**given)
        net.generate(**given, max_new_tokens=2, do_sample=False)
    assert len(handle.maps) == (8 if name in ("smolvlm", "idefics3") else 4)
    for one in handle.maps:
        assert (one.grid, one.group) == ((1, 8, 8), 4)
        assert [(step.stage, step.n_in, step.n_out) for step in one.steps] == [("splice", 16, 16), ("llm", 16, 8)]
        assert one.survivors().sum() == 8 * 4


def test_windows_are_shortened_at_full_attention_only() -> None:
    net = model("qwen2_5_vl")
    with pytest.raises(UserError, match=r"\[1, 3\]"), accelerate(net, "drop", schedule=[Step("vision", 0, ratio=0.5)]):
        pass
    with accelerate(net, "drop", schedule=[Step("vision", 1, ratio=0.1)]) as handle:
        encode(net, batch("qwen2_5_vl"))
        record = handle._session.vision[-1]
    assert record.full_lengths[0] == [16] * 8
    assert record.full_lengths[1] == [64, 64]
    assert record.lengths[3] == [4, 4]
    assert record.lengths[2] == [4, 4]  # the other six windows are empty and left out


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_gradients_are_refused_unless_allowed(name: str) -> None:
    net, given = model(name), pictures(batch(name))
    with accelerate(net, "drop", schedule=steps(name)), pytest.raises(UserError, match="no_grad"):
        net.model.get_image_features(**given)
    with accelerate(net, "recycle", schedule=steps(name), allow_grad=True):
        pixels = given["pixel_values"].clone().requires_grad_()
        out = net.model.get_image_features(**{**given, "pixel_values": pixels})
        torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output]).sum().backward()
    assert torch.isfinite(pixels.grad).all()
    assert pixels.grad.abs().sum() > 0


def test_tiles_of_one_picture_share_a_map() -> None:
    """InternVL: a run of placeholders is an image with its tiles."""
    net, given = model("internvl"), dict(batch("internvl"))
    image = (given["input_ids"] == tiny.IMAGE)[0].nonzero()[:, 0]
    between = torch.ones(given["input_ids"].shape[1], dtype=torch.bool)
    between[image[15] + 1 : image[16]] = False  # the text between the two images goes: one image of two tiles
    for key in ("input_ids", "attention_mask"):
        given[key] = given[key][:, between]
    with accelerate(net, "recycle", schedule=steps("internvl"), trace=True) as handle, torch.no_grad():
        net(**given)
        # transformers 5.3 encodes after the beams are made, and mixes up their tiles: no beams there
        beams = 2 if "mm_encoder_outputs" in inspect.signature(net.forward).parameters else 1
        net.generate(**given, max_new_tokens=2, do_sample=False, num_beams=beams)
    assert [one.grid for one in handle.maps] == [(2, 8, 8)] * 2
    first, second = handle.maps
    assert [(step.n_in, step.n_out) for step in first.steps[:3]] == [(32, 18), (18, 10), (10, 10)]
    assert np.array_equal(first.owner(2), second.owner(2))


@settings(max_examples=25, deadline=None)
@example(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_cell_order_puts_the_patches_of_a_cell_side_by_side(rows: int, columns: int, side: int) -> None:
    height, width = rows * side, columns * side
    order = cell_order(height, width, side)
    assert order.sort().values.tolist() == list(range(height * width))
    for number, cell in enumerate(order.view(-1, side * side).tolist()):
        assert {(p // width // side, p % width // side) for p in cell} == {divmod(number, columns)}
