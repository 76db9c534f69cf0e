"""Closed-form costs against counted ones and against the worked figures of the specifications."""

from __future__ import annotations

import pytest
import torch
import vlm_tiny as tiny
from torch.utils.flop_counter import FlopCounterMode
from vlm_accel import costs
from vlm_accel.llm.locate import find_decoder
from vlm_accel.schedule import Step, counts_per_layer, expand, pyramid

QWEN7B = costs.DecoderShape(28, 3584, 3584, 512, 18944)


def flops(function: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_decoder_counts_as_the_flop_counter(name: str) -> None:
    model = tiny.build(name, attn="eager")
    decoder = find_decoder(model)
    shape = costs.DecoderShape.of(decoder.config, len(decoder.layers))
    ids = tiny.inputs(name, model, batch=2, text=11)["input_ids"]
    counted = flops(lambda: decoder.module(input_ids=ids, use_cache=False))
    # The rotary table is made by a small matrix product in some families; nothing else is outside the layers.
    head = 2 * shape.query // decoder.config.num_attention_heads // 2 * 11 * 2
    ours = 2 * 2 * shape.prefill([11] * shape.layers, causal=False)
    assert ours <= counted <= ours + 2 * head


def test_encoder_counts_as_the_flop_counter() -> None:
    model = tiny.build("clip", attn="eager")
    layer = getattr(model, "vision_model", model).encoder.layers[0]
    x = torch.randn(3, 17, 32)
    counted = flops(lambda: layer(x, None))
    assert counted == 2 * costs.EncoderShape(32, 64).block([17, 17, 17], 51)


def test_decode_step_behind_a_cache() -> None:
    assert QWEN7B.layer(1, cached=10) == QWEN7B.layer(11) - QWEN7B.layer(10)


def test_worked_figures_of_the_specification() -> None:
    assert QWEN7B.prefill([1088] * 28) == pytest.approx(7.22e12, rel=0.01)
    ratios = {}
    for target in (0.35, 0.03):
        _, steps = expand(pyramid(target), 0, 28)
        rows = [64 + n for n in counts_per_layer(steps, 1024, 28)]
        ratios[target] = QWEN7B.prefill([1088] * 28) / QWEN7B.prefill(rows)
    assert ratios[0.35] == pytest.approx(1.80, abs=0.01)
    assert ratios[0.03] == pytest.approx(4.23, abs=0.01)
    assert QWEN7B.kv_bytes([1], 2) * 28 == 57_344


def test_siglip_with_the_published_image_schedule() -> None:
    shape = costs.EncoderShape(1152, 4304)
    steps = [Step("vision", layer, drop=92) for layer in (5, 6, 7, 8)]
    counts = counts_per_layer(steps, 729, 26)
    after = [*counts[1:], counts[-1]]
    plain = sum(shape.block([729], 729) for _ in range(26))
    short = sum(shape.block([n], m) for n, m in zip(counts, after, strict=True))
    assert plain == pytest.approx(320.4e9, rel=0.001)
    assert short == pytest.approx(195.8e9, rel=0.001)


def test_gains() -> None:
    assert costs.decode_gain(100, 300, 100) == 2
    gain = costs.end_to_end_gain({"vision": 0.2, "prefill": 0.5, "decode": 0.3}, {"prefill": 3.65, "decode": 1.1})
    assert gain == pytest.approx(1.64, abs=0.01)
