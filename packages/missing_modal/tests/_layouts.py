"""The three public data sets in their exact official layouts, raw and Arrow, and a manifest: small, made here.

Written without the code under test. Pictures are noise in sizes and modes that real ones have. All functions return the
folder that a user would give as root.
"""

import csv
import io
import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image

GENRES = [
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery",
    "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western", "Sport",
    "Short", "Film-Noir",
]  # fmt: skip
DISHES = ["apple_pie", "baby_back_ribs", "beef_carpaccio"]


def picture(seed, size=(48, 36), mode="RGB"):
    """PIL image of ``size`` (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def encoded(seed, form="JPEG", **options):
    stream = io.BytesIO()
    picture(seed, **options).save(stream, format=form)
    return stream.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# ------------------------------------------------------------------ MM-IMDb


def films(split, count):
    """{id: (plots, genres)}: one to three plots, genres in any order, some that do not count, one film without any."""
    start = {"train": 100, "dev": 200, "test": 300}[split]
    found = {}
    for i in range(count):
        plots = [f"Plot {k} of film {start + i}: a detective — “late” — finds a châlet." for k in range(1 + i % 3)]
        genres = [GENRES[(i * 5 + 7 * k) % 23] for k in range(i % 4)] + (["News"] if i % 2 else [])
        found[f"{start + i:07d}"] = (plots, genres)
    return found


def write_mmimdb(folder, train=6, dev=3, test=4, size=(48, 71)):
    folder, split = Path(folder), {}
    for name, count in (("train", train), ("dev", dev), ("test", test)):
        found = films(name, count)
        split[name] = list(reversed(found))  # the official lists are in no order
        for number, (film, (plots, genres)) in enumerate(found.items()):
            mode = "L" if number % 3 == 1 else "RGB"  # a part of the posters is grey
            put(folder / "images" / f"{film}.jpeg", encoded(int(film), size=size, mode=mode))
            put(folder / "labels" / f"{film}.json", {"plot": plots, "genres": genres, "title": film, "year": 1999})
    put(folder / "split.json", split)
    return folder


def multi_hot(genres):
    return [1 if name in genres else 0 for name in GENRES]


def mmimdb_arrow(folder, train=6, dev=3, test=4):
    """The Arrow files of the same films."""
    for name, count in (("train", train), ("dev", dev), ("test", test)):
        found = films(name, count)
        order = list(reversed(found))
        write_arrow(
            Path(folder) / f"mmimdb_{name}.arrow",
            {
                "image": [encoded(int(film), size=(48, 71)) for film in order],
                "plots": [found[film][0] for film in order],
                "label": [multi_hot(found[film][1]) for film in order],
                "genres": [found[film][1] for film in order],
                "image_id": order,
                "split": [name] * count,
            },
        )
    return Path(folder)


# ------------------------------------------------------------------ Food-101


def dishes(split, count):
    """[(file, class)]; the numbers of the files say nothing about the split."""
    start = {"train": 0, "val": 50, "test": 100}[split]
    return [(f"{DISHES[i % 3]}_{start + i}.jpg", DISHES[i % 3]) for i in range(count)]


def write_food101(
    folder, train=6, val=3, test=4, *, texts="json", header=True, size=(64, 48), without=("apple_pie_0",)
):
    """Food-101; ``class_idx.json`` is not in alphabetical order, ``without`` are stems of files without a text."""
    folder, split, rows = Path(folder), {}, {"train": [], "test": []}
    for name, count in (("train", train), ("val", val), ("test", test)):
        found = dishes(name, count)
        split[name] = [file for file, _ in found]
        part = "test" if name == "test" else "train"
        for number, (file, dish) in enumerate(found):
            put(folder / "images" / part / dish / file, encoded(number, size=size))
            if Path(file).stem not in without:
                rows[part].append((file, f'How to make {dish.replace("_", " ")}, "easy" no. {number}', dish))
    put(folder / "class_idx.json", {"beef_carpaccio": 0, "apple_pie": 1, "baby_back_ribs": 2})
    put(folder / "split.json", split)
    if texts == "json":
        put(folder / "text.json", {file: title for part in rows.values() for file, title, _ in part})
    for part, held in rows.items():
        path = put(folder / "texts" / f"{part}_titles.csv", b"")
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([*([("image", "title", "class")] if header else []), *held])
    return folder


def food101_arrow(folder, train=6, val=3, test=4):
    index = {"beef_carpaccio": 0, "apple_pie": 1, "baby_back_ribs": 2}
    for name, count in (("train", train), ("val", val), ("test", test)):
        found = dishes(name, count)
        write_arrow(
            Path(folder) / f"food101_{name}.arrow",
            {
                "image": [encoded(i) for i in range(count)],
                "text": [[f"How to make {dish}"] for _, dish in found],
                "label": [index[dish] for _, dish in found],
                "image_id": [file for file, _ in found],
                "split": [name] * count,
            },
        )
    return Path(folder)


# ------------------------------------------------------------------ Hateful Memes


def memes(split, count):
    start = {"train": 1235, "dev": 8291, "test": 16395, "test_unseen": 30000}[split]
    return [
        {"id": start + i, "img": f"img/{start + i:05d}.png", "label": i % 2, "text": f"its their\ncharacter {i}"}
        for i in range(count)
    ]


def write_hatememes(folder, train=6, dev=4, test=4, *, inside="", test_name="test_seen", size=(55, 80)):
    home = Path(folder) / inside
    for name, count in (("train", train), ("dev", dev), ("test", test), ("test_unseen", 3)):
        found = memes(name, count)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        put(home / f"{test_name if name == 'test' else name}.jsonl", lines)
        for number, row in enumerate(found):
            mode = ("RGB", "RGBA", "L", "P")[number % 4]
            put(home / row["img"], encoded(row["id"], "PNG", size=size, mode=mode))
    return Path(folder)


def hatememes_arrow(folder, train=6, dev=4, test=4):
    """Arrow files as the official writer makes them: no ids."""
    for name, count in (("train", train), ("dev", dev), ("test", test)):
        found = memes(name, count)
        write_arrow(
            Path(folder) / f"hatememes_{name}.arrow",
            {
                "image": [encoded(row["id"], "PNG") for row in found],
                "text": [[row["text"]] for row in found],
                "label": [row["label"] for row in found],
                "split": [name] * count,
            },
        )
    return Path(folder)


def write_arrow(path, columns):
    """One IPC file, all rows in one record batch, types as pyarrow infers them (the official writers go by pandas)."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)
    return path


# ------------------------------------------------------------------ a user's own data


def write_wav(path, samples, rate=16000, width=2, channels=1):
    """PCM: samples (n,) or (n, channels) in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(np.asarray(samples).reshape(-1) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (whole + 128).astype(np.uint8).tobytes() if width == 1 else b"".join(
        int(one).to_bytes(width, "little", signed=True) for one in whole
    )  # fmt: skip
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(raw)
    return path


def write_manifest(folder, count=12, *, name="data.jsonl", split=True):
    """One file with image, text, audio and tabular; each is null in some row."""
    folder, rows = Path(folder), []
    for i in range(count):
        put(folder / "pictures" / f"{i}.png", encoded(i, "PNG"))
        write_wav(folder / "sounds" / f"{i}.wav", np.sin(np.arange(800) * (i + 1) / 20) * 0.5)
        row = {
            "id": f"s{i}",
            "image": None if i % 4 == 1 else f"pictures/{i}.png",
            "text": None if i % 4 == 2 else f"text {i}",
            "audio": None if i % 4 == 3 else f"sounds/{i}.wav",
            "tabular": [i, i / 2, -1.5],
            "label": "cat" if i % 2 else "dog",
        }
        if i == 5:
            del row["tabular"]
        rows.append(row | ({"split": ("train", "train", "val", "test")[i // 2 % 4]} if split else {}))
    put(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return folder / name
