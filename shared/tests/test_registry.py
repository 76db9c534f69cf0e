"""The lazy method table: names, errors that help, nothing imported before it is needed."""

import subprocess
import sys

import pytest
from polymodal.errors import UserError
from polymodal.registry import MethodInfo, Registry


def row(name="ssaw", target="collections:OrderedDict", **changes):
    return MethodInfo(name=name, target=target, paper="A et al. 2025", summary="one line", **changes)


class Options:
    """Stands for a method class."""

    def __init__(self, dim: int, heads: int = 2, *, mode: str = "gate") -> None:
        if mode == "nested":
            int("1", wrong=2)  # a TypeError of the method's own
        self.dim, self.heads, self.mode = dim, heads, mode


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setitem(sys.modules, "polymodal_test_methods", type(sys)("polymodal_test_methods"))
    sys.modules["polymodal_test_methods"].Options = Options
    rows = [row("ssaw", "polymodal_test_methods:Options"), row("concat"), row("cross_attention")]
    return Registry("fusion", rows)


def test_names_keep_table_order(table):
    assert table.names() == ["ssaw", "concat", "cross_attention"]
    assert [r.name for r in table] == table.names()
    assert len(table) == 3


def test_create_passes_options(table):
    made = table.create("ssaw", 8, mode="attention")
    assert (made.dim, made.heads, made.mode) == (8, 2, "attention")


def test_unknown_name_suggests_and_lists(table):
    with pytest.raises(UserError, match=r"unknown fusion 'ssav'; did you mean ssaw\? known: ssaw, concat, cross"):
        table.create("ssav")
    with pytest.raises(UserError, match=r"unknown fusion 'zzz'; known:"):
        table.info("zzz")


def test_unknown_option_suggests(table):
    with pytest.raises(UserError, match=r"fusion 'ssaw' has no option 'moode'; did you mean mode\?"):
        table.create("ssaw", 8, moode="gate")


class Typed:
    """Stands for a method class with options of all kinds."""

    def __init__(self, rate: float = 1.0, most: int = 3, fast: bool = True, lam: float | None = None, end: str = "a"):
        self.given = (rate, most, fast, lam, end)


@pytest.fixture
def typed(monkeypatch):
    monkeypatch.setitem(sys.modules, "polymodal_typed_methods", type(sys)("polymodal_typed_methods"))
    sys.modules["polymodal_typed_methods"].Typed = Typed
    return Registry("method", [row("typed", "polymodal_typed_methods:Typed")])


def test_options_of_the_right_type_are_passed(typed):
    given = {"rate": 2, "most": 4, "fast": False, "lam": None, "end": "b"}
    assert typed.create("typed", **given).given == tuple(given.values())
    assert typed.create("typed", lam=0.5).given[3] == 0.5


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rate", "high", "option rate='high'; expected a number"),
        ("rate", "1e-3", "option rate='1e-3'; expected a number; YAML takes 1e-3 for a text, write 0.001"),
        ("rate", True, "option rate=True; expected a number"),
        ("rate", None, "option rate=None; expected a number"),
        ("most", 2.5, "option most=2.5; expected a whole number"),
        ("most", True, "option most=True; expected a whole number"),
        ("fast", "yes", "option fast='yes'; expected true or false"),
        ("fast", 1, "option fast=1; expected true or false"),
        ("lam", "none", "option lam='none'; expected a number or null"),
        ("end", 3, "option end=3; expected a text"),
    ],
)
def test_options_of_another_type_are_refused(typed, key, value, words):
    with pytest.raises(UserError) as refusal:
        typed.create("typed", **{key: value})
    assert str(refusal.value) == f"method 'typed': {words}"


def test_a_type_error_inside_the_method_is_not_blamed_on_the_user(table):
    with pytest.raises(TypeError):
        table.create("ssaw", 8, mode="nested")


def test_duplicates_are_refused():
    with pytest.raises(ValueError, match="'a' is registered twice"):
        Registry("fusion", [row("a"), row("a")])


@pytest.mark.parametrize(
    "bad", [{"name": "SSAW"}, {"name": "a-b"}, {"target": "module.Class"}, {"fidelity": "exact"}], ids=str
)
def test_rows_of_the_wrong_form_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        row(**bad)


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from polymodal.discovery import installed_packages, listing; listing(installed_packages());"
        "print([m for m in ('torch', 'lightning', 'wandb', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_fields_that_a_dataclass_inherits_from_another_module_have_types(monkeypatch):
    base = """from __future__ import annotations
from dataclasses import dataclass
Mode = str

@dataclass
class Base:
    mode: Mode = "a"
    rate: float = 1.0
"""
    derived = """from __future__ import annotations
from dataclasses import dataclass
from polymodal_test_base import Base

@dataclass
class Derived(Base):
    most: int = 1
"""
    for name, source in (("polymodal_test_base", base), ("polymodal_test_derived", derived)):
        module = type(sys)(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, module.__dict__)
    table = Registry("method", [row("derived", "polymodal_test_derived:Derived")])
    assert table.create("derived", rate=2, most=3).rate == 2
    with pytest.raises(UserError, match="option rate='high'; expected a number"):
        table.create("derived", rate="high")
