"""Cells of the evaluation matrix: a lookup equals scoring the logits of that cell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from missing_modal.matrix import LogitCache, passes, sweep
from missing_modal.metrics import mean_by_row, report
from missing_modal.patterns import all_masks
from missing_modal.tables import combine, draw_table, missing_table
from polymodal.errors import UserError

THREE = ("image", "text", "audio")
TASKS = ("multiclass", "binary", "multilabel")


def model(sample, mask, task):
    """Logits of one sample under one pattern: any function of the two will do."""
    classes = 2 if task == "binary" else 4
    return 2.0 * np.random.default_rng([int(sample), int(mask)]).normal(size=classes)


def labels_of(count, task, seed=0):
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        return (rng.random((count, 4)) < 0.4).astype(np.float32)
    return rng.integers(0, 2 if task == "binary" else 4, count)


def filled(count, task, natural=None, modalities=("image", "text"), rows=None):
    ids = [f"s{number}" for number in range(count)]
    cache = LogitCache(ids, rows or ids, labels_of(count, task), task, natural, modalities)
    for mask, samples in cache.needed.items():
        cache.put(mask, np.stack([model(sample, mask, task) for sample in samples]))
    return cache


def direct(cache, masks):
    """The pass over the set as the cell has it, without a cache."""
    logits = np.stack([model(sample, mask, cache.task) for sample, mask in enumerate(masks)])
    return report(logits, cache.labels, masks, cache.task, cache.modalities)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [("image", "text"), THREE])
def test_a_cell_equals_direct_evaluation(task, modalities):
    count = 60
    natural = np.random.default_rng(5).integers(1, 2 ** len(modalities), count).tolist()
    cache = filled(count, task, natural, modalities)
    kinds = ["both", "image"] if len(modalities) == 2 else ["any", "only:audio"]
    cells = list(sweep(cache, kinds, [0.0, 0.3, 1.0], [0, 1], "d"))
    assert [(c.kind, c.ratio, c.seed) for c in cells] == [
        (k, r, s) for k in kinds for r in (0.0, 0.3, 1.0) for s in (0, 1)
    ]
    for cell in cells:
        table = draw_table(cache.rows, cell.kind, cell.ratio, cell.seed, "d", "test", modalities).masks
        masks = [combine(natural[i], table[row]) for i, row in enumerate(cache.rows)]
        assert cell.metrics == direct(cache, np.array(masks))
        assert sum(cell.counts.values()) == count
        np.testing.assert_array_equal(cache.table_masks(table), masks)
        np.testing.assert_array_equal(cache.logits(masks), [model(i, m, task) for i, m in enumerate(masks)])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from(TASKS))
def test_any_patterns(count, seed, task):
    rng = np.random.default_rng(seed)
    natural = rng.integers(1, 8, count)
    masks = np.array([rng.choice([m for m in range(1, 8) if m & have == m]) for have in natural])
    cache = filled(count, task, natural.tolist(), THREE)
    expected = direct(cache, masks)
    found = cache.evaluate(masks)
    assert found == pytest.approx(expected, nan_ok=True, abs=0)


def test_passes_run_only_what_can_be():
    found = passes([3, 1, 3, 1])
    assert {mask: samples.tolist() for mask, samples in found.items()} == {3: [0, 2], 1: [0, 1, 2, 3], 2: [0, 2]}
    assert list(passes([1, 1])) == [1]
    assert list(passes([7], THREE)) == all_masks(THREE)


def test_samples_of_a_row_share_its_pattern():
    rows = ["a", "a", "b", "c", "c", "c"]
    cache = filled(6, "multilabel", rows=rows)
    cell = next(sweep(cache, ["text"], [0.4], [3], "d"))
    table = missing_table(["a", "b", "c"], "text", 0.4, 3, "d", "test")
    lacking = sum(rows.count(row) for row, code in table.items() if code == 1)
    assert cell.counts == {"complete": 6 - lacking, "image": lacking, "text": 0}


def test_mean_over_the_samples_of_a_row():
    rows = ["b", "b", "a", "c", "c", "c"]
    ids = [f"s{number}" for number in range(6)]
    labels = np.array([1, 1, 0, 3, 3, 3])
    cache = LogitCache(ids, rows, labels, "multiclass")
    for mask, samples in cache.needed.items():
        cache.put(mask, np.stack([model(sample, mask, "multiclass") for sample in samples]))
    means = cache.mean_rows()
    assert means.ids == ["b", "a", "c"]
    assert means.labels.tolist() == [1, 0, 3]
    _, expected = mean_by_row(cache.logits(np.array([3, 3, 1, 2, 2, 2])), rows, "multiclass")
    np.testing.assert_array_equal(means.logits(np.array([3, 1, 2])), expected)
    cache.labels = np.array([1, 0, 0, 3, 3, 3])
    with pytest.raises(ValueError, match="cannot be averaged"):
        cache.mean_rows()


def test_wrong_use():
    cache = LogitCache(["a", "b"], ["a", "b"], [0, 1], "binary", [3, 1])
    assert cache.missing_passes == [3, 1, 2]
    with pytest.raises(ValueError, match="not run yet: complete, image, text"):
        cache.evaluate(np.array([3, 1]))
    with pytest.raises(ValueError, match="pattern 4"):
        cache.put(4, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected \\(1, C\\)"):
        cache.put(3, np.zeros((2, 2)))
    for mask, samples in cache.needed.items():
        cache.put(mask, np.zeros((len(samples), 2)))
    with pytest.raises(ValueError, match="sample b has 1, not pattern 3"):
        cache.evaluate(np.array([3, 3]))
    with pytest.raises(UserError, match="no row b"):
        cache.table_masks({"a": 3})
    with pytest.raises(ValueError, match="1 labels"):
        LogitCache(["a", "b"], ["a", "b"], [0], "binary")


def test_save_and_load(tmp_path):
    cache = filled(7, "binary", [3, 3, 1, 2, 3, 1, 3])
    path = tmp_path / "logits.npz"
    cache.save(path, {"model": "m"})
    found, meta = LogitCache.load(path)
    assert meta == {"model": "m"}
    assert (found.ids, found.rows, found.task, found.modalities) == (cache.ids, cache.rows, "binary", cache.modalities)
    masks = np.array([3, 1, 1, 2, 2, 1, 3])
    assert found.evaluate(masks) == pytest.approx(cache.evaluate(masks), abs=0, nan_ok=True)
    half = LogitCache(cache.ids, cache.rows, cache.labels, "binary", cache.natural.tolist())
    half.put(3, cache.logits(cache.natural)[cache.natural == 3])
    half.save(path)
    assert LogitCache.load(path)[0].missing_passes == [1, 2]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04."])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "logits.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as caught:
        LogitCache.load(path)
    assert "\n" not in str(caught.value)


def test_files_cut_short_or_with_objects(tmp_path):
    path = tmp_path / "logits.npz"
    filled(5, "multiclass").save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot be read"):
        LogitCache.load(path)
    np.savez(path, header=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        LogitCache.load(path)
