"""Scripts of ``dashboards/`` as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "dashboards"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
@pytest.mark.parametrize("flags", [(), ("-P",)])
def test_a_script_is_the_command_for_its_package_and_does_not_hide_it(script, flags, tmp_path):
    command = [sys.executable, *flags, script, "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    layout = json.loads(done.stdout)
    assert layout["package"] == script.stem
    assert len(layout["sections"]) > 3  # its own, before the three shared ones
