"""Keep everything: every decoder family gives the bits of the untouched model (LightVLM 8, first line)."""

from __future__ import annotations

import pytest
import torch
import vlm_tiny as tiny
from vlm_accel.budget import KVBudget
from vlm_decoder import decoder, generate, model, plain, steps

KEEP_ALL = steps((2, 1.0), (4, 1.0))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tiny.VLMS)
def test_keeping_all_is_bit_equal_in_prefill_greedy_and_beams(name: str, attn: str) -> None:
    net = model(name, attn)
    one = tiny.inputs(name, net)
    padded = tiny.inputs(name, net, batch=2, pad=3)
    want = [plain(net, one).logits, plain(net, padded).logits, plain(net, one, use_cache=False).logits]
    greedy, beams = generate(net, padded), generate(net, padded, num_beams=3)
    with decoder(net, "lightvlm", KEEP_ALL):
        got = [plain(net, one).logits, plain(net, padded).logits, plain(net, one, use_cache=False).logits]
        assert torch.equal(generate(net, padded), greedy)
        assert torch.equal(generate(net, padded, num_beams=3), beams)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", tiny.LANGUAGE)
def test_language_models_with_a_large_budget_are_bit_equal(name: str) -> None:
    net = model(name)
    batch = tiny.inputs(name, net, batch=2, text=20, pad=3)
    greedy, beams = generate(net, batch), generate(net, batch, num_beams=3)
    with decoder(net, "lightvlm", kv=KVBudget.uniform(100)):
        assert torch.equal(generate(net, batch), greedy)
        assert torch.equal(generate(net, batch, num_beams=3), beams)


@pytest.mark.parametrize("name", ["llava", "gemma3_text"])
def test_sliding_windows_live_in_the_mask(name: str) -> None:
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
    net = model(name, **(window if name == "llava" else {}))
    batch = tiny.inputs(name, net, text=26)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[:, 3:19] = True
    given = {} if name == "llava" else {"image_mask": mask}
    greedy = generate(net, batch)
    with decoder(net, "drop", KEEP_ALL) as session:
        assert torch.equal(generate(net, batch | given), greedy)
        assert [layer.physical for layer in session.cache.layers] == [batch["input_ids"].shape[1] + 2] * 6
    with decoder(net, "drop", steps((2, 0.5))) as session:
        generate(net, batch | given)
        length = batch["input_ids"].shape[1] + 2
        assert [layer.physical for layer in session.cache.layers] == [length] * 2 + [length - 8] * 4
