"""Writes the synthetic world of :mod:`slt.data.synthetic`: glyph clips, annotation, questions, ground truth."""

from __future__ import annotations

import json
import logging
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.seeding import numpy_rng

from slt.data.base import SPLITS
from slt.data.phoenix import Phoenix2014T
from slt.data.questions import Question, write_questions
from slt.data.synthetic import FILLERS, GLYPH, HOMONYMS, NEGATION, TOPICS, UNAMBIGUOUS

__all__ = ["draw_glyphs", "render_sign", "write_world"]

_HOMONYM_SHARE = 0.6
_log = logging.getLogger(__name__)


def draw_glyphs(seed: int) -> np.ndarray:
    """Twelve binary 5x5 glyphs, any two of which differ in at least six cells.

    Returns:
        ``(12, 5, 5)`` float, 0 or 1.
    """
    rng = numpy_rng(seed, "glyphs")
    glyphs: list[np.ndarray] = []
    while len(glyphs) < len(HOMONYMS) + len(UNAMBIGUOUS):
        candidate = (rng.random((GLYPH, GLYPH)) < 0.5).astype(np.float64)
        if all(np.abs(candidate - other).sum() >= 6 for other in glyphs):
            glyphs.append(candidate)
    return np.stack(glyphs)


def render_sign(glyph: np.ndarray, motion: int, frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One sign: a glyph moving left-right (0), up-down (1) or in a circle (2), from a random place and phase.

    Returns:
        ``(frames, size, size)`` float, 0 or 1.
    """
    room = size - GLYPH
    reach = room * 0.3
    phase = rng.uniform(0, 2 * np.pi) + np.linspace(0, 2 * np.pi, frames, endpoint=False)
    centre = rng.uniform(reach, room - reach, size=2)
    left = centre[0] + reach * np.cos(phase) * (motion != 1)
    top = centre[1] + reach * np.sin(phase) * (motion != 0)
    clip = np.zeros((frames, size, size))
    for frame, (x, y) in enumerate(zip(np.rint(left).astype(int), np.rint(top).astype(int), strict=True)):
        clip[frame, y : y + GLYPH, x : x + GLYPH] = glyph
    return clip


def _draw_signs(rng: np.random.Generator) -> list[str]:
    """Three to five signs; a homonym with probability .6; never the same sign twice in a row."""
    signs: list[str] = []
    for _ in range(int(rng.integers(3, 6))):
        pool = list(HOMONYMS) if rng.random() < _HOMONYM_SHARE else list(UNAMBIGUOUS)
        signs.append(str(rng.choice([sign for sign in pool if sign != (signs[-1] if signs else "")])))
    return signs


def _draw_question(rng: np.random.Generator, topic: str, distractors: int) -> str:
    """Fillers in their usual order with the topic word somewhere among them, and negated words of other topics."""
    length = 8 if distractors else 4
    fillers = length - 1 - 2 * distractors
    words = [FILLERS[i] for i in sorted(rng.choice(len(FILLERS), size=fillers, replace=False))]
    groups = [[str(rng.choice(TOPICS[topic]))]]
    others = [word for other, synonyms in TOPICS.items() if other != topic for word in synonyms]
    groups += [[NEGATION, str(word)] for word in rng.choice(others, size=distractors, replace=False)]
    for group in groups:
        # a place before which no negation stands, so that "nicht" always belongs to the word after it
        places = [i for i in range(len(words) + 1) if i == 0 or words[i - 1] != NEGATION]
        place = int(rng.choice(places))
        words[place:place] = group
    return " ".join(words)


def _png(pixels: np.ndarray) -> bytes:
    """Grey 8-bit PNG, written out here: frames this small need nothing of a general encoder."""
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)  # each row starts with filter type 0
    rows[:, 1:] = pixels

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _write_clip(folder: Path, signs: list[str], glyphs: np.ndarray, options: dict[str, Any], name: str) -> None:
    rng = numpy_rng(options["seed"], "clip", name)
    forms = [*HOMONYMS, *UNAMBIGUOUS]
    parts = []
    for sign in signs:
        index = forms.index(sign)
        parts.append(render_sign(glyphs[index], index % 3, int(rng.integers(6, 11)), options["frame_size"], rng))
    clip = np.concatenate(parts)
    clip += rng.normal(0, options["noise"], size=clip.shape)
    pixels = np.rint(255 * np.clip(0.15 + 0.7 * clip, 0, 1)).astype(np.uint8)
    folder.mkdir()
    for number, frame in enumerate(pixels, start=1):
        path = os.path.join(folder, f"images{number:04d}.png")  # noqa: PTH118 (as text: there are many of them)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        os.write(descriptor, _png(frame))
        os.close(descriptor)


def _word(sign: str, topic: str) -> str:
    return UNAMBIGUOUS[sign] if sign in UNAMBIGUOUS else HOMONYMS[sign][list(TOPICS).index(topic)]


def write_world(folder: Path, options: dict[str, Any]) -> None:
    """Write a whole world into an empty folder.

    Args:
        folder: existing empty folder.
        options: as :meth:`slt.data.synthetic.Synthetic.options` gives them.
    """
    glyphs = draw_glyphs(options["seed"])
    truth: dict[str, Any] = {"options": options, "topics": {}, "signs": {}}
    home = folder / "PHOENIX-2014-T"
    done, total, told = 0, sum(options["sizes"]), time.monotonic()
    for split, size in zip(SPLITS, options["sizes"], strict=True):
        frames = home / Phoenix2014T.features / split
        frames.mkdir(parents=True)
        rows = ["name|video|start|end|speaker|orth|translation"]
        questions = []
        for number in range(size):
            name = f"synthetic-{split}-{number:05d}"
            rng = numpy_rng(options["seed"], "texts", name)
            topic = str(rng.choice(list(TOPICS)))
            signs = _draw_signs(rng)
            sentence = " ".join(_word(sign, topic) for sign in signs)
            question = _draw_question(rng, topic, options["distractors"])
            _write_clip(frames / name, signs, glyphs, options, name)
            rows.append(f"{name}|{name}/*.png|-1|-1|Glyph|{' '.join(signs)}|{sentence}")
            questions.append(Question(name, question, sentence, source="template", topic=topic))
            truth["topics"][name], truth["signs"][name] = topic, " ".join(signs)
            done += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                _log.info("synthetic world: %d of %d clips", done, total)
        csv = home / Phoenix2014T.annotation(split)
        csv.parent.mkdir(parents=True, exist_ok=True)
        csv.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
        write_questions(folder / "questions" / f"{split}.jsonl", questions)
    (folder / "truth.json").write_text(json.dumps(truth, ensure_ascii=False), encoding="utf-8")
