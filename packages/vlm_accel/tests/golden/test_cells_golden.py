"""Encoders with cells against the float64 encoder of ``_cells_reference``, image by image."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from vlm_accel import Step, accelerate
from vlm_accel.families import family_of, load_encoder
from vlm_accel.methods.base import Reduced, TokenMethod

_spec = importlib.util.spec_from_file_location("_cells_reference", Path(__file__).with_name("_cells_reference.py"))
assert _spec is not None
assert _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
__import__("sys").modules["_cells_reference"] = reference
_spec.loader.exec_module(reference)

ACT = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh", "internvl": "gelu"}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = ("internvl", "smolvlm", "idefics3")
GRIDS = {"image": [[1, 8, 12], [1, 6, 4]], "video": [[3, 6, 8]]}


class Biased(TokenMethod):
    """Drops, and biases keys by the original number of their cell."""

    biases_keys = True

    def reduce(self, tokens: Any, keep: int) -> Reduced:
        kept = tokens.scores.sort(stable=True, dim=1, descending=True).indices[:, :keep].sort(1).values
        index = tokens.index.gather(1, kept)
        x = tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[-1]))
        return Reduced(x=x, kept=kept, key_bias=(index % 7).float() / 3)


class Spy(TokenMethod):
    """``drop`` that remembers the scores it got."""

    def __init__(self, cells: bool = True) -> None:
        self.seen: list[torch.Tensor] = []

    def reduce(self, tokens: Any, keep: int) -> Reduced:
        self.seen.append(tokens.scores.clone())
        kept = tokens.scores.sort(stable=True, dim=1, descending=True).indices[:, :keep].sort(1).values
        return Reduced(x=tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[-1])), kept=kept)


@cache
def model(name: str) -> Any:
    return tiny.build(name).double()


def qwen_call(name: str, kind: str = "image") -> tuple[Any, dict[str, torch.Tensor]]:
    """The model and the arguments of ``get_image_features`` or ``get_video_features``."""
    size = 16 if name == "qwen3_vl" else 14
    grid = torch.tensor(GRIDS[kind])
    rows = int(grid.prod(1).sum())
    pixels = torch.randn(rows, 3 * 2 * size * size, generator=torch.Generator().manual_seed(3)).double()
    suffix = "" if kind == "image" else "_videos"
    return model(name), {f"pixel_values{suffix}": pixels, f"{kind}_grid_thw": grid}


def features(net: Any, given: dict[str, Any]) -> Any:
    kind = "video" if "video_grid_thw" in given else "image"
    with torch.no_grad():
        return getattr(net.model, f"get_{kind}_features")(**given)


def entry(net: Any, block: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """What enters the first block of the plain encoder."""
    seen = []
    handle = block.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    features(net, given)
    handle.remove()
    return seen[0]


def steps_of(name: str) -> list[Step]:
    layers = (1, 3) if name == "qwen2_5_vl" else (1, 2)
    return [Step("vision", layer, ratio=0.6) for layer in layers]


def qwen_reference(name: str, kind: str, rule: Any, bias: bool = False) -> list[Any]:
    """Per segment: what the reference finds, first row of the segment, raster number of its cells."""
    net, given = qwen_call(name, kind)
    visual = net.model.visual
    (hidden,), kwargs = entry(net, visual.blocks[0], given)
    cos, sin = (reference.array(table) for table in kwargs["position_embeddings"])
    encoder: Any = load_encoder(family_of(net), net)
    windows = encoder.windows(given[f"{kind}_grid_thw"])
    found, start = [], 0
    for t, h, w in GRIDS[kind]:
        for _ in range(t):
            n = h * w
            part, keep, cells = slice(start, start + n), n // 4, {}
            for step in steps_of(name):
                keep = step.count(keep * 4, 4) // 4
                cells[step.layer] = keep
            order = ids = None
            if windows is not None:
                order = windows.order.numpy()[start // 4 : (start + n) // 4] - start // 4
                window = np.searchsorted(windows.bounds, np.arange(start, start + n), side="right")
                ids = [window if layer in encoder.windowed else np.zeros(n) for layer in range(encoder.used)]
            numbers = np.arange(n // 4) if order is None else order
            one = reference.encode(
                visual.blocks, reference.array(hidden[part]), encoder.heads, ACT[name], cells, rule,
                (cos[part], sin[part]), ids, order, bias=(numbers % 7).astype(np.float32) / 3 if bias else None,
            )  # fmt: skip
            found.append((one, start, numbers))
            start += n
    return found


def whole(tap: Any) -> torch.Tensor:
    """DeepStack features are whole in transformers 5.3, split by image since."""
    return tap if torch.is_tensor(tap) else torch.cat(tap)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_packed_images_equal_each_alone_in_float64(name: str, kind: str, rule: str) -> None:
    """Windows, rotary rows, lengths, order, DeepStack: each segment is what the plain slow encoder makes of it."""
    net, given = qwen_call(name, kind)
    with accelerate(net, rule, schedule=steps_of(name)) as handle:
        out = features(net, given)
        rows = handle._session.image_rows[kind]
        segments = handle._session.segments[kind]
    visual, full = net.model.visual, torch.cat(out.pooler_output)
    wanted = torch.zeros_like(rows)
    last, begin = 0, 0
    for number, (one, start, raster) in enumerate(qwen_reference(name, kind, getattr(reference, rule))):
        state = out.last_hidden_state[last : last + len(one.x)]
        assert np.abs(state.numpy() - one.x).max() < 2e-5 * np.abs(one.x).max()
        last += len(one.x)
        places = torch.from_numpy(start // 4 + raster[one.rows[::4] // 4])
        wanted[places] = True
        with torch.no_grad():
            merged = visual.merger(torch.from_numpy(one.x))
        torch.testing.assert_close(full[places], merged, rtol=2e-5, atol=2e-5)
        for tap, features_ in enumerate(getattr(out, "deepstack_features", None) or []):
            held, x = one.taps[visual.deepstack_visual_indexes[tap]]
            alive = np.isin(held, one.rows)
            with torch.no_grad():
                merged = visual.deepstack_merger_list[tap](torch.from_numpy(x[alive]))
            torch.testing.assert_close(whole(features_)[places], merged, rtol=2e-5, atol=2e-5)
        assert segments[number] == len(raster)
        begin += segments[number]
    assert last == len(out.last_hidden_state)
    assert begin == len(rows)
    assert torch.equal(rows, wanted)
    assert not full[~rows].any()
    for features_ in getattr(out, "deepstack_features", None) or []:
        assert not whole(features_)[~rows].any()


@pytest.mark.parametrize("name", QWEN)
def test_key_bias_reaches_each_later_window(name: str) -> None:
    """A method's bias of the keys is added in every later block, to the right rows of the right image."""
    net, given = qwen_call(name)
    with accelerate(net, Biased(), schedule=steps_of(name)):
        out = features(net, given)
    wanted = np.concatenate([one.x for one, _, _ in qwen_reference(name, "image", reference.drop, bias=True)])
    assert np.abs(out.last_hidden_state.numpy() - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", QWEN)
def test_scores_are_the_attention_received(name: str) -> None:
    net, given = qwen_call(name)
    spy = Spy()
    with accelerate(net, spy, schedule=steps_of(name)):
        features(net, given)
    found = qwen_reference(name, "image", reference.drop)
    for number, (one, _, raster) in enumerate(found):  # the images differ in size: one call each a step
        for step in range(2):
            scores = spy.seen[step * len(found) + number][0]
            assert scores.sum().item() * 4 == pytest.approx(1, abs=1e-5)
            wanted = one.scores[step].reshape(-1, 4).mean(1)
            cells = np.arange(len(raster)) if step == 0 else None
            if cells is not None:
                wanted = wanted[np.argsort(raster)]
                np.testing.assert_allclose(scores.numpy(), wanted, atol=1e-6)
            else:
                np.testing.assert_allclose(np.sort(scores.numpy()), np.sort(wanted), atol=1e-6)


@cache
def tiles(name: str, padded: bool = False) -> dict[str, torch.Tensor]:
    given = tiny.inputs(name, model(name), images=2)
    given = {key: value for key, value in given.items() if key.startswith("pixel")}
    given["pixel_values"] = given["pixel_values"].double()
    if padded:  # the second tile is 5 x 8 patches (cells that are half padding), the fourth 8 x 4
        given["pixel_attention_mask"][0, 1, 70:] = False
        given["pixel_attention_mask"][0, 3, :, 56:] = False
    return given


def cell_rows(side: int = 8) -> np.ndarray:
    """Raster index of each patch, cells of 2 x 2 side by side, by loops."""
    return np.array(
        [
            (i + a) * side + j + b
            for i in range(0, side, 2) for j in range(0, side, 2) for a in (0, 1) for b in (0, 1)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_tiles_in_float64(name: str, rule: str) -> None:
    net, given = model(name), tiles(name)
    encoder: Any = load_encoder(family_of(net), net)
    prefix = encoder.num_prefix_tokens
    args, kwargs = entry(net, encoder.blocks[0], given)
    hidden = reference.array(args[0] if args else kwargs["hidden_states"])
    with accelerate(net, rule, schedule=steps_of(name)) as handle:
        out = features(net, given)
        rows = handle._session.image_rows["image"].view(len(hidden), 16)
    full = torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output]).view(len(hidden), 16, -1)
    order = cell_rows()
    for tile, x in enumerate(hidden):
        x = np.concatenate([x[:prefix], x[prefix:][order]])
        one = reference.encode(
            encoder.blocks, x, 4, "gelu" if name == "internvl" else "gelu_pytorch_tanh",
            {1: 9, 2: 5}, getattr(reference, rule), prefix=prefix,
        )  # fmt: skip
        cells = torch.from_numpy(one.rows[::4] // 4)
        assert torch.equal(rows[tile].nonzero()[:, 0], cells)
        post = encoder.tower.layernorm if name == "internvl" else encoder.tower.post_layernorm
        with torch.no_grad():
            x = post(torch.from_numpy(one.x))[prefix:].reshape(len(cells), -1)
            wanted = encoder.projector(_shuffled(name, x))
        torch.testing.assert_close(full[tile][cells], wanted, rtol=1e-5, atol=1e-5)
        assert not full[tile][~rows[tile]].any()


def _shuffled(name: str, x: torch.Tensor) -> torch.Tensor:
    """Slots of a cell in the order of the model's pixel shuffle: found by shuffling numbers."""
    net = model(name).model
    number = torch.arange(64.0)
    if name == "internvl":
        slots = net.pixel_shuffle(number.view(1, 8, 8, 1), 0.5).view(16, 4)
    else:
        slots = net.connector.pixel_shuffle(number.view(1, 64, 1), 2).view(16, 4)
    place = torch.empty(64, dtype=torch.long)
    place[torch.from_numpy(cell_rows())] = torch.arange(64) % 4
    order = place[slots[0].long()]
    return x.view(len(x), 4, -1)[:, order].reshape(len(x), -1)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_padding_goes_first_and_flows_nowhere(name: str, rule: str) -> None:
    """Padding is no key, no query of a score, no source of a merge, and goes before any patch of the picture."""
    net, given = model(name), tiles(name, padded=True)
    encoder: Any = load_encoder(family_of(net), net)
    args, kwargs = entry(net, encoder.blocks[0], given)
    hidden = reference.array(args[0] if args else kwargs["hidden_states"])
    with accelerate(net, rule, schedule=steps_of(name), trace=True) as handle:
        out = features(net, given)
        rows = handle._session.image_rows["image"].view(len(hidden), 16)
        maps = list(handle._session.pending)
    assert rows.sum(1).tolist() == [5, 5, 5, 5]
    full = torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output]).view(len(hidden), 16, -1)
    order = cell_rows()
    for tile, (height, width) in {1: (5, 8), 3: (8, 4)}.items():
        valid = np.zeros((8, 8), bool)
        valid[:height, :width] = True
        cells = valid.ravel()[order].reshape(16, 4).any(1)
        assert cells[rows[tile].numpy()].all()
        owner = maps[tile].steps[0].assign
        kept = maps[tile].steps[0].kept
        assert all(cells[kept[owner[cell]]] == cells[cell] for cell in range(16) if owner[cell] >= 0)
        alive = np.repeat(cells, 4)
        step = {1: 9, 2: 5} if cells.sum() > 9 else {2: 5}
        one = reference.encode(
            encoder.blocks, hidden[tile][order][alive], 4, "gelu_pytorch_tanh", step,
            getattr(reference, rule), valid=valid.ravel()[order][alive],
        )  # fmt: skip
        left = np.flatnonzero(cells)[one.rows[::4] // 4]
        assert np.array_equal(left, np.flatnonzero(rows[tile].numpy()))
        with torch.no_grad():
            x = encoder.tower.post_layernorm(torch.from_numpy(one.x)).reshape(len(left), -1)
            wanted = encoder.projector(_shuffled(name, x))
        torch.testing.assert_close(full[tile][torch.from_numpy(left)], wanted, rtol=1e-5, atol=1e-5)
