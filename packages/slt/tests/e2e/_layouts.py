"""Generated data sets in the official layouts: names, folders, annotation files and picture sizes as released."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Clip = tuple[str, int, str, str]
"""id, frames, sentence, question"""

GERMAN: Mapping[str, Sequence[Clip]] = {
    "train": [
        ("11August_2010_Wednesday_tagesschau-1", 60, "Heute Nacht regnet es im Norden", "Wie wird das Wetter heute ?"),
        ("11August_2010_Wednesday_tagesschau-2", 16, "Am Montag scheint die Sonne", "Wie wird der Montag ?"),
        ("01April_2010_Thursday_heute-6694", 32, "Im Süden bleibt es kühl", "Was ist im Süden ?"),
        ("01April_2010_Thursday_heute-6695", 25, "In den Alpen fällt Schnee", "Was fällt in den Bergen ?"),
    ],
    "dev": [("05May_2011_Thursday_tagesschau-3", 20, "Morgen weht ein frischer Wind", "Wie ist der Wind ?")],
    "test": [("03June_2011_Friday_tagesschau-8", 24, "Am Freitag ziehen Wolken auf", "Was kommt am Freitag ?")],
}

CHINESE: Mapping[str, Sequence[Clip]] = {
    "train": [
        ("S000001_P0001_T00", 60, "我 们 去 学 校 。", "你 们 去 哪 里 ？"),
        ("S000001_P0004_T00", 16, "我 们 去 学 校 。", "你 们 去 哪 里 ？"),
        ("S000003_P0002_T00", 30, "今 天 很 冷 。", "天 气 怎 么 样 ？"),
        ("S000004_P0001_T00", 21, "他 喜 欢 喝 茶 。", "他 喜 欢 什 么 ？"),
    ],
    "dev": [("S000005_P0000_T00", 18, "苹 果 多 少 钱 ？", "你 要 买 什 么 ？")],
    "test": [("S000007_P0003_T00", 22, "我 是 医 生 。", "你 做 什 么 工 作 ？")],
}


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A dark shape on a light ground that moves from frame to frame; ``size`` is (width, height)."""
    width, height = size
    pixels = np.full((height, width, 3), (190, 200, 210), dtype=np.uint8)
    top, left = 5 + 7 * number % (height // 2), 5 + 11 * number % (width // 2)
    pixels[top : top + height // 4, left : left + width // 4] = (40, 10 + number % 200, 60)
    return Image.fromarray(pixels)


def phoenix(home: Path, clips: Mapping[str, Sequence[Clip]] = GERMAN, size: tuple[int, int] = (210, 260)) -> Path:
    """PHOENIX-2014-T as unpacked: ``features/fullFrame-210x260px`` and ``annotations/manual``."""
    annotations = home / "annotations" / "manual"
    annotations.mkdir(parents=True)
    for split, rows in clips.items():
        lines = ["name|video|start|end|speaker|orth|translation"]
        lines += [f"{name}|{name}/1/*.png|-1|-1|Signer01|GLOSS|{text}" for name, _, text, _ in rows]
        path = annotations / f"PHOENIX-2014-T.{split}.corpus.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name, frames, _, _ in rows:
            folder = home / "features" / "fullFrame-210x260px" / split / name
            folder.mkdir(parents=True)
            for number in range(frames):
                picture(number, size).save(folder / f"images{number + 1:04d}.png", compress_level=1)
    questions(home.parent / "questions", clips)
    return home


def csl_daily(root: Path, clips: Mapping[str, Sequence[Clip]] = CHINESE, size: tuple[int, int] = (512, 512)) -> Path:
    """CSL-Daily as released: ``sentence/frames_512x512`` and ``sentence_label``."""
    labels = root / "sentence_label"
    labels.mkdir(parents=True)
    info, lines = [], ["name|split"]
    for split, rows in clips.items():
        for name, frames, text, _ in rows:
            lines.append(f"{name}|{split}")
            info.append(
                {
                    "name": name,
                    "length": frames,
                    "label_gloss": ["我"],
                    "label_char": text.split(),
                    "label_word": text.split(),
                    "label_postag": ["r"],
                    "signer": int(name[9:13]),
                    "time": "2020-01-01",
                }
            )
            folder = root / "sentence" / "frames_512x512" / name
            folder.mkdir(parents=True)
            for number in range(frames):
                picture(number, size).save(folder / f"{number:06d}.jpg", quality=90)
    (labels / "csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": info, "gloss_map": ["我"], "char_map": ["我"]}))
    (labels / "split_1.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    joined = {s: [(n, f, t.replace(" ", ""), q.replace(" ", "")) for n, f, t, q in rows] for s, rows in clips.items()}
    questions(root / "questions", joined)
    return root


def questions(folder: Path, clips: Mapping[str, Sequence[Clip]]) -> Path:
    """One JSONL a split in the schema that the package ships."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in clips.items():
        lines = [{"video_id": name, "question": asked, "sentence": text} for name, _, text, asked in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def manifest(root: Path, clips: Mapping[str, Sequence[Clip]] = GERMAN, size: tuple[int, int] = (32, 40)) -> Path:
    """Own data: one JSONL a split that names folders of pictures."""
    root.mkdir(parents=True)
    for split, rows in clips.items():
        lines = []
        for name, frames, text, asked in rows:
            (root / "clips" / name).mkdir(parents=True)
            for number in range(frames):
                picture(number, size).save(root / "clips" / name / f"{number:04d}.png", compress_level=1)
            lines.append({"video_id": name, "video": f"clips/{name}", "sentence": text, "question": asked})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (root / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root
