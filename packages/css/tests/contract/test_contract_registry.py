"""The shared contract of method tables, held by the table of continual methods."""

from css.methods import METHODS
from css.methods.base import Method
from polymodal import checks

OPTIONS = {
    "ft": {"init": "zero"},
    "pl": {"threshold": 0.5},
    "replay": {"threshold": 0.5},
    "mib": {"distillation": 100.0},
    "plop": {"scales": [1, 2], "bins": 20},
    "ssul": {"background_factor": 0.0},
    "ssul_m": {"threshold": 0.5},
    "dkd": {"pos_weight": 35.0},
    "dkd_m": {"auxiliary": 0.0},
    "eir": {"distillation": "mib"},
}


def test_table_of_methods():
    checks.check_registry(METHODS, (), OPTIONS, base=Method)
    checks.check_registry(METHODS, (), base=Method)


def test_table_has_the_promised_names():
    promised = {"ft", "joint", "pl", "replay", "mib", "plop", "ssul", "ssul_m", "dkd", "dkd_m", "eir"}
    assert set(METHODS.names()) == promised


def test_what_is_replayed_and_how():
    kept = {row.name: METHODS.load(row.name).memory for row in METHODS}
    images = {"replay", "ssul_m", "dkd_m"}
    assert kept == {name: "images" if name in images else "instances" if name == "eir" else "none" for name in kept}
    assert [row.name for row in METHODS if METHODS.load(row.name).mix == "half"] == ["ssul_m"]
    assert [row.name for row in METHODS if METHODS.load(row.name).offline] == ["joint"]
    tagged = {row.name: "softmax" in row.tags for row in METHODS}
    assert tagged == {row.name: METHODS.load(row.name).softmax for row in METHODS}
