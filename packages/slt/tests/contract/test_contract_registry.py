"""The shared contract of method tables, held by the table of fusions."""

from polymodal import checks
from slt.methods import FUSIONS
from slt.methods.base import Fusion


def test_table_of_fusions():
    options = {"ssaw": {"mode": "attention"}, "cross_attention": {"bias": False}}
    checks.check_registry(FUSIONS, (8, 2), options, base=Fusion)
    checks.check_registry(FUSIONS, (8, 2), base=Fusion)
