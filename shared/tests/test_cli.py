"""Parsing, presets, class-typed options, one-line errors, exit codes, help."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from polymodal import cli
from polymodal.config import RunConfig, TrainerConfig, config_hash, to_dict, to_yaml
from polymodal.errors import UserError


@dataclass
class Reader:
    """A reader."""

    root: Path | None = None
    """folder of the data"""


@dataclass
class Small(Reader):
    """Made-up data."""

    size: int = 10
    """samples"""


@dataclass
class Large(Reader):
    """Data on disk."""

    lowercase: bool = True
    """lower-case texts"""


@dataclass
class DemoConfig(RunConfig):
    """A demo."""

    mode: Literal["gate", "attention"] = "gate"
    """how to weight"""
    data: Reader = field(default_factory=Small, metadata={"class_typed": True})
    """reader"""
    betas: tuple[float, float] = (0.9, 0.98)
    """of AdamW"""
    options: dict[str, int] = field(default_factory=dict)
    """free options"""


CHOICES = {"data": {"small": f"{__name__}.Small", "large": f"{__name__}.Large"}}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # importlib mode gives test modules a dotted name without packages; class paths need a plain one.
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "demo_presets_package"
    (package / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "configs" / "fast.yaml").write_text("# demo --config fast\ndata: large\nmode: attention\n")
    (package / "configs" / "slow.yaml").write_text("trainer:\n  max_epochs: 77\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "demo_presets_package"


def parse(*arguments: str, presets: str | None = None) -> DemoConfig:
    return cli.parse_config(DemoConfig, list(arguments), prog="demo", presets=presets, choices=CHOICES)


def test_defaults_and_dotted_overrides() -> None:
    config = parse("--trainer.max_epochs", "3", "--seed=4", "--betas", "[0.5, 0.6]", "--options.a", "2")
    assert config.trainer == TrainerConfig(max_epochs=3)
    assert (config.seed, config.betas, config.options) == (4, (0.5, 0.6), {"a": 2})
    assert config.data == Small()


def test_class_typed_data_brings_its_own_options() -> None:
    assert parse("--data", "large", "--data.root", "/d", "--data.lowercase", "false").data == Large(Path("/d"), False)
    assert parse("--data=small", "--data.size", "3").data == Small(None, 3)
    with pytest.raises(UserError, match="size"):
        parse("--data", "large", "--data.size", "3")
    with pytest.raises(UserError, match="did you mean large.*known: small, large"):
        parse("--data", "lrge")


def test_presets_by_name_file_and_run_folder(presets: str, tmp_path: Path) -> None:
    assert cli.preset_names(presets) == ["fast", "slow"]
    config = parse("--config", "fast", "--data.lowercase", "false", presets=presets)
    assert config.data == Large(None, False)
    assert config.mode == "attention"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse("--config", str(tmp_path)) == config
    with pytest.raises(UserError, match="presets: fast, slow"):
        parse("--config", "none", presets=presets)


@pytest.mark.parametrize("text", ["data: [", "- 1\n- 2\n", "nonsense: 1\n", "trainer:\n  max_epoch: 2\n"])
def test_bad_configuration_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        parse("--config", str(path))


def test_yaml_round_trip_is_exact() -> None:
    config = parse(
        "--data", "large", "--data.root", "/x", "--log.tags", "[a, b]", "--trainer.extra.limit_val_batches", "2"
    )
    text = to_yaml(config)
    assert yaml.safe_load(text)["data"]["class_path"].endswith(".Large")
    assert cli.parse_config(DemoConfig, ["--config", _write(text)], choices=CHOICES) == config


def _write(text: str) -> str:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "c.yaml"
    path.write_text(text)
    return str(path)


def test_config_hash_ignores_seed_and_places_only() -> None:
    base = config_hash(DemoConfig())
    assert config_hash(DemoConfig(seed=3, name="x", out=Path("/o"), threads=2, resume="auto")) == base
    assert config_hash(DemoConfig(mode="attention")) != base
    assert config_hash(DemoConfig(data=Large())) != base
    assert "trainer" in to_dict(DemoConfig())


def run(main, *arguments: str, **options) -> int:
    return cli.command(main, DemoConfig, prog="demo", choices=CHOICES, argv=list(arguments), **options)


def test_exit_codes_and_single_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException):
        def main(config: DemoConfig) -> None:
            raise error

        return main

    assert run(lambda c: None) == 0
    for main, code, word in [
        (fail(UserError("no file\nx.png")), 2, "demo: error: no file x.png\n"),
        (fail(cli.Interrupted("saved")), 130, "demo: saved\n"),
        (fail(KeyboardInterrupt()), 130, "demo: interrupted\n"),
        (fail(ZeroDivisionError("oh")), 1, "demo: failed: ZeroDivisionError: oh (--debug shows the traceback)\n"),
    ]:
        capsys.readouterr()
        assert run(main) == code
        assert capsys.readouterr().err == word
    assert run(lambda c: None, "--nonsense", "1") == 2
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert error.count("\n") == 1
    assert run(fail(UserError("with trace")), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_default_preset_follows_the_data(presets: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[DemoConfig] = []
    table = {"": "slow", "large": "fast"}
    assert run(seen.append, presets=presets, default_presets=table) == 0
    assert run(seen.append, "--data", "large", presets=presets, default_presets=table) == 0
    assert run(seen.append, "--config", "fast", presets=presets, default_presets=table) == 0
    assert [c.trainer.max_epochs for c in seen] == [77, 10, 10]
    assert [c.mode for c in seen] == ["gate", "attention", "attention"]
    assert "preset slow" in capsys.readouterr().err


def test_aliases_dashes_and_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda c: None, "--way", "attention", "--print-config", aliases={"way": "mode"}) == 0
    assert yaml.safe_load(capsys.readouterr().out)["mode"] == "attention"
    seen: list[DemoConfig] = []
    assert run(seen.append, "--dry-run", "true") == 0
    assert seen[0].dry_run


def test_help_is_short_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda c: None, "--help", "--data", "large", example="demo --data large --data.root DIR") == 0
    text = capsys.readouterr().out
    assert text.index("demo --data large") < text.index("--seed")
    for option in ("--trainer.max_epochs INT", "--data.lowercase BOOL", "--mode gate|attention", "--log.wandb"):
        assert option in text
    assert len(text.splitlines()) < 60


def test_lists_may_be_written_in_three_ways() -> None:
    want = ["--seeds=[0, 1, 2]", "--name", "x"]
    for words in (["--seeds", "0", "1", "2"], ["--seeds", "0,1,2"], ["--seeds=0,1,2"], ["--seeds=[0, 1, 2]"]):
        assert cli.join_lists([*words, "--name", "x"], ("seeds",)) == want
    assert cli.join_lists(["--seeds", "[3,", "4]"], ("seeds",)) == ["--seeds=[3, 4]"]
    assert cli.join_lists(["--train-kinds", "a:b", "any"], ("train_kinds",)) == ['--train-kinds=["a:b", "any"]']
    assert cli.join_lists(["--ratios", "0.5,", "1"], ("ratios",)) == ["--ratios=[0.5, 1]"]
    assert cli.join_lists(["--seeds", "--name", "x"], ("seeds", "x")) == ["--seeds", "--name", "x"]


def test_list_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda c: None, "--list-methods", list_methods=lambda: "ssaw") == 0
    assert capsys.readouterr().out == "ssaw\n"


def test_subcommands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"go": ("goes", lambda argv: len(argv))}
    for argv, code in [(["x", "go", "a", "b"], 2), (["x", "--help"], 0), (["x"], 2), (["x", "no"], 2)]:
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.subcommands(table, prog="x") == code
    assert "unknown command 'no'; known: go" in capsys.readouterr().err


def test_parsing_does_not_import_torch() -> None:
    code = (
        "import sys; from polymodal.cli import parse_config; from polymodal.config import RunConfig;"
        "parse_config(RunConfig, ['--seed', '1']); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resume_takes_the_runs_own_configuration(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "demo" / "a-1"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "manifest.json").write_text("{}")
    (run_folder / "checkpoints" / "last.ckpt").write_text("")
    (run_folder / "config.yaml").write_text(to_yaml(DemoConfig(mode="attention", data=Small(size=3))))
    seen: list[DemoConfig] = []
    assert run(seen.append, "--resume", str(run_folder)) == 0
    assert run(seen.append, "--resume", str(run_folder / "checkpoints" / "last.ckpt"), "--seed", "5") == 0
    assert [(c.mode, c.data.size, c.seed) for c in seen] == [("attention", 3, 0), ("attention", 3, 5)]
    assert seen[0].resume == str(run_folder)
