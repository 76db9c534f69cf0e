"""Targets, absent questions, what trains what, and the transfer from stage 1 to stage 2."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from polymodal.errors import UserError
from slt.config import LossConfig
from slt.losses import parameter_groups, split_target, stage1_loss, stage2_loss, token_cross_entropy, transfer_stage1
from slt.models.translator import SLTModel

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).with_name("_models_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def model(seed=0, **changes) -> SLTModel:
    torch.manual_seed(seed)
    return SLTModel(toy.small_config(dropout=0.0, **changes), toy.tokenizer().vocab).double()


def test_decoder_input_and_labels():
    ids = torch.tensor([[5, 6, 2, 9], [7, 2, 9, 1], [1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    inputs, labels, valid = split_target(ids, mask)
    assert inputs[0].tolist() == [9, 5, 6]
    assert labels[0].tolist() == [5, 6, 2]
    assert inputs[1, :2].tolist() == [9, 7]
    assert labels[1, :2].tolist() == [7, 2]
    assert valid.tolist() == [[True, True, True], [True, True, False], [False, False, False]]


def test_no_valid_token_costs_nothing():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = token_cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), 0.2)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("stage", [stage1_loss, stage2_loss])
def test_padding_of_texts_does_not_count(stage):
    net, batch = model().eval(), toy.batch()
    config = LossConfig(w_qs=1.0, lambda_c=1.0)
    names = [f.name for f in dataclasses.fields(batch) if f.name.endswith("_ids")]
    garbage = {}
    for name in names:
        mask = getattr(batch, name.replace("_ids", "_mask"))
        garbage[name] = torch.where(mask, getattr(batch, name), 7)
        garbage[name] = torch.nn.functional.pad(garbage[name], (0, 3), value=8)
        garbage[name.replace("_ids", "_mask")] = torch.nn.functional.pad(mask, (0, 3))
    loss, logs = stage(net, batch, config, 0)
    other, other_logs = stage(net, dataclasses.replace(batch, **garbage), config, 0)
    torch.testing.assert_close(loss, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(logs, other_logs, rtol=0, atol=1e-10)


def test_single_sample_has_no_contrast():
    _, logs = stage1_loss(model().eval(), toy.batch(toy.samples()[:1]), LossConfig(w_qs=1.0), 0)
    assert logs["contrastive_vs"] == logs["contrastive_vq"] == logs["contrastive_qs"] == 0
    assert logs["restore_sentence"] > 0


@pytest.mark.parametrize("stage", [stage1_loss, stage2_loss])
def test_batch_without_any_question(stage):
    net, batch = model().train(), toy.batch(toy.samples(questions=("",)))
    loss, logs = stage(net, batch, LossConfig(w_qs=1.0, lambda_c=1.0), 0)
    loss.backward()
    assert loss.isfinite()
    assert logs["contrastive_vq"] == logs["contrastive_qs"] == 0
    assert "restore_question" not in logs


def test_rows_without_a_question_do_not_change_question_terms():
    net, rows = model().eval(), toy.samples()
    config = LossConfig(w_vs=0.0, w_qs=1.0)
    _, all_rows = stage1_loss(net, toy.batch(rows), config, 0)
    _, asked = stage1_loss(net, toy.batch([row for row in rows if row.question]), config, 0)
    for name in ("contrastive_vq", "contrastive_qs", "restore_question"):
        torch.testing.assert_close(all_rows[name], asked[name], rtol=0, atol=1e-10)


def test_terms_without_weight_are_not_computed():
    net, batch = model().eval(), toy.batch()
    _, logs = stage1_loss(net, batch, LossConfig(w_vq=0.0, lambda_ssl=0.0), 0)
    assert set(logs) == {"loss", "contrastive_vs"}
    _, logs = stage1_loss(net, batch, LossConfig(w_vs=0.0, w_vq=0.0, restore_questions=False), 0)
    assert set(logs) == {"loss", "restore_sentence"}
    _, logs = stage2_loss(net, batch, LossConfig(lambda_q=0.0), 0)
    assert set(logs) == {"loss", "translation"}
    _, logs = stage2_loss(net, batch, LossConfig(lambda_q=0.0, lambda_triplet=1.0), 0)
    assert set(logs) == {"loss", "translation", "triplet"}


def test_restoration_every_so_many_steps():
    net, batch, config = model().eval(), toy.batch(), LossConfig(ssl_every=5)
    for stage in (stage1_loss, stage2_loss):
        steps = [step for step in range(11) if "restore_question" in stage(net, batch, config, step)[1]]
        assert steps == [0, 5, 10]


@pytest.mark.parametrize("detach", [True, False])
def test_restoration_reaches_the_text_encoder_only_when_asked(detach):
    net, batch = model().train(), toy.batch()
    config = LossConfig(w_vs=0.0, w_vq=0.0, detach_text_encoder=detach)
    loss, _ = stage1_loss(net, batch, config, 0)
    loss.backward()
    layer = net.text_encoder.layers[0].fc1.weight.grad
    assert (layer is None) == detach
    assert net.translator.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_stage_1_trains_all_but_the_fusion():
    net = model().train()
    loss, _ = stage1_loss(net, toy.batch(), LossConfig(), 0)
    loss.backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None}
    assert silent == {name for name, _ in net.named_parameters() if name.startswith("fusion.")}


def test_multi_uses_equal_sentences_as_positives():
    net, batch = model().eval(), toy.batch()
    same = dataclasses.replace(batch, positives=torch.tensor([1, 1, 2, 3]))
    distinct = dataclasses.replace(batch, positives=torch.tensor([4, 1, 2, 3]))
    losses = [stage1_loss(net, b, LossConfig(contrastive="multi"), 0)[1]["contrastive_vs"] for b in (same, distinct)]
    plain = stage1_loss(net, batch, LossConfig(), 0)[1]["contrastive_vs"]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], plain, rtol=0, atol=1e-12)


def test_losses_leave_the_batch_alone():
    net, batch = model().train(), toy.batch()
    before = {
        f.name: getattr(batch, f.name).clone()
        for f in dataclasses.fields(batch)
        if f.name.endswith(("ids", "mask")) and isinstance(getattr(batch, f.name), torch.Tensor)
    }
    stage1_loss(net, batch, LossConfig(), 0)
    stage2_loss(net, batch, LossConfig(), 0)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


def test_logs_are_detached():
    loss, logs = stage2_loss(model().train(), toy.batch(), LossConfig(), 0)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in logs.values())
    assert logs["loss"] == loss


def test_bad_settings_say_what_is_expected():
    with pytest.raises(UserError, match="ssl_every=0"):
        LossConfig(ssl_every=0)
    with pytest.raises(UserError, match=r"label_smoothing=1\.0"):
        LossConfig(label_smoothing=1.0)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("fusion", ["ssaw", "concat"])
def test_stage_2_takes_everything_but_the_fusion(prefix, fusion):
    first, second = model(seed=1), model(seed=2, fusion=fusion)
    fresh = {name: value.clone() for name, value in second.state_dict().items() if name.startswith("fusion.")}
    report = transfer_stage1(second, {prefix + name: value for name, value in first.state_dict().items()})
    for name, value in second.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("fusion.") else first.state_dict()[name]), name
    assert set(report.fresh) == set(fresh)
    assert all(name.startswith("fusion.") for name in report.dropped)
    assert len(report.loaded) + len(report.fresh) == len(second.state_dict())
    assert str(len(report.loaded)) in str(report)


def test_transfer_names_what_does_not_fit_and_loads_nothing():
    weights = model(seed=1).state_dict()
    target = model(seed=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    missing = {name: value for name, value in weights.items() if name != "visual.sign_emb.weight"}
    with pytest.raises(UserError, match=r"missing visual\.sign_emb\.weight"):
        transfer_stage1(target, missing)
    with pytest.raises(UserError, match=r"unexpected extra\.weight"):
        transfer_stage1(target, {**weights, "extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"1 other shapes, first video_head\.weight: \(3, 3\) in stage 1"):
        transfer_stage1(target, {**weights, "video_head.weight": torch.zeros(3, 3)})
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_groups_hold_every_trained_parameter_once():
    net = model()
    decay, free = parameter_groups(net, 0.01)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(p)] for group in (decay, free) for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    kept = {names[id(p)] for p in free["params"]}
    assert {"logit_scale", "cls_token", "visual.norm.weight", "visual.sign_emb.bias"} <= kept
    net.visual.requires_grad_(False)
    smaller = parameter_groups(net, 0.01)
    assert sum(len(group["params"]) for group in smaller) < len(found)
