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
HERE = {"shared", "packages/slt"}


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
}


@pytest.mark.parametrize(("module", "name"), PROMISED)
def test_promised_callables(module: str, name: str) -> None:
    found = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    promised = PROMISED[module, name]
    assert found[: len(promised)] == promised


def test_ssaw_has_the_promised_submodules() -> None:
    import slt

    module = slt.SigmoidSelfAttentionWeighting(8, 2)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj"):
        assert type(getattr(module, name)).__name__ == "Linear"
    assert module.type_embedding.shape == (2, 8)


@pytest.mark.parametrize("preset", cli.preset_names("slt"))
def test_presets_parse_round_trip_and_name_their_command(preset: str, tmp_path: Path) -> None:
    from slt.data import READERS
    from slt.settings import SLTConfig

    text = (importlib.resources.files("slt") / "configs" / f"{preset}.yaml").read_text()
    assert text.startswith("# slt-train")
    assert "# Data" in text
    config = cli.parse_config(SLTConfig, ["--config", preset], presets="slt", choices={"data": READERS})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = cli.parse_config(SLTConfig, ["--config", str(tmp_path)], presets="slt", choices={"data": READERS})
    assert again == config


def test_default_presets_exist() -> None:
    from slt.data import READERS
    from slt.train import DEFAULT_PRESETS

    assert set(DEFAULT_PRESETS.values()) <= set(cli.preset_names("slt"))
    assert set(DEFAULT_PRESETS) - {""} <= set(READERS)
