"""Scores without attention maps, against the maps of the eager model (LightVLM 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import vlm_tiny as tiny
from torch import Tensor
from vlm_accel.llm import scores
from vlm_accel.methods.base import Reduced, TokenMethod, Tokens
from vlm_decoder import decoder, model, plain, steps


@dataclass(frozen=True)
class Spy(TokenMethod):
    """Keeps the first rows, and what it was shown."""

    kind: str = "none"
    seen: list[Any] = field(default_factory=list)
    own_llm_scores = True
    needs_keys = True

    def score(self, stage: str) -> Any:
        return self.kind

    def llm_scores(self, view: Any) -> Tensor:
        rows = torch.arange(view.visible.shape[1]).expand_as(view.span)
        self.seen.append({name: rule(view) for name, rule in scores.SCORES.items()} | {
            "all": view.attention(rows), "view": view, "keys": view.keys(), "x": view.x,
        })  # fmt: skip
        return view.span.float()

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        self.seen.append(tokens)
        kept = torch.arange(keep).expand(tokens.x.shape[0], keep)
        return Reduced(tokens.x[:, :keep], kept)


def prompt(net: Any, name: str, pad: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Batch, image mask, valid mask; an image of 12 tokens at a place of its own in each sample."""
    batch = tiny.inputs(name, net, batch=2, text=30, pad=pad)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, pad + 4 : pad + 16] = True
    mask[1, pad + 9 : pad + 21] = True
    return batch, mask, batch["attention_mask"].bool()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tiny.LANGUAGE)
@pytest.mark.parametrize("pad", [0, 5])
def test_equal_the_eager_maps_with_grouped_heads_norms_windows_and_padding(name: str, attn: str, pad: int) -> None:
    net = model(name, attn)
    batch, image, valid = prompt(net, name, pad)
    maps = plain(model(name, "eager"), batch, output_attentions=True).attentions[2]
    spy = Spy()
    with decoder(net, spy, steps((3, 0.5))):
        plain(net, batch | {"image_mask": image})
    seen = spy.seen[0]
    weight = (image.int().flip(1).cumsum(1).flip(1) == 0) & valid
    mean = maps.mean(1)
    want = {
        "last": mean[:, -1],
        "text": (mean * weight[..., None]).sum(1) / weight.sum(1, keepdim=True),
        "received": (mean * valid[..., None]).sum(1) / valid.flip(1).cumsum(1).flip(1).clamp(min=1),
    }
    for kind, value in want.items():
        torch.testing.assert_close(seen[kind] * valid, value * valid, rtol=0, atol=1e-6)
    both = valid[:, None, :, None] & valid[:, None, None]
    torch.testing.assert_close(seen["all"] * both, maps * both, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_self_is_the_layer_that_the_tokens_enter(name: str) -> None:
    net = model(name)
    batch, image, _ = prompt(net, name, 0)
    maps = plain(model(name, "eager"), batch, output_attentions=True).attentions[3]
    spy = Spy("self")
    with decoder(net, spy, steps((3, 0.5))):
        plain(net, batch | {"image_mask": image})
        torch.testing.assert_close(spy.seen[0]["self"], maps.mean(1)[:, -1], rtol=0, atol=1e-6)
        plain(net, batch | {"image_mask": image}, use_cache=False)
        assert torch.equal(spy.seen[0]["self"], spy.seen[2]["self"])


def test_received_is_the_same_for_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("llama")
    batch, image, _ = prompt(net, "llama", 3)
    results = []
    for chunk in (128, 7):
        monkeypatch.setattr(scores, "CHUNK", chunk)
        spy = Spy()
        with decoder(net, spy, steps((3, 0.5))):
            plain(net, batch | {"image_mask": image})
        results.append(spy.seen[0]["received"])
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def test_what_methods_are_given() -> None:
    net = model("llava")
    batch = tiny.inputs("llava", net, batch=2, images=2, pad=2)
    hidden = plain(net, batch, output_hidden_states=True).hidden_states
    spy = Spy()
    with decoder(net, spy, steps((2, 0.5), (4, 0.5))) as session:
        out = plain(net, batch, output_hidden_states=True)
    for layer in (0, 1, 2):
        assert torch.equal(out.hidden_states[layer], hidden[layer]), "scoring must not change a layer"
    shown, tokens, later, last = spy.seen
    view = shown["view"]
    image = batch["input_ids"] == tiny.IMAGE
    assert torch.equal(view.x, hidden[2])
    assert torch.equal(view.embeds, hidden[0])
    assert torch.equal(view.embeds_image, image)
    assert torch.equal(view.image, image)
    assert torch.equal(tokens.x.reshape(-1, 64), hidden[2][image])
    assert tokens.index.tolist() == [list(range(16))] * 4
    assert tokens.span.tolist() == [0, 1, 2, 3]
    assert torch.equal(tokens.keys[0], shown["keys"][0].transpose(0, 1)[image[0].nonzero()[:16, 0]])
    at = later["view"].origin.clamp(min=0)
    columns = session.cache.layers[3].index if session.cache is not None else None
    assert columns is not None
    assert torch.equal(torch.where(later["view"].origin < 0, -1, at), columns)
    assert last.index.tolist() == [list(range(8))] * 4
