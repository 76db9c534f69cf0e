"""Drawings, sounds and rows of numbers: a classifier of three modalities, any of which may be missing.

The script draws a small data set of four instruments, writes it as files with a manifest, and calls ``mm-train``::

    python three_modalities.py FOLDER [--rows 1200] [options of mm-train]

Nothing is downloaded and every draw is seeded. No modality tells all four classes apart, any two do:

=========  ==========  ======================  =========
class      drawing     sound                   numbers
=========  ==========  ======================  =========
bell       circle      steady tone             middling
drum       square      steady tone             large
flute      triangle    rising tone             small
horn       triangle    falling tone            middling
=========  ==========  ======================  =========

Of a tenth of the rows one modality is null in the manifest, of a twentieth two are: they are really missing, and only
what is left can be taken away (``--missing.kind any``: half of the rows lack something more). The run ends in the table
of the seven patterns.

One modality gets at most three of the four classes right (75 %), two could get all. Measured with the default options,
once (42 s of CPU time on one thread, with the small encoders): accuracy 97.4 % on complete rows;
92.0 (drawing and sound), 94.7 (drawing and numbers), 100.0 (sound and numbers); 67.6 (drawing alone), 68.4 (sound),
64.1 (numbers); 87.5 over all 360 test rows. With ``--data_seed 1 --seed 1``: 99.4 on complete rows, 94.1 to 100.0 with
two modalities, 62.2 to 74.3 with one, 89.2 over all. An incomplete pattern has 24 to 39 test rows, so that its figure
moves by several points with the seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["main", "train_command", "write_data"]

CLASSES = ("bell", "drum", "flute", "horn")
MODALITIES = ("image", "audio", "tabular")
SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
SHAPES = ("circle", "square", "triangle", "triangle")
SWEEPS = (0.0, 0.0, 1.0, -1.0)
"""octaves that a tone of each class rises"""
SIZES = (0.0, 1.5, -1.5, 0.0)
"""mean of a class's numbers"""
SIDE, RATE, SECONDS = 32, 16_000, 0.5
"""pixels, samples a second, s"""
NULLS = (0.10, 0.05)
"""shares of the rows that really lack one modality, and two"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data, print the command, train; returns the exit code of ``mm-train``."""
    parser = argparse.ArgumentParser(description="Train on drawings, sounds and numbers, any of which may be missing.")
    parser.add_argument("folder", type=Path, help="receives the files, the manifest and the run")
    parser.add_argument("--rows", type=int, default=1200, help="samples in all [1200]")
    parser.add_argument("--data_seed", type=int, default=0, help="of the drawings, sounds and numbers [0]")
    given, options = parser.parse_known_args(arguments)
    if given.rows < 40:
        parser.error("--rows: at least 40, so that each split has some of each class")
    manifest = write_data(given.folder, given.rows, given.data_seed)
    command = [*train_command(manifest, given.folder / "runs"), *options]
    sys.stdout.write(f"{given.rows} rows in {manifest}\n{shlex.join(command)}\n\n")
    sys.stdout.flush()
    from missing_modal import train

    sys.argv = command
    return train.main()


def train_command(manifest: Path, out: Path) -> list[str]:
    """``mm-train`` on the manifest: small encoders, half of the rows lack something, about a minute on one core."""
    options: dict[str, Any] = {
        "data": manifest,
        "out": out,
        "backbone": "small",
        "backbone.seconds": SECONDS,
        "method_options": "{length: 6, depth: 2, reduction: 4}",
        "missing.kind": "any",
        "missing.ratio": 0.5,
        "trainer.max_epochs": 8,
        "trainer.accumulate": 1,
        "loader.batch_size": 32,
        "loader.num_workers": 0,
    }
    return ["mm-train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def write_data(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write drawings, sounds and the manifest.

    Args:
        folder: made where it is not there.
        rows: samples; classes take turns, splits are blocks.
        seed: of every draw.

    Returns:
        The manifest, one row a line.
    """
    for name in ("drawings", "sounds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        draw = np.random.default_rng([seed, number])
        label = number % len(CLASSES)
        lost = _lost(draw)
        row: dict[str, Any] = {"id": f"r{number:04d}", "label": CLASSES[label], "split": _split(number / rows)}
        row |= dict.fromkeys(MODALITIES)
        values = drawing(SHAPES[label], draw), sound(SWEEPS[label], draw), numbers(SIZES[label], draw)
        if "image" not in lost:
            row["image"] = f"drawings/{row['id']}.png"
            values[0].save(folder / row["image"])
        if "audio" not in lost:
            row["audio"] = f"sounds/{row['id']}.wav"
            write_wav(folder / row["audio"], values[1])
        if "tabular" not in lost:
            row["tabular"] = [round(float(value), 3) for value in values[2]]
        lines.append(json.dumps(row))
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _split(place: float) -> str:
    """Of a row at 0 <= place < 1."""
    if place < SHARES["train"]:
        return "train"
    return "val" if place < SHARES["train"] + SHARES["val"] else "test"


def _lost(draw: np.random.Generator) -> list[str]:
    """What a row really lacks: nothing, one or two of its modalities."""
    place = draw.random()
    count = 1 if place < NULLS[0] else 2 if place < sum(NULLS) else 0
    return [str(name) for name in draw.choice(MODALITIES, count, replace=False)]


def drawing(shape: str, draw: np.random.Generator) -> Image.Image:
    """A bright shape of random size, place and colour on a dark ground with noise, (32, 32) RGB."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in draw.integers(0, 80, 3)))
    half = int(draw.integers(7, 11))
    x, y = (int(value) for value in draw.integers(half + 1, SIDE - half - 1, 2))
    colour = tuple(int(value) for value in draw.integers(150, 256, 3))
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "square":
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    else:
        pen.polygon(((x, y - half), (x - half, y + half), (x + half, y + half)), fill=colour)
    noisy = np.asarray(picture, np.float64) + draw.normal(0, 12, (SIDE, SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def sound(octaves: float, draw: np.random.Generator) -> np.ndarray:
    """A tone that rises by some octaves, of random pitch, with noise: (8000,) in -1..1."""
    time = np.arange(int(RATE * SECONDS)) / RATE
    pitch = draw.uniform(400, 800) * 2.0 ** (octaves * (time / SECONDS - 0.5))
    return 0.5 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + draw.normal(0, 0.05, len(time))


def numbers(mean: float, draw: np.random.Generator) -> np.ndarray:
    """Four measurements that have a size in common: (4,)."""
    return mean + draw.normal(0, 0.3) + draw.normal(0, 0.5, 4)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Mono PCM of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    raise SystemExit(main())
