"""The built-in world: canvases with two handwritten digits, blank patches and noise, and questions about them.

Digits are scikit-learn's (1,797 of 8 x 8 pixels); those of one split are in no other. The left half of a canvas shows
one, the right half another, each at a random height; the rest is noise. Everything is a function of (seed, split,
number), so that nothing has to be stored.

Source: LightVLM 8 ("CPU experiment"); square canvases, because a CLIP tower wants them, and two kinds of question more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

__all__ = ["KINDS", "VOCABULARY", "Samples", "WorldOptions", "answer_of", "draw_samples", "fingerprint", "prompt_of"]

SIDE = 16
"""canvas height and width, pixels"""
PATCH = 2
TOKENS = (SIDE // PATCH) ** 2
"""image tokens of a canvas"""
DIGIT = 8
KINDS = ("left", "right", "both", "describe")
"""questions: one digit, one digit, both from left to right, a sentence with both"""
VOCABULARY = (
    *("<pad>", "<bos>", "<eos>", "<image>", "<unk>"),
    *("left", "right", "both", "describe", "?"),
    *map(str, range(10)),
)
PAD, BOS, EOS, IMAGE = range(4)
IDS = {word: number for number, word in enumerate(VOCABULARY)}
ANSWER = 5
"""longest answer in tokens, its end included"""
SPLITS = {"train": (0, 1297), "val": (1297, 1497), "test": (1497, 1797)}
"""digits of each split, by their number after a fixed permutation"""


@dataclass
class WorldOptions:
    """The canvases."""

    train: int = 6000
    """training canvases of an epoch"""
    val: int = 96
    """validation canvases, each with all four questions"""
    noise: float = 0.1
    """largest brightness of the noise, 0..1"""
    seed: int = 0
    """of the canvases; the run's seed draws weights and orders"""

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise UserError(f"world.train={self.train}, world.val={self.val}; expected at least 1")
        if not 0 <= self.noise <= 1:
            raise UserError(f"world.noise={self.noise}; expected 0..1 in units of the full brightness")


@dataclass
class Samples:
    """Canvases with one question each.

    Args:
        canvas: (n, 16, 16) uint8.
        digits: (n, 2) int64 digits, left and right.
        kind: (n,) int64, number in ``KINDS``.
        prompt: (n, P) int64 token ids, image placeholders included.
        answer: (n, 5) int64 token ids, ``<eos>`` at the end, then ``<pad>``.
    """

    canvas: np.ndarray
    digits: np.ndarray
    kind: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.canvas)


def prompt_of(kind: str) -> list[int]:
    """Token ids of a prompt: ``<bos>``, the image, the question."""
    return [BOS, *[IMAGE] * TOKENS, IDS[kind], IDS["?"]]


def answer_of(kind: str, left: int, right: int) -> list[int]:
    """Token ids of the right answer, ``<eos>`` at the end."""
    words: dict[str, tuple[str | int, ...]] = {
        "left": (left,),
        "right": (right,),
        "both": (left, right),
        "describe": ("left", left, "right", right),
    }
    return [*(IDS[str(word)] for word in words[kind]), EOS]


def draw_samples(options: WorldOptions, split: str, numbers: np.ndarray, kinds: np.ndarray | None = None) -> Samples:
    """Samples of a split by their numbers.

    Args:
        options: of the world.
        split: train, val or test.
        numbers: (n,) which canvases.
        kinds: (n,) numbers in ``KINDS``; None: canvas i is asked the question i modulo 4.
    """
    kinds = numbers % len(KINDS) if kinds is None else kinds
    drawn = [_canvas(options, split, number) for number in numbers.tolist()]
    pairs = np.array([digits for _, digits in drawn], dtype=np.int64)
    answers = np.full((len(numbers), ANSWER), PAD, dtype=np.int64)
    for row, (kind, (left, right)) in enumerate(zip(kinds.tolist(), pairs.tolist(), strict=True)):
        ids = answer_of(KINDS[kind], left, right)
        answers[row, : len(ids)] = ids
    prompts = np.array([prompt_of(KINDS[kind]) for kind in kinds.tolist()], dtype=np.int64)
    return Samples(
        np.stack([canvas for canvas, _ in drawn]), pairs, np.asarray(kinds, dtype=np.int64), prompts, answers
    )


def fingerprint(options: WorldOptions) -> str:
    """Hash of what the canvases depend on."""
    text = json.dumps({**asdict(options), "version": 1, "vocabulary": VOCABULARY}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canvas(options: WorldOptions, split: str, number: int) -> tuple[np.ndarray, tuple[int, int]]:
    """One canvas (16, 16) uint8 and its two digits."""
    rng = numpy_rng(options.seed, "canvas", split, number)
    pictures, labels = _digits()
    first, last = SPLITS[split]
    chosen = rng.integers(first, last, 2)
    canvas = rng.uniform(0.0, options.noise, (SIDE, SIDE))
    for half, index in enumerate(chosen):
        top = DIGIT * int(rng.integers(2))
        window = canvas[top : top + DIGIT, half * DIGIT : half * DIGIT + DIGIT]
        np.maximum(window, pictures[index], out=window)
    left, right = (int(labels[index]) for index in chosen)
    return np.rint(canvas * 255).astype(np.uint8), (left, right)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) brightness 0..1 and (1797,) labels, in a fixed order that mixes the writers."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images / 16.0)[order], data.target[order].astype(np.int64)
