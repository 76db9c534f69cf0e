"""Eviction through beams, turns and scopes; budgets of unequal layers; running sums; kvpress-like scorers."""

import math
from types import SimpleNamespace

import pytest
import torch
import vlm_tiny as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from torch.nn import functional as F
from vlm_accel import KVBudget, Step, accelerate
from vlm_accel.llm.cache import TrackedLayer
from vlm_accel.llm.evict import NOTE, Evictor, evictable, kept_entries
from vlm_accel.llm.locate import find_decoder
from vlm_accel.llm.ring import Part, Ring
from vlm_accel.methods import create
from vlm_accel.session import Plan, Session
from vlm_evict import SMALL, Blinkers, Watch, accelerated, build, close, prompt, run

BEAM_METHODS = {
    "window_kv": {}, "h2o": {}, "tova": {}, "streaming_llm": {"rerotate": True}, "random_kv": {},
    "snapkv": {"window": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", BEAM_METHODS)
def test_beams_carry_their_own_cache(name):
    """The best beam's score is what its tokens get in a run of their own: ring, sums and entries followed the beams."""
    method = create(name, **BEAM_METHODS[name])
    model, inputs = build("llama"), prompt("llama")
    with accelerate(model, method, kv=SMALL), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=11, min_new_tokens=11, num_beams=3, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
        moved = out.beam_indices[0, :11]
    assert len(set(moved.tolist())) > 1  # the beams did change places
    tokens = out.sequences[:, 13:]
    logits, _, _, _ = accelerated("llama", method, tokens=tokens)
    alone = logits.log_softmax(-1).gather(-1, tokens.T[..., None]).sum()
    assert float((alone - out.sequences_scores[0]).abs()) < 2e-5


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_padded_beams(family):
    runs = [accelerated(family, create("window_kv"), pad=pad, num_beams=3)[1] for pad in (0, 4)]
    assert torch.equal(*runs)


def test_sampling_with_several_returns():
    with accelerate(build("llava"), "h2o", kv=SMALL):
        torch.manual_seed(0)
        out = build("llava").generate(**prompt("llava"), max_new_tokens=8, do_sample=True, num_return_sequences=4)
    assert out.shape == (4, prompt("llava")["input_ids"].shape[1] + 8)
    assert len({tuple(row.tolist()) for row in out}) > 1


def turns(model, pieces):
    """Logits after each piece, fed one after the other into one cache."""
    cache, made = None, []
    with torch.no_grad():
        for piece in pieces:
            out = model(input_ids=piece, use_cache=True, **({} if cache is None else {_cache_name(model): cache}))
            cache = out.past_key_values if "past_key_values" in out else out.cache
            made.append(out.logits)
    return made, cache


def _cache_name(model):
    from vlm_accel.llm.locate import cache_name

    return cache_name(find_decoder(model).module)


@pytest.mark.parametrize("name", ["window_kv", "h2o", "snapkv", "adakv"])
def test_second_turn_sees_the_compressed_cache(name):
    """A prefill, some steps, a second prefill, some steps: the plain model with the same entries masked agrees."""
    options = {"window": 4} if name in ("snapkv", "adakv") else {}
    budget = KVBudget.ratio(0.5, sink=1, recent=2, window=2, interval=2)
    draw = torch.Generator().manual_seed(4)
    pieces = [torch.randint(2, 80, (1, size), generator=draw) for size in (16, 1, 1, 1, 1, 9, 1, 1, 1)]
    model = build("llama")
    with accelerate(model, create(name, **options), kv=budget), Watch(model) as watch:
        got, cache = turns(model, pieces)
    with Blinkers(model, watch.calls):
        want, _ = turns(model, pieces)
    for a, b in zip(got, want, strict=True):
        assert close(a, b, 2e-6)
    notes = [layer.state[NOTE] for layer in cache.layers]
    assert all(note.length == 25 for note in notes)  # two prompts; shares are shares of both
    assert all(note.entries == 12 for note in notes)
    assert cache.get_seq_length() == 32
    if name == "adakv":
        assert all(sum(map(len, layer[0])) == 2 * 12 for layer in watch.calls[6])
    assert kept_entries(cache.layers[0]) <= 12 + (3 if name in ("snapkv", "adakv") else 1)


def test_turn_token_by_token_is_a_chunk_while_nothing_goes():
    draw = torch.Generator().manual_seed(5)
    first, second = (torch.randint(2, 80, (1, size), generator=draw) for size in (16, 5))
    model = build("llama")
    budget = KVBudget.uniform(10, sink=2, recent=4, window=4, interval=50)
    made = []
    for pieces in ([first, *second.split(1, 1)], [first, second]):
        # the chunk is a prefill and is cut afterwards: what it saw is the same
        with accelerate(model, "window_kv", kv=budget):
            made.append(turns(model, pieces)[0][-1][:, -1])
    assert close(*made, 2e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_scope_image_leaves_text_alone(family):
    inputs = prompt(family)
    budget = KVBudget.uniform(8, sink=0, recent=2, window=4, interval=3, scope="image")
    watch = accelerated(family, create("window_kv"), budget)[2]
    text = (inputs["input_ids"][0] != tiny.IMAGE).nonzero().flatten().tolist()
    length = inputs["input_ids"].shape[1]
    for layer in watch.calls[-1]:
        for head in layer[0]:
            assert head == text + list(range(length, length + 9))  # no image entry is left: b is below the text
    budget = KVBudget.uniform(40, sink=0, recent=2, window=4, interval=3, scope="image")
    watch = accelerated(family, create("window_kv"), budget)[2]
    for layer in watch.calls[-1]:
        for head in layer[0]:
            assert set(text) <= set(head)
            assert len(text) + 9 < len(head) <= 40 + 3


def test_scope_no_system_keeps_what_stands_before_the_image():
    budget = KVBudget.uniform(20, sink=0, recent=2, window=4, interval=3, scope="no_system")
    _, _, watch, cache = accelerated("llava", create("random_kv"), budget)
    for layer in watch.calls[-1]:
        for head in layer[0]:
            assert head[:13] == list(range(13))
            assert head != list(range(len(head)))
    assert max(layer.physical for layer in cache.layers) < 20 + 3
    # nothing tells a system prompt where there is no image: all compete
    watch = accelerated(
        "llama", create("recent_kv"), KVBudget.uniform(6, sink=0, recent=1, window=1, scope="no_system")
    )[2]
    assert watch.calls[1][0][0][0] == list(range(7, 13))


def test_budgets_follow_the_pyramid_of_tokens():
    """16 image tokens halved twice: every layer keeps half of what its own prefill brought."""
    schedule = [Step("llm", 2, ratio=0.5), Step("llm", 4, ratio=0.5)]
    budget = KVBudget.ratio(0.5, sink=1, recent=2, window=2, interval=40)
    model, inputs = build("llava"), prompt("llava", text=6)
    with accelerate(model, "lightvlm", schedule=schedule, kv=budget), Watch(model) as watch:
        run(model, inputs, 3)
    assert [len(layer[0][0]) for layer in watch.calls[1]] == [14, 14, 10, 10, 8, 8]


def test_merged_and_evicted_padded():
    """Merging and eviction together: a padded sample is the unpadded one."""
    schedule = [Step("llm", 2, ratio=0.5), Step("llm", 4, ratio=0.5)]
    runs = []
    for pad in (0, 4):
        with accelerate(build("llava"), "lightvlm", schedule=schedule, kv=SMALL):
            runs.append(run(build("llava"), prompt("llava", pad)))
    assert torch.equal(runs[0][1], runs[1][1])
    assert close(runs[1][0], runs[0][0], 2e-6)


@pytest.mark.parametrize("name", ["lightvlm", "lightvlm+h2o", "lightvlm+random_kv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_merged_and_evicted_batch_is_its_samples(family, name):
    """Samples of unequal length, merged, padded on the left by the engine, then evicted."""
    schedule = [Step("llm", 2, ratio=0.5), Step("llm", 4, ratio=0.5)]
    both = tiny.inputs(family, build(family), batch=2, text=7, pad=3)
    model = build(family)
    with accelerate(model, name, schedule=schedule, kv=SMALL):
        logits, tokens = run(model, both)
        for sample in range(2):
            keep = both["attention_mask"][sample].bool()
            one = {
                key: value[sample : sample + 1, keep] for key, value in both.items() if value.shape[1:] == keep.shape
            }
            half = len(both["pixel_values"]) // 2
            one["pixel_values"] = both["pixel_values"][sample * half : (sample + 1) * half]
            if "image_grid_thw" in both:
                one["image_grid_thw"] = both["image_grid_thw"][sample : sample + 1]
            single, same = run(model, one)
            assert torch.equal(tokens[sample : sample + 1], same)
            assert close(logits[:, sample : sample + 1], single, 2e-6)


@given(
    entries=st.integers(1, 14), sink=st.integers(0, 3), recent=st.integers(0, 4), window=st.integers(1, 6),
    interval=st.integers(1, 5), pool=st.sampled_from([1, 3]), per_head=st.booleans(), pad=st.sampled_from([0, 3]),
    name=st.sampled_from(["window_kv", "h2o", "random_kv", "streaming_llm", "tova"]),
)  # fmt: skip
@settings(deadline=None, max_examples=15, derandomize=True)
def test_any_budget_holds(entries, sink, recent, window, interval, pool, per_head, pad, name):
    budget = KVBudget.uniform(
        max(entries, sink + recent, 1), sink=sink, recent=recent, window=window, interval=interval, pool=pool,
        per_head=per_head,
    )  # fmt: skip
    logits, tokens, watch, _ = accelerated("llama", create(name), budget, 6, pad=pad)
    assert logits.isfinite().all()
    for step, call in enumerate(watch.calls[1:]):
        now = pad + 13 + step
        for layer in call:
            for head in layer[0]:
                assert head == sorted(set(head))
                assert head[:sink] == list(range(pad, pad + sink))
                assert head[len(head) - recent :] == list(range(now - recent, now))
                assert len(head) <= max(budget.value, 1) + interval - 1
    with Blinkers(build("llama"), watch.calls):
        masked, _ = run(build("llama"), prompt("llama", pad), 6, tokens)
    assert close(logits, masked, 3e-6)


def test_pyramidkv_shares():
    inputs = tiny.inputs("llama", build("llama"), text=100)
    _, _, watch, _ = accelerated(
        "llama", create("pyramidkv", window=1), KVBudget.ratio(0.3, sink=0, recent=0, window=1), 2, inputs=inputs
    )
    kept = [len(layer[0][0]) for layer in watch.calls[1]]
    assert kept == KVBudget.pyramid(0.3, sink=0, recent=0, window=1).entries([100] * 6)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_adakv_heads_differ_and_only_mask():
    budget = KVBudget.ratio(0.4, sink=0, recent=0, window=4)
    inputs = tiny.inputs("llama", build("llama"), text=40)
    _, _, watch, cache = accelerated("llama", create("adakv", window=4), budget, 2, inputs=inputs)
    counts = [[len(head) for head in layer[0]] for layer in watch.calls[1]]
    assert all(sum(pair) == 2 * 16 for pair in counts)
    assert any(a != b for a, b in counts)
    assert [layer.physical for layer in cache.layers] == [41] * 6
    assert [kept_entries(layer) for layer in cache.layers] == [17] * 6


def test_adakv_budgets():
    with pytest.raises(UserError, match="share of each layer"), accelerate(build("llama"), "adakv", kv="uniform:64"):
        pass
    decoder = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="flash_attention_2", sliding_window=None), layers=[None] * 2
    )
    session = Session(build("llama"), Plan(cache=create("adakv"), kv=KVBudget.ada(0.5)))
    with pytest.raises(UserError, match="FlashAttention"):
        Evictor(session, decoder)


def test_flat_masks_share_one_set_of_entries():
    """FlashAttention with padding gets a mask (B, n): no place for heads, so one set serves all."""
    model = build("llama")
    decoder = find_decoder(model)
    evictor = Evictor(Session(model, Plan(cache=create("window_kv"), kv=SMALL)), decoder)
    for mask in (None, torch.ones(1, 20)):
        layer = TrackedLayer()
        layer.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16))
        hidden = torch.randn(1, 20, 64)
        rope = model.model.rotary_emb(hidden, torch.arange(20)[None])
        kwargs = {
            "hidden_states": hidden, "position_embeddings": rope, "attention_mask": mask,
            "cache": SimpleNamespace(layers=[layer]),
        }  # fmt: skip
        evictor.after(0, model.model.layers[0].self_attn, (), kwargs, None)
        assert layer.physical == 10
        assert layer.index.dim() == (3 if mask is None else 2)


def test_layers_with_a_window():
    config = SimpleNamespace(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert evictable(SimpleNamespace(config=config, layers=[None] * 4)) == [1, 3]
    every = SimpleNamespace(sliding_window=8)
    assert evictable(SimpleNamespace(config=every, layers=[None] * 3)) == [0, 1, 2]
    off = SimpleNamespace(sliding_window=8, use_sliding_window=False, layer_types=["full_attention"] * 2)
    assert evictable(SimpleNamespace(config=off, layers=[None] * 2)) == [0, 1]


def test_h2o_sums_are_the_models_own_attention():
    """Sums over the prefill and eleven steps equal those of the eager model's attention maps."""
    model = build("llama", "eager")
    inputs, big = prompt("llama", text=21), KVBudget.uniform(300, interval=4, window=4)
    with accelerate(model, "h2o", kv=big), Watch(model) as watch:
        _, tokens = run(model, inputs)
        states = [layer.state for layer in watch.cache.layers]
    whole = torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)
    with torch.no_grad():
        maps = model(whole, output_attentions=True).attentions
    for state, attention in zip(states, maps, strict=True):
        note = state[NOTE]
        known = state["h2o_sums"].shape[-1]
        note.settle()
        assert known + note.unseen == 31
        want = attention[:, :, :known].sum(2).view(1, 2, 2, -1).mean(2)[..., :known]
        torch.testing.assert_close(state["h2o_sums"], want, atol=2e-6, rtol=1e-5)
        assert state["h2o_seen"][0, 0].tolist() == list(range(known, 0, -1))


def test_window_rule_uses_the_models_own_queries():
    """What is left after the prefill is what the eager model's attention maps rank highest."""
    model, inputs = build("qwen3", "eager"), prompt("qwen3", text=40)
    budget = KVBudget.uniform(20, sink=2, recent=4, window=6)
    watch = accelerated("qwen3", create("window_kv"), budget, 2, attn="eager", inputs=inputs)[2]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for layer, attention in zip(watch.calls[1], maps, strict=True):
        scores = attention[0, :, -6:].mean(1).view(2, 2, -1).mean(1)
        scores[:, :2] = scores[:, -4:] = math.inf
        assert layer[0] == [sorted(row) for row in scores.topk(20).indices.tolist()]


def test_cropping_takes_the_ring_back():
    ring = Ring(4)
    for at in range(6):
        ring.loose.append((torch.full((2, 1, 3), float(at)), (torch.full((1, 1, 2), float(at)),) * 2))
    ring.crop(2)
    part = ring.last(9)
    assert part.positions().tolist() == [[2, 3]] * 2
    assert part.hidden[:, :, 0].tolist() == [[2.0, 3.0]] * 2
    assert part.rope[0].shape == (1, 2, 2)
    ring.crop(5)
    assert ring.count == 0


def test_ring_keeps_the_last_rows_and_follows_beams():
    ring = Ring(5)
    tables = (torch.arange(8.0)[None, :, None].expand(2, 8, 2),) * 2
    ring.push(Part(torch.arange(16.0).view(2, 8, 1), tables, torch.arange(8).expand(2, 8)), 8)
    assert ring.count == 5
    assert ring.parts[0].hidden.untyped_storage().nbytes() == 2 * 5 * 4  # no view of the whole prompt
    ring.loose.append((torch.tensor([[[100.0]], [[200.0]]]), (torch.full((1, 1, 2), 8.0),) * 2))
    turned = ring.select(torch.tensor([1, 1, 0]))
    part = turned.last(3)
    assert part.hidden[..., 0].tolist() == [[14.0, 15.0, 200.0]] * 2 + [[6.0, 7.0, 100.0]]
    assert part.positions().tolist() == [[6, 7, 8]] * 3
    assert part.rope[0][..., 0].tolist() == [[6.0, 7.0, 8.0]] * 3
    assert ring.last(2).hidden.shape == (2, 2, 1)


def test_rerotated_cache_is_a_prompt_of_the_kept_tokens():
    """In a model of one layer keys know nothing of other tokens: a cache without gaps is that of a shorter prompt."""
    model = tiny.build("llama", num_hidden_layers=1)
    inputs = prompt("llama")
    method = create("streaming_llm", rerotate=True)
    with accelerate(model, method, kv="uniform:6,sink=2,recent=1,window=1,interval=2"):
        logits, tokens = run(model, inputs, 8)
    whole = torch.cat([inputs["input_ids"], tokens], 1)[0]
    kept = [0, 1, 9, 10, 11, 12]
    for step in range(1, 8):
        kept.append(12 + step)
        with torch.no_grad():
            want = model(whole[kept][None]).logits[:, -1]
        assert close(logits[step], want, 2e-6)
        if len(kept) == 6 + 2:
            kept = kept[:2] + kept[-4:]
    assert kept[2] > 13  # several compressions, the prompt's middle long gone


def test_rerotation_refuses_three_axes():
    with pytest.raises(UserError, match="M-RoPE"):
        accelerated("qwen2_vl", create("streaming_llm", rerotate=True))


@pytest.mark.parametrize(
    "name", ["snapkv", "h2o", "streaming_llm", "tova", "adakv", "random_kv", "recent_kv", "lightvlm"]
)
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_language_models_by_name(family, name):
    """The promised call: a name and a share."""
    inputs = tiny.inputs(family, build(family), text=160)
    with accelerate(build(family), name, kv="ratio:0.5"), Watch(build(family)) as watch:
        run(build(family), inputs, 3)
    for layer in watch.cache.layers:
        assert kept_entries(layer) == 80 + (0 if name == "tova" else 2)
        assert layer.physical == (162 if name == "adakv" else kept_entries(layer))
        assert layer.get_seq_length() == 162


@pytest.mark.parametrize(
    "name", ["snapkv", "h2o", "streaming_llm", "tova", "pyramidkv", "adakv", "random_kv", "recent_kv"]
)
def test_methods_bring_a_budget(name):
    inputs = tiny.inputs("llama", build("llama"), text=160)
    with accelerate(build("llama"), name), Watch(build("llama")) as watch:
        run(build("llama"), inputs, 2)
    mean = sum(kept_entries(layer) for layer in watch.cache.layers) / 6
    assert mean == pytest.approx(80, abs=1)


# ---- kvpress-like scorers


class KnormLike:
    """Scores by the norm of the keys, as KnormPress."""

    compression_ratio = 0.25

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


class SnapLike:
    """Window attention from hidden states and kwargs["position_embeddings"], as SnapKVPress computes it."""

    window_size = 4

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None
        batch, kv_heads, count, size = keys.shape
        groups = module.config.num_attention_heads // module.config.num_key_value_heads
        assert hidden_states.shape[1] > self.window_size
        q = module.q_proj(hidden_states[:, -self.window_size :]).view(batch, self.window_size, -1, size).transpose(1, 2)
        cos, sin = (t[:, -self.window_size :].unsqueeze(1) for t in kwargs["position_embeddings"])
        first, second = q.chunk(2, -1)
        q = q * cos + torch.cat([-second, first], -1) * sin
        logits = q @ keys.repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(size)
        logits = logits + torch.full_like(logits, -torch.inf).triu(count - self.window_size + 1)
        scores = logits.softmax(-1, dtype=torch.float32)[..., : -self.window_size].mean(-2)
        scores = scores.view(batch, kv_heads, groups, -1).mean(2)
        return F.pad(scores, (0, self.window_size), value=scores.max().item())


class Recorder:
    """Notes what it is given."""

    def __init__(self):
        self.seen = []

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        cos, _ = kwargs["position_embeddings"]
        position = kwargs["cache_position"]
        assert module.rotary_emb(hidden_states, position[None])[0].shape == cos.shape
        assert cos.shape[1] == hidden_states.shape[1] == position.shape[0]
        assert values.shape == keys.shape
        self.seen.append((module.layer_idx, position.tolist(), keys.shape[2], kwargs["past_key_values"] is not None))
        return torch.zeros(keys.shape[:3])


def test_kvpress_norms():
    watch = accelerated("llama", KnormLike(), None, 2, inputs=prompt("llama", text=16))[2]
    model = build("llama")
    with torch.no_grad():
        cache = model(prompt("llama", text=16)["input_ids"], use_cache=True).past_key_values
    for layer, plain in zip(watch.calls[1], cache.layers, strict=True):
        want = (-plain.keys[0].norm(dim=-1)).topk(12).indices.sort(-1).values
        assert layer[0] == want.tolist()  # compression_ratio .25 of 16 removed


def test_kvpress_windows_are_ours():
    """A scorer written as kvpress writes SnapKV keeps what our window rule keeps, in the prefill and while decoding."""
    budget = KVBudget.uniform(10, sink=0, recent=4, window=4, interval=3)
    ours = accelerated("llama", create("window_kv"), budget)
    theirs = accelerated("llama", SnapLike(), budget, tokens=ours[1])
    assert close(theirs[0], ours[0])
    assert theirs[2].calls[1:] == ours[2].calls[1:]


def test_kvpress_arguments():
    scorer = Recorder()
    accelerated("llama", scorer, SMALL, 5)
    assert scorer.seen[0] == (0, list(range(13)), 13, True)
    assert scorer.seen[6] == (0, list(range(12, 16)), 13, True)  # three steps later: the last window of inputs
    assert len(scorer.seen) == 12
    assert not hasattr(build("llama").model.layers[0].self_attn, "rotary_emb")


def test_kvpress_padding_goes_first():
    runs = [accelerated("llama", KnormLike(), SMALL, pad=pad)[0] for pad in (0, 4)]
    assert close(runs[1], runs[0], 2e-6)


@pytest.mark.parametrize("wrong", [None, 0.5, torch.zeros(1, 2, 3)])
def test_kvpress_wrong_shapes(wrong):
    scorer = SimpleNamespace(score=lambda *args: wrong)
    with pytest.raises(UserError, match="expected \\(B, K, n\\)"):
        accelerated("llama", scorer, SMALL, 2)


def test_kvpress_ratios():
    with (
        pytest.raises(UserError, match=r"in \[0, 1\)"),
        accelerate(build("llama"), SimpleNamespace(score=print, compression_ratio=1.5)),
    ):
        pass
