"""The task module: loss, groups of the optimizer, schedule, scores by pattern, what a checkpoint says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.backbones.small import small_patches, small_text
from missing_modal.batch import Batch
from missing_modal.calibration import Temperatures
from missing_modal.classifier import Classifier
from missing_modal.methods import METHODS
from missing_modal.module import MMModule, check_meta, decays, loss_of
from missing_modal.records import pack
from missing_modal.settings import OptimConfig
from polymodal.errors import UserError

SIZES = {"width": 8, "depth": 2, "heads": 2, "features": 4}
OPTIM = OptimConfig(lr=1e-2, lr_out=3e-3, lr_towers=1e-4, weight_decay=0.02)


def module_of(method="dcp", classes=2, task="binary", optim=OPTIM, total=20, meta=None, rows=None, **options):
    towers = (small_patches(4, 3, **SIZES), small_text(9, 5, **SIZES))
    if method == "dcp":
        options = {"length": 6, "depth": 2, "reduction": 4} | options
    made = METHODS.create(method, **options)
    model = Classifier(towers, made, classes)
    return MMModule(model, optim, task=task, total_steps=total, meta=meta, rows=rows)


def batch_of(masks=(3, 1, 2, 3), labels=(0, 1, 1, 0), seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = {name: [i for i, m in enumerate(masks) if m >> bit & 1] for bit, name in enumerate(("image", "text"))}
    text = torch.randint(1, 7, (len(masks), 5), generator=draw)
    text[:, 3], text[:, 4] = 8, 0
    inputs = {"image": torch.randn(len(masks), 4, 3, generator=draw)[rows["image"]], "text": text[rows["text"]]}
    return Batch(
        [f"s{i}" for i in range(len(masks))],
        list(masks),
        {name: value for name, value in inputs.items() if len(value)},
        {name: torch.tensor(at) for name, at in rows.items() if at},
        None if labels is None else torch.tensor(labels),
    )


def test_prompt_rows_are_named():
    assert module_of(length=9).num_prefix_tokens == {"image": 9, "text": 9}
    assert module_of("head_only").num_prefix_tokens == {"image": 0, "text": 0}


def step_of(module, batch=None):
    return module.loss(batch or batch_of(), torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ loss


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    shifted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(shifted[np.arange(5), labels]).mean()
    found = loss_of(torch.tensor(logits), torch.tensor(labels), "multiclass")
    assert float(found) == pytest.approx(expected, rel=1e-12)
    several = rng.integers(0, 2, (5, 3))
    p = 1 / (1 + np.exp(-logits))
    expected = -(several * np.log(p) + (1 - several) * np.log(1 - p)).mean()
    found = loss_of(torch.tensor(logits), torch.tensor(several, dtype=torch.float32), "multilabel")
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_terms_carry_the_tasks_name_and_the_methods_own():
    loss, terms = step_of(module_of())
    assert terms.keys() == {"ce"}
    assert float(terms["ce"]) == float(loss.detach())
    loss, terms = step_of(module_of("msp", length=2, depth=2))
    assert float(loss.detach()) == pytest.approx(sum(float(term) for term in terms.values()))
    assert len(terms) == 2
    several = torch.tensor([[0.0, 1.0]] * 4)
    batch = batch_of()
    batch.labels = several
    assert step_of(module_of(task="multilabel"), batch)[1].keys() == {"bce"}


def test_training_without_labels_is_refused():
    with pytest.raises(UserError, match="no label in training: s0, s1, s2"):
        step_of(module_of(), batch_of(labels=None))


def test_modality_dropout_thins_training_batches_by_the_steps_generator():
    module = module_of("modality_dropout", rate=0.5)
    met = []
    original = module.model.with_tables
    module.model.with_tables = lambda batch: (met.append(batch.masks), original(batch))[1]
    batch = batch_of((3,) * 16, (0, 1) * 8)
    for seed in (0, 0, 1):
        module.loss(batch, torch.Generator().manual_seed(seed))
    assert met[0] == met[1] != met[2]
    assert set(met[0]) == {1, 2, 3}
    module.evaluate(batch)
    assert batch.masks == [3] * 16, "evaluation thins nothing"


# ------------------------------------------------------------------ optimizer


def test_decay_goes_by_name_as_in_the_official_code():
    assert decays("model.prompter.outputs.0.norm_weight"), "ln_post and ln_final decay there"
    assert decays("model.prompter.prompts.generators.0.1.0.weight"), "layernorm_*.N.weight decays there"
    assert not decays("model.prompter.outputs.0.norm_bias")
    assert not decays("model.head.bias")
    assert not decays("model.prompter.attention.in_proj_bias")
    assert not decays("visual.norm.weight")
    assert not decays("visual.norm1.weight")


@pytest.mark.parametrize("method", ["dcp", "head_only", "modality_dropout", "mmp_input"])
def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay(method):
    options = {"length": 2, "depth": 2} if method == "mmp_input" else {}
    module = module_of(method, **options)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates = {"prompts": 1e-2, "out": 3e-3, "towers": 1e-4}
    grouped = [id(p) for group in module.parameter_groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in module.parameters() if p.requires_grad}
    for group in module.parameter_groups():
        assert group["lr"] == rates[group["name"]]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if "bias" in name else 0.02), name
            assert (group["name"] == "out") == (".outputs." in name)
            assert (group["name"] == "towers") == (".tuned." in name)
    assert module.parameter_groups()[0]["name"] == "prompts"


def test_frozen_weights_are_neither_in_state_nor_in_the_optimizer():
    module = module_of("head_only")
    optimizer = module.configure_optimizers()["optimizer"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == 8 * 2 + 2
    ours = {value.data_ptr() for tower in module.model.towers for value in tower.state().values()}
    assert not ours & {value.data_ptr() for value in module.state_dict().values()}
    assert not ours & {value.data_ptr() for value in module.parameters()}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_schedule_is_the_official_one(total, warmup):
    """The official code calls transformers' polynomial schedule with power 1 and end 0."""
    module = MMModule.__new__(MMModule)
    torch.nn.Module.__init__(module)
    module.optim = OptimConfig(warmup=warmup)
    warm = int(warmup * total)
    for step in range(total + 2):
        if step < warm:
            expected = step / max(1, warm)
        elif step > total:
            expected = 0.0
        else:
            expected = 1 - (step - warm) / max(1, total - warm)
        assert math.isclose(module.rate(step, total), expected, abs_tol=1e-12)


def test_rates_follow_the_schedule_in_all_groups():
    module = module_of(total=10)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    first = [group["lr"] for group in module.parameter_groups()]
    assert seen == [[0.0] * len(first), first, pytest.approx([value * 8 / 9 for value in first])]


# ------------------------------------------------------------------ evaluation


def test_records_and_scores_by_pattern():
    module = module_of()
    module.records = module.eval().evaluate(batch_of())
    assert module.records["s1"].keys() == {"logits", "mask", "label"}
    assert [record["mask"] for record in module.records.values()] == [3, 1, 2, 3]
    module._add_patterns("val")
    names = {name for name in module.last_metrics if name.startswith("val/accuracy")}
    assert names == {"val/accuracy/complete", "val/accuracy/image", "val/accuracy/text"}
    packed = pack(module.records, "binary")
    right = packed.logits.argmax(1) == packed.labels
    assert module.last_metrics["val/accuracy/complete"] == right[[0, 3]].mean()


def test_temperatures_change_the_likelihood_of_the_test_alone_never_a_prediction():
    module = module_of()
    module.temperatures = Temperatures({3: 0.5, 1: 2.0, 2: 1.0})
    module.records = module.eval().evaluate(batch_of())
    module._add_patterns("test")
    packed = pack(module.records, "binary")
    scaled = packed.logits / np.array([0.5, 2.0, 1.0, 0.5])[:, None]
    p = np.exp(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))
    expected = -np.log(p[np.arange(4), packed.labels]).mean()
    assert module.last_metrics["test/nll_calibrated"] == pytest.approx(expected, rel=1e-6)
    assert "test/accuracy_calibrated" not in module.last_metrics


def test_several_samples_of_a_row_are_averaged_before_they_are_scored():
    rows = {"s0": "a", "s1": "b", "s2": "b", "s3": "a"}
    module = module_of(rows=rows)
    records = module.eval().evaluate(batch_of((3, 3, 3, 3), (0, 1, 1, 0)))
    packed = pack(records, "binary")
    assert (packed.ids, packed.labels.tolist(), packed.masks.tolist()) == (["a", "b"], [0, 1], [3, 3])

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    mean = (softmax(records["s0"]["logits"]) + softmax(records["s3"]["logits"])) / 2
    assert softmax(packed.logits[0]) == pytest.approx(mean, rel=1e-6)


def test_samples_without_a_label_cannot_be_scored():
    records = module_of().eval().evaluate(batch_of(labels=None))
    with pytest.raises(UserError, match="sample s0 has no label"):
        pack(records, "binary")
    with pytest.raises(UserError, match="the split is empty"):
        pack({}, "binary")


# ------------------------------------------------------------------ checkpoint

META = {
    "method": "dcp",
    "method_options": {"length": 6},
    "modalities": ["image", "text"],
    "class_names": ["a", "b"],
    "backbone": {"image": {"identity": "small:image", "sha256": "ab" * 32}},
}


def test_a_checkpoint_says_what_it_belongs_to():
    module, stored = module_of(meta=META), {}
    module.on_save_checkpoint(stored)
    assert stored["missing_modal"] == {"schema_version": 1, **META}
    module.on_load_checkpoint(stored)
    assert module._prepared, "mean features come with the weights"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "schema version 2 is newer"),
        ({"method": "msp"}, "trained with method msp, not dcp"),
        ({"class_names": ["b", "a"]}, "class_names"),
        ({"backbone": {"image": {"identity": "x", "sha256": "cd" * 32}}}, "other image weights .x, sha256 cdcd"),
        ({"backbone": {}}, "other image weights"),
    ],
)
def test_a_foreign_checkpoint_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        check_meta({"schema_version": 1, **META, **change}, META)


def test_what_is_no_checkpoint_of_ours():
    with pytest.raises(UserError, match="no checkpoint of mm-train"):
        check_meta(None, META)
