"""The shapes world: what is drawn, and that it is written once, whole, and again for other options."""

import json
import threading

import numpy as np
import pytest
from css.data import SPLITS
from css.data.pairs import Pairs
from css.data.shapes import KINDS, Shapes
from css.data.world import LOOKS, draw_picture, outline
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

SMALL = {"images": (12, 4, 6)}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


def pictures(count, classes=4, noise=0.06, scatter=0.11, size=64, most=3):
    return [draw_picture(classes, size, noise, scatter, numpy_rng(0, "test", i), most) for i in range(count)]


def test_every_class_has_an_outline_of_its_own_within_its_circle():
    v, u = np.mgrid[-1.5:1.5:121j, -1.5:1.5:121j]
    found = {kind: outline(kind, u, v) for kind in KINDS}
    assert set(LOOKS) == set(KINDS)
    for kind, inside in found.items():
        assert not inside[np.hypot(u, v) > 1.07].any(), kind
        assert 0.15 < inside.sum() / (np.hypot(u, v) <= 1).sum() < 0.95, kind
    for kind, inside in found.items():
        for other, there in found.items():
            if other != kind:
                assert (inside & there).sum() / (inside | there).sum() < 0.85, (kind, other)


def test_areas_of_outlines_are_those_of_geometry():
    v, u = np.mgrid[-1:1:801j, -1:1:801j]
    area = {kind: outline(kind, u, v).mean() * 4 for kind in KINDS}
    expected = {
        "disc": np.pi * 0.9**2,
        "square": 1.5**2,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 2 * (0.6 * 1.9) - 0.6**2,
        "ring": np.pi * (1 - 0.25),
        "bar": 1.9 * 0.7,
    }
    assert {kind: area[kind] for kind in expected} == pytest.approx(expected, rel=0.01)


def test_pictures_show_one_to_three_shapes_of_any_classes_together():
    masks = [mask for _, mask in pictures(150)]
    sets = [tuple(np.unique(mask[mask > 0])) for mask in masks]
    assert {len(found) for found in sets} == {1, 2, 3}
    assert set().union(*sets) == {1, 2, 3, 4}
    pairs = {(a, b) for found in sets for a in found for b in found if a < b}
    assert pairs == {(a, b) for a in range(1, 5) for b in range(a + 1, 5)}
    later = [found for found in sets if 3 in found]
    assert 0.25 < np.mean([1 in found or 2 in found for found in later]) < 0.85  # old classes in pictures of a new one
    share = np.mean([mask > 0 for mask in masks])
    assert 0.05 < share < 0.35


@pytest.mark.parametrize("most", [1, 2])
def test_fewer_shapes_a_picture(most):
    assert {len(np.unique(mask[mask > 0])) for _, mask in pictures(60, most=most)} == set(range(1, most + 1))


def test_colour_alone_tells_classes_poorly_but_better_than_chance():
    found = pictures(200)
    pixels = np.concatenate([image[mask > 0] for image, mask in found]) / 255
    labels = np.concatenate([mask[mask > 0] for _, mask in found])
    means = np.array([LOOKS[kind].colour for kind in KINDS[:4]])
    guess = ((pixels[:, None] - means) ** 2).sum(2).argmin(1) + 1
    assert 0.35 < (guess == labels).mean() < 0.75
    tight = pictures(200, scatter=0.0)
    pixels = np.concatenate([image[mask > 0] for image, mask in tight]) / 255
    labels = np.concatenate([mask[mask > 0] for _, mask in tight])
    easier = ((pixels[:, None] - means) ** 2).sum(2).argmin(1) + 1
    assert (easier == labels).mean() > (guess == labels).mean() + 0.1


def test_noise_changes_pixels_and_no_mask():
    for (clean, mask), (noisy, other) in zip(pictures(3, noise=0.0), pictures(3, noise=0.1), strict=True):
        np.testing.assert_array_equal(mask, other)
        difference = noisy.astype(int) - clean.astype(int)
        assert 10 < difference.std() < 26  # 0.1 of 255, less what is clipped


def test_world_is_written_once_and_read_like_any_pairs(tmp_path):
    reader = Shapes(**SMALL)
    reader.prepare()
    world = reader.world()
    assert tmp_path / "cache" in world.parents
    stamps = {path: path.stat().st_mtime_ns for path in world.rglob("*.png")}
    assert len(stamps) == 2 * 22
    again = Shapes(**SMALL)
    assert [len(again.items(split)) for split in SPLITS] == [12, 4, 6]
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*.png")} == stamps
    assert [path.name for path in world.parent.iterdir()] == [world.name]  # nothing temporary is left
    pairs = Pairs(root=world)
    assert pairs.class_names() == reader.class_names() == ["disc", "square", "triangle", "cross"]
    for split in SPLITS:
        assert pairs.items(split) == reader.items(split)
        assert pairs.class_sets(split) == reader.class_sets(split)
        for item, found in zip(reader.items(split), reader.class_sets(split), strict=True):
            mask = reader.load_mask(item)
            assert reader.load_image(item).shape == (64, 64, 3)
            assert found == tuple(np.unique(mask[mask > 0]))


def test_pixels_depend_on_the_options_alone(tmp_path):
    first, second = Shapes(root=tmp_path / "a", **SMALL), Shapes(root=tmp_path / "b", **SMALL)
    more = Shapes(root=tmp_path / "c", images=(14, 4, 6))
    other = Shapes(root=tmp_path / "d", world_seed=1, **SMALL)
    images = [[reader.load_image(item) for item in reader.items("train")[:12]] for reader in (first, second, more)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert (other.load_image(other.items("train")[0]) != images[0][0]).any()


def test_each_set_of_options_has_a_folder_and_a_fingerprint():
    variants = [
        {},
        {"size": 48},
        {"classes": 5},
        {"noise": 0.1},
        {"scatter": 0.0},
        {"most": 1},
        {"world_seed": 3},
        {"images": (12, 4, 7)},
    ]
    readers = [Shapes(**{**SMALL, **options}) for options in variants]
    assert len({reader.world() for reader in readers}) == len(variants)
    noise, plain = readers[3], readers[0]
    assert noise.class_sets("train") == plain.class_sets("train")
    assert noise.fingerprint() != plain.fingerprint()
    assert Shapes(**SMALL).fingerprint() == plain.fingerprint()


def test_writers_at_the_same_time_do_no_harm():
    errors = []

    def write():
        try:
            Shapes(**SMALL).prepare()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world = Shapes(**SMALL).world()
    assert errors == []
    assert [path.name for path in world.parent.iterdir()] == [world.name]
    assert json.loads((world / "world.json").read_text()) == Shapes(**SMALL).options()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": (0, 1, 1)}, "images="),
        ({"images": (5, 5)}, "three numbers"),
        ({"size": 16}, "size=16"),
        ({"classes": 9}, "expected 2..8"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"scatter": 2.0}, "scatter=2.0"),
        ({"most": 4}, "most=4"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(UserError, match=words):
        Shapes(**options).prepare()


def test_half_a_world_is_refused_by_name():
    reader = Shapes(**SMALL)
    reader.prepare()
    (reader.world() / "world.json").unlink()
    with pytest.raises(UserError, match=r"world\.json is missing; remove the folder"):
        Shapes(**SMALL).items("train")


def test_a_root_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --data.root"):
        Shapes(root=tmp_path / "file", **SMALL).prepare()
