"""Eviction: a plain model with the same columns masked, padding that changes nothing, budgets that hold."""

import functools

import pytest
import torch
import vlm_tiny as tiny
from vlm_accel import KVBudget, accelerate
from vlm_accel.methods import create
from vlm_evict import SMALL, Blinkers, Watch, accelerated, attentions, build, close, prompt, run

SHARE = KVBudget.ratio(0.4, sink=0, recent=0, window=4, interval=3)
METHODS = {
    "window_kv": ({}, SMALL), "snapkv": ({"window": 4, "pool": 3}, SMALL), "h2o": ({}, SMALL),
    "streaming_llm": ({}, SMALL), "tova": ({}, SMALL), "pyramidkv": ({"window": 4}, SHARE),
    "adakv": ({"window": 4}, SHARE), "random_kv": ({}, SMALL), "recent_kv": ({}, SMALL),
}  # fmt: skip
FAMILIES = ("qwen2", "qwen3", "phi3", "gemma3_text", "mistral", "llava", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm")


@functools.cache
def shortened(family, name="window_kv", **changes):
    """One run with eviction, kept for all tests that look at it."""
    options, budget = METHODS[name]
    return accelerated(family, create(name, **options), budget, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_evicted_is_masked(name):
    """A plain model whose masks hide what eviction took out gives the same logits at every step."""
    logits, tokens, watch, _ = shortened("llama", name)
    with Blinkers(build("llama"), watch.calls):
        masked, _ = run(build("llama"), prompt("llama"), 11, tokens)
    assert close(logits, masked)
    plain, _ = run(build("llama"), prompt("llama"), 11, tokens)
    assert not close(logits, plain, 1e-2)  # and it is not that nothing was hidden
    assert close(logits[0], plain[0])  # the prefill itself is whole


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_is_masked_in_every_family(family):
    logits, tokens, watch, _ = shortened(family)
    with Blinkers(build(family), watch.calls):
        masked, _ = run(build(family), prompt(family), 11, tokens)
    assert close(logits, masked)
    kinds = getattr(build(family).config, "layer_types", None) or ["full_attention"] * 6
    kinds = kinds if "full_attention" in kinds else ["full_attention"] * 6  # Mistral: every layer has a window
    for layer, kind in zip(watch.cache.layers, kinds, strict=True):
        if kind == "full_attention":
            assert layer.physical == 11 < layer.get_seq_length()
        else:
            assert layer.keys.shape[2] == 7  # the window, untouched


def test_eager_is_sdpa():
    eager = accelerated("llava", create("window_kv"), attn="eager", tokens=shortened("llava")[1])[0]
    assert close(eager, shortened("llava")[0])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name][1] is SMALL])
def test_padding_changes_nothing(name):
    logits, tokens, _, _ = shortened("llama", name)
    padded, same, _, cache = shortened("llama", name, pad=4)
    assert torch.equal(tokens, same)
    assert close(padded, logits, 2e-6)
    assert all(layer.valid.all() for layer in cache.layers)  # padding went first


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("per_head", [True, False])
def test_padded_images(family, per_head):
    budget = KVBudget.uniform(10, sink=2, recent=4, window=4, interval=3, per_head=per_head)
    logits, tokens, _, cache = accelerated(family, create("window_kv"), budget)
    padded, same, _, _ = accelerated(family, create("window_kv"), budget, pad=4)
    assert torch.equal(tokens, same)
    assert close(padded, logits, 2e-6)
    assert cache.layers[0].index.dim() == (3 if per_head else 2)


def test_padding_to_the_letter():
    """LightVLM 8: small weights, one set for all heads, logits equal to 2e-7 over ten steps."""
    budget = KVBudget.uniform(10, sink=2, recent=4, window=4, per_head=False, interval=1)
    model = tiny.build("llava")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 / 6 if parameter.dim() > 1 else 1)
    runs = []
    for pad in (0, 4):
        with accelerate(model, create("window_kv"), kv=budget):
            runs.append(run(model, prompt("llava", pad), 11))
    assert torch.equal(runs[0][1], runs[1][1])
    torch.testing.assert_close(runs[1][0], runs[0][0], atol=2e-7, rtol=0)


def test_batch_is_its_samples():
    both = tiny.inputs("llava", build("llava"), batch=2, text=6)
    logits, tokens, _, _ = accelerated("llava", create("window_kv"), inputs=both)
    for sample in range(2):
        one = {key: value[sample : sample + 1] for key, value in both.items()}
        single, same, _, _ = accelerated("llava", create("window_kv"), inputs=one)
        assert torch.equal(tokens[sample : sample + 1], same)
        assert close(logits[:, sample : sample + 1], single)


def test_padded_batch_is_its_samples():
    both = tiny.inputs("llama", build("llama"), batch=2, text=20, pad=5)
    logits, tokens, _, _ = accelerated("llama", create("h2o"), inputs=both)
    for sample in range(2):
        keep = both["attention_mask"][sample].bool()
        one = {key: value[sample : sample + 1, keep] for key, value in both.items()}
        single, same, _, _ = accelerated("llama", create("h2o"), inputs=one)
        assert torch.equal(tokens[sample : sample + 1], same)
        assert close(logits[:, sample : sample + 1], single, 2e-6)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
@pytest.mark.parametrize("name", ["window_kv", "h2o", "tova", "adakv"])
def test_budget_that_is_not_reached_is_bit_equal(family, name, attn):
    model, options = build(family, attn), METHODS[name][0]
    budget = KVBudget.ratio(1.0) if name == "adakv" else KVBudget.uniform(100)
    for beams in (1, 3):
        plain = run(model, prompt(family), 6, num_beams=beams)
        logits, tokens, _, _ = accelerated(
            family, create(name, **options), budget, 6, attn=attn, num_beams=beams, pad=0
        )
        assert torch.equal(plain[0], logits)
        assert torch.equal(plain[1], tokens)


def test_budget_that_takes_padding_only_changes_nothing():
    """Ten real tokens, seven columns of padding, ten entries: only the padding goes."""
    inputs = prompt("llama", pad=7, text=10)
    budget = KVBudget.uniform(10, sink=2, recent=4, window=4, interval=50)
    plain, tokens = run(build("llama"), inputs, 8)
    logits, same, watch, cache = accelerated("llama", create("window_kv"), budget, 8, inputs=inputs)
    assert [layer.physical for layer in cache.layers] == [17] * 6  # 10 + 7 generated
    assert watch.calls[1][0][0][0] == list(range(7, 17))
    assert torch.equal(tokens, same)
    assert close(logits, plain)


def test_positions_after_a_hundred_steps():
    model = build("llama")
    seen = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1]).flatten().tolist()),
        with_kwargs=True,
    )
    try:
        _, _, watch, cache = accelerated("llama", create("window_kv"), steps=101)
    finally:
        hook.remove()
    assert [at for (at,) in seen[1:]] == list(range(13, 113))
    assert cache.get_seq_length() == 113
    assert max(watch.counts) <= 12  # before each call; after it 10 + 3 go back to 10


def test_mrope_positions_are_the_plain_models():
    model = build("qwen2_vl")
    seen = []
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    try:
        tokens = shortened("qwen2_vl")[1]
        accelerated("qwen2_vl", create("window_kv"), tokens=tokens)
        half = len(seen)
        run(model, prompt("qwen2_vl"), 11, tokens)
    finally:
        hook.remove()
    assert len(seen) == 2 * half
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept(name):
    """Ascending, within the budget, sinks and recent ones there, at every step."""
    watch = shortened("llama", name)[2]
    method = create(name, **METHODS[name][0])
    budget = method.adapt(METHODS[name][1])
    sinks = list(range(budget.sink))
    for step, call in enumerate(watch.calls[1:]):
        now = 13 + step
        for layer in call:
            for head in layer[0]:
                assert head == sorted(set(head))
                assert head[: budget.sink] == sinks
                assert head[len(head) - budget.recent :] == list(range(now - budget.recent, now))
            if not method.once:
                assert len(layer[0][0]) <= 10 + (0 if method.every_step else budget.interval - 1)
    if method.once:
        share = budget.entries([13] * 6) if budget.kind != "uniform" else [10] * 6
        mean = [sum(len(head) for head in layer[0]) / 2 for layer in watch.calls[1]]
        assert mean == share


@pytest.mark.parametrize("name", ["window_kv", "h2o", "random_kv"])
def test_sinks_and_recent_alone_are_streaming_llm(name):
    budget = KVBudget.uniform(6, sink=2, recent=4, window=4, interval=2)
    logits, tokens, watch, _ = accelerated("llava", create(name), budget)
    streaming = accelerated("llava", create("streaming_llm"), budget, tokens=tokens)
    assert close(logits, streaming[0])
    assert [[[sorted(h) for h in layer[0]] for layer in call] for call in watch.calls[1:]] == [
        [[sorted(h) for h in layer[0]] for layer in call] for call in streaming[2].calls[1:]
    ]


def test_memory_shrinks():
    """The storage behind keys and values is that of the entries left, with room for one interval."""
    cache = shortened("llama")[3]
    for layer in cache.layers:
        assert layer.physical == 11
        rows = layer.keys.untyped_storage().nbytes() // (2 * 16 * 4)
        assert rows <= 10 + 3


def test_nothing_stays_behind():
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerated("llama", create("adakv", window=4), SHARE)
    with pytest.raises(RuntimeError, match="stop"):
        _broken_off(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert attentions(model)[0].forward.__func__ is type(attentions(model)[0]).forward


def _broken_off(model):
    with accelerate(model, "snapkv", kv=SMALL), Watch(model):
        run(model, prompt("llama"), 3)
        raise RuntimeError("stop")
