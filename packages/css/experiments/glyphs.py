"""Writes a data set of real glyphs on photographs: Fashion-MNIST articles, one to three in a picture, exact masks.

Ten classes, pictures of 64 x 64 pixels, in the layout of ``css.data.pairs.Pairs``: ``<out>/{train,val,test}/{images,
masks}`` and ``classes.txt``. An article is cut out where it is brighter than a threshold, tinted at random, and laid on
a random piece of a photograph. Articles and parts of photographs of one split are in no other split. The same seed and
sources give the same files.

    apt-get install dataset-fashion-mnist
    python packages/css/experiments/glyphs.py --out DIR --photos SITE_PACKAGES/skimage/data
    css-train --data pairs --data.root DIR --task 4-2 --loader.crop 64

``--photos`` is the data folder inside an installed scikit-image.
"""

import argparse
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from css.data.files import palette, read_image
from PIL import Image
from polymodal.errors import UserError
from polymodal.paths import require_files
from polymodal.seeding import numpy_rng

CLASSES = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
SPLITS = ("train", "val", "test")
COLUMNS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
"""part of each photograph's width that a split has"""
VAL_ARTICLES = 10_000
"""the last so many training articles are those of val"""
THRESHOLD = 20
SIDES = (20, 28)
"""of an article, pixels"""
PIECE = 160
"""largest side of a piece of a photograph, pixels; it is shrunk to the picture"""
PLACES = 20
COVERED = 0.15
"""largest share of an earlier article that a later one may hide"""


@dataclass
class Articles:
    """Articles of one split: (n, 28, 28) uint8 pictures, (n,) classes 0..9."""

    pictures: np.ndarray
    classes: np.ndarray


def read_idx(path: Path) -> np.ndarray:
    """Array of an idx file of bytes, compressed by gzip.

    Raises:
        UserError: the file is broken or holds something else.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); install dataset-fashion-mnist again") from error
    dimensions = data[3] if len(data) > 3 and data[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    if not dimensions or len(data) - start != int(np.prod(shape)):
        raise UserError(f"{path} is no complete idx file of bytes; install dataset-fashion-mnist again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_articles(source: Path) -> dict[str, Articles]:
    """The articles of each split; test ones are those of the data set's own test files."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    remedy = "install the Debian package dataset-fashion-mnist, or give its folder with --source"
    paths = require_files(source, names, "Fashion-MNIST", remedy)
    pictures, classes, test_pictures, test_classes = (read_idx(path) for path in paths)
    cut = max(1, len(pictures) - VAL_ARTICLES) if len(pictures) > VAL_ARTICLES else len(pictures) * 4 // 5
    return {
        "train": Articles(pictures[:cut], classes[:cut]),
        "val": Articles(pictures[cut:], classes[cut:]),
        "test": Articles(test_pictures, test_classes),
    }


def read_photos(folder: Path, size: int) -> dict[str, list[np.ndarray]]:
    """The part of each photograph that a split has."""
    paths = require_files(folder, PHOTOS, "photographs", "give the folder skimage/data of an installed scikit-image")
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for path in paths:
        photo = read_image(path)
        for split, (left, right) in COLUMNS.items():
            width = photo.shape[1]
            part = photo[:, round(left * width) : round(right * width)]
            if min(part.shape[:2]) < size:
                raise UserError(f"photograph {path}: {width} pixels wide is too narrow for pictures of {size}")
            parts[split].append(part)
    return parts


def cut_background(photos: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: a random piece of a random photograph, mirrored or not."""
    photo = photos[int(rng.integers(len(photos)))]
    height, width = photo.shape[:2]
    side = int(rng.integers(size, min(PIECE, height, width) + 1))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    piece = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return np.array(Image.fromarray(np.ascontiguousarray(piece)).resize((size, size), Image.Resampling.BILINEAR))


def place(inside: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top left corner at which an article hides little of earlier ones; None where none was found."""
    side, room = len(inside), len(mask) - len(inside)
    labels, areas = np.unique(mask[mask > 0], return_counts=True)
    for _ in range(PLACES):
        top, left = (int(value) for value in rng.integers(0, room + 1, 2))
        under = mask[top : top + side, left : left + side][inside]
        if all(np.count_nonzero(under == label) <= COVERED * area for label, area in zip(labels, areas, strict=True)):
            return top, left
    return None


def draw_picture(
    articles: Articles, photos: Sequence[np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (size, size, 3) uint8 and its mask (size, size) uint8: 0 background, 1..10 articles."""
    picture, mask = cut_background(photos, size, rng), np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        index = int(rng.integers(len(articles.pictures)))
        side = int(rng.integers(SIDES[0], SIDES[1] + 1))
        glyph = np.array(Image.fromarray(articles.pictures[index]).resize((side, side), Image.Resampling.BILINEAR))
        tint = rng.uniform(0.5, 1.0, 3)
        inside = glyph > THRESHOLD
        corner = place(inside, mask, rng)
        if corner is None or not inside.any():
            continue
        window = slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side)
        picture[window][inside] = np.rint(glyph[inside][:, None] * tint).astype(np.uint8)
        mask[window][inside] = articles.classes[index] + 1
    return picture, mask


def write(out: Path, source: Path, photos: Path, counts: Sequence[int], size: int, seed: int) -> Iterator[str]:
    """Write the data set; yields a line for each split, with the number of pictures that show each class.

    Raises:
        UserError: a source is missing or broken, the folder holds something, or an option is out of range.
    """
    if min(counts) < 1 or size < 2 * SIDES[1]:
        raise UserError(f"--counts {list(counts)} --size {size}; expected counts above 0, a size of {2 * SIDES[1]} up")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    articles, parts = read_articles(source), read_photos(photos, size)
    colours = palette().tobytes()
    for split, count in zip(SPLITS, counts, strict=True):
        shown = np.zeros(len(CLASSES) + 1, int)
        for kind in ("images", "masks"):
            (out / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f"glyphs-{split}-{number:05d}"
            picture, mask = draw_picture(articles[split], parts[split], size, numpy_rng(seed, "glyphs", name))
            Image.fromarray(picture).save(out / split / "images" / f"{name}.png", compress_level=1)
            indexed = Image.fromarray(mask)
            indexed.putpalette(colours)
            indexed.save(out / split / "masks" / f"{name}.png", compress_level=1)
            shown[np.unique(mask)] += 1
        yield f"{split}: {count} pictures; with " + ", ".join(
            f"{name} {found}" for name, found in zip(CLASSES, shown[1:].tolist(), strict=True)
        )
    options = {"seed": seed, "size": size, "counts": list(counts), "threshold": THRESHOLD, "photographs": PHOTOS}
    (out / "glyphs.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    parser.add_argument("--photos", type=Path, required=True, help="folder skimage/data of scikit-image")
    parser.add_argument("--counts", type=int, nargs=3, default=(1000, 200, 300), help="pictures in train, val, test")
    parser.add_argument("--size", type=int, default=64, help="height and width, pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        for line in write(given.out, given.source, given.photos, given.counts, given.size, given.seed):
            sys.stdout.write(line + "\n")
    except UserError as error:
        sys.exit(f"glyphs: {error}")


if __name__ == "__main__":
    main()
