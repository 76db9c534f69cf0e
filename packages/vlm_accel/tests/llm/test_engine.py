"""The engine around the prefill: refusals, restoration, threads, traces, biases, host synchronisation."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import vlm_tiny as tiny
from polymodal.errors import UserError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlm_accel import accelerate
from vlm_accel.budget import KVBudget
from vlm_accel.llm.cache import Rows
from vlm_accel.llm.masks import layer_mask
from vlm_accel.merge_map import MergeMap
from vlm_decoder import CACHE, decoder, generate, model, plain, steps

HALVES = steps((2, 0.5), (4, 0.5))


# ---- refusals: one line with the remedy


def test_ways_of_generating_that_cannot_work_are_refused() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net)
    with decoder(net, "lightvlm", HALVES):
        with pytest.raises(UserError, match="use_cache=False"):
            generate(net, batch, use_cache=False)
        with pytest.raises(UserError, match="cache_implementation='static'"):
            generate(net, batch, cache_implementation="static")
        cache = StaticCache(config=net.config.get_text_config(), max_cache_len=64)
        with pytest.raises(UserError, match="StaticCache cannot"):
            generate(net, batch, **{CACHE: cache})
        with pytest.raises(UserError, match="labels"):
            net(**batch, labels=batch["input_ids"])


def test_a_prefill_in_pieces_is_refused_where_an_encoder_counted_the_rows() -> None:
    net = model("llava")
    piece = {key: value[:, :12] for key, value in tiny.inputs("llava", net).items() if key != "pixel_values"}
    with (
        decoder(net, "lightvlm", HALVES, segments={"image": [16]}),
        pytest.raises(UserError, match="prefill_chunk_size"),
    ):
        net(**piece)


def test_training_and_gradients_are_refused_or_allowed() -> None:
    net = tiny.build("llava")
    batch = tiny.inputs("llava", net)
    with decoder(net, "lightvlm", HALVES), torch.enable_grad():
        with pytest.raises(UserError, match="allow_grad"):
            net(**batch)
        net.train()
        with pytest.raises(UserError, match="training"):
            net(**batch)
        net.eval()
    with decoder(net, "lightvlm", HALVES, allow_grad=True), torch.enable_grad():
        net(**batch).logits.sum().backward()
    assert net.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_attention_and_layers_that_do_not_fit() -> None:
    net = tiny.build("llava")
    net.model.language_model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UserError, match=r"flex_attention.*sdpa"), decoder(net, "drop", HALVES):
        pass
    net.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="log_size"), decoder(net, "drop", HALVES, log_size=True):
        pass
    deep = model("qwen3_vl")
    with pytest.raises(UserError, match="layer 2 or later"), decoder(deep, "drop", steps((1, 0.5))):
        pass


def test_language_models_need_to_know_the_image_tokens() -> None:
    net = model("llama")
    with decoder(net, "drop", HALVES), pytest.raises(UserError, match="image_mask"):
        plain(net, tiny.inputs("llama", net))


def test_assisted_decoding_works_until_it_would_take_back_merged_tokens() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, text=12)
    with decoder(net, "drop", HALVES) as session:
        greedy = generate(net, batch, 6, eos_token_id=1)
        assert torch.equal(generate(net, batch, 6, eos_token_id=1, prompt_lookup_num_tokens=2), greedy)
        plain(net, batch)
        with pytest.raises(UserError, match="assisted decoding"):
            session.cache.crop(-14)


# ---- leaving no trace


def snapshot(net: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (sorted(module.__dict__), [len(getattr(module, hook)) for hook in hooks])
        for name, module in net.named_modules()
    } | {"attention": sorted(ALL_ATTENTION_FUNCTIONS.keys())}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm"])
def test_nothing_remains_after_an_exception_anywhere(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=2)
    want, before, greedy = plain(net, batch).logits, snapshot(net), generate(net, batch)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    text = getattr(net.model, "language_model", None) or net.model.text_model
    for place in (text.layers[3], text.layers[3].self_attn, text.norm, net.lm_head):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"), decoder(net, "lightvlm", HALVES, kv=KVBudget.ratio(1)):
            plain(net, batch)
        handle.remove()
        assert snapshot(net) == before
    with decoder(net, "lightvlm", HALVES):
        handle = text.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            plain(net, batch)
        handle.remove()
        plain(net, batch)
    assert snapshot(net) == before
    assert torch.equal(plain(net, batch).logits, want)
    assert torch.equal(generate(net, batch), greedy)


def test_two_models_at_once_in_two_threads() -> None:
    nets = {"llava": tiny.build("llava"), "qwen2_vl": tiny.build("qwen2_vl")}
    batches = {name: tiny.inputs(name, net, batch=2, pad=1) for name, net in nets.items()}
    want = {}
    for name, net in nets.items():
        with decoder(net, "lightvlm", HALVES):
            want[name] = generate(net, batches[name], 6)
    got: dict[str, list[Any]] = {name: [] for name in nets}

    def run(name: str) -> None:
        with torch.no_grad(), decoder(nets[name], "lightvlm", HALVES):
            for _ in range(3):
                got[name].append(generate(nets[name], batches[name], 6))

    threads = [threading.Thread(target=run, args=(name,)) for name in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, results in got.items():
        assert len(results) == 3
        assert all(torch.equal(one, want[name]) for one in results)


def test_caches_given_by_the_user() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net)
    with decoder(net, "lightvlm", HALVES) as session:
        want = generate(net, batch)
        for cache in (DynamicCache(), DynamicCache(config=net.config.get_text_config())):
            assert torch.equal(generate(net, batch, **{CACHE: cache}), want)
            assert session.cache is cache
            assert cache.layers[3].physical == 18 + 2


def test_a_cache_filled_by_the_plain_model_goes_on() -> None:
    net = model("llava")
    first, second = tiny.inputs("llava", net, seed=5), tiny.inputs("llava", net, seed=6)
    cache = plain(net, first)[CACHE]
    more = {CACHE: cache, "attention_mask": torch.ones(1, 52, dtype=torch.long)}
    with decoder(net, "drop", HALVES):
        plain(net, second | more)
    assert [layer.physical for layer in cache.layers] == [52, 52, 44, 44, 40, 40]


# ---- traces


def test_maps_tell_where_tokens_went() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2)
    with decoder(net, "lightvlm", HALVES, trace=True) as session:
        plain(net, batch)
        kept = session.cache.layers[5]
        columns = [kept.index[at][kept.image[at]] for at in (0, 1)]
    assert len(session.maps) == 4
    image = batch["input_ids"] == tiny.IMAGE
    for number, one in enumerate(session.maps):
        sample, picture = divmod(number, 2)
        assert [(step.layer, step.n_in, step.n_out) for step in one.steps] == [(2, 16, 8), (4, 8, 4)]
        places = image[sample].nonzero().flatten()[picture * 16 :][:16]
        assert places[one.positions()].tolist() == columns[sample][picture * 4 :][:4].tolist()
        assert one.sizes().sum() == 16
        assert (one.owner() >= 0).all()
        torch.testing.assert_close(torch.tensor(one.source_weights().row_sums()), torch.ones(4, dtype=torch.float64))
        assert one.steps[0].score.shape == (16,)


@pytest.mark.parametrize("budget", ["span", "global"])
def test_traces_change_nothing_and_follow_the_first_beam(budget: str) -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2)
    with decoder(net, "lightvlm", HALVES, budget=budget):
        want = generate(net, batch, num_beams=2)
    with decoder(net, "lightvlm", HALVES, segments={"image": [16] * 4}, trace=True, budget=budget) as session:
        session.pending.extend(MergeMap(grid=(1, 4, 4)) for _ in range(4))
        assert torch.equal(generate(net, batch, num_beams=2), want)
        assert len(session.maps) == 4
        assert not session.pending
        left = [sum(one.steps[-1].n_out for one in session.maps[at : at + 2]) for at in (0, 2)]
        assert left == [8, 8]
        for one in session.maps:
            one.positions()


# ---- log sizes


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_log_sizes_reach_the_logits_of_merged_keys(attn: str) -> None:
    net = tiny.build("llava", attn)
    batch = tiny.inputs("llava", net)
    with decoder(net, "drop", HALVES):
        dropped = plain(net, batch).logits
    with decoder(net, "drop", HALVES, log_size=True):
        torch.testing.assert_close(plain(net, batch).logits, dropped, rtol=0, atol=3e-6)
    seen: list[Any] = []
    handle = net.model.language_model.layers[3].self_attn.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True
    )
    with decoder(net, "lightvlm", HALVES, log_size=True, trace=True) as session:
        generate(net, batch)
    handle.remove()
    image = session.cache.layers[3].image[0]
    sizes = torch.tensor(session.maps[0].sizes(0)).float()
    want = torch.zeros(20).masked_scatter(image, sizes.log())
    assert want.max() > 0
    assert [mask.shape for mask in seen] == [(1, 1, 18, 18), (1, 1, 1, 19), (1, 1, 1, 20)]
    for mask in seen:
        torch.testing.assert_close(mask[0, 0, -1], want[: mask.shape[-1]])
    assert (seen[0][0, 0].triu(1)[0, 1:] < -1e30).all()


# ---- host synchronisation


class Count(TorchDispatchMode):
    """Counts operations whose result the host must wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
        self.waits += func.__name__.split(".")[0].removeprefix("aten::") in waits
        return func(*args, **(kwargs or {}))


def waits(net: Any, batch: dict[str, Any], tokens: int, **options: Any) -> int:
    with Count() as mode:
        generate(net, batch, tokens, **options)
    return mode.waits


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("method", ["lightvlm", "recycle", "fastv", "pyramiddrop"])
def test_no_layer_and_no_decoding_step_waits_for_the_device(name: str, method: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=2)
    plain_waits = [waits(net, batch, tokens) for tokens in (2, 6)]
    with decoder(net, method, HALVES):
        assert [waits(net, batch, tokens) for tokens in (2, 6)] == plain_waits


# ---- through accelerate


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "smolvlm"])
def test_accelerate_runs_the_paper_presets(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, pad=2)
    for preset in ("keep35", "keep3"):
        with accelerate(net, "lightvlm", schedule=preset, trace=True) as handle:
            ids = generate(net, batch, 4)
            assert ids.shape == (2, 4)
            assert len(handle.maps) >= 2


def test_every_decoder_method_leaves_what_it_counts() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2, pad=2)
    names = ("rank1", "recycle", "shift", "drop", "lightvlm", "random", "stride", "pool", "fastv", "pyramiddrop",
             "sparsevlm", "pact", "text_only")  # fmt: skip
    for name in names:
        for scope in ("span", "global"):
            with decoder(net, name, HALVES, budget=scope, trace=True) as session:
                ids = generate(net, batch, 3)
                assert ids.shape == (2, 3)
                left = 0 if name == "text_only" else 8
                assert session.prefills[0].survivors[-1] == left, name
                assert session.cache.layers[5].image.sum(1).tolist() == [left, left], name


def test_the_model_without_its_head_is_accelerated_too() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net)
    with decoder(net, "drop", HALVES):
        want = plain(net, batch).logits
    with decoder(net.model, "drop", HALVES) as session:
        hidden = plain(net.model, batch).last_hidden_state
        assert session.prefills[0].rows == [26, 26, 18, 18, 14, 14]
        torch.testing.assert_close(net.lm_head(hidden), want)


def test_masks_of_flash_attention_are_gathered_in_two_dimensions() -> None:
    # the kernel itself cannot be installed here: only what it would be given is tested
    index = torch.tensor([[-1, 0, 3], [1, 2, 5]])
    rows = Rows(index, index >= 0, index < 0, holes=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    given = {"keys": rows, "queries": None, "past": 0, "flash": True, "heads": 4, "dtype": torch.float32}
    assert layer_mask(mask, **given).tolist() == [[0, 1, 1], [0, 1, 1]]
    assert layer_mask(None, **given).tolist() == [[False, True, True], [True, True, True]]
    whole = Rows(index.clamp(min=0), index >= -1, index < 0)
    assert layer_mask(None, **{**given, "keys": whole}) is None
    heads = Rows(index[:, None].expand(-1, 2, -1), index[:, None] >= 0, index[:, None] < 0, holes=True)
    with pytest.raises(UserError, match="per_head=False"):
        layer_mask(mask, **{**given, "keys": heads})
