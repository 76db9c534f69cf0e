"""A small world of image and text whose best use of the image depends on whether the text is there (DCP 8).

A nuisance lies over the image's first sign of the label, and only the text tells how large it is; the image's second
sign needs no text, and the text has a sign of its own. Prompts that know what is missing can read the image in two
ways, others in one. Nothing is written and nothing downloaded: the samples are a function of the options.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from polymodal.errors import UserError

from missing_modal.data.base import SPLITS, MMData, Sample, Task

__all__ = ["CHANNELS", "CONTEXT", "PATCHES", "VOCABULARY", "World"]

PATCHES, CHANNELS = 8, 4
"""of an image: (8, 4) float32"""
BINS, RANDOM_TOKENS = 8, 8
"""of each number that the text tells; tokens without meaning"""
_SPREAD, _SIGN, _SECOND = 1.2, 0.9, 0.55
VOCABULARY = 2 * BINS + RANDOM_TOKENS + 3
"""ids: 0 nothing, 1..8 bin of the nuisance, 9..16 bin of the text's own sign, 17..24 random, 25 start, 26 end"""
CONTEXT = 5
_START, _END = VOCABULARY - 2, VOCABULARY - 1
_WORLD_VERSION = 1


@dataclass
class World(MMData):
    """The two-modality world; two classes.

    Args:
        root: not used.
        sizes: samples in train, val and test.
        noise: standard deviation of every channel of every patch.
        world_seed: seed of the samples; the seed of a run does not change the data.

    Source: DCP (arXiv 2410.06558), our specification 8, experiment; the draws eps are one a sample, not one a patch,
        which is what its accuracies need.
    """

    sizes: tuple[int, int, int] = (2000, 1000, 2000)
    noise: float = 0.3
    world_seed: int = 0

    name: ClassVar[str] = "world"
    task: ClassVar[Task] = "binary"
    modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    metric: ClassVar[str] = "accuracy"
    remedy: ClassVar[str] = "give numbers of samples above 0 (--data.sizes)"

    def class_names(self) -> list[str]:
        """Names of the two labels."""
        return ["minus", "plus"]

    def check(self) -> None:
        """Whether the options are in range.

        Raises:
            UserError: an option out of range.
        """
        if len(self.sizes) != 3 or min(self.sizes) < 1:
            raise UserError(f"data.sizes={list(self.sizes)}; expected three numbers of at least 1: [400, 200, 200]")
        if self.noise < 0:
            raise UserError(f"data.noise={self.noise}; expected 0 or more")

    def read_split(self, split: str) -> list[Sample]:
        """Samples of a split: image (8, 4) float32, text (5,) int64, label 0 or 1."""
        self.check()
        images, texts, labels = draw(self.sizes[SPLITS.index(split)], self.noise, self.world_seed, split)
        return [
            Sample(f"world-{split}-{number:05d}", {"image": image, "text": text}, int(label))
            for number, (image, text, label) in enumerate(zip(images, texts, labels, strict=True))
        ]

    def pairs(self, count: int) -> dict[str, Any]:
        """Images and texts that belong together, drawn apart from all splits: what encoders are trained on before."""
        images, texts, _ = draw(count, self.noise, self.world_seed, "pairs")
        return {"image": images, "text": texts}

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and sizes, for the manifest."""
        options = [_WORLD_VERSION, list(self.sizes), self.noise, self.world_seed]
        fingerprint = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
        sizes = dict(zip(SPLITS, self.sizes, strict=True))
        return {"name": self.name, "fingerprint": fingerprint, "classes": 2, "samples": sizes}


def draw(count: int, noise: float, seed: int, split: str) -> tuple[Any, Any, Any]:
    """Samples of the world.

    Args:
        count: N.
        noise: of every channel of every patch.
        seed: root seed.
        split: name of the split, part of the seed.

    Returns:
        Images (N, 8, 4) float32, texts (N, 5) int64, labels (N,) int64.

    Source: DCP (arXiv 2410.06558), our specification 8: with s = +-1 the label, z ~ N(0, 1.2^2) the nuisance and eps
        standard normal, channel 0 of patches 0-3 has 0.9 s + z + 0.15 eps, channel 1 of patches 4-7 has
        0.55 s + 0.8 eps; the text is start, bin of z, bin of 0.55 s + 0.8 eps (8 bins on [-3, 3]), a random token, end.
    """
    import numpy as np
    from polymodal.seeding import numpy_rng

    rng = numpy_rng(seed, "missing_modal", "world", split)
    labels = rng.integers(0, 2, count)
    s = 2.0 * labels - 1.0
    z = rng.normal(0.0, _SPREAD, count)
    first, second, third = rng.normal(size=(3, count))
    images = rng.normal(0.0, noise, (count, PATCHES, CHANNELS))
    images[:, : PATCHES // 2, 0] += (_SIGN * s + z + 0.15 * first)[:, None]
    images[:, PATCHES // 2 :, 1] += (_SECOND * s + 0.8 * second)[:, None]
    texts = np.empty((count, CONTEXT), dtype=np.int64)
    texts[:, 0] = _START
    texts[:, 1] = 1 + _bin(z)
    texts[:, 2] = 1 + BINS + _bin(_SECOND * s + 0.8 * third)
    texts[:, 3] = 1 + 2 * BINS + rng.integers(0, RANDOM_TOKENS, count)
    texts[:, 4] = _END
    return images.astype(np.float32), texts, labels


def _bin(values: Any) -> Any:
    """Numbers 0..7 of the eight bins of equal width on [-3, 3]; what lies outside is in the last one of its side."""
    import numpy as np

    return np.clip(np.floor((values + 3.0) / 6.0 * BINS), 0, BINS - 1).astype(np.int64)
