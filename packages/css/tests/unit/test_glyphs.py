"""The script that lays Fashion-MNIST articles on photographs, on small sources made here."""

import gzip
import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from css.data.pairs import Pairs
from PIL import Image
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

SCRIPT = Path(__file__).parents[2] / "experiments" / "glyphs.py"


@pytest.fixture(scope="module")
def glyphs():
    spec = importlib.util.spec_from_file_location("css_experiment_glyphs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


def write_idx(path, array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def sources(tmp_path):
    """Articles are squares, brighter than 100 and as bright as their number; photographs are darker, by column."""
    idx, photos = tmp_path / "idx", tmp_path / "photos"
    idx.mkdir()
    photos.mkdir()
    for part, count, first in (("train", 50, 101), ("t10k", 20, 201)):
        pictures = np.zeros((count, 28, 28), np.uint8)
        pictures[:, 4:24, 6:22] = (first + np.arange(count))[:, None, None]
        write_idx(idx / f"{part}-images-idx3-ubyte.gz", pictures)
        write_idx(idx / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    for number, name in enumerate(("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")):
        photo = np.zeros((90, 400, 3), np.uint8)
        photo[..., 0] = 10 * number
        photo[..., 1] = np.arange(400) // 80 * 4
        Image.fromarray(photo).save(photos / name, **({"quality": 100} if name.endswith("jpg") else {}))
    return idx, photos


def run(glyphs, sources, out, *more):
    options = ["--out", str(out), "--source", str(sources[0]), "--photos", str(sources[1]), "--counts", "30", "8", "9"]
    glyphs.main([*options, *more])
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.*"))}


def test_pairs_reads_what_it_writes(glyphs, sources, tmp_path, capsys):
    run(glyphs, sources, tmp_path / "out")
    reader = Pairs(root=tmp_path / "out")
    reader.check()
    assert [len(reader.items(split)) for split in ("train", "val", "test")] == [30, 8, 9]
    assert reader.class_names() == list(glyphs.CLASSES)
    sets = reader.class_sets("train")
    assert {len(found) for found in sets} == {1, 2, 3}
    assert set().union(*sets) == set(range(1, 11))
    assert "train: 30 pictures; with t_shirt" in capsys.readouterr().out


def test_same_seed_same_files(glyphs, sources, tmp_path):
    first = run(glyphs, sources, tmp_path / "a")
    assert run(glyphs, sources, tmp_path / "b") == first
    assert run(glyphs, sources, tmp_path / "c", "--seed", "1") != first


def test_mask_is_where_an_article_is_above_the_threshold(glyphs):
    rng = np.random.default_rng(0)
    articles = glyphs.Articles(rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8))
    dark = [np.zeros((80, 80, 3), np.uint8)]
    for number in range(20):
        image, mask = glyphs.draw_picture(articles, dark, 64, numpy_rng(0, "test", number))
        np.testing.assert_array_equal(mask > 0, image.max(2) > 0)
        assert image.max(2)[mask > 0].min() >= glyphs.THRESHOLD // 2  # a tint takes at most half
        assert set(np.unique(mask)) <= set(range(6))


def test_splits_share_neither_articles_nor_photographs(glyphs, sources):
    articles, photos = glyphs.read_articles(sources[0]), glyphs.read_photos(sources[1], 64)
    brightness = {split: set(part.pictures.max((1, 2)).tolist()) for split, part in articles.items()}
    columns = {
        split: {int(v) for part in parts[:3] for v in np.unique(part[..., 1])} for split, parts in photos.items()
    }
    for found in (brightness, columns):
        assert all(found.values())
        assert len(set().union(*found.values())) == sum(map(len, found.values()))
    assert brightness["test"] == set(range(201, 221))
    assert [len(part.classes) for part in articles.values()] == [40, 10, 20]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda idx, photos: (idx / "t10k-labels-idx1-ubyte.gz").unlink(), "dataset-fashion-mnist"),
        (lambda idx, photos: (idx / "train-images-idx3-ubyte.gz").write_bytes(b"no"), "cannot be unpacked"),
        (lambda idx, photos: (idx / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1")), "idx"),
        (lambda idx, photos: (photos / "coffee.png").unlink(), r"coffee\.png is missing"),
        (lambda idx, photos: Image.new("RGB", (90, 90)).save(photos / "coffee.png"), "too narrow"),
    ],
    ids=["no labels", "no gzip", "no idx", "no photograph", "narrow photograph"],
)
def test_bad_sources_are_named(glyphs, sources, tmp_path, damage, words):
    damage(*sources)
    with pytest.raises(UserError, match=words):
        list(glyphs.write(tmp_path / "out", *sources, (2, 1, 1), 64, 0))
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_left_alone(glyphs, sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        run(glyphs, sources, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
