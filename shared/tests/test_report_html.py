"""The page is one well-formed file without outside addresses, and shows what the tables say."""

import base64
import html
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from polymodal.curves import average
from polymodal.report import ReportOptions, collect, render
from polymodal.report_svg import differences, dots, lines, number, ticks
from polymodal.run_reader import Point
from polymodal.stats import PairedDifference

_spec = importlib.util.spec_from_file_location("_run_factory", Path(__file__).with_name("_run_factory.py"))
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
VOID = {"meta", "br", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects text, attributes and tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.curves = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]
        if "data-curves" in values:
            self.curves.append(json.loads(values["data-curves"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    root = tmp_path / "runs"
    for method, base in (("ssaw", 90.0), ("a<b>&", 50.0)):
        for seed in (0, 1, 2):
            folder = factory.write_run(
                root / f"{method[:1]}-{seed}",
                method=method,
                seed=seed,
                metrics={"test/bleu4": base + seed},
                curves={
                    "train/loss": [(s, 0, 5.0 / s + seed) for s in range(1, 30)],
                    "train/alignment": [(s, 0, 1.0 / s) for s in (1, 2)],
                    "test/bleu4": [(30, 0, base)],
                },
                samples={"test-translations.jsonl": [{"id": "c1", "translation": "<script>alert(1)</script>"}]},
            )
            (folder / "figures").mkdir()
            (folder / "figures" / "gate.png").write_bytes(PNG)
            (folder / "audit.md").write_text("| who | BLEU-4 |\n|---|---|\n| copy_question | 3.21 |\n\n**ok**\n")
    factory.write_run(root / "killed", status="interrupted", seed=9)
    asked = ReportOptions(runs=(root,), against="a<b>&")
    return render(collect(asked), "html", asked)


def test_the_page_is_well_formed_and_refers_to_nothing_outside(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.addresses
    assert all(a.startswith("data:image/png;base64,") for a in checker.addresses)
    assert not re.search(r"https?://|@import|url\(", page)


def test_text_of_runs_is_escaped(page):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a<b>" not in page


def test_scores_differences_samples_pictures_and_runs_are_there(page):
    checker = Checker()
    checker.feed(page)
    text = "\n".join(checker.text)
    assert re.search(r"91\.00\s*± 1\.00", text)
    assert "+40.00" in text
    assert "copy_question" in text
    assert "interrupted" in text
    assert "fusion.name" in text  # differs between the groups
    assert page.count("data:image/png;base64,") == 2  # one run of each group


def test_the_footer_is_the_command_that_makes_the_page_again(tmp_path):
    factory.write_run(tmp_path / "a b", method="none", metrics={"test/bleu4": 50.0})
    asked = ReportOptions(
        runs=(tmp_path,), metrics=("test/*",), where=("method=no*",), against="none", mix=True, unfinished=True
    )
    text = html.unescape(render(collect(asked), "html", asked))
    options = "--by method --metric 'test/*' --where 'method=no*' --against none --mix --unfinished"
    assert f"<code>polymodal report {tmp_path} {options}</code>" in text


def test_curves_follow_the_layout_and_leave_single_points_out(page):
    checker = Checker()
    checker.feed(page)
    assert len(checker.curves) == 2
    assert [c["g"] for c in checker.curves[0]["curves"]] == ["a<b>&", "ssaw"]
    assert checker.curves[0]["curves"][0]["y"][0] == 6.0  # 5/1 + mean seed 1
    assert page.index("train/loss") < page.index("More train") < page.index("train/alignment")


def test_one_run_makes_a_page_too(tmp_path):
    factory.write_run(tmp_path / "r", curves={"train/loss": [(1, 0, 2.0), (2, 0, 2.0)]}, git=None, peak_mib=None)
    asked = ReportOptions(runs=(tmp_path,))
    page = render(collect(asked), "html", asked)
    assert "Every seed" not in page
    assert "One run each." in page
    assert "<p class=legend>" not in page
    assert "<b>90.00</b>" in page


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-1, 1, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (0.0001, 0.0005, [0.0001, 0.0002, 0.0003, 0.0004, 0.0005]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_stay_short():
    assert [number(v) for v in (0, 0.0005, 1234567, 0.25, 99.123)] == ["0", "5.0e-4", "1.2e6", "0.25", "99.12"]


def test_pictures_place_values_in_order():
    svg = dots({"a": {0: 1.0, 1: 3.0}, "none": {}}, {"a": "#111", "none": "#222"})
    first, second = (float(x) for x in re.findall(r'circle cx="([\d.]+)"', svg))
    assert first < second
    assert "none" not in svg
    svg = differences(
        {"a": PairedDifference(3, 2.0, 1.0, 3.0), "b": PairedDifference(1, 2.0, None, None)},
        dict.fromkeys("ab", "#111"),
    )
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', svg)[1])
    assert zero < float(re.search(r'circle cx="([\d.]+)"', svg)[1])


def test_a_flat_curve_has_a_finite_picture():
    svg = lines(average({"a": [[Point(5, 0, 0.0)]]}), "step", {"a": "#111"})
    assert "nan" not in svg
    assert "inf" not in svg
