"""The benchmark harness: its statistics, files and tables, and that every section runs in tiny sizes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks._bench")


def samples(bench, *wall):
    return bench.Samples(list(wall), [x / 2 for x in wall])


def test_ratios_are_of_medians_and_quartiles_of_neighbouring_runs(bench):
    ours, theirs = samples(bench, 1.0, 2.0, 3.0), samples(bench, 2.0, 8.0, 9.0)
    fast = bench.speedup("x", ours, theirs, at_least=4.0)
    assert (fast.ours, fast.baseline, fast.ratio, fast.cpu_ratio) == (2000, 8000, 4, 4)
    assert (fast.low, fast.high) == (2.5, 3.5)  # of 2, 4, 3
    assert fast.met is True
    assert bench.speedup("x", ours, theirs, at_least=4.1).met is False
    slow = bench.overhead("x", ours, theirs, at_most=0.25)
    assert (slow.ours, slow.baseline, slow.ratio, slow.met) == (2000, 8000, 0.25, True)
    assert bench.overhead("x", ours, theirs, at_most=0.24).met is False
    share = bench.value("x", "%", [9.0, 11.0, 12.0], below=10)
    assert (share.ours, share.low, share.high, share.met, share.target) == (11, 10, 11.5, False, "< 10 %")
    rate = bench.value("x", "pictures/s", [29.0, 30.0, 31.0], at_least=30)
    assert (rate.met, rate.target) == (True, ">= 30 pictures/s")
    assert bench.value("x", "pictures/s", [29.9], at_least=30).met is False


def test_figures_that_are_no_times_are_compared_as_they_are(bench):
    row = bench.against("x", "MiB", [3.0, 4.0, 8.0], [2.0, 4.0, 4.0], at_most=1.0)
    assert (row.unit, row.ours, row.baseline, row.ratio, row.low, row.high) == ("MiB", 4, 4, 1, 1.25, 1.75)
    assert (row.met, row.target, row.cpu_ratio, row.runs) == (True, "<= 1.00", None, 3)
    assert bench.against("x", "MiB", [5.0], [4.0], at_most=1.2).met is False


def test_runs_take_turns_after_the_warm_up(bench):
    calls = []
    found = bench.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(s.wall) for s in found.values()] == [3, 3]


def test_results_are_written_with_their_circumstances_and_tabulated(bench, tmp_path, capsys):
    options = bench.parse("t", ["one", "two"], ["one", "--out", str(tmp_path)])
    sections = {"one": ("A title", lambda _: [bench.value("a rate", "clips/s", [1.0, 2.0, 3.0])]), "two": ("", None)}
    (path,) = bench.run_sections("demo", options, sections)
    report = json.loads(path.read_text())
    assert path.name == "demo_one.json"
    assert {"versions", "device", "threads", "load_at_start", "date", "commit", "rows"} <= set(report)
    assert report["rows"][0]["ours"] == 2.0
    assert "| a rate | 2 clips/s |  |  | 1.5 – 2.5 |" in capsys.readouterr().out
    page = "before\n<!-- demo_one -->\nold\n<!-- /demo_one -->\nafter <!-- x -->\n"
    fresh = bench.refreshed(page, tmp_path)
    assert "old" not in fresh
    assert "| a rate | 2 clips/s |" in fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("after <!-- x -->\n")
    assert bench.refreshed(fresh, tmp_path) == fresh


def test_an_unknown_section_is_named(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse("t", ["one"], ["three"])
    assert "no section three; there are one" in capsys.readouterr().err


def test_the_page_shows_the_committed_results(bench):
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert bench.refreshed(page) == page


def test_no_committed_result_is_of_a_quick_run(bench):
    for path in bench.RESULTS.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["quick"] is False, path.name


def test_prefix_search_finds_what_generate_finds(bench):
    import torch
    from slt.models.generate import generate
    from transformers.modeling_outputs import BaseModelOutput

    inputs = importlib.import_module("benchmarks._slt_inputs")
    model, vocab = inputs.translator(32, 1, 5, 40)
    states, mask = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1)), torch.ones(2, 4).bool()
    encoded = BaseModelOutput(last_hidden_state=states)
    found = generate(model, encoded, mask, vocab, num_beams=3, max_new_tokens=5)
    assert [len(row) for row in found] == [5, 5]
    assert inputs.prefix_search(model, states, mask, vocab, beams=3, tokens=5) == found


def test_the_plain_loop_has_the_logits_and_gradients_of_the_classifier(bench):
    import torch

    inputs = importlib.import_module("benchmarks._mm_inputs")
    towers = [tower.to("cpu", torch.float64) for tower in inputs.two_towers(inputs.SMALL)]
    model = inputs.classifier(inputs.SMALL, towers).double()
    batch = inputs.draw_batch(inputs.SMALL, longest=8)
    assert sorted(batch.masks) == [1, 1, 2, 2, 3, 3]
    found = {}
    for together in (None, True, False):
        logits = model(batch) if together is None else inputs.plain_logits(model, batch, together)
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found[together] = logits.detach(), gradients
    logits, gradients = found[None]
    for other, theirs in (found[True], found[False]):
        torch.testing.assert_close(other, logits, atol=1e-12, rtol=0)
        assert theirs.keys() == gradients.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(value, gradients[name], atol=1e-12, rtol=0, msg=name)
    changed = {"ours": lambda: logits, "other": lambda: logits + 2e-5}
    with pytest.raises(RuntimeError, match="other: logits differ by 2e-05"):
        inputs.require_same(changed)


def test_multiply_adds_of_towers_are_those_counted_by_hand(bench):
    inputs = importlib.import_module("benchmarks._mm_inputs")
    shape = inputs.Shape(widths=(2, 3), blocks=5, side=4, patch=2, length=6)
    image, text = (5 * (12 * d * d * rows + 2 * rows * rows * d) for d, rows in ((2, 6 + 5), (3, 6 + 4)))
    assert inputs.macs(shape, [7, 1], 4) == 7 * image + text
    assert inputs.macs(shape, [0, 2], 4) == 2 * text


def test_drawn_pictures_are_read_in_the_layouts_and_each_class_is_one_region(bench, monkeypatch):
    from css.data.ade import ADE20K
    from css.data.voc import VOC
    from css.memory.components import admissible

    monkeypatch.setenv("POLYMODAL_CACHE", "before")
    inputs = importlib.import_module("benchmarks._css_inputs")
    with inputs.voc_folder(26, 22) as home:
        voc = VOC(root=home, augmented=False)
        items = voc.items("train")
        masks = [voc.load_mask(item) for item in items]
        assert {number for found in voc.class_sets("train") for number in found} == set(range(1, 21))
        assert all(
            mask.shape == voc.load_image(item).shape[:2] == (375, 500) for item, mask in zip(items, masks, strict=True)
        )
        assert all(admissible(mask) and (mask == 255).any() for mask in masks)
        assert (masks[22] == masks[0]).all()
        assert not (masks[1] == masks[0]).all()
    assert not home.exists()
    assert os.environ["POLYMODAL_CACHE"] == "before"
    with inputs.ade_folder(3) as home:
        assert ADE20K(root=home).class_sets("train") == [(1,), (2, 9), (3, 10)]


@pytest.mark.parametrize(
    ("script", "sections"),
    [
        ("shared", ["small"]),
        ("slt", ["packed", "beam", "rates", "split"]),
        ("css", ["step", "index"]),
        ("fedcore", ["serial", "batched", "methods"]),
        ("fedcore_lora", ["aggregate", "large", "rounds"]),
        ("fedcore_privacy", ["rounds", "noise"]),
        ("missing_modal", ["loop", "skip", "tables", "cut", "frozen", "matrix", "gpu"]),
    ],
)
def test_sections_run_in_tiny_sizes(bench, script, sections, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    try:
        importlib.import_module(f"benchmarks.{script}").main([*sections, "--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    names = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert names == sorted(f"{script}_{section}" for section in sections)
    rows = [row for path in tmp_path.glob("*.json") for row in json.loads(path.read_text())["rows"]]
    assert all(row["ours"] > 0 or row["unit"] == "% of a step" for row in rows)
    assert all(row["target"] is None for row in rows)


def run_script(script, *arguments, cwd):
    """The script as a file, from a foreign folder; ``slt.py``, ``css.py`` and ``fedcore.py`` must not hide packages."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLYMODAL_CACHE": str(cwd / "cache")}
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize(
    "script",
    [
        *("shared.py", "slt.py", "css.py", "fedcore.py", "fedcore_lora.py", "fedcore_privacy.py"),
        *("vlm_accel.py", "missing_modal.py"),
    ],
)
def test_scripts_start_from_any_folder(script, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


@pytest.mark.slow
def test_waiting_for_data_runs_in_tiny_sizes(tmp_path):
    done = run_script("slt.py", "wait", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "slt_wait.json").read_text())["rows"]
    assert all(0 < row["ours"] < 100 for row in rows)


@pytest.mark.slow
def test_workers_and_processes_run_in_tiny_sizes(tmp_path):
    done = run_script("css.py", "loader", "memory", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, count in (("loader", 4), ("memory", 2)):
        rows = json.loads((tmp_path / f"css_{name}.json").read_text())["rows"]
        assert len(rows) == count
        assert all(row["ours"] > 0 for row in rows)


@pytest.mark.slow
def test_memory_of_a_prompt_step_runs_in_tiny_sizes(tmp_path):
    done = run_script("missing_modal.py", "memory", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "missing_modal_memory.json").read_text())["rows"]
    assert [0 < row["ratio"] < 1 for row in rows] == [True, True]
