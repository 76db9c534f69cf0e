"""CIDEr of captions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["cider", "words_of"]

_ORDERS = 4
_SIGMA = 6.0


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation (an approximation of the Penn Treebank tokenizer of the official code)."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a set, times 10 as published (so 1.0 is about what people reach).

    Tf-idf vectors of n-grams, n = 1..4; document frequency over the images' references; counts of a prediction clipped
    by the reference's; a Gaussian penalty of the difference in length.

    Args:
        predictions: one caption an image.
        references: captions of each image by people.

    Source: Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 5 (the D form: clipping, length, sigma 6).
    """
    counted = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in counted:
        frequency.update({gram for text in texts for gram in text})
    log_images = math.log(max(len(references), 1))
    total = 0.0
    for prediction, texts in zip(predictions, counted, strict=True):
        mine = _weigh(_grams(prediction), frequency, log_images)
        found = [_similarity(mine, _weigh(text, frequency, log_images)) for text in texts]
        total += sum(found) / max(1, len(found))
    return 10.0 * total / max(1, len(predictions))


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = words_of(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1))


_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _weigh(grams: Counter[tuple[str, ...]], frequency: Counter[tuple[str, ...]], log_images: float) -> _Vector:
    """Tf-idf by order, their norms, and the length (of bigrams, as the official code has it)."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
    length = 0
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (log_images - math.log(max(1.0, frequency[gram])))
        length += count if len(gram) == 2 else 0
    return vectors, [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors], length


def _similarity(mine: _Vector, other: _Vector) -> float:
    penalty = math.exp(-((mine[2] - other[2]) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for a, b, norm_a, norm_b in zip(mine[0], other[0], mine[1], other[1], strict=True):
        product = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
        total += penalty * product / (norm_a * norm_b) if norm_a and norm_b else 0.0
    return total / _ORDERS
