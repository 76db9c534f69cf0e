"""The shortened prefill: against a loop written by hand, and the invariants of LightVLM 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm_tiny as tiny
from polymodal.errors import UserError
from vlm_accel.schedule import resolve
from vlm_decoder import CACHE, by_hand, decoder, generate, plain, sample, steps
from vlm_decoder import model as build

HALVES = steps((2, 0.5), (4, 0.5))


def model(name: str, attn: str = "sdpa") -> Any:
    """In float64, but for the norms and rotary tables, which transformers makes in float32."""
    return build(name, attn, double=True)


def close(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def lengths(session: Any) -> list[int]:
    return [layer.physical for layer in session.cache.layers]


@pytest.mark.parametrize("name", tiny.VLMS)
def test_equals_a_loop_written_by_hand(name: str) -> None:
    batch = tiny.inputs(name, model(name), images=2)
    want, columns = by_hand(model(name, "eager"), batch, {2: 0.5, 4: 0.4})
    for attn in ("sdpa", "eager"):
        net = model(name, attn)
        with decoder(net, "drop", steps((2, 0.5), (4, 0.4))) as session:
            out = plain(net, batch)
            close(out.logits, want, 3e-6)
            for number, layer in enumerate(session.cache.layers):
                assert torch.equal(layer.index[0], columns[number])


@pytest.mark.parametrize("name", tiny.VLMS)
def test_lengths_follow_resolve_and_the_model_counts_the_full_prompt(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, images=2)
    length, image = batch["input_ids"].shape[1], 2 * tiny.image_tokens(name)
    runs = 4 if name in ("smolvlm", "idefics3") else 2
    left = [image, image, *(runs * n for n in resolve(HALVES, image // runs))]
    want = [length - image + left[max(0, layer // 2 * 2 - 2) if layer > 1 else 0] for layer in range(6)]
    want = [length] * 2 + [length - image + left[2]] * 2 + [length - image + left[3]] * 2
    with decoder(net, "lightvlm", HALVES) as session:
        out = plain(net, batch)
        assert lengths(session) == want
        assert [layer.get_seq_length() for layer in out[CACHE].layers] == [length] * 6
        assert out.logits.shape[1] == want[-1]
        record = session.prefills[0]
        assert record.rows == want
        assert (record.batch, record.prompt, record.text, record.image) == (1, length, length - image, image)
        assert record.survivors == [n - (length - image) for n in want]
        text = (batch["input_ids"][0] < tiny.IMAGE).nonzero().flatten()
        for layer in session.cache.layers:
            assert set(text.tolist()) <= set(layer.index[0].tolist())
            assert (layer.index[0].diff() > 0).all()
            assert torch.equal(layer.image[0], batch["input_ids"][0, layer.index[0]] == tiny.IMAGE)


@pytest.mark.parametrize("name", tiny.VLMS)
def test_a_padded_batch_equals_its_single_runs(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=4)
    options = {"return_dict_in_generate": True, "output_logits": True, "tokens": 4}
    with decoder(net, "lightvlm", HALVES) as session:
        both = net_generate(net, batch, **options)
        assert lengths(session)[4] - 3 < lengths(session)[0] - 3
        for at in (0, 1):
            alone = net_generate(net, sample(batch, at, 4 if at == 0 else 0), **options)
            for a, b in zip(both.logits, alone.logits, strict=True):
                close(a[at : at + 1], b)
        beams = generate(net, batch, num_beams=3)
        for at in (0, 1):
            assert torch.equal(beams[at : at + 1], generate(net, sample(batch, at, 4 * (at == 0)), num_beams=3))


def net_generate(net: Any, batch: Any, tokens: int, **options: Any) -> Any:
    return net.generate(**batch, max_new_tokens=tokens, do_sample=False, **options)


@pytest.mark.parametrize("name", tiny.VLMS)
def test_without_a_cache_the_logits_are_the_same(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=3)
    for method in ("drop", "pyramiddrop"):
        with decoder(net, method, HALVES):
            close(plain(net, batch, use_cache=False).logits, plain(net, batch).logits)


def ragged(net: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """LLaVA prompts with one and with two images, padded on the left to one batch."""
    two = tiny.inputs("llava", net, images=2, seed=3)
    one = tiny.inputs("llava", net, images=1, seed=4)
    extra = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": torch.cat([pad(one["input_ids"], (extra, 0)), two["input_ids"]]),
        "attention_mask": torch.cat([pad(one["attention_mask"], (extra, 0)), two["attention_mask"]]),
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    return batch, [one, two]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_samples_with_different_counts_are_padded(attn: str) -> None:
    # eager attention in float64 is not a number on padding, in the plain model too
    net = build("llava", attn, double=attn == "sdpa")
    batch, singles = ragged(net)
    options = {"return_dict_in_generate": True, "output_logits": True, "tokens": 5}
    with decoder(net, "lightvlm", HALVES) as session:
        both = net_generate(net, batch, **options)
        assert lengths(session) == [51, 51, 35, 35, 27, 27]
        assert (session.cache.layers[5].index[0] == -1).sum() == 9
        for at, single in enumerate(singles):
            alone = net_generate(net, single, **options)
            for a, b in zip(both.logits, alone.logits, strict=True):
                close(a[at : at + 1], b, 1e-6 if attn == "sdpa" else 3e-6)
                assert not a.isnan().any()
        for at, single in enumerate(singles):
            assert torch.equal(generate(net, batch, num_beams=3)[at : at + 1], generate(net, single, num_beams=3))
    with decoder(net, "lightvlm", HALVES, ragged="error"), pytest.raises(UserError, match="ragged"):
        plain(net, batch)


def test_right_padding_scores_from_the_last_real_token() -> None:
    net = model("llava")
    one = tiny.inputs("llava", net)
    padded = dict(one)
    for key in ("input_ids", "attention_mask"):
        padded[key] = torch.nn.functional.pad(one[key], (0, 3))
    with decoder(net, "drop", HALVES) as session:
        want = plain(net, one).logits
        kept = [layer.index for layer in session.cache.layers]
        got = plain(net, padded).logits
        close(got, want)
        for a, layer in zip(kept[2:], session.cache.layers[2:], strict=True):
            assert torch.equal(a, layer.index)


def test_global_budget_ranks_the_images_of_a_sample_together() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2, pad=2)
    with decoder(net, "drop", steps((2, 0.5)), budget="global") as session:
        plain(net, batch)
        layer = session.cache.layers[3]
        assert layer.image.sum(1).tolist() == [16, 16]
        picture = layer.index - torch.tensor([[7], [7]]) < 16
        shares = (picture & layer.image).sum(1).tolist()
        for at in (0, 1):
            plain(net, sample(batch, at, 2 * (at == 0)))
            alone = session.cache.layers[3].index[0] + 2 * (at == 0)
            assert torch.equal(layer.index[at][layer.valid[at]], alone)
    assert shares != [8, 8], "per-image budgets would give the same here; choose another seed"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_onevision"])
def test_video_and_image_tokens_are_spans_alike(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, images=1, video=2)
    image, video = ((batch["input_ids"] == token).sum().item() for token in (tiny.IMAGE, tiny.VIDEO))
    want, _ = by_hand(model(name, "eager"), batch, {2: 0.5})
    with decoder(net, "drop", steps((2, 0.5))) as session:
        close(plain(net, batch).logits, want, 3e-6)
        left = sum(resolve(steps((2, 0.5)), n)[0] for n in (image, video))
        assert session.cache.layers[3].image.sum() == left


def test_segments_are_ranked_by_themselves() -> None:
    net = model("qwen2_vl")
    batch = tiny.inputs("qwen2_vl", net, images=0, video=3)
    with decoder(net, "drop", steps((2, 0.25)), segments={"video": [16, 16, 16]}) as session:
        plain(net, batch)
        layer = session.cache.layers[3]
        rows = layer.index[0][layer.image[0]] - (batch["input_ids"][0] == tiny.VIDEO).nonzero()[0]
        assert torch.bincount(rows // 16).tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", tiny.VLMS)
def test_rows_left_out_before_layer_0(name: str) -> None:
    batch = tiny.inputs(name, model(name))
    count = tiny.image_tokens(name)
    alive = torch.arange(count) % 3 == 1
    left_out = torch.zeros_like(batch["input_ids"][0], dtype=torch.bool)
    left_out[batch["input_ids"][0] == tiny.IMAGE] = ~alive
    want, columns = by_hand(model(name, "eager"), batch, {4: 0.5}, left_out)
    for attn in ("sdpa", "eager"):
        net = model(name, attn)
        with decoder(net, "drop", steps((4, 0.5)), image_rows={"image": alive}) as session:
            close(plain(net, batch).logits, want, 3e-6)
            assert torch.equal(session.cache.layers[0].index[0], columns[0])
            session.image_rows = {"image": alive}
            greedy = generate(net, batch)
            session.image_rows = {"image": alive}
            sequences = generate(net, batch, num_beams=2, num_return_sequences=2)
            assert sequences.shape == (2, greedy.shape[1])
    net = model(name)
    with decoder(net, "drop", steps((4, 1.0)), image_rows={"image": torch.ones(count, dtype=torch.bool)}):
        assert torch.equal(plain(net, batch).logits, _untouched(net, batch))


def _untouched(net: Any, batch: Any) -> Any:
    with decoder(net, "drop", ()):
        return plain(net, batch).logits


def test_beams_repeat_the_rows_of_their_sample() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2)
    alive = torch.arange(32) % 16 < torch.tensor([5] * 16 + [9] * 16)
    with decoder(net, "drop", steps((2, 0.5))) as session:
        for at in (0, 1):
            session.image_rows = {"image": alive}
            both = generate(net, batch, num_beams=2)
            assert session.cache.layers[0].image.sum(1).tolist() == [5, 5, 9, 9]
            session.image_rows = {"image": alive.chunk(2)[at]}
            assert torch.equal(both[at : at + 1], generate(net, sample(batch, at), num_beams=2))
        session.image_rows = {"image": alive[:20]}
        with pytest.raises(UserError, match="32 image placeholder rows, the encoder made 20"):
            plain(net, batch)
        session.image_rows = {"image": alive & (torch.arange(32) >= 16)}
        with pytest.raises(UserError, match="keeps no token"):
            plain(net, batch)


def test_sampling_several_sequences() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net)
    with decoder(net, "lightvlm", HALVES):
        torch.manual_seed(0)
        many = net.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3)
        repeated = {key: value.repeat_interleave(3, 0) for key, value in batch.items()}
        torch.manual_seed(0)
        assert torch.equal(net.generate(**repeated, max_new_tokens=4, do_sample=True), many)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_positions_in_decoding_are_those_of_the_plain_model(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net)
    seen: list[Any] = []
    handle = net.model.language_model.rotary_emb.register_forward_pre_hook(lambda m, a: seen.append(a[1].clone()))
    generate(net, batch, 5)
    plain_positions, seen[:] = list(seen), []
    with decoder(net, "drop", HALVES):
        generate(net, batch, 5)
    handle.remove()
    assert len(plain_positions) == len(seen) == 5
    for a, b in zip(plain_positions, seen, strict=True):
        assert torch.equal(a, b)


def test_text_only_leaves_no_image_token() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2)
    with decoder(net, "text_only", steps((3, 0.5))) as session:
        generate(net, batch)
        assert [int(layer.image.sum()) for layer in session.cache.layers] == [64] * 3 + [0] * 3
        assert session.prefills[0].survivors == [32] * 3 + [0] * 3


def test_embeddings_with_an_image_mask_and_prompts_without_images() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2)
    mask = batch["input_ids"] == tiny.IMAGE
    embeds = net.get_input_embeddings()(batch["input_ids"]).detach()
    with torch.no_grad():
        features = torch.cat(list(net.get_image_features(batch["pixel_values"]).pooler_output))
    embeds = embeds.masked_scatter(mask[..., None], features)
    text = {"input_ids": torch.randint(2, 80, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    alone = plain(net, text).logits
    with decoder(net, "lightvlm", HALVES) as session:
        want, greedy, beams = plain(net, batch).logits, generate(net, batch), generate(net, batch, num_beams=2)
        given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "image_mask": mask}
        close(plain(net, given).logits, want)
        assert torch.equal(generate(net, given), greedy)
        assert torch.equal(generate(net, given, num_beams=2), beams)
        assert lengths(session)[4] == 14 + 2
        with pytest.raises(UserError, match="image_mask"):
            plain(net, {"inputs_embeds": embeds})
        assert torch.equal(plain(net, text).logits, alone)


def test_a_second_turn_merges_its_own_images_only() -> None:
    net = model("llava")
    first, second = tiny.inputs("llava", net, seed=5), tiny.inputs("llava", net, seed=6)
    with decoder(net, "lightvlm", HALVES) as session:
        cache = plain(net, first)[CACHE]
        before = [(layer.keys.clone(), layer.index.clone()) for layer in cache.layers]
        more = {CACHE: cache, "attention_mask": torch.ones(1, 52, dtype=torch.long)}
        out = plain(net, second | more)
        assert cache.get_seq_length() == 52
        assert [layer.physical for layer in cache.layers] == [52, 52, 36, 36, 28, 28]
        for (keys, index), layer in zip(before, cache.layers, strict=True):
            count = keys.shape[2]
            assert torch.equal(layer.keys[:, :, :count], keys)
            assert torch.equal(layer.index[:, :count], index)
            assert (layer.index[:, count:] >= 26).all()
        assert out.logits.shape[1] == 14
        assert len(session.prefills) == 2


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "smolvlm"])
def test_a_second_turn_of_text_as_one_chunk_or_token_by_token(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=2)
    ids = torch.cat([batch["input_ids"], torch.randint(2, 80, (2, 5), generator=torch.Generator().manual_seed(0))], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}

    def turn(cache: Any, length: int) -> Any:
        given = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
        return net.generate(**given, **{CACHE: cache}, **options).logits[0]

    length = batch["input_ids"].shape[1]
    with decoder(net, "lightvlm", HALVES) as session:
        cache = net.generate(**batch, **options)[CACHE]
        chunk = turn(cache, length + 5)
        assert cache.get_seq_length() == length + 5
        assert lengths(session)[4] < lengths(session)[0] == length + 5
        cache = net.generate(**batch, **options)[CACHE]
        for more in range(1, 6):
            last = turn(cache, length + more)
        close(chunk, last)
