"""Does it matter which patches an encoder keeps? Digits on a noisy canvas, a small ViT, merging without training.

The CPU experiment of iLLaVA section 8: scikit-learn's digits at random places on a canvas of 14 x 14 pixels with
uniform noise up to .15; 49 patches of 2 x 2; timm's ViT with width 48, 4 blocks, 4 heads; 1,500 AdamW steps of 64 (one
cycle, 3e-3, weight decay .02); then fewer patches at blocks 0, 1, 2. Two readouts (class token, mean of the patches),
three seeds. Test: 720 canvases of digits that training never saw. Training is a plain loop of torch: it is a minute of
CPU with its data drawn on the spot.

    python packages/vlm_accel/experiments/digits_encoder.py run
    python packages/vlm_accel/experiments/digits_encoder.py table

``run`` writes ``results/digits_encoder/{readout}-{method}-seed{n}.json`` as cells finish and leaves out finished ones.
About 1.5 minutes a training on an idle core, six trainings.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from polymodal.files import write_json
from polymodal.seeding import derive, generator, numpy_rng
from sklearn.datasets import load_digits
from torch import Tensor, nn
from vlm_accel import Step, accelerate
from vlm_accel.methods import create

RESULTS = Path(__file__).parent / "results" / "digits_encoder"
READOUTS = ("cls", "mean")
#: patches left behind blocks 0, 1, 2
LEFT = {24: (40, 32, 24), 15: (34, 24, 15), 9: (30, 18, 9)}
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
CANVAS, PATCH, NOISE = 14, 2, 0.15
STEPS, BATCH, RATE, DECAY = 1500, 64, 3e-3, 0.02
TEST = 720


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(pictures (n, 8, 8) in [0, 1], labels) for training and for the test; the split depends on the seed."""
    digits = load_digits()
    order = numpy_rng(seed, "digits", "split").permutation(len(digits.target))
    pictures = torch.from_numpy(digits.images[order] / 16).float()
    labels = torch.from_numpy(digits.target[order])
    return (pictures[TEST:], labels[TEST:]), (pictures[:TEST], labels[:TEST])


def place(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Canvases (n, 1, 14, 14): each digit somewhere, noise everywhere."""
    count, side = len(pictures), pictures.shape[1]
    canvas = torch.rand(count, CANVAS, CANVAS, generator=draw) * NOISE
    corner = torch.randint(CANVAS - side + 1, (2, count, 1, 1), generator=draw)
    rows = corner[0] + torch.arange(side)[:, None]
    columns = corner[1] + torch.arange(side)
    at = (torch.arange(count)[:, None, None], rows.expand(-1, -1, side), columns.expand(-1, side, -1))
    return canvas.index_put(at, pictures, accumulate=True)[:, None]


def build(readout: str, seed: int) -> nn.Module:
    """The ViT with a class token, or with mean pooling and none."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(derive(seed, "digits", readout, "weights") % 2**32)
    return VisionTransformer(
        img_size=CANVAS, patch_size=PATCH, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4,
        class_token=readout == "cls", global_pool="token" if readout == "cls" else "avg",
    )  # fmt: skip


def train(readout: str, seed: int) -> tuple[nn.Module, float]:
    """(trained model, seconds)."""
    model, ((pictures, labels), _) = build(readout, seed), split(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    draw = generator(seed, "digits", readout, "batches")
    start = time.perf_counter()
    model.train()
    for step in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(model(place(pictures[rows], draw)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        # Some seeds do not learn in 1,500 steps, with clipping and without; the table shows each seed's difference.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 300 == 299:
            sys.stderr.write(f"{readout} seed {seed}: step {step + 1} of {STEPS}, loss {loss.item():.3f}\n")
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, canvases: Tensor, labels: Tensor) -> float:
    """Percent correct."""
    return 100 * (model(canvases).argmax(1) == labels).float().mean().item()


def measure(model: nn.Module, readout: str, name: str, seed: int) -> dict[str, float]:
    """Accuracy in percent by patches left."""
    _, (pictures, labels) = split(seed)
    canvases = place(pictures, generator(seed, "digits", "test"))
    if name == "full":
        return {"49": accuracy(model, canvases, labels)}
    method, options = METHODS[name]
    found = {}
    for left, counts in LEFT.items():
        steps = [Step("vision", block, keep=count) for block, count in enumerate(counts)]
        with accelerate(model, create(method, **options), schedule=steps, seed=seed):
            found[str(left)] = accuracy(model, canvases, labels)
    return found


def cells(readout: str) -> list[str]:
    """Methods of one readout: without a class token there is no class attention to rank by."""
    return ["full", *(name for name in METHODS if readout == "cls" or name != "drop_cls")]


def path_of(readout: str, name: str, seed: int) -> Path:
    """File of one cell."""
    return RESULTS / f"{readout}-{name}-seed{seed}.json"


def trained(readout: str, seed: int, weights: Path | None) -> tuple[nn.Module, float]:
    """(model, seconds) from ``weights`` where it is there, else trained and kept there."""
    path = None if weights is None else weights / f"{readout}-seed{seed}.pt"
    if path is not None and path.exists():
        kept = torch.load(path, weights_only=True)
        model = build(readout, seed)
        model.load_state_dict(kept["model"])
        return model.eval(), float(kept["seconds"])
    model, seconds = train(readout, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "seconds": seconds}, path)
    return model, seconds


def run(seeds: Sequence[int], readouts: Sequence[str], weights: Path | None = None) -> None:
    """Train where a cell is missing, and measure the missing cells."""
    for seed, readout in itertools.product(seeds, readouts):
        missing = [name for name in cells(readout) if not path_of(readout, name, seed).exists()]
        if not missing:
            continue
        for method, options in METHODS.values():
            create(method, **options)  # a broken one shows before the training, not after it
        model, seconds = trained(readout, seed, weights)
        for name in missing:
            found = measure(model, readout, name, seed)
            RESULTS.mkdir(parents=True, exist_ok=True)
            cell = {
                "experiment": "digits_encoder", "readout": readout, "method": name, "seed": seed,
                "accuracy": {left: round(value, 4) for left, value in found.items()}, "test": TEST, "steps": STEPS,
                "train_s": round(seconds, 1), "torch": version("torch"), "timm": version("timm"),
            }  # fmt: skip
            write_json(path_of(readout, name, seed), cell)


def read(readout: str, name: str) -> dict[int, dict[str, float]]:
    """{seed: {patches left: accuracy}} of the finished cells."""
    import json

    found = {}
    for path in sorted(RESULTS.glob(f"{readout}-{name}-seed*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found[int(cell["seed"])] = cell["accuracy"]
    return found


def table() -> Iterator[str]:
    """Markdown: mean and deviation over the seeds, and the paired difference to ``drop``."""
    yield "| readout | method | " + " | ".join(f"{left} left" for left in LEFT) + " | to drop, per seed, 15 left |"
    yield "|---|---|" + "---|" * (len(LEFT) + 1)
    for readout in READOUTS:
        base = read(readout, "drop")
        for name in cells(readout):
            seeds = read(readout, name)
            if not seeds:
                continue
            if name == "full":
                values = [one["49"] for one in seeds.values()]
                yield f"| {readout} | full (49 patches) | {_mean(values)} |" + " |" * len(LEFT)
                continue
            columns = [_mean([one[str(left)] for one in seeds.values()]) for left in LEFT]
            paired = [one["15"] - base[seed]["15"] for seed, one in seeds.items() if seed in base]
            difference = ", ".join(f"{value:+.1f}" for value in paired) if name != "drop" else ""
            yield f"| {readout} | {name} | " + " | ".join(columns) + f" | {difference} |"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--readouts", nargs="+", choices=READOUTS, default=READOUTS)
    parser.add_argument("--weights", type=Path, help="folder that keeps trained models; default: they are not kept")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.what == "run":
        run(given.seeds, given.readouts, given.weights)
    for line in table():
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
