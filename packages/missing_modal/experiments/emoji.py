"""Emoji and their names as a data set of two modalities: 1,906 drawings of 32 x 32 pixels, names, nine groups.

The package is made with ``npm pack emoji-datasource-twitter@16.0.0`` (62 MB; code MIT, drawings CC-BY 4.0). This script
reads it, or a folder with ``emoji.json`` and ``img/twitter/sheets/32.png`` of it, and reaches out to nothing:

    python packages/missing_modal/experiments/emoji.py emoji-datasource-twitter-16.0.0.tgz --out DATA
    mm-matrix --config packages/missing_modal/experiments/emoji.yaml --data.root DATA/manifest.jsonl

A row: the drawing on white as a PNG file, the name in small letters, the group (``category``) as the label. The five
swatches of skin colour (``Component``) are left out, and so are the coloured variants of a drawing.

Near-duplicates are in one split. Rows are in one group if their code points are the same but for sex, age, skin and
direction, if one is obsolete in favour of the other, if they have the same name, or if their drawings differ by less
than ``NEAR`` (root mean square over pixels and channels, 0..1): coats of arms, families, clock faces. Groups are dealt
out by a hash with seed 0 into 70 % training, 10 % validation and 20 % test rows of each class (``splits.deal``).
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from polymodal.errors import UserError
from polymodal.files import atomic_write
from splits import counts, deal, joined, script, write_manifest

SIDE, PITCH, EDGE = 32, 34, 1
"""pixels of a drawing, from one to the next in the sheet, and in front of the first"""
NEAR = 0.08
SHEET = "img/twitter/sheets/32.png"
_ADULTS, _CHILDREN = ("1F468", "1F469", "1F9D1"), ("1F466", "1F467", "1F9D2")
_DROPPED = {"200D", "FE0F", "2640", "2642", "27A1", *(f"1F3F{last}" for last in "BCDEF")}
"""joiners, signs of sex, the arrow to the right, skin"""


def opened(source: Path) -> Callable[[str], bytes]:
    """Reader of the package's files by their names in it.

    Raises:
        UserError: neither the archive nor the folder.
    """
    if source.is_file():
        with tarfile.open(source) as archive:
            held = {name: archive.extractfile(f"package/{name}").read() for name in ("emoji.json", SHEET)}
        return held.__getitem__
    for folder in (source, source / "package"):
        if (folder / "emoji.json").is_file():
            return lambda name: (folder / name).read_bytes()
    raise UserError(
        f"{source}: no emoji.json there; give the .tgz file of npm pack, or the folder that it was unpacked to"
    )


def drawings(sheet: Image.Image, rows: list[dict[str, Any]]) -> np.ndarray:
    """(N, 32, 32, 3) uint8, on white."""
    sheet = sheet.convert("RGBA")
    found = []
    for row in rows:
        left, top = PITCH * row["sheet_x"] + EDGE, PITCH * row["sheet_y"] + EDGE
        ground = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
        ground.alpha_composite(sheet.crop((left, top, left + SIDE, top + SIDE)))
        found.append(np.asarray(ground.convert("RGB")))
    return np.stack(found)


def kin(unified: str) -> str:
    """Code points without what tells variants of one drawing apart."""
    kept = [code for code in unified.split("-") if code not in _DROPPED]
    same = {code: "adult" for code in _ADULTS} | {code: "child" for code in _CHILDREN}
    return "-".join(same.get(code, code) for code in kept)


def near(pixels: np.ndarray, limit: float) -> list[tuple[int, int]]:
    """Pairs of drawings that differ by less than ``limit``, root mean square, 0..1."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    squares = (flat**2).sum(1)
    distance = (squares[:, None] + squares[None] - 2 * flat @ flat.T) / flat.shape[1]
    first, second = np.nonzero(np.triu(distance < limit**2, 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def related(rows: list[dict[str, Any]], pixels: np.ndarray) -> list[int]:
    """Group of each row."""
    pairs = near(pixels, NEAR)
    for key in (lambda row: kin(row["unified"]), lambda row: row["name"].lower()):
        first: dict[str, int] = {}
        pairs += [(first.setdefault(key(row), place), place) for place, row in enumerate(rows)]
    by_code = {row["unified"]: place for place, row in enumerate(rows)}
    pairs += [
        (place, by_code[row["obsoleted_by"]]) for place, row in enumerate(rows) if row.get("obsoleted_by") in by_code
    ]
    return joined(len(rows), pairs)


def write(source: Path, out: Path) -> str:
    """The manifest and its pictures; returns what there is, as text."""
    read = opened(source)
    rows = [row for row in json.loads(read("emoji.json")) if row["category"] != "Component" and row["has_img_twitter"]]
    pixels = drawings(Image.open(io.BytesIO(read(SHEET))), rows)
    groups, labels = related(rows, pixels), [row["category"] for row in rows]
    names = [row["unified"].lower() for row in rows]
    splits = deal(groups, labels, names)
    (out / "images").mkdir(parents=True, exist_ok=True)
    listed = []
    for row, name, picture, split in zip(rows, names, pixels, splits, strict=True):
        atomic_write(out / "images" / f"{name}.png", lambda file, p=picture: Image.fromarray(p).save(file, "PNG"))
        listed.append(
            {"id": name, "image": f"images/{name}.png", "text": row["name"].lower(), "label": row["category"]}
            | {"split": split}
        )
    write_manifest(out / "manifest.jsonl", {"image": "image", "text": "text"}, sorted(set(labels)), listed)
    largest = max(groups.count(group) for group in set(groups))
    return f"{len(rows):,} drawings in {len(set(groups)):,} groups (largest {largest}): {counts(splits)}"


def main() -> int:
    return script(__doc__, "the .tgz file of npm pack, or the folder it was unpacked to", write)


if __name__ == "__main__":
    sys.exit(main())
