"""Tables, schedules, budgets, presets and maps are usable before torch is there."""

import subprocess
import sys

import pytest

CODE = """
import sys
{statement}
heavy = {{"torch", "transformers", "lightning", "wandb", "timm", "open_clip"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import vlm_accel; vlm_accel.PRESETS; vlm_accel.resolve; vlm_accel.pyramid(0.5); vlm_accel.KVBudget",
        "from vlm_accel.methods import METHODS; assert len(METHODS) == 31; METHODS.info('recycle')",
        "from vlm_accel.merge_map import MergeMap; MergeMap((1, 2, 2)).owner()",
        "from vlm_accel.methods.base import Tokens, Reduced; from vlm_accel.schedule import expand",
    ],
)
def test_nothing_heavy_is_imported(statement):
    subprocess.run([sys.executable, "-c", CODE.format(statement=statement)], check=True, timeout=60)


def test_rules_need_torch_alone():
    statement = "from vlm_accel import ops; ops.recycle"
    code = CODE.format(statement=statement).replace('"torch", ', "")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
