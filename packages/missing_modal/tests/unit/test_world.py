"""The two-modality world: what is in an image and in a text, and that it is a function of its options."""

from __future__ import annotations

import numpy as np
import pytest
from missing_modal.data import READERS, reader_class
from missing_modal.world import CHANNELS, CONTEXT, PATCHES, VOCABULARY, World, draw
from polymodal import checks
from polymodal.errors import UserError


def test_shapes_types_and_ids():
    images, texts, labels = draw(300, 0.3, 0, "train")
    assert images.shape == (300, PATCHES, CHANNELS)
    assert images.dtype == np.float32
    assert texts.shape == (300, CONTEXT)
    assert set(labels.tolist()) == {0, 1}
    for column, (low, high) in enumerate([(25, 25), (1, 8), (9, 16), (17, 24), (26, 26)]):
        assert low <= texts[:, column].min()
        assert texts[:, column].max() <= high
    assert texts.max() == VOCABULARY - 1


def test_moments_are_those_of_the_specification():
    images, texts, labels = draw(40_000, 0.0, 1, "train")
    s = 2 * labels - 1
    first, second = images[:, 0, 0], images[:, 4, 1]
    assert np.ptp(images[:, :4, 0], axis=1).max() == 0, "one draw a sample, the same in its four patches"
    assert np.ptp(images[:, 4:, 1], axis=1).max() == 0
    assert not images[:, 4:, 0].any()
    assert not images[:, :4, 1].any()
    assert np.mean(first * s) == pytest.approx(0.9, abs=0.02)
    assert np.var(first - 0.9 * s) == pytest.approx(1.2**2 + 0.15**2, rel=0.02)
    assert np.mean(second * s) == pytest.approx(0.55, abs=0.02)
    assert np.std(second - 0.55 * s) == pytest.approx(0.8, rel=0.02)
    # the first sign is readable with the text alone: the bin of z leaves little of z
    centre = (texts[:, 1] - 1 + 0.5) * 6 / 8 - 3
    assert np.std(first - centre - 0.9 * s) < 0.3
    assert np.corrcoef(texts[:, 2], s)[0, 1] > 0.4
    assert abs(np.corrcoef(texts[:, 3], s)[0, 1]) < 0.02


def test_what_the_text_says_of_the_label_is_drawn_apart_from_the_image():
    images, texts, labels = draw(40_000, 0.0, 3, "train")
    s = 2 * labels - 1
    told = texts[:, 2] - np.array([texts[labels == one, 2].mean() for one in (0, 1)])[labels]
    for seen, slope in ((images[:, 0, 0], 0.9), (images[:, 4, 1], 0.55)):
        assert abs(np.corrcoef(seen - slope * s, told)[0, 1]) < 0.02


def test_noise_is_on_every_channel():
    images = draw(20_000, 0.3, 2, "train")[0]
    assert np.std(images[:, :, 2:]) == pytest.approx(0.3, rel=0.02)


def test_bins_cut_what_lies_outside():
    from missing_modal.world import _bin

    assert _bin(np.array([-9.0, -3.0, -2.26, -2.25, -0.01, 0.0, 2.24, 2.99, 3.0, 9.0])).tolist() == [
        0, 0, 0, 1, 3, 4, 6, 7, 7, 7,
    ]  # fmt: skip


def test_splits_and_pairs_are_drawn_apart():
    world = World(sizes=(50, 50, 50))
    found = {split: [sample.id for sample in world.samples(split)] for split in ("train", "val", "test")}
    checks.check_disjoint_splits(found)
    images = [world.samples(split)[0].inputs["image"] for split in found] + [world.pairs(1)["image"][0]]
    assert len({image.tobytes() for image in images}) == 4
    again = World(sizes=(50, 50, 50)).samples("test")[7]
    assert np.array_equal(again.inputs["text"], world.samples("test")[7].inputs["text"])


def test_fingerprint_is_that_of_the_options():
    def finger(**options):
        return lambda: type("R", (), {"fingerprint": lambda self: World(**options).describe()["fingerprint"]})()

    checks.check_stable_fingerprint(finger(), finger(noise=0.2), finger(world_seed=1), finger(sizes=(1, 2, 3)))


def test_it_is_a_reader_by_name():
    assert reader_class("world") is World
    assert next(iter(READERS)) == "world"
    assert (World.task, World.metric, World().class_names()) == ("binary", "accuracy", ["minus", "plus"])


@pytest.mark.parametrize("options", [{"sizes": (0, 1, 1)}, {"sizes": (1, 1)}, {"noise": -1.0}])
def test_options_out_of_range(options):
    with pytest.raises(UserError, match="data"):
        World(**options).check()
