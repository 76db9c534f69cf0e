"""Small towers: the block against a plain NumPy one, causality, extra keys and values, copies that are trained."""

import copy
import math

import numpy as np
import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.backbones.small import small_audio, small_image, small_patches, small_tabular, small_text
from missing_modal.backbones.tabular import VectorTower
from polymodal.errors import UserError

erf = np.vectorize(math.erf)

INPUTS = {
    "image": (lambda: small_image(16, 8), lambda: torch.randn(2, 3, 16, 16)),
    "patches": (lambda: small_patches(6, 4), lambda: torch.randn(2, 6, 4)),
    "text": (lambda: small_text(12, 7), lambda: torch.tensor([[10, 3, 11, 0, 0, 0, 0], [10, 1, 2, 4, 11, 0, 0]])),
    "audio": (lambda: small_audio(32, 64), lambda: torch.randn(2, 32, 50)),
    "tabular": (lambda: small_tabular(7, 3), lambda: torch.randn(2, 7)),
}


@pytest.fixture(params=list(INPUTS))
def pair(request):
    """A tower in float64 and inputs of it."""
    make, inputs = INPUTS[request.param]
    torch.manual_seed(0)
    tower = make().to("cpu", torch.float64)
    x = inputs()
    return tower, x.double() if x.is_floating_point() else x


def _norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def _numpy_block(w, index, h, heads, eps, causal, quick=False, extra=None):
    """One sample (R, d), head by head, row by row."""
    w = {key.removeprefix(f"block.{index}."): value.numpy() for key, value in w.items() if f"block.{index}." in key}
    d = h.shape[1]
    x = _norm(h, w["norm_1.weight"], w["norm_1.bias"], eps)
    q, k, v = np.split(x @ w["attention_in.weight"].T + w["attention_in.bias"], 3, axis=1)
    out = np.zeros_like(h)
    for row in range(len(h)):
        seen = row + 1 if causal else len(h)
        keys, values = k[:seen], v[:seen]
        if extra is not None:
            keys, values = np.concatenate([keys, extra[0]]), np.concatenate([values, extra[1]])
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            score = keys[:, part] @ q[row, part] / np.sqrt(d / heads)
            share = np.exp(score - score.max())
            out[row, part] = share / share.sum() @ values[:, part]
    h = h + out @ w["attention_out.weight"].T + w["attention_out.bias"]
    z = _norm(h, w["norm_2.weight"], w["norm_2.bias"], eps) @ w["mlp_in.weight"].T + w["mlp_in.bias"]
    z = z / (1 + np.exp(-1.702 * z)) if quick else z * (1 + erf(z / np.sqrt(2))) / 2
    return h + z @ w["mlp_out.weight"].T + w["mlp_out.bias"]


def _jitter(tower):
    """Weights without the zeros and ones that hide a mistake."""
    draw = torch.Generator().manual_seed(1)
    state = tower.state().items()
    return tower.replaced({k: v + 0.1 * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in state})


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_block_is_the_plain_one(pair, quick, extra):
    tower = _jitter(pair[0])
    tower._activation = "quick_gelu" if quick else "gelu"
    h = torch.randn(2, 5, tower.spec.width, dtype=torch.float64)
    more = (
        (torch.randn(2, 3, tower.spec.width).double(), torch.randn(2, 3, tower.spec.width).double()) if extra else None
    )
    got = tower.block(1, h, tower.mask(5, h), more)
    for sample in range(2):
        more_here = None if more is None else (more[0][sample].numpy(), more[1][sample].numpy())
        want = _numpy_block(tower.state(), 1, h[sample].numpy(), 2, 1e-5, tower.causal, quick, more_here)
        np.testing.assert_allclose(got[sample].numpy(), want, atol=1e-12)


def test_mask_of_each_sample(pair):
    tower = pair[0]
    h = torch.randn(2, 4, tower.spec.width, dtype=torch.float64)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[1, :, :, 3] = float("-inf")
    got = tower.block(0, h, mask)
    torch.testing.assert_close(got[0], tower.block(0, h[:1], None)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(got[1, :3], tower.block(0, h[1:, :3], None)[0], atol=1e-12, rtol=0)


def test_shapes_and_sizes(pair):
    tower, x = pair
    tokens = tower.embed(x)
    assert tokens.shape[0] == 2
    assert tokens.shape[2] == tower.spec.width
    assert tower.spec.depth == 3
    assert tower.spec.features == 16
    held = tower.placeholder(3)
    assert tower.embed(held).shape[0] == 3
    rows = tower.pool_rows(x)
    assert rows.dtype == torch.long
    assert rows.tolist() == ([2, 4] if tower.spec.name == "text" else [0, 0])


def test_names_of_the_weights_seed_and_hash(pair):
    tower, _ = pair
    twin = copy.copy(tower).replaced(tower.state())
    assert state_hash(twin) == state_hash(tower)
    other = tower.replaced({key: value + 1e-9 for key, value in tower.state().items()})
    assert state_hash(other) != state_hash(tower)
    with pytest.raises(ValueError, match="other names"):
        tower.replaced({})


def test_tuned_copy_trains_itself_only(pair):
    tower, x = pair
    before = state_hash(tower)
    twin, module = tower.tuned()
    start = twin.block(0, twin.embed(x), None)
    torch.testing.assert_close(start, tower.block(0, tower.embed(x), None), atol=0, rtol=0)
    start.square().sum().backward()
    used = {name for name, value in module.named_parameters() if value.grad is not None}
    assert any(name.startswith("block__0") for name in used)
    assert not any(name.startswith(("block__1", "out")) for name in used)
    assert not any(name.startswith("out") for name, _ in module.named_parameters())
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.1)
    assert not torch.equal(twin.block(0, twin.embed(x), None), start)
    assert state_hash(tower) == before
    assert not any(value.requires_grad for value in tower.state().values())
    module.float()
    assert twin.embed(x.float() if x.is_floating_point() else x).dtype == torch.float32
    assert twin.to("cpu", torch.float64) is twin


def test_moving_to_bfloat16_keeps_the_last_norm_and_projection():
    tower = small_image(16, 8).to("cpu", torch.bfloat16)
    assert tower.embed(torch.randn(1, 3, 16, 16)).dtype == torch.bfloat16
    assert tower.spec.projection.dtype == tower.spec.norm_weight.dtype == torch.float32


def test_other_seed_other_weights():
    assert state_hash(small_text(seed=0)) == state_hash(small_text(seed=0))
    assert state_hash(small_text(seed=1)) != state_hash(small_text(seed=0))


def test_text_reads_the_end_and_cuts_behind_it():
    tower, ids = small_text(12, 7), torch.tensor([[10, 3, 11, 0, 0, 0, 0], [10, 1, 2, 4, 11, 0, 0]])
    assert tower.length(ids) == 5
    assert tower.placeholder(1).tolist() == [[10, 11, 0, 0, 0, 0, 0]]
    tower.eos = 4
    assert tower.pool_rows(ids).tolist() == [0, 3]


def test_shorter_clip_has_the_first_tokens_of_a_longer_one():
    tower, clip = small_audio(32, 64), torch.randn(1, 32, 64)
    assert tower.embed(clip).shape[1] == 9
    short = tower.embed(clip[:, :, :40])
    assert short.shape[1] == 5
    torch.testing.assert_close(short, tower.embed(clip)[:, :5], atol=1e-6, rtol=0)


def test_tabular_token_is_an_affine_map_of_its_own_numbers():
    tower = small_tabular(7, 3)
    x = torch.randn(1, 7)
    moved = x.clone()
    moved[0, 6] += 1
    changed = (tower.embed(moved) - tower.embed(x)).abs().sum(-1)[0]
    assert changed[:3].tolist() == [0, 0, 0]
    weight = tower.state()["token.weight"]
    torch.testing.assert_close((tower.embed(moved) - tower.embed(x))[0, 3], weight[2, 0], atol=1e-6, rtol=0)


def test_vectors_pass_through():
    tower = VectorTower("vector", 5)
    x = torch.randn(2, 5)
    assert tower.embed(x) is x
    assert tower.spec.depth == 0
    assert tower.placeholder(2).tolist() == [[0] * 5] * 2


@pytest.mark.parametrize(
    ("tower", "x", "message"),
    [
        (lambda: small_image(16, 8), torch.zeros(1, 3, 32, 32), "resize"),
        (lambda: small_text(12, 7), torch.zeros(1, 9, dtype=torch.long), "7 positions"),
        (lambda: small_audio(32, 64), torch.zeros(1, 16, 64), "32 mel bands"),
        (lambda: small_audio(32, 64), torch.zeros(1, 32, 96), "positions for 8"),
        (lambda: small_tabular(7, 3), torch.zeros(1, 8), "expected 7"),
        (lambda: VectorTower("vector", 5), torch.zeros(1, 6), "expected 5"),
    ],
)
def test_inputs_of_another_shape(tower, x, message):
    with pytest.raises(UserError, match=message):
        tower().embed(x)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="3 heads"):
        small_text(heads=3)
