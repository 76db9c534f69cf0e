"""Settings: what is refused at once, options of methods, a configuration that comes back from its file."""

from __future__ import annotations

import subprocess
import sys

import pytest
from missing_modal.data import READERS
from missing_modal.settings import BackboneConfig, CalibrationConfig, LoaderConfig, MMConfig, OptimConfig
from polymodal.cli import parse_config, preset_names
from polymodal.config import to_yaml
from polymodal.errors import UserError


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OptimConfig(lr=0), "optim.lr=0"),
        (lambda: OptimConfig(lr_out=-1), "optim.lr_out=-1"),
        (lambda: OptimConfig(warmup=1), "optim.warmup=1"),
        (lambda: OptimConfig(weight_decay=-0.1), "optim.weight_decay"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "optim.betas"),
        (lambda: LoaderConfig(batch_size=0), "loader.batch_size=0"),
        (lambda: LoaderConfig(num_workers=-1), "loader.num_workers=-1"),
        (lambda: BackboneConfig(width=0), "backbone.width=0"),
        (lambda: BackboneConfig(width=9, heads=2), "backbone.heads=2"),
        (lambda: BackboneConfig(steps=-1), "backbone.steps=-1"),
        (lambda: CalibrationConfig(least=0), "calibration.least=0"),
    ],
)
def test_out_of_range(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_published_values_are_the_defaults():
    optim = OptimConfig()
    assert (optim.lr, optim.weight_decay, optim.betas, optim.eps, optim.warmup) == (1e-2, 2e-2, (0.9, 0.98), 1e-8, 0.1)


def test_options_of_the_method_win_over_those_of_the_preset():
    config = MMConfig(defaults_by_method={"dcp": {"length": 6, "depth": 2}}, method_options={"depth": 3})
    assert config.options_of_method() == {"length": 6, "depth": 3}
    config.method = "msp"
    assert config.options_of_method() == {"depth": 3}
    with pytest.raises(UserError, match="defaults_by_method.msp"):
        MMConfig(method="msp", defaults_by_method={"msp": 3}).options_of_method()


@pytest.mark.parametrize("preset", preset_names("missing_modal"))
def test_presets_come_back_from_their_own_yaml(preset, tmp_path):
    options = ["--config", preset, "--data.root", str(tmp_path)]
    config = parse_config(MMConfig, options, presets="missing_modal", choices={"data": READERS})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = parse_config(MMConfig, ["--config", str(path)], presets="missing_modal", choices={"data": READERS})
    assert to_yaml(again) == to_yaml(config)


def test_help_loads_no_torch():
    code = "import sys, missing_modal.train as t, missing_modal.report, missing_modal.dashboard; "
    code += "sys.argv = ['mm-train', '--help']; t.main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
