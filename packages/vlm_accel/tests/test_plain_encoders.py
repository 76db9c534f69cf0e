"""Plain encoders of timm, open_clip and DINOv2: identity, batches, prefix rows, rotary rows, dense grids, refusals."""

from __future__ import annotations

import functools
import re

import pytest
import timm
import torch
import vlm_tiny as tiny
from open_clip import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from polymodal.errors import UserError
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Backbone, Dinov2ForImageClassification
from vlm_accel import Step, accelerate
from vlm_accel.encoders.plain import weighted_mean
from vlm_accel.families import family_of, load_encoder

METHODS = ("rank1", "recycle", "shift", "drop", "random", "stride", "pool", "tome", "evit")


def _vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    return VisionTransformer(**(sizes | options))


def _eva(**options):
    return Eva(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5, **options)


def _open_clip(**options):
    return OpenClipVisionTransformer(32, 8, 32, 4, 4, 2.0, output_dim=16, **options)


def _clip(**vision):
    vision = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32} | vision
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    return CLIP(16, vision, text)


BUILD = {
    "vit": _vit,
    "vit_registers": lambda: _vit(reg_tokens=2, init_values=0.1, qk_norm=True, drop_path_rate=0.2),
    "vit_mean": lambda: _vit(class_token=False, global_pool="avg"),
    "vit_map": lambda: _vit(class_token=False, global_pool="map"),
    "vit_post_norm": lambda: _vit(block_fn=ResPostBlock),
    "vit_parallel": lambda: _vit(block_fn=ParallelScalingBlock),
    "deit_distilled": lambda: VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5
    ),
    "eva": lambda: _eva(use_rot_pos_emb=True, swiglu_mlp=True, init_values=0.1),
    "eva_mixed": lambda: _eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", num_reg_tokens=2),
    "eva_grouped": lambda: _eva(use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_kv_heads=2),
    "eva_post_norm": lambda: _eva(use_post_norm=True),
    "open_clip": _open_clip,
    "open_clip_mean": lambda: _open_clip(pool_type="avg", ls_init_value=0.1),
    "open_clip_custom": lambda: _open_clip(qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True),
    "open_clip_pooler": lambda: _open_clip(attentional_pool=True, attn_pooler_heads=4),
    "dinov2": lambda: tiny.build("dinov2"),
    "dinov2_eager": lambda: tiny.build("dinov2", attn="eager"),
    "dinov2_registers": lambda: tiny.build("dinov2_registers"),
}


@functools.cache
def model_of(name):
    """A random encoder whose norms, scales and heads are no identities."""
    torch.manual_seed(sum(map(ord, name)))
    model = BUILD[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.shape[0] == 5:
            parameter.data.copy_(0.7 + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif name.startswith("eva"):
            parameter.data *= 5
    return model


def images(name, count=3):
    side = 56 if name.startswith("dinov2") else 32
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model, x):
    out = model(x)
    return out if torch.is_tensor(out) else out.last_hidden_state


def state_of(model):
    """What an acceleration could leave behind on the modules."""
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
        for module in model.modules()
    ]


def stop(*_args):
    raise RuntimeError("stop")


@pytest.mark.parametrize("name", BUILD)
def test_keeping_all_is_bit_equal_and_nothing_remains(name):
    model, x = model_of(name), images(name)
    plain = run(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = state_of(model)
    for method in ("recycle", "tome"):
        with accelerate(model, method, schedule=[Step("vision", 1, ratio=1.0), Step("vision", 2, keep=10**6)]):
            assert torch.equal(run(model, x), plain)
    hook = load_encoder(family_of(model), model).blocks[-1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), accelerate(model, "recycle", ratio=0.5):
        run(model, x)
    hook.remove()
    assert state_of(model) == modules
    assert torch.equal(run(model, x), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BUILD)
def test_a_batch_is_its_single_runs_for_every_method(name):
    model, x = model_of(name), images(name)
    schedule = [Step("vision", 1, keep=11), Step("vision", 2, keep=7)]
    for method in METHODS:
        if method == "random":
            continue  # draws belong to the place in the call
        with accelerate(model, method, schedule=schedule):
            batch = run(model, x)
            single = torch.cat([run(model, x[row : row + 1]) for row in range(len(x))])
        assert torch.allclose(batch, single, atol=2e-6), method
        assert torch.isfinite(batch).all()


@pytest.mark.parametrize("name", BUILD)
def test_records_counts_and_maps(name):
    model, x = model_of(name), images(name)
    prefix = load_encoder(family_of(model), model).num_prefix_tokens
    schedule = [Step("vision", 1, keep=11), Step("vision", 2, ratio=0.5)]
    with accelerate(model, "drop", schedule=schedule, trace=True) as handle:
        traced = run(model, x)
        record, maps = handle._session.vision[0], handle.maps
    rows = [3 * (left + prefix) for left in (16, 16, 11, 5)]
    post = name == "vit_parallel"
    assert record.tokens == rows
    assert record.mlp_tokens == [rows[0], rows[1] if post else rows[2], rows[2] if post else rows[3], rows[3]]
    assert record.full == [rows[0]] * 4
    assert record.lengths == [[count // 3] for count in rows]
    assert record.left == [5] * 3
    assert [(one.grid, one.prefix) for one in maps] == [((1, 4, 4), prefix)] * 3
    for one in maps:
        assert [(step.layer, step.n_in, step.n_out) for step in one.steps] == [(1, 16, 11), (2, 11, 5)]
        assert one.survivors().sum() == 5
        assert (one.owner() >= 0).sum() == 5
        assert one.source_weights().row_sums() == pytest.approx(1)
    with accelerate(model, "drop", schedule=schedule):
        assert torch.equal(run(model, x), traced)


def test_prefix_rows_stay_in_front_and_are_never_merged():
    """The rows of class and register tokens reach the end in their places, whatever the patches do."""
    model, x = model_of("dinov2_registers"), images("dinov2_registers")
    prefix = 1 + model.config.num_register_tokens
    seen = []
    hook = model.encoder.layer[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    plain = run(model, x)
    for method in METHODS:
        with accelerate(model, method, schedule=[Step("vision", 1, keep=6)]):
            short = run(model, x)
        # what enters block 2: prefix rows saw a full block 1, and their own MLP
        assert torch.allclose(seen[-1][:, :prefix], seen[0][:, :prefix], atol=1e-6), method
        assert short.shape[1] < plain.shape[1]
    hook.remove()


def _reference_drop(model, x, layer, keep):
    """A timm ViT in plain operations, float64: the ``keep`` patches that get most attention go on behind ``layer``."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for number, block in enumerate(model.blocks):
        s, n, width = tokens.shape
        qkv = block.attn.qkv(block.norm1(tokens)).view(s, n, 3, block.attn.num_heads, -1)
        q, k, v = (block.attn.q_norm(qkv[:, :, 0]), block.attn.k_norm(qkv[:, :, 1]), qkv[:, :, 2])
        attention = (torch.einsum("snhd,smhd->shnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        out = torch.einsum("shnm,smhd->snhd", attention, v).reshape(s, n, width)
        tokens = tokens + block.ls1(block.attn.proj(out))
        if number == layer:
            prefix = model.num_prefix_tokens
            order = attention.mean((1, 2))[:, prefix:].argsort(dim=1, descending=True, stable=True)
            rows = torch.cat((torch.arange(prefix).expand(s, -1), order[:, :keep].sort(1).values + prefix), 1)
            tokens = tokens.gather(1, rows[..., None].expand(-1, -1, width))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("name", ["vit", "vit_registers", "vit_mean"])
def test_drop_is_attention_received_then_rows_deleted(name):
    model = model_of(name).double()
    x = images(name).double()
    with torch.no_grad():
        expected = _reference_drop(model, x, 1, 6)
    with accelerate(model, "drop", schedule=[Step("vision", 1, keep=6)]):
        assert torch.allclose(run(model, x), expected, atol=1e-12)
    model.float()


@pytest.mark.parametrize("name", ["eva", "eva_mixed", "eva_grouped"])
def test_rotary_rows_follow_the_survivors(name):
    """The blocks written out by hand, with the angles of fixed survivors, give what the accelerated model gives."""
    model, x = model_of(name), images(name)
    kept = torch.tensor([[0, 3, 4, 9, 10, 15]]).expand(3, -1)
    prefix = model.num_prefix_tokens

    with accelerate(model, fixed((0, 3, 4, 9, 10, 15)), schedule=[Step("vision", 3, keep=6)]):
        late = run(model, x)
    with accelerate(model, fixed((0, 3, 4, 9, 10, 15)), schedule=[Step("vision", 1, keep=6)]):
        early = run(model, x)
    tokens, rope = model._pos_embed(model.patch_embed(x))
    mixed = getattr(model, "rope_mixed", False)
    rows = torch.cat((torch.arange(prefix).expand(3, -1), kept + prefix), 1)
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            angles = rope[number] if mixed else rope
            if number > 1:
                angles = angles[..., kept[0], :]
            tokens = block(tokens, rope=angles) if number != 1 else _eva_block(block, tokens, angles, rows)
        expected = model.forward_head(model.norm(tokens))
    assert torch.allclose(early, expected, atol=1e-5)
    assert not torch.allclose(early, late, atol=1e-3)


def _eva_block(block, x, rope, rows):
    update = block.attn(block.norm1(x), rope=rope)
    x = x + (update if block.gamma_1 is None else block.gamma_1 * update)
    x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    update = block.mlp(block.norm2(x))
    return x + (update if block.gamma_2 is None else block.gamma_2 * update)


@functools.cache
def fixed(rows, hidden=()):
    """A method that keeps these patches; keys of the ``hidden`` ones get a bias that no attention passes."""
    from vlm_accel.methods.drop import Drop

    class Fixed(Drop):
        biases_keys = bool(hidden)

        def reduce(self, tokens, keep):
            reduced = super().reduce(tokens, keep)
            kept = torch.tensor(rows).expand(len(tokens.x), -1)
            reduced.kept = kept
            reduced.x = tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[2]))
            if hidden:
                reduced.key_bias = torch.tensor([-1e9 if row in hidden else 0.0 for row in rows]).expand(len(kept), -1)
            return reduced

    return Fixed()


@pytest.mark.parametrize(
    "name",
    ["vit", "vit_registers", "vit_parallel", "eva_mixed", "open_clip", "open_clip_custom", "dinov2", "dinov2_eager"],
)
def test_a_key_bias_reaches_the_attention_of_later_blocks(name):
    """For the class token, a patch whose key is hidden is a patch that was dropped."""
    model, x = model_of(name), images(name)

    def cls(method, keep):
        seen = []
        last = load_encoder(family_of(model), model).blocks[-1]
        with accelerate(model, method, schedule=[Step("vision", 1, keep=keep)]):
            hook = last.register_forward_hook(lambda _m, _i, out: seen.append(out[:, 0]))
            run(model, x)
            hook.remove()
        return seen[0]

    hidden = cls(fixed((0, 1, 5, 7, 8, 10, 12, 13, 15), (1, 8, 13)), 9)
    dropped = cls(fixed((0, 5, 7, 10, 12, 15)), 6)
    nothing = cls(fixed((0, 1, 5, 7, 8, 10, 12, 13, 15)), 9)
    assert torch.allclose(hidden, dropped, atol=1e-5)
    assert not torch.allclose(hidden, nothing, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "open_clip", "dinov2", "dinov2_registers"])
def test_scatter_gives_the_full_grid_with_survivors_in_their_cells(name):
    model, x = model_of(name), images(name)
    schedule = [Step("vision", 1, keep=9), Step("vision", 2, keep=5)]

    def tokens():
        if name.startswith("dinov2"):
            return run(model, x)
        if name.startswith("open_clip"):
            seen = []
            hook = model.ln_post.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
            run(model, x)
            hook.remove()
            return seen[0]
        with torch.no_grad():
            return model.forward_features(x)

    with accelerate(model, "recycle", schedule=schedule, trace=True) as handle:
        short = tokens()
        maps = handle.maps
    with accelerate(model, "recycle", schedule=schedule, layout="scatter"):
        full = tokens()
    prefix = full.shape[1] - 16
    assert torch.equal(full[:, :prefix], short[:, :prefix])
    for row, one in enumerate(maps):
        places = one.positions()
        assert torch.equal(full[row, prefix + torch.from_numpy(places)], short[row, prefix:])
        owner = one.owner()
        merged = [cell for cell in range(16) if owner[cell] >= 0]
        for cell in merged:
            assert torch.equal(full[row, prefix + cell], short[row, prefix + int(owner[cell])])
        distance = [[(c // 4 - p // 4) ** 2 + (c % 4 - p % 4) ** 2 for p in places] for c in range(16)]
        for cell in set(range(16)) - set(merged):
            nearest = distance[cell].index(min(distance[cell]))
            assert torch.equal(full[row, prefix + cell], short[row, prefix + nearest])


@pytest.mark.parametrize("name", ["vit_registers", "vit_mean", "eva_mixed", "open_clip"])
def test_intermediates_are_dense(name):
    model, x = model_of(name), images(name)

    def taps(**options):
        with torch.no_grad():
            out = model.forward_intermediates(x, intermediates_only=True, **options)
        return out["image_intermediates"] if isinstance(out, dict) else out

    plain = taps()
    with accelerate(model, "drop", schedule=[Step("vision", 1, keep=6)]) as handle:
        maps, flat, some = taps(), taps(output_fmt="NLC"), taps(indices=[0, 3])
        kept = handle._session.vision[0].left
    assert [tap.shape for tap in maps] == [tap.shape for tap in plain] == [(3, 32, 4, 4)] * 4
    assert torch.equal(maps[0], plain[0])
    assert not torch.equal(maps[1], plain[1])
    assert all(torch.equal(a.flatten(2).transpose(1, 2), b) for a, b in zip(maps, flat, strict=True))
    assert torch.equal(some[0], maps[0])
    assert torch.equal(some[1], maps[3])
    assert kept == [6] * 3
    # six different vectors fill the grid of the last block
    assert len(maps[3][0].flatten(1).T.unique(dim=0)) == 6
    assert "forward_intermediates" not in model.__dict__


def test_intermediates_keep_their_prefix_rows():
    model, x = model_of("vit_registers"), images("vit_registers")
    with accelerate(model, "drop", schedule=[Step("vision", 1, keep=6)]), torch.no_grad():
        pairs = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
        last, taps = model.forward_intermediates(x, indices=1)
    assert [(patches.shape, prefix.shape) for patches, prefix in pairs] == [((3, 32, 4, 4), (3, 3, 32))] * 4
    assert last.shape == (3, 9, 32)
    assert taps[0].shape == (3, 32, 4, 4)


@pytest.mark.parametrize("name", ["vit_registers", "open_clip", "dinov2"])
def test_costs_agree_with_the_flop_counter(name, monkeypatch):
    """Without scores, everything but patch embedding and head is what the handle's MACs count (2 FLOP a MAC)."""
    # the counter does not know the one operation that nn.MultiheadAttention is without it
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    model, x = model_of(name), images(name)
    for method, schedule in (("random", [Step("vision", 1, keep=9), Step("vision", 2, keep=4)]), ("recycle", None)):
        given = {"schedule": schedule} if schedule else {"ratio": 1.0}
        with accelerate(model, method, **given) as handle, FlopCounterMode(display=False) as counter:
            run(model, x)
        counts = counter.get_flop_counts()
        blocks = sum(
            sum(operations.values())
            for module, operations in counts.items()
            if re.search(r"(blocks|resblocks|layer)\.\d+$", module)
        )
        assert handle.stats["macs/vision"] * 2 == blocks, method


def test_weighted_mean_counts_rows_as_often_as_they_say():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    spread = torch.stack([x[0, 0], *[x[0, 1]] * 2, *[x[0, 2]] * 4]).mean(0)
    assert torch.allclose(weighted_mean(x, sizes)[0], spread)
    assert torch.allclose(weighted_mean(x, sizes)[1], x[1].mean(0))


@pytest.mark.parametrize("name", ["vit_mean", "open_clip_mean"])
def test_size_weighted_pooling(name):
    model, x = model_of(name), images(name)
    schedule = [Step("vision", 2, keep=9)]
    modules = state_of(model)
    pooled = {}
    for weighted in (False, True):
        with accelerate(model, "tome", schedule=schedule, size_weighted_pool=weighted):
            pooled[weighted] = run(model, x)
        with accelerate(model, "drop", schedule=schedule, size_weighted_pool=weighted):
            pooled["drop", weighted] = run(model, x)
    assert not torch.allclose(pooled[True], pooled[False], atol=1e-4)
    assert torch.allclose(pooled["drop", True], pooled["drop", False], atol=1e-5)
    assert state_of(model) == modules


def test_classifier_and_backbone_of_dinov2():
    base = model_of("dinov2").config
    x = images("dinov2")
    torch.manual_seed(0)
    classifier = Dinov2ForImageClassification(base).eval()
    schedule = [Step("vision", 2, keep=9)]
    with torch.no_grad(), accelerate(classifier, "tome", schedule=schedule):
        plain = classifier(x).logits
    with torch.no_grad(), accelerate(classifier, "tome", schedule=schedule, size_weighted_pool=True) as handle:
        weighted = classifier(x).logits
        rows = classifier.dinov2(x).last_hidden_state
        assert handle._session.vision[-1].left == [9] * 3
    assert rows.shape[1] == 10
    assert not torch.allclose(plain, weighted, atol=1e-5)
    config = type(base).from_dict(base.to_dict() | {"out_features": ["stage1", "stage4"], "out_indices": None})
    backbone = Dinov2Backbone(config).eval()
    with torch.no_grad():
        expected = backbone(x).feature_maps
        with accelerate(backbone, "recycle", schedule=schedule):
            maps = backbone(x).feature_maps
        assert torch.equal(backbone(x).feature_maps[1], expected[1])
    assert [one.shape for one in maps] == [one.shape for one in expected]
    assert torch.equal(maps[0], expected[0])
    assert not torch.equal(maps[1], expected[1])


def test_clip_visual_is_the_promised_call():
    torch.manual_seed(0)
    clip, x = _clip().eval(), images("open_clip")
    with torch.no_grad():
        plain = clip.encode_image(x)
        with accelerate(clip.visual, "recycle", ratio=0.5) as handle:
            inner = clip.encode_image(x)
            assert handle._session.vision[0].left == [8] * 3
        with accelerate(clip, "recycle", ratio=0.5):
            outer = clip.encode_image(x)
        assert torch.equal(inner, outer)
        assert not torch.equal(inner, plain)
        assert torch.equal(clip.encode_image(x), plain)


def test_timm_tower_of_open_clip_goes_to_the_timm_adapter():
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    tower = TimmModel(name, 16, image_size=224, pool="avg", proj="linear").eval()
    x = torch.randn(1, 3, 224, 224)
    plain = run(tower, x)
    with accelerate(tower, "drop", schedule=[Step("vision", 11, keep=50)]) as handle:
        short = run(tower, x)
        assert handle._session.vision[0].left == [50]
    assert short.shape == plain.shape
    assert not torch.equal(short, plain)


def test_what_cannot_be_shortened_is_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UserError, match="unknown model family"), accelerate(swin.eval(), "drop", ratio=0.5):
        pass
    tower = TimmModel("convnext_atto", 16, pool="avg", proj="linear").eval()
    with pytest.raises(UserError, match="plain VisionTransformer or Eva"), accelerate(tower, "drop", ratio=0.5):
        pass
    resnet = _clip(layers=[1, 1, 1, 1], width=8, image_size=64, head_width=8).eval()
    with pytest.raises(UserError, match="no vision transformer"), accelerate(resnet, "drop", ratio=0.5):
        pass
    differential = _vit(attn_layer="diff").eval()
    with pytest.raises(UserError, match="DiffAttention"), accelerate(differential, "drop", ratio=0.5):
        pass


def test_calls_that_cannot_be_right_are_refused():
    model, x = model_of("vit"), images("vit")
    with pytest.raises(UserError, match="between an encoder and a language model"), accelerate(model, "visionzip"):
        pass
    with accelerate(model, "drop", ratio=0.5), pytest.raises(UserError, match="gradients on"):
        model(x)
    with accelerate(model, "drop", ratio=0.5, allow_grad=True):
        x.requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
    with accelerate(model, "drop", ratio=0.5), torch.no_grad(), pytest.raises(UserError, match="attention masks"):
        model(images("vit"), attn_mask=torch.zeros(17, 17))
    with accelerate(model, "drop", ratio=0.5), torch.no_grad():
        model.train()
        with pytest.raises(UserError, match="training mode"):
            model(images("vit"))
        model.eval()
    with pytest.raises(UserError, match="layer 4"), accelerate(model, "drop", schedule=[Step("vision", 4, keep=3)]):
        pass
