"""Random prompts: counts as resolved, every text token there, no NaN, hooks gone (LightVLM 8, hypothesis)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vlm_accel.schedule import Step, resolve
from vlm_decoder import decoder, model

IMAGE_RUNS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4)


@st.composite
def prompts(draw: Any) -> list[list[tuple[int, int]]]:
    """For each sample pairs (image tokens, text tokens after them); the first text of 1 to 4 tokens is added."""
    return draw(st.lists(IMAGE_RUNS, min_size=1, max_size=3))


STEPS = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([0.1, 0.34, 0.5, 0.75, 1.0])),
    min_size=1,
    max_size=3,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: [Step("llm", layer, ratio=ratio) for layer, ratio in sorted(pairs)])


def hooks(net: torch.nn.Module) -> list[tuple[int, ...]]:
    return [(*module._forward_pre_hooks, *module._forward_hooks) for module in net.modules()]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    samples=prompts(),
    schedule=STEPS,
    method=st.sampled_from(["lightvlm", "drop", "recycle", "rank1", "random"]),
    name=st.sampled_from(["llama", "qwen3", "gemma3_text"]),
    attn=st.sampled_from(["sdpa", "eager"]),
    right=st.booleans(),
)
def test_random_prompts(
    samples: list[list[tuple[int, int]]], schedule: list[Step], method: str, name: str, attn: str, right: bool
) -> None:
    net = model(name, attn)
    kinds = [[0, 0] + [kind for run in sample for kind in [1] * run[0] + [0] * run[1]] for sample in samples]
    length = max(map(len, kinds))
    blank = [[-1] * (length - len(kind)) for kind in kinds]
    rows = torch.tensor([kind + pad if right else pad + kind for kind, pad in zip(kinds, blank, strict=True)])
    ids = torch.randint(2, 80, rows.shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": (rows >= 0).long(), "image_mask": rows == 1}
    changed = any(step.count(n) < n for sample in samples for n, _ in sample for step in schedule)
    before = hooks(net)  # transformers leaves hooks of its own where attentions were asked for once
    with decoder(net, method, schedule) as session:
        out = net(**batch)
        layers = session.cache.layers
        for number, layer in enumerate(layers):
            done = [step for step in schedule if step.layer <= number]
            for at, sample in enumerate(samples):
                left = [([n, *resolve(done, n)])[-1] for n, _ in sample]
                index, image = layer.index[at], layer.image[at]
                assert int(image.sum()) == sum(left)
                mine = index[(index >= 0) & layer.valid[at]]
                assert (mine.diff() > 0).all()
                assert set((rows[at] == 0).nonzero().flatten().tolist()) == set(
                    index[~image & layer.valid[at]].tolist()
                )
                assert (rows[at][index[image]] == 1).all()
        assert layers[5].logical == length
        for at in range(len(samples)):
            real = out.logits[at][-1] if changed and layers[5].physical < length else out.logits[at, rows[at] >= 0][-1]
            assert not real.isnan().any()
        if not right:
            more = net.generate(**batch, max_new_tokens=2, do_sample=False)
            assert more.shape[1] == length + 2
    assert hooks(net) == before


def test_hooks_are_gone_when_the_prompt_is_refused() -> None:
    net = model("llama")
    before = hooks(net)
    with pytest.raises(ValueError, match="exactly one"), decoder(net, "drop", [Step("llm", 2, ratio=0.5)]):
        net()
    assert hooks(net) == before
