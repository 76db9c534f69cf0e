"""Words spelled with real recordings: the fingerspelling lexicon of the package ``spoken-to-signed`` as a data set.

What the recordings are. The lexicon holds one clip a letter and sign language (19 languages, about 600 clips of one
second), as MediaPipe landmarks whose body proportions were replaced by an average signer's. So for one letter there is
real variability only *between* languages: another recording, another hand, often (not always) the same handshape for
the same letter. There is no second recording of a letter in one language, and no real transition between letters:
clips are cut end to end.

What can be measured honestly, hence the two splits:

- ``recordings`` (default): whole sign languages are held out. The words are the same in all splits, but no recording of
  dev or test occurs in training. Letters whose handshape is peculiar to the held-out language cannot be known: nearest
  neighbours in the other languages name 56 % of the letters, 75 % of the words when the list is given, and 88 % when
  the category is, which is what the question tells (experiments/fingerspelling_letters.py). Languages are dealt to
  ``folds`` folds in alphabetical order; fold f is the test set, fold f + 1 the dev set.
- ``words``: words are held out and all languages are in all splits. Test words were never spelled in training, but
  their letters are *the same recordings*: this measures spelling, not recognition of new recordings.

Categories hold pairs that differ by a letter or two across categories (bear - pear - beer, goat - coat - boat), so that
the question is needed where a letter was not recognised. Words are English whatever the sign language.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from polymodal.data import read_text_lines, require_dir, require_files
from polymodal.errors import UserError
from polymodal.files import check_writable, write_json, write_text
from polymodal.seeding import derive

from slt.data import jsonl, manifest
from slt.data.base import SPLITS
from slt.data.landmarks import mirror, missing_hand
from slt.data.poses import read_pose

__all__ = ["CATEGORIES", "ONE_HANDED", "QUESTIONS", "build_fingerspelling"]

ONE_HANDED = ("ase", "asq", "bzs", "eso", "gsg", "ise", "lls", "mfs", "psr", "sgg", "ssp", "svk", "swl")
"""Sign languages of the lexicon that spell the Latin alphabet with one hand (``ise`` with the left: mirrored)."""

CATEGORIES: dict[str, str] = {
    "animal": "bear bee cat cow crab deer dog duck fox frog goat hen horse lamb lion moth mouse pig rat seal shark"
    " sheep snail snake swan tiger wolf",
    "food": "apple bean beer bread cake cheese chip corn egg grape ham honey jam lemon meal melon milk onion"
    " peach pear pie plum rice salad soup toast",
    "clothes": "belt blouse boot cap cape coat dress glove gown hat jeans robe scarf shirt shoe skirt sock suit tie"
    " vest",
    "body": "ankle arm back beard brain chin ear elbow eye foot hair hand heel hip knee leg lip mouth neck nose"
    " skin thumb toe tooth",
    "vehicle": "bike boat bus cab canoe cart ferry jeep kayak lorry plane ship sled tank taxi train tram truck van"
    " yacht",
    "home": "bed bowl box chair clock cup desk door fork house knife lamp mirror oven pan pen plate shelf sofa"
    " spoon stove table towel vase",
    "nature": "beach cliff cloud coast hill ice island lake leaf moon moss ocean rain river rose sand shore snow"
    " star stone storm sun tree wind",
}
QUESTIONS: dict[str, tuple[str, str]] = {
    "animal": ("which animal is spelled ?", "what creature is it ?"),
    "food": ("which food is spelled ?", "what can we eat or drink ?"),
    "clothes": ("which garment is spelled ?", "what does somebody wear ?"),
    "body": ("which part of a person is spelled ?", "what belongs to our anatomy ?"),
    "vehicle": ("which vehicle is spelled ?", "what transport is it ?"),
    "home": ("which furniture is spelled ?", "what is found indoors ?"),
    "nature": ("which landscape is spelled ?", "what is found outdoors ?"),
}
"""Two wordings a category; none contains a word of the list."""

_REMEDY = "give the folder spoken_to_signed/assets/fingerspelling_lexicon of the package spoken-to-signed"
_log = logging.getLogger(__name__)


def build_fingerspelling(
    lexicon: Path,
    out: Path,
    *,
    split: str = "recordings",
    languages: Sequence[str] = ONE_HANDED,
    folds: int = 5,
    fold: int = 0,
    letter_frames: int = 12,
    seed: int = 0,
) -> dict[str, int]:
    """Write a folder for ``--data poses --data.root OUT``: letter clips, one JSONL a split, ``dataset.json``.

    Args:
        lexicon: folder with ``data.csv`` and the ``.pose`` files of the letters.
        out: new folder; rows refer to the letter clips, which are stored once.
        split: ``recordings`` (languages held out) or ``words`` (words held out); see the module's text.
        languages: sign-language codes of the lexicon.
        folds: number of folds of ``recordings``; at least 3.
        fold: which one is the test set, 0..folds-1.
        letter_frames: frames per letter, evenly spaced over its clip (they last about a second, 25 frames, slower
            than signers spell); 0 keeps all.
        seed: draws the wording of questions and, for ``words``, the held-out words.

    Returns:
        Number of clips by split.

    Raises:
        UserError: lexicon incomplete, unknown language, bad option, folder not empty, pose-format not installed.
    """
    parts = _languages_by_split(split, languages, folds, fold)
    files = _letters(lexicon, languages)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose a new folder with --out")
    check_writable(out)
    for (language, letter), path in files.items():
        points = read_pose(path)
        if missing_hand(points, "right") > 0.5 and missing_hand(points, "left") <= 0.5:
            points = mirror(points)
        if letter_frames:
            points = points[np.linspace(0, len(points) - 1, letter_frames).round().astype(int)]
        target = out / "letters" / language / f"{letter}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, points, allow_pickle=False)
    counts = {}
    for name, codes in parts.items():
        rows = [
            row for code in codes for row in _rows(code, files, seed) if _belongs(row["sentence"], name, split, seed)
        ]
        lines = [jsonl.header(manifest.SCHEMA, manifest.SCHEMA_VERSION)]
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(out / f"{name}.jsonl", "\n".join(lines) + "\n")
        counts[name] = len(rows)
    write_json(
        out / manifest.DATASET_FILE,
        {
            "schema": manifest.DATASET_SCHEMA,
            "schema_version": manifest.DATASET_VERSION,
            "language": "en_XX",
            "level": "char",
            "split": split,
            "sign_languages": {name: list(codes) for name, codes in parts.items()},
            "letter_frames": letter_frames,
            "seed": seed,
        },
    )
    return counts


def _languages_by_split(split: str, languages: Sequence[str], folds: int, fold: int) -> dict[str, list[str]]:
    codes = sorted(set(languages))
    if split == "words":
        return dict.fromkeys(SPLITS, codes)
    if split != "recordings":
        raise UserError(f"split={split!r}; expected recordings (languages held out) or words (words held out)")
    if not 3 <= folds <= len(codes):
        raise UserError(f"folds={folds}; expected 3..{len(codes)}, at most one a language")
    if not 0 <= fold < folds:
        raise UserError(f"fold={fold}; expected 0..{folds - 1}")
    test, dev = codes[fold::folds], codes[(fold + 1) % folds :: folds]
    return {"train": [c for c in codes if c not in test + dev], "dev": dev, "test": test}


def _belongs(word: str, name: str, split: str, seed: int) -> bool:
    """Whether a word is in this part of the split ``words``: 80, 10 and 10 % by its hash."""
    if split == "recordings":
        return True
    draw = derive(seed, "fingerspelling-words", word) % 10
    return name == ("test" if draw == 0 else "dev" if draw == 1 else "train")


def _letters(lexicon: Path, languages: Sequence[str]) -> dict[tuple[str, str], Path]:
    folder = require_dir(lexicon, "fingerspelling lexicon", _REMEDY)
    (table,) = require_files(folder, ["data.csv"], "fingerspelling lexicon", _REMEDY)
    reader = csv.DictReader(read_text_lines(table, "fingerspelling lexicon"))
    if not {"path", "signed_language", "words"} <= set(reader.fieldnames or []):
        raise UserError(f"{table}:1: expected the columns path, signed_language, words; {_REMEDY}")
    found: dict[tuple[str, str], Path] = {}
    for row in reader:
        letter = row["words"].upper()
        if row["signed_language"] in languages and len(letter) == 1 and "A" <= letter <= "Z":
            path = folder / row["path"]
            if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise UserError(f"{table}:{reader.line_num}: {path} is missing; {_REMEDY}")
            found.setdefault((row["signed_language"], letter), path)
    known = {language for language, _ in found}
    for language in languages:
        if language not in known:
            raise UserError(
                f"{table}: no Latin letter of sign language {language!r}; there are {', '.join(ONE_HANDED)}"
            )
    return found


def _rows(language: str, files: dict[tuple[str, str], Path], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    skipped = []
    for category, words in CATEGORIES.items():
        for word in words.split():
            if any((language, letter) not in files for letter in word.upper()):
                skipped.append(word)
                continue
            name = f"{language}-{word}"
            rows.append(
                {
                    "video_id": name,
                    "video": [f"letters/{language}/{letter}.npy" for letter in word.upper()],
                    "sentence": word,
                    "question": QUESTIONS[category][derive(seed, "fingerspelling-question", name) % 2],
                    "speaker": language,
                    "topic": category,
                }
            )
    if skipped:
        _log.info("%s has no clip for a letter of %s", language, ", ".join(skipped))
    return rows
