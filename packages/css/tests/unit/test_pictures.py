"""Pictures: what is drawn where, in which colour, and which pictures of a split are taken."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from css.data.batch import Sample
from css.data.files import palette
from css.data.transforms import normalise
from css.pictures import (
    MemoryTile,
    confusion_plot,
    iou_matrix,
    iou_plot,
    memory_sheet,
    overlay,
    prediction_grid,
    predictions_grid,
    save_picture,
)
from css.report import StepReport
from css.samples import Shown, choose_pictures, displayed, raw_lut, segment_some
from css.task import Task
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

NAMES = ["ant", "bee", "cat", "dog"]
TASK = Task("2-1", 4, (3, 1, 4, 2))


def reports(task=TASK, names=NAMES):
    rng = np.random.default_rng(1)
    made = []
    for step in range(task.num_steps):
        matrix = rng.integers(1, 50, (task.num_channels(step),) * 2)
        made.append(StepReport.of(matrix, task, names, step))
    return made


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def pixels(figure):
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


def drawn(figure):
    figure.canvas.draw()
    return pixels(figure)


def colour_at(figure, x, y):
    """Colour at a place in data coordinates of the first axes."""
    image = drawn(figure)
    column, row = figure.axes[0].transData.transform((x, y))
    return image[round(len(image) - row), round(column)]


# ------------------------------------------------------------------ matrices


def test_iou_stands_in_its_cell_and_unseen_cells_are_blank():
    made = reports()
    figure = iou_plot(made, "a title")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["background", "cat", "ant", "dog", "bee", "old", "new", "all", "harmonic"]
    placed = {
        (round(t.get_position()[0] - 0.5), round(t.get_position()[1] - 0.5)): t.get_text() for t in texts_of(figure)
    }
    for step, report in enumerate(made):
        for channel, value in enumerate(report.iou):
            assert placed[channel, step] == f"{value:.1f}"
        for channel in range(len(report.iou), 5):
            assert (channel, step) not in placed
            assert (colour_at(figure, channel + 0.2, step + 0.2) == 255).all()
    assert (colour_at(figure, 4.2, 2.2) != 255).any()
    assert len(texts(figure)) == 3 + 4 + 5 + 2 + 4 + 4


def texts_of(figure):
    return figure.axes[0].texts


def test_darker_cells_are_better():
    matrix = np.array([[100, 0, 0], [5, 95, 0], [90, 0, 10]])
    figure = iou_plot([StepReport.of(matrix, Task("2-1", 4), NAMES, 0)])
    low, high = (int(colour_at(figure, x, 0.2).sum()) for x in (2.2, 1.2))
    assert high < low


def test_a_matrix_of_150_classes_has_no_numbers_in_it_but_means():
    task, names = Task("100-50", 150), [f"class {i}" for i in range(150)]
    made = reports(task, names)
    figure = iou_plot(made)
    assert len(texts(figure)) == 2 + 4
    assert figure.get_figwidth() < 25
    assert confusion_plot(made[1].confusion, ["background", *names]).get_figwidth() < 20


def test_confusion_rows_are_shares_and_a_class_without_truth_is_blank():
    matrix = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    figure = confusion_plot(matrix, ["background", "ant", "bee"], "title")
    assert sorted(texts(figure)) == sorted(["75", "25", "0", "25", "0", "75"])
    assert (colour_at(figure, 0.2, 1.2) == 255).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["background", "ant", "bee"]


# ------------------------------------------------------------------ segmentations


def test_the_grid_has_the_palettes_colours_and_names_what_occurs():
    truth = np.zeros((20, 20), np.uint8)
    truth[5:15, 5:15] = 3
    shown = [Shown(np.full((20, 20, 3), 90, np.uint8), truth, np.full((20, 20), 1, np.uint8), "one")]
    figure = prediction_grid(shown, NAMES, "title")
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert (images[0] == 90).all()
    assert (images[1][10, 10] == palette()[3]).all()
    assert (images[1][0, 0] == 0).all()
    assert (images[2] == palette()[1]).all()
    written = [text.get_text() for text in figure.texts]
    assert {"background", "ant", "cat", "title", "image", "truth", "prediction"} <= set(written)
    assert "bee" not in written


def test_the_grid_does_without_truth_or_prediction():
    image, label = np.zeros((8, 12, 3), np.uint8), np.full((8, 12), 255, np.uint8)
    assert len(prediction_grid([Shown(image, label)] * 2, NAMES).axes) == 4
    assert len(prediction_grid([Shown(image, None, label)], NAMES, rows=("a", "b", "c")).axes) == 2
    written = [text.get_text() for text in prediction_grid([Shown(image, None, label)], NAMES).texts]
    assert "prediction" in written
    assert "truth" not in written
    assert "ignored" in written


def test_an_overlay_leaves_the_background_and_rims_each_region():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    labels = np.zeros((30, 40), np.uint8)
    labels[10:20, 10:20], labels[0:3] = 2, 255
    found = overlay(image, labels, 0.5)
    inner, rim = np.zeros(labels.shape, bool), np.zeros(labels.shape, bool)
    inner[10:19, 10:19] = True
    rim[9:20, 9:20] = True
    rim[9, 9] = rim[10:19, 10:19] = False
    assert (found[~(inner | rim)] == image[~(inner | rim)]).all()
    assert (found[rim] == 255).all()
    assert found[inner] == pytest.approx(image[inner] / 2 + palette()[2] / 2, abs=0.51)
    assert overlay(image, np.zeros_like(labels)).tolist() == image.tolist()


def test_memory_tiles_are_outlined_in_their_colour():
    labels = np.zeros((20, 30), np.uint8)
    labels[4:16, 4:26] = 2
    tile = MemoryTile(np.zeros((20, 30, 3), np.uint8), labels, "bee", ("picture 7", "step 0"))
    figure = memory_sheet([tile] * 5, "five entries, 2.0 KiB")
    assert len(figure.axes) == 5
    written = [text.get_text() for text in figure.texts]
    assert written.count("bee") == written.count("picture 7") == 5
    assert "five entries, 2.0 KiB" in written
    assert figure.axes[0].get_xlim() == (-0.5, 29.5)  # the outline does not move the picture
    assert (drawn(figure) == palette()[2]).all(-1).any()
    plain = MemoryTile(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), "bee")
    assert not (drawn(memory_sheet([plain], "")) == palette()[2]).all(-1).any()


def test_pictures_are_written_whole_in_the_format_of_their_name(tmp_path):
    iou_matrix(tmp_path / "figures" / "iou.png", reports(), "title")
    with Image.open(tmp_path / "figures" / "iou.png") as image:
        assert image.size[0] > 300
    save_picture(iou_plot(reports()), tmp_path / "iou.svg")
    assert "<svg" in (tmp_path / "iou.svg").read_text()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["iou.png", "iou.svg"]


def test_drawing_leaves_pyplot_and_torch_alone():
    code = (
        "import sys, numpy as np\n"
        "from css.pictures import confusion_plot, overlay\n"
        "confusion_plot(np.eye(3), ['a', 'b', 'c']).canvas.draw()\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib.pyplot', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ which pictures


def test_each_class_is_shown_once_before_any_twice():
    sets = [(1,), (1,), (1,), (2,), (1,), (3, 1), (4,)]
    assert choose_pictures(sets, (1, 2, 3, 4), 3) == [3, 5, 6]
    assert choose_pictures(sets, (1, 2, 3, 4), 4) == [0, 3, 5, 6]  # a new round


def test_pictures_without_a_seen_class_fill_up():
    assert choose_pictures([(), (9,), (1,), ()], (1, 2), 3) == [0, 1, 2]
    assert choose_pictures([(), ()], (1,), 5) == [0, 1]
    assert choose_pictures([], (1,), 5) == []


@settings(max_examples=60, deadline=None)
@given(
    sets=st.lists(st.sets(st.integers(1, 6)).map(lambda s: tuple(sorted(s))), max_size=20),
    seen=st.integers(1, 6),
    count=st.integers(0, 8),
)
def test_as_many_pictures_as_asked_for_and_every_class_where_that_is_easy(sets, seen, count):
    known = tuple(range(1, seen + 1))
    chosen = choose_pictures(sets, known, count)
    assert len(chosen) == min(count, len(sets))
    assert chosen == sorted(set(chosen))
    there = {raw for found in sets for raw in found} & set(known)
    shown = {raw for index in chosen for raw in sets[index]}
    if count >= len(there):
        assert there <= shown


def test_channels_go_back_to_raw_ids():
    table = raw_lut(TASK)
    assert table[[0, 1, 2, 3, 4, 255]].tolist() == [0, 3, 1, 4, 2, 255]
    mask = np.array([0, 1, 2, 3, 4, 255])
    assert (table[TASK.test_lut(2)[mask]] == mask).all()


def test_a_normalised_picture_is_shown_as_it_was():
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert (displayed(normalise(image)) == image.permute(1, 2, 0).numpy()).all()


class Toy(torch.nn.Module):
    """Says channel 1 where red is high."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.modes = []

    def full_logits(self, x):
        self.modes.append(self.training)
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] * self.weight, -torch.ones_like(x[:, 0])], 1)


def toy_data():
    """Four pictures of different sizes; the loader's pictures are a part of the split."""
    items = [SimpleNamespace(id=f"p{i}") for i in range(4)]
    samples = []
    for i in range(4):
        image = torch.zeros(3, 4 + i, 6, dtype=torch.uint8)
        image[0, :2] = 255
        samples.append(Sample(items[i].id, normalise(image), (image[0] > 0).long()))

    class Data(list):
        pass

    dataset = Data(samples[1:])
    dataset.items = items[1:]
    reader = SimpleNamespace(items=lambda split: items, class_sets=lambda split: [(3,), (3,), (1,), (3, 1)])
    return SimpleNamespace(
        reader=reader, step=0, loader=lambda split, shard: SimpleNamespace(dataset=dataset, split=split)
    )


def test_some_pictures_are_segmented_in_raw_ids_and_the_network_is_left_as_it_was(tmp_path):
    net, method = Toy(), SimpleNamespace(predict=lambda logits: logits.argmax(1))
    net.train()
    shown = segment_some(net, method, toy_data(), "test", TASK, 2)
    assert net.training
    assert not any(net.modes)
    assert [item.title for item in shown] == ["p2", "p3"]  # p3 has both classes, p2 the newest
    for item in shown:
        assert item.truth[:2].tolist() == item.prediction[:2].tolist() == [[3] * 6] * 2  # channel 1 is raw id 3
        assert not item.truth[2:].any()
        assert item.image.shape == (*item.truth.shape, 3)
    module = SimpleNamespace(net=net, method=method)
    predictions_grid(tmp_path / "grid.png", module, toy_data(), NAMES, TASK)
    assert (tmp_path / "grid.png").stat().st_size > 1000
