"""Members of the workspace: names, commands that exist, honest placeholders, promised callables, presets."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import tomllib
from pathlib import Path

import pytest
from polymodal import cli
from polymodal.config import to_yaml

ROOT = Path(__file__).parent.parent
NAMES = {
    "shared": ("polymodal", "polymodal"),
    "packages/fedcore": ("polymodal-fedcore", "fedcore"),
    "packages/vlm_accel": ("polymodal-vlm-accel", "vlm_accel"),
    "packages/slt": ("polymodal-slt", "slt"),
    "packages/css": ("polymodal-css", "css"),
    "packages/missing_modal": ("polymodal-missing-modal", "missing_modal"),
}
HERE = {"shared", "packages/slt", "packages/css", "packages/fedcore", "packages/vlm_accel", "packages/missing_modal"}


@pytest.mark.parametrize("folder", NAMES)
def test_metadata(folder: str) -> None:
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
    distribution, module = NAMES[folder]
    assert project["project"]["name"] == distribution
    assert project["tool"]["uv"]["build-backend"]["module-name"] == module
    readme = (ROOT / folder / "README.md").read_text()
    scripts = project["project"].get("scripts", {})
    if folder not in HERE:
        assert "Not here yet" in readme
        assert not scripts, "no command is registered before it works"
    for target in scripts.values():
        name, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(name), function))
    for dependency in project["project"]["dependencies"]:
        assert dependency.startswith("polymodal") or ">=" in dependency, f"{dependency} has no lower bound"


def test_root_depends_on_all_members_and_is_no_package() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert root["tool"]["uv"]["package"] is False
    assert set(root["project"]["dependencies"]) == {d for d, _ in NAMES.values()}


PROMISED = {
    ("slt", "SigmoidSelfAttentionWeighting"): ["dim", "num_heads", "mode", "granularity"],
    ("slt", "contrastive_loss"): ["a", "b", "logit_scale", "variant", "ids"],
    ("slt", "padded_length"): ["frames", "scheme"],
    ("slt", "token_length"): ["frames", "scheme"],
    ("slt", "omit_last"): ["words", "rate", "u"],
    ("slt", "bleu"): ["references", "hypotheses", "level"],
    ("slt", "rouge_l"): ["references", "hypotheses", "level", "variant"],
    ("css", "Task"): ["name", "num_classes"],
    ("css", "pseudo_label"): ["labels", "old_logits", "threshold"],
    ("css", "soft_binary_loss"): ["logits", "soft_target"],
    ("css", "region_distillation"): ["new_logits", "old_logits", "labels", "variant"],
    ("css", "rank_cells"): ["foreground_mask", "cell"],
    ("css", "paste_instance"): [
        *("image", "soft_target", "instance", "mask", "cls", "origin", "cell", "lam"),
    ],
    ("css", "balanced_sample"): ["candidates", "budget", "class_order"],
    ("css", "predict"): ["logits"],
    ("css", "segmentation_report"): ["confusion", "base_classes", "later_classes"],
    ("fedcore.lora", "qr_init"): ["weight", "rank", "scaling", "rms"],
    ("fedcore.lora", "aggregate_concat_qr"): ["factors", "weights", "target_ranks", "decomposition", "thin"],
    ("vlm_accel", "accelerate"): ["model", "method", "schedule", "ratio", "kv", "trace"],
    ("vlm_accel", "resolve"): ["schedule", "tokens", "group"],
    ("vlm_accel.ops", "rank1"): ["x", "scores", "keep"],
    ("vlm_accel.ops", "recycle"): ["x", "scores", "keep"],
    ("vlm_accel.ops", "assign"): ["x", "scores", "keep", "sizes"],
    ("missing_modal", "CorrelatedPrompts"): ["widths", "length", "depth"],
    ("missing_modal", "missing_table"): ["ids", "kind", "ratio", "seed", "dataset", "split"],
    ("fedcore.privacy", "epsilon"): ["sampling_rate", "noise_multiplier", "rounds", "delta", "accountant"],
}


@pytest.mark.parametrize(("module", "name"), PROMISED)
def test_promised_callables(module: str, name: str) -> None:
    found = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    promised = PROMISED[module, name]
    assert found[: len(promised)] == promised


def test_fedcore_reaches_its_parts_by_attribute() -> None:
    import fedcore

    assert fedcore.privacy.epsilon(0.1, 0.8, 301, 1 / 500) == pytest.approx(13.488, rel=0.01)
    assert fedcore.lora.qr_init.__module__ == "fedcore.lora.init"


def test_ssaw_has_the_promised_submodules() -> None:
    import slt

    module = slt.SigmoidSelfAttentionWeighting(8, 2)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj"):
        assert type(getattr(module, name)).__name__ == "Linear"
    assert module.type_embedding.shape == (2, 8)


TRAIN = {"fedcore": "fed", "missing_modal": "mm"}
CONFIGS = {
    "slt": "slt.settings:SLTConfig",
    "css": "css.settings:CSSConfig",
    "fedcore": "fedcore.settings:FedConfig",
    "missing_modal": "missing_modal.settings:MMConfig",
}


@pytest.mark.parametrize(("package", "preset"), [(p, name) for p in CONFIGS for name in cli.preset_names(p)])
def test_presets_parse_round_trip_and_name_their_command(package: str, preset: str, tmp_path: Path) -> None:
    module, _, name = CONFIGS[package].partition(":")
    config_class = getattr(importlib.import_module(module), name)
    readers = {"data": importlib.import_module(f"{package}.data").READERS}
    text = (importlib.resources.files(package) / "configs" / f"{preset}.yaml").read_text()
    assert text.startswith(f"# {TRAIN.get(package, package)}-train")
    assert "# Data" in text
    config = cli.parse_config(config_class, ["--config", preset], presets=package, choices=readers)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = cli.parse_config(config_class, ["--config", str(tmp_path)], presets=package, choices=readers)
    assert again == config


@pytest.mark.parametrize("package", CONFIGS)
def test_default_presets_exist(package: str) -> None:
    readers = importlib.import_module(f"{package}.data").READERS
    defaults = importlib.import_module(f"{package}.train").DEFAULT_PRESETS
    assert set(defaults.values()) <= set(cli.preset_names(package))
    assert set(defaults) - {""} <= set(readers)
