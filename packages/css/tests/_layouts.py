"""Small data sets in the exact layouts of VOC 2012 (+ SBD), ADE20K and pairs, written without the code under test.

Pictures are noise with one rectangle a class, each class in a colour of its own; a rectangle has a border of ignored
pixels where ``ignore`` is set. All functions return the folder that a user would give as root.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)
"""height, width"""


def voc_classes(count, shift=0):
    """Two classes a picture, such that ``count >= 20`` pictures hold every class."""
    return {f"2007_{i:06d}": ((i + shift) % 20 + 1, (i + shift + 7) % 20 + 1) for i in range(count)}


def ade_classes(count, split="train"):
    """Three classes a picture: two of 1..100 and one of 101..150."""
    return {
        f"ADE_{split}_{i + 1:08d}": (i * 13 % 100 + 1, (i * 29 + 50) % 100 + 1, 101 + i * 7 % 50) for i in range(count)
    }


def color_map():
    """VOC's colours, bit by bit as in its development kit: 256 x 3."""
    table = []
    for number in range(256):
        rgb, rest = [0, 0, 0], number
        for place in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= (rest >> channel & 1) << place
            rest >>= 3
        table.append(rgb)
    return table


def scene(classes, seed, size=SIZE, ignore=True):
    """Picture (H, W, 3) and mask (H, W), both uint8."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = rng.integers(90, 130, (height, width, 3))
    mask = np.zeros(size, np.uint8)
    slots = rng.permutation(max(4, len(classes)))[: len(classes)]
    across = -(-max(4, len(classes)) // 2)
    for number, slot in zip(classes, slots, strict=True):
        top, left = slot // across * (height // 2), slot % across * (width // across)
        high, wide = rng.integers(height // 4, height // 2 - 2), rng.integers(width // across // 2, width // across - 1)
        box = (slice(top + 1, top + 1 + high), slice(left + 1, left + 1 + wide))
        if ignore:
            mask[max(0, top) : top + high + 2, max(0, left) : left + wide + 2] = 255
        mask[box] = number
        image[box] = (np.array(color_map()[number]) * 0.7 + 40 + rng.integers(-12, 12, (high, wide, 3))).clip(0, 255)
    return image.astype(np.uint8), mask


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def save_mask(path, mask, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    if palette:
        picture.putpalette([value for rgb in color_map() for value in rgb])
    picture.save(path)


def write_voc(folder, train=20, test=20, *, inside="VOCdevkit/VOC2012", augmented=True, form="pairs", size=SIZE):
    """VOC 2012: grey masks in SegmentationClassAug (all), palette masks in SegmentationClass (half of train, test).

    Args:
        folder: the root.
        train: number of pictures, or {id: classes}.
        test: number of pictures, or {id: classes}.
        inside: ``VOCdevkit/VOC2012``, ``VOC2012`` or empty.
        augmented: write SegmentationClassAug and train_aug.txt.
        form: lines of train_aug.txt: ``pairs``, ``prefixed`` (paths with VOC2012 in front) or ``ids``.
        size: height, width.
    """
    home = Path(folder) / inside
    train = voc_classes(train) if isinstance(train, int) else train
    test = {f"2008_{k[5:]}": v for k, v in voc_classes(test, 3).items()} if isinstance(test, int) else test
    for number, (name, classes) in enumerate({**train, **test}.items()):
        image, mask = scene(classes, number, size)
        save_image(home / "JPEGImages" / f"{name}.jpg", image)
        if augmented:
            save_mask(home / "SegmentationClassAug" / f"{name}.png", mask)
        if name in test or number % 2:
            save_mask(home / "SegmentationClass" / f"{name}.png", mask, palette=True)
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in list(train)[1::2]))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in test))
    if augmented:
        before = {"pairs": "/", "prefixed": "/VOC2012/"}.get(form)
        pair = f"{before}JPEGImages/{{0}}.jpg {before}SegmentationClassAug/{{0}}.png\n"
        text = "".join((pair if before else "{0}\n").format(name) for name in train)
        (lists / "train_aug.txt").write_text(text)
    return Path(folder)


def write_ade(folder, train=12, test=6, *, inside="ADEChallengeData2016", size=SIZE):
    """ADE20K: ``images`` and ``annotations``, 0 = other, no ignored pixels.

    Args:
        folder: the root.
        train: number of pictures, or {id: classes}.
        test: number of pictures, or {id: classes}.
        inside: ``ADEChallengeData2016`` or empty.
        size: height, width.
    """
    home = Path(folder) / inside
    splits = {"training": (train, "train"), "validation": (test, "val")}
    for place, (split, (given, word)) in enumerate(splits.items()):
        pictures = ade_classes(given, word) if isinstance(given, int) else given
        for number, (name, classes) in enumerate(pictures.items()):
            image, mask = scene(classes, 1000 * place + number, size, ignore=False)
            save_image(home / "images" / split / f"{name}.jpg", image)
            save_mask(home / "annotations" / split / f"{name}.png", mask)
    (home / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    return Path(folder)


def write_pairs(folder, train=8, test=4, val=0, *, names=("disc", "ring", "bar", "star"), form="folders", size=SIZE):
    """Pairs with ``classes.txt``; two classes a picture.

    Args:
        folder: the root.
        train: number of pictures.
        test: number of pictures.
        val: number of pictures; 0: no such split.
        names: class names.
        form: ``folders`` or ``csv``.
        size: height, width.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    (home / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    for place, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        rows = []
        for i in range(count):
            image, mask = scene((i % len(names) + 1, (i + 1) % len(names) + 1), 100 * place + i, size)
            folders = (f"{split}/images", f"{split}/masks") if form == "folders" else ("pictures", "labels")
            stem = f"{split}{i}"
            save_image(home / folders[0] / f"{stem}.jpg", image)
            save_mask(home / folders[1] / f"{stem}.png", mask)
            rows.append((f"{folders[0]}/{stem}.jpg", f"{folders[1]}/{stem}.png"))
        if form == "csv" and rows:
            with (home / f"{split}.csv").open("w", newline="") as handle:
                csv.writer(handle).writerows([("image", "mask"), *rows])
    return home
