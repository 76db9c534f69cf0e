"""The translation model: padding, absent questions, fusions, numeric formats, learning."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from polymodal.errors import UserError
from slt.config import LossConfig, ModelConfig
from slt.losses import parameter_groups, stage2_loss
from slt.methods import FUSIONS
from slt.models.translator import SLTModel, compact

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).with_name("_models_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def model(seed=0, double=True, **changes) -> SLTModel:
    torch.manual_seed(seed)
    built = SLTModel(toy.small_config(**changes), toy.tokenizer().vocab).eval()
    return built.double() if double else built


def logits(net, batch):
    tokens, mask, _ = net.fuse_batch(batch)
    ids = batch.sentence_ids[:, :-1]
    return net.translate_logits(tokens, mask, ids)


def test_defaults_are_the_published_setting():
    config = ModelConfig()
    assert (config.backbone, config.width, config.text_layers) == ("resnet18", 1024, 12)
    assert (config.encoder_layers, config.decoder_layers, config.heads, config.ffn) == (3, 3, 8, 4096)
    assert (config.activation, config.dropout, config.padding, config.fusion) == ("relu", 0.1, "gfslt", "ssaw")


def test_prototype_setting_has_the_prototype_size():
    net = SLTModel(toy.synthetic_model_config(max_positions=128), toy.tokenizer().vocab)
    count = sum(p.numel() for p in net.parameters())
    assert 420_000 < count < 432_000
    positions = (net.text_encoder, net.translator.model.encoder, net.translator.model.decoder)
    assert all(abs(part.embed_positions.weight.std().item() - 0.5) < 0.02 for part in positions)
    assert abs(net.translator.model.encoder.layers[0].fc1.weight.std().item() - 0.125) < 0.01
    assert net.text_encoder.embed_tokens.embed_scale == net.translator.model.decoder.embed_tokens.embed_scale == 8


def test_one_embedding_matrix():
    net = model()
    tables = (net.text_encoder.embed_tokens, net.translator.model.decoder.embed_tokens, net.translator.lm_head)
    assert all(table.weight is net.translator.model.shared.weight for table in tables)


def test_compact_moves_valid_tokens_to_the_front():
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    tokens = torch.arange(8.0).view(2, 4, 1)
    moved, moved_mask = compact(tokens, mask)
    assert moved[0, :3, 0].tolist() == [0, 2, 3]
    assert moved[1, 0, 0] == 6
    assert moved_mask.tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize("fusion", [info.name for info in FUSIONS])
def test_logits_of_a_sample_do_not_depend_on_its_batch(fusion):
    net, rows = model(fusion=fusion), toy.samples()
    together = logits(net, toy.batch(rows))
    for number, row in enumerate(rows):
        alone = logits(net, toy.batch([row]))
        torch.testing.assert_close(together[number, : alone.shape[1]], alone[0], rtol=0, atol=1e-10)


def test_an_empty_question_is_the_same_as_no_question_tokens():
    net, batch = model(), toy.batch(toy.samples(questions=("",)))
    assert batch.question_ids.shape[1] == 0
    wide = dataclasses.replace(
        batch, question_ids=torch.ones(4, 5, dtype=torch.int64), question_mask=torch.zeros(4, 5, dtype=torch.bool)
    )
    torch.testing.assert_close(logits(net, batch), logits(net, wide), rtol=0, atol=1e-12)
    states = net.encode_text(wide.question_ids, wide.question_mask)
    assert torch.equal(states, torch.zeros_like(states))


def test_question_only_without_any_question_stays_finite():
    net = model(fusion="question_only")
    tokens, mask, _ = net.fuse_batch(toy.batch(toy.samples(questions=("",))))
    out = net.translate_logits(tokens, mask, torch.full((4, 1), net.vocab.tag_id))
    assert out.isfinite().all()
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-12)


def test_question_changes_the_output_and_video_does_not_in_question_only():
    rows = toy.samples(lengths=(8, 8), questions=("das",))
    same_words = [dataclasses.replace(rows[0]), dataclasses.replace(rows[0], frames=rows[1].frames)]
    other_question = [rows[0], dataclasses.replace(rows[0], question="wird regen")]
    blind, seeing = model(fusion="question_only"), model()
    torch.testing.assert_close(*logits(blind, toy.batch(same_words)), rtol=0, atol=1e-12)
    assert not torch.allclose(*logits(seeing, toy.batch(same_words)))
    assert not torch.allclose(*logits(seeing, toy.batch(other_question)))


def test_text_padding_changes_nothing():
    net, batch = model(), toy.batch()
    states = net.encode_text(batch.sentence_ids, batch.sentence_mask)
    garbage = torch.where(batch.sentence_mask, batch.sentence_ids, 7)
    torch.testing.assert_close(net.encode_text(garbage, batch.sentence_mask), states, rtol=0, atol=1e-12)
    pooled = net.pool_text(states, batch.sentence_mask)
    for row in range(4):
        last = int(batch.sentence_mask[row].sum()) - 1
        assert batch.sentence_ids[row, last] == net.vocab.tag_id
        assert torch.equal(pooled[row], states[row, last])


def test_pooled_video_does_not_depend_on_batch_mates():
    net, rows = model(), toy.samples()
    batch = toy.batch(rows)
    pooled = net.pool_video(*net.encode_video(batch.frames, batch.lengths))
    for number, row in enumerate(rows):
        single = toy.batch([row])
        alone = net.pool_video(*net.encode_video(single.frames, single.lengths))
        torch.testing.assert_close(pooled[number], alone[0], rtol=0, atol=1e-10)


def test_more_tokens_than_positions_is_one_line():
    net = model(max_positions=8)
    with pytest.raises(UserError, match=r"9 tokens, but the model has 8 positions.*max_positions=9"):
        net.encode_text(torch.ones(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool))
    tokens = torch.randn(2, 10, 16, dtype=torch.float64)
    mask = torch.arange(10)[None] < torch.tensor([[3], [8]])
    states, kept = net.encode_fused(tokens, mask)
    assert states.shape == (2, 8, 16)
    assert kept.sum(1).tolist() == [3, 8]
    with pytest.raises(UserError, match="10 tokens"):
        net.encode_fused(tokens, torch.ones(2, 10, dtype=torch.bool))
    with pytest.raises(UserError, match="max_new_tokens"):
        net.generate(toy.batch(), max_new_tokens=9)


def test_heads_and_options_are_checked():
    with pytest.raises(UserError, match="not a multiple of heads=3"):
        toy.small_config(heads=3)
    with pytest.raises(UserError, match="did you mean"):
        model(fusion="ssav")
    with pytest.raises(UserError, match="no option 'mood'"):
        model(fusion_options={"mood": "gate"})
    assert model(fusion_options={"mode": "attention"}).fusion.config.mode == "attention"


def test_bfloat16_autocast_stays_finite():
    net, batch = model(double=False).train(), toy.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs = stage2_loss(net, batch, LossConfig(lambda_c=1.0, w_qs=1.0), 0)
    loss.backward()
    assert all(value.isfinite() for value in logs.values())
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert loss.dtype == torch.float32


def test_float64_model_gives_a_float64_loss():
    loss, _ = stage2_loss(model().train(), toy.batch(), LossConfig(), 0)
    assert loss.dtype == torch.float64


def test_every_trained_parameter_has_a_gradient():
    net, batch = model().train(), toy.batch()
    loss, _ = stage2_loss(net, batch, LossConfig(lambda_c=1.0), 0)
    loss.backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None]
    assert silent == []


def test_overfits_eight_samples():
    rows = toy.samples(lengths=(12, 8, 16, 9, 14, 8, 11, 20), seed=4)
    tok = toy.tokenizer()
    batch = toy.batch(rows, tok)
    torch.manual_seed(0)
    config = toy.synthetic_model_config(
        width=32, ffn=64, text_layers=1, encoder_layers=1, decoder_layers=1, dropout=0.0
    )
    net = SLTModel(config, tok.vocab).train()
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.01), lr=3e-3, betas=(0.9, 0.98))
    settings = LossConfig(label_smoothing=0.0, lambda_q=0.0)
    for step in range(80):
        loss, _ = stage2_loss(net, batch, settings, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert math.isfinite(loss.item())
    with torch.no_grad():
        net.train()  # batch statistics settle on the one batch there is
        for _ in range(30):
            net.encode_video(batch.frames, batch.lengths)
    net.eval()
    assert [tok.decode(ids) for ids in net.generate(batch, max_new_tokens=8)] == batch.sentences
