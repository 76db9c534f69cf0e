"""How hard are the fingerspelling recordings? Nearest neighbours, without any training.

For each sign language, its letters are classified by the letters of the other languages (3 neighbours, handshape of
the right hand at six moments). Then whole words are looked up in the word list, and in the list of their category,
which is what a question gives. This says what a model can be expected to reach on ``split="recordings"``.

    slt-data fingerspelling --lexicon LEXICON --out DIR --letter_frames 0
    python packages/slt/experiments/fingerspelling_letters.py DIR

Writes ``results/fingerspelling_letters.json`` and prints it as a table.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from slt.data.fingerspelling import CATEGORIES
from slt.data.landmarks import SECTIONS, local_hands

MOMENTS = 6
NEIGHBOURS = 3


def features(path: Path) -> np.ndarray:
    """Handshape at six moments of the middle half of a clip, (6, 42)."""
    hand = local_hands(np.load(path))[:, SECTIONS["right"], :2]
    moments = np.linspace(len(hand) * 0.25, len(hand) * 0.75, MOMENTS).astype(int)
    return hand[moments].reshape(MOMENTS, -1)


def distances(clips: dict[tuple[str, str], np.ndarray], language: str) -> dict[str, dict[str, list[float]]]:
    """For each letter of a language: sorted distances to the clips of every letter in the other languages."""
    out = {}
    for (code, letter), clip in clips.items():
        if code != language:
            continue
        found: dict[str, list[float]] = {}
        for (other, name), reference in clips.items():
            if other != language:
                found.setdefault(name, []).append(float(np.linalg.norm(clip - reference, axis=1).mean()))
        out[letter] = {name: sorted(values) for name, values in found.items()}
    return out


def vote(found: dict[str, list[float]]) -> str:
    """Majority of the three nearest clips, the nearest on a tie."""
    nearest = sorted((value, name) for name, values in found.items() for value in values)[:NEIGHBOURS]
    counts = Counter(name for _, name in nearest)
    return max(counts, key=lambda name: (counts[name], -min(v for v, n in nearest if n == name)))


def spell(word: str, found: dict[str, dict[str, list[float]]], words: list[str]) -> str:
    """The word of the list with as many letters whose letters are nearest in sum (mean of two nearest clips each)."""
    same = [w for w in words if len(w) == len(word)]
    cost = {
        w: sum(
            np.mean(found[shown.upper()].get(meant.upper(), [9.9])[:2]) for shown, meant in zip(word, w, strict=True)
        )
        for w in same
    }
    return min(cost, key=cost.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that slt-data fingerspelling wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fingerspelling_letters.json")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("letters/*/*.npy"))
    clips = {(path.parent.name, path.stem): features(path) for path in paths}
    words = [word for text in CATEGORIES.values() for word in text.split()]
    rows = {}
    for language in sorted({code for code, _ in clips}):
        found = distances(clips, language)
        spelled = [
            (word, text.split())
            for text in CATEGORIES.values()
            for word in text.split()
            if set(word.upper()) <= set(found)
        ]
        rows[language] = {
            "letters": len(found),
            "letter_accuracy": np.mean([vote(table) == letter for letter, table in found.items()]),
            "words": len(spelled),
            "word_accuracy": np.mean([spell(word, found, words) == word for word, _ in spelled]),
            "word_accuracy_with_category": np.mean([spell(word, found, listed) == word for word, listed in spelled]),
        }
    names = ("letter_accuracy", "word_accuracy", "word_accuracy_with_category")
    mean = {name: round(float(np.mean([row[name] for row in rows.values()])), 3) for name in names}
    rows = {code: {k: round(float(v), 3) if k in names else v for k, v in row.items()} for code, row in rows.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"mean": mean, "languages": rows}, indent=2) + "\n", encoding="utf-8")
    print("| held-out language | letters right | words right (list) | words right (category) |\n|---|---|---|---|")
    for code, row in {**rows, "mean": mean}.items():
        print(f"| {code} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")


if __name__ == "__main__":
    main()
