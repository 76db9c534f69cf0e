"""CLIP and SigLIP alone: the merge block, its scores beside the kernel, and that nothing else changes."""

import functools
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
import vlm_tiny as tiny
from polymodal.errors import UserError
from torch.nn.functional import scaled_dot_product_attention
from vlm_accel import Step, accelerate
from vlm_accel.encoders import scores
from vlm_accel.encoders.clip import Tower
from vlm_accel.methods.base import Reduced, TokenMethod

FAMILIES = ("clip", "siglip")
STEPS = [Step("vision", 1, keep=12), Step("vision", 2, keep=7)]
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


@functools.cache
def model_of(name, attn="sdpa"):
    return tiny.build(name, attn)


@functools.cache
def images(name, batch=3):
    return tiny.inputs(name, model_of(name), batch=batch)


@dataclass(frozen=True)
class Keep(TokenMethod):
    """Drops the least important and writes down what it was given."""

    kind: str = "received"
    seen: tuple = ()

    def score(self, stage):
        return self.kind

    def reduce(self, tokens, keep):
        order = tokens.scores if tokens.scores is not None else -tokens.index.float()
        kept = order.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
        for box in self.seen:
            box.append(tokens)
        return Reduced(tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[2])), kept)


def run(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options)


def plain_modules(model):
    """Instance attributes and hooks of every module."""
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), id(m.__dict__.get("config")))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["recycle", "tome", "random"])
def test_keeping_all_is_bit_equal_and_so_is_the_model_afterwards(name, attn, method):
    model, batch = model_of(name, attn), images(name)
    run(model, batch, output_hidden_states=True)  # transformers installs its own hooks at the first such call
    before, plain = plain_modules(model), run(model, batch)
    with accelerate(model, method, schedule=[Step("vision", 1, ratio=1.0), Step("vision", 3, keep=16)]):
        same = run(model, batch)
    with accelerate(model, method, schedule=STEPS):
        other = run(model, batch)
    after = run(model, batch)
    for one in (same, after):
        assert torch.equal(plain.last_hidden_state, one.last_hidden_state)
    assert other.last_hidden_state.shape[1] == 7 + (name == "clip")
    assert plain_modules(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_block_is_attention_then_merge_then_mlp_and_positions_stay(name):
    model, batch = model_of(name), images(name)
    prefix = int(name == "clip")
    tower = Tower(model)
    inputs = []
    for block in tower.blocks:
        inputs.append(block.register_forward_pre_hook(lambda _m, args: rows.append(args[0])))
    rows = []
    with accelerate(model, Keep(), schedule=[Step("vision", 2, keep=5)]):
        out = run(model, batch, output_hidden_states=True)
    for handle in inputs:
        handle.remove()
    block, x = tower.blocks[2], rows[2]
    assert [part.shape[1] for part in rows] == [16 + prefix] * 3 + [5 + prefix]
    with torch.no_grad():
        attention = block.self_attn
        heads = [
            proj(block.layer_norm1(x)).unflatten(2, (4, 8)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        seen = (heads[0] @ heads[1].transpose(2, 3) * 8**-0.5).softmax(-1)
        u = x + attention.out_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        importance = seen.mean((1, 2))[:, prefix:]
        kept = importance.argsort(dim=1, descending=True, stable=True)[:, :5].sort(1).values
        short = torch.stack([torch.cat([u[i, :prefix], u[i, prefix:][kept[i]]]) for i in range(3)])
        expected = short + block.mlp(block.layer_norm2(short))
    assert torch.allclose(rows[3], expected, atol=1e-6)
    assert out.hidden_states[3].shape == rows[3].shape
    assert out.hidden_states[2].shape[1] == 16 + prefix


def test_scores_equal_eager_attention_and_watching_changes_nothing():
    batch = images("clip")
    eager, sdpa = model_of("clip", "eager"), model_of("clip", "sdpa")
    attention = run(eager, batch, output_attentions=True).attentions
    found = {}
    for kind in ("received", "cls"):
        for model in (eager, sdpa):
            box = []
            with accelerate(model, Keep(kind, (box,)), schedule=[Step("vision", 1, keep=15)]):
                run(model, batch)
            found[kind, model is eager] = box[0].scores
    for kernel in (True, False):
        assert torch.allclose(found["received", kernel], attention[1].mean((1, 2))[:, 1:], atol=1e-6)
        assert torch.allclose(found["cls", kernel], attention[1][:, :, 0].mean(1)[:, 1:], atol=1e-6)
    block = Tower(sdpa).blocks[1]
    x = torch.randn(2, 9, 32)
    session = Undo()
    with torch.no_grad():
        plain = block(x, None)
        for kind in ("received", "lse"):
            scores.watch(session, block.self_attn, wanted := scores.Watch(kind, raw=True))
            assert torch.equal(block(x, None), plain)
            assert wanted.take()[0].scores.shape == (2, 9)
    session.close()
    assert "_vlm_accel_watched" not in block.self_attn.__dict__
    assert block.self_attn.config is Tower(sdpa).config


class Undo:
    """The part of a session that a watch needs."""

    def __init__(self):
        from vlm_accel.session import Plan, Session

        self.session = Session(torch.nn.Identity(), Plan())
        self.replace, self.close = self.session.replace, self.session.close


def test_a_flash_kernel_gets_its_own_name_and_another_backend_is_refused():
    """The path that FlashAttention takes, with a stand-in for its kernel (the real one cannot be installed here)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, batch, names = tiny.build("clip"), images("clip"), []
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def kernel(module, query, key, value, attention_mask, **kwargs):
        names.append(module.config._attn_implementation)
        return base(module, query, key, value, attention_mask, **kwargs)

    tf.AttentionInterface.register("flash_stand_in", kernel)
    config = Tower(model).config
    try:
        with accelerate(model, Keep(), schedule=STEPS):
            expected = run(model, batch).last_hidden_state
        config._attn_implementation_internal = "flash_stand_in"
        with accelerate(model, Keep(), schedule=STEPS):
            assert torch.equal(run(model, batch).last_hidden_state, expected)
        assert set(names) == {"flash_stand_in"}
        with accelerate(model, "tome", schedule=STEPS), pytest.raises(UserError, match="sdpa"):
            run(model, batch)
        config._attn_implementation_internal = "flex_attention"
        with pytest.raises(UserError, match="flex_attention.*sdpa"), accelerate(model, Keep(), schedule=STEPS):
            pass
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["flash_stand_in"]


def test_the_class_row_stays_and_blocks_without_a_step_are_not_touched():
    model, batch = model_of("clip"), images("clip")
    tower = Tower(model)
    with accelerate(model, "recycle", schedule=[Step("vision", 1, keep=1)]) as handle:
        assert ["forward" in block.__dict__ for block in tower.blocks] == [False, True, False, False]
        assert [block.self_attn.config is tower.config for block in tower.blocks] == [True, False, True, True]
        out = run(model, batch)
        record = handle._session.vision[-1]
    assert out.last_hidden_state.shape == (3, 2, 32)
    assert (record.tokens, record.mlp_tokens) == ([51, 51, 6, 6], [51, 6, 6, 6])
    assert (record.full, record.lengths, record.left) == ([51] * 4, [[17], [17], [2], [2]], [1] * 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["rank1", "recycle", "drop", "tome", "evit", "stride", "pool"])
def test_a_batch_equals_single_images_and_a_trace_changes_nothing(name, method):
    model, batch = model_of(name), images(name)
    with accelerate(model, method, schedule=STEPS):
        together = run(model, batch)
    with accelerate(model, method, schedule=STEPS, trace=True) as handle:
        alone = [run(model, {"pixel_values": batch["pixel_values"][i : i + 1]}) for i in range(3)]
        traced = run(model, batch)
    assert torch.equal(traced.last_hidden_state, together.last_hidden_state)
    single = torch.cat([one.last_hidden_state for one in alone])
    assert torch.allclose(single, together.last_hidden_state, atol=1e-5)
    assert len(handle.maps) == 6
    for one in handle.maps:
        assert one.grid == (1, 4, 4)
        assert [step.n_out for step in one.steps] == [12, 7]
        assert len(one.owner()) == 16


def test_permuted_patches_with_their_positions_give_permuted_survivors():
    model, batch = tiny.build("siglip"), images("siglip")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    with accelerate(model, Keep(), schedule=STEPS, trace=True) as handle:
        run(model, batch)
        blocks = batch["pixel_values"].unflatten(2, (4, 14)).unflatten(4, (4, 14)).permute(2, 4, 0, 1, 3, 5)
        mixed = blocks.flatten(0, 1)[order].unflatten(0, (4, 4)).permute(2, 3, 0, 4, 1, 5).flatten(2, 3).flatten(3)
        table = Tower(model).module.embeddings.position_embedding.weight
        table.data = table.data[order]
        run(model, {"pixel_values": mixed})
    for before, after in zip(handle.maps[:3], handle.maps[3:], strict=True):
        assert set(order[torch.from_numpy(after.positions())].tolist()) == set(before.positions().tolist())


def test_scatter_gives_each_survivor_its_cell_and_missing_cells_their_token():
    model, batch = model_of("clip"), images("clip")
    with accelerate(model, "recycle", schedule=STEPS, trace=True) as handle:
        short = run(model, batch).last_hidden_state
    with accelerate(model, "recycle", schedule=STEPS, layout="scatter"):
        dense = run(model, batch).last_hidden_state
    assert dense.shape == (3, 17, 32)
    assert torch.equal(dense[:, 0], short[:, 0])
    for image, one in enumerate(handle.maps):
        places, owner = one.positions(), one.owner()
        assert torch.equal(dense[image, 1 + torch.from_numpy(places)], short[image, 1:])
        for cell in set(range(16)) - set(places.tolist()):
            if owner[cell] >= 0:
                expected = short[image, 1 + owner[cell]]
            else:
                far = [(p // 4 - cell // 4) ** 2 + (p % 4 - cell % 4) ** 2 for p in places]
                expected = short[image, 1 + far.index(min(far))]
            assert torch.equal(dense[image, 1 + cell], expected)


def test_pooled_outputs_are_over_the_survivors():
    torch.manual_seed(0)
    model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**CLIP)).eval()
    batch = images("siglip")
    with accelerate(model, "drop", schedule=STEPS):
        short = run(model, batch)
    with accelerate(model, "drop", schedule=STEPS, layout="scatter"):
        dense = run(model, batch)
    with torch.no_grad():
        assert torch.equal(short.pooler_output, Tower(model).module.head(short.last_hidden_state))
    assert torch.equal(short.pooler_output, dense.pooler_output)
    assert dense.last_hidden_state.shape[1] == 16


def test_the_mean_of_a_classifier_can_count_patches():
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.CLIPForImageClassification(tf.CLIPConfig(vision_config=CLIP, text_config=text, num_labels=3)).eval()
    batch = images("clip")
    with accelerate(model, "rank1", schedule=[Step("vision", 3, keep=4)], trace=True) as handle:
        rows = run(model.vision_model, batch).last_hidden_state[:, 1:]
        plain = run(model, batch).logits
    with accelerate(model, "rank1", schedule=[Step("vision", 3, keep=4)], size_weighted_pool=True):
        weighted = run(model, batch).logits
    sizes = torch.stack([torch.from_numpy(one.sizes()) for one in handle.maps[:3]]).float()
    assert sizes.sum(1).tolist() == [16.0] * 3
    with torch.no_grad():
        assert torch.allclose(model.classifier(rows.mean(1)), plain, atol=1e-6)
        expected = model.classifier((rows * sizes[..., None]).sum(1) / 16)
    assert torch.allclose(weighted, expected, atol=1e-6)
    assert not torch.allclose(weighted, plain, atol=1e-4)


def test_a_whole_clip_model_gives_its_similarities_and_text_stays():
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "eos_token_id": 49,
    }  # fmt: skip
    model = tf.CLIPModel(tf.CLIPConfig(vision_config=CLIP, text_config=text, projection_dim=16)).eval()
    batch = {**images("clip"), "input_ids": torch.randint(2, 49, (2, 6))}
    plain = run(model, batch)
    with accelerate(model, "recycle", ratio=0.5) as handle:
        short = run(model, batch)
    assert torch.equal(short.text_embeds, plain.text_embeds)
    assert short.vision_model_output.last_hidden_state.shape[1] < 17
    assert handle._session.vision[-1].left == [8] * 3


def test_tome_adds_log_sizes_to_later_logits_in_both_kernels():
    batch = images("clip")
    out = {}
    for attn in ("sdpa", "eager"):
        with accelerate(model_of("clip", attn), "tome", schedule=STEPS):
            out[attn] = run(model_of("clip", attn), batch).last_hidden_state
    assert torch.allclose(out["sdpa"], out["eager"], atol=1e-5)
    model, seen = model_of("clip"), []
    with accelerate(model, "tome", schedule=[Step("vision", 1, keep=10)]):
        attention = Tower(model).blocks[2].self_attn
        handle = attention.q_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        found = attention.out_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        run(model, batch)
        handle.remove(), found.remove()
        bias = attention.__dict__["_vlm_accel_watched"].watches[0].key_bias()
    assert bias.shape == (3, 10)
    assert (bias.exp().sum(1) - 16).abs().max() < 1e-4
    with torch.no_grad():
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (one(seen[0]).unflatten(2, (4, 8)).transpose(1, 2) for one in projections)
        mask = torch.nn.functional.pad(bias, (1, 0))[:, None, None]
        expected = ((q @ k.transpose(2, 3) * 8**-0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(seen[1], expected, atol=1e-6)


def test_everything_is_undone_after_an_exception_and_calls_that_cannot_work_are_refused():
    model, batch = tiny.build("clip"), images("clip")
    before = plain_modules(model)

    @dataclass(frozen=True)
    class Broken(TokenMethod):
        def reduce(self, tokens, keep):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), accelerate(model, Broken(), schedule=STEPS):
        run(model, batch)
    assert plain_modules(model) == before
    with accelerate(model, "drop", schedule=STEPS), pytest.raises(UserError, match="no_grad"):
        model(**batch)
    with accelerate(model, "drop", schedule=STEPS):
        model.train()
        with pytest.raises(UserError, match="eval"), torch.no_grad():
            model(**batch)
        model.eval()
    with pytest.raises(UserError, match="language model"), accelerate(model, "visionzip"):
        pass
    with accelerate(model, "recycle", schedule=STEPS, allow_grad=True):
        pixels = batch["pixel_values"].clone().requires_grad_()
        model(pixel_values=pixels).last_hidden_state.sum().backward()
    assert pixels.grad.abs().sum() > 0
    model.zero_grad()


def test_two_models_at_once_and_a_grid_that_is_no_square():
    one, two = tiny.build("clip"), tiny.build("clip", seed=1)
    pixels = torch.randn(2, 3, 56, 84)
    with accelerate(one, "drop", schedule=STEPS, trace=True) as a, accelerate(two, "recycle", ratio=0.5) as b:
        first = run(one, {"pixel_values": pixels}, interpolate_pos_encoding=True)
        second = run(two, {"pixel_values": pixels}, interpolate_pos_encoding=True)
    assert a.maps[0].grid == (1, 4, 6)
    assert first.last_hidden_state.shape[1] == 8
    assert second.last_hidden_state.shape[1] == 1 + b._session.vision[-1].left[0]
