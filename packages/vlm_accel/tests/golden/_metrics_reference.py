"""Scores of answers worked out in other ways than the package does: recursion, dense NumPy vectors, plain counting."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np


def distance(a: str, b: str) -> int:
    """Levenshtein distance by its recursive definition."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def vqa(prediction: str, answers: list[str]) -> float:
    """Mean over all subsets of n - 1 answers of min(1, matches / 3), on texts in their normal form already."""
    scores = [min(1.0, sum(a == prediction for a in subset) / 3) for subset in combinations(answers, len(answers) - 1)]
    return float(np.mean(scores))


def cider(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D over lists of words, with dense vectors over all n-grams (float64)."""
    images = len(references)
    total = np.zeros(images)
    for n in range(1, 5):
        grams = sorted({g for texts in references for t in texts for g in ngrams(t, n)})
        grams += sorted({g for t in predictions for g in ngrams(t, n)} - set(grams))
        if not grams:
            continue
        places = {gram: place for place, gram in enumerate(grams)}

        def count(text: list[str], n: int = n, places: dict = places) -> np.ndarray:
            vector = np.zeros(len(places))
            for gram in ngrams(text, n):
                vector[places[gram]] += 1
            return vector

        in_images = np.array([[any(count(t)[i] > 0 for t in texts) for i in range(len(grams))] for texts in references])
        idf = np.log(images) - np.log(np.maximum(1, in_images.sum(0)))
        for image, (text, texts) in enumerate(zip(predictions, references, strict=True)):
            mine = count(text) * idf
            scores = []
            for other in texts:
                theirs = count(other) * idf
                norms = np.linalg.norm(mine) * np.linalg.norm(theirs)
                gap = (max(0, len(text) - 1)) - max(0, len(other) - 1)
                product = np.minimum(mine, theirs) @ theirs
                scores.append(product / norms * np.exp(-(gap**2) / 72.0) if norms else 0.0)
            total[image] += np.mean(scores) / 4
    return float(10 * total.mean())


def ngrams(text: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
