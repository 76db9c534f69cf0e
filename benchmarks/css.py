"""Speed of continual segmentation: a step of EIR, the loader with pasting, memory of the distillation, the index.

python benchmarks/css.py                  # all sections, about ten minutes on one thread
python benchmarks/css.py step loader      # some of them
python benchmarks/css.py --quick          # does it run?
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package css behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, against, interleave, overhead, parse, run_sections, speedup, value
from benchmarks._css_inputs import LaterStep, ade_folder, later_step, peak_memory, voc_folder

PICTURES_PER_SECOND = 30.0


def step(options: Options) -> list[Row]:
    """EIR with its published settings against two forward passes of the teacher and plain binary cross-entropy."""
    from css.data.ade import ADE20K
    from css.data.options import LoaderConfig
    from css.data.shapes import Shapes
    from css.data.voc import VOC
    from css.settings import NetworkConfig, OptimConfig
    from css.task import Task

    quick = options.quick
    deeplab = NetworkConfig(name="tiny" if quick else "deeplabv3_resnet50")
    crop = 64 if quick else 256
    gentle = OptimConfig(later_lr=1e-6)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        world = Shapes(root=Path(temporary), images=(60, 8, 8) if quick else (480, 120, 150))
        tiny, loader = NetworkConfig(name="tiny"), LoaderConfig(batch_size=8, crop=64)
        task = Task("2-1", world.num_classes, ())
        rows.append(_step(options, "tiny network, shapes world", world, task, tiny, loader, gentle, 16, 100))
    pair = LoaderConfig(batch_size=2, crop=crop)
    drawn = 20 if quick else 80
    with voc_folder(drawn, drawn) as home:
        reader, task = VOC(root=home, augmented=False), Task("15-1", 20, ())
        rows.append(_step(options, f"{deeplab.name}, VOC 15-1", reader, task, deeplab, pair, gentle, 4, 20))
    if quick:
        return rows
    with ade_folder(150) as home:  # as many as it takes for one of each class
        task = Task("100-50", 150, ())
        rows.append(
            _step(options, f"{deeplab.name}, ADE 100-50", ADE20K(root=home), task, deeplab, pair, gentle, 4, 20)
        )
    return rows


def _step(
    options: Options, what: str, reader: Any, task: Any, network: Any, loader: Any, optim: Any, count: int, runs: int
) -> Row:
    import torch
    from css.methods.eir import EIR
    from css.module import CSSModule
    from css.ops.labels import one_hot
    from css.ops.losses import soft_binary_loss

    with tempfile.TemporaryDirectory() as folder:
        later = later_step(
            reader, task, network, loader, folder=Path(folder) / "memory", method=EIR(), device=options.device
        )
        batches = later.batches(count, options.device)

    def plain(ctx: Any, batch: Any) -> torch.Tensor:
        for _ in range(2):
            ctx.old_logits(batch.images)
        logits = ctx.net.full_logits(batch.images)
        return soft_binary_loss(logits, one_hot(batch.labels, logits.shape[1]))

    pastes: list[float] = []

    def stepper(ours: bool) -> Callable[[], None]:
        ctx = copy.copy(later.ctx)
        ctx.net = copy.deepcopy(later.ctx.net)
        module = CSSModule(ctx, later.method, optim, base=len(task.steps[0]), total_steps=10**6)
        optimizer = module.configure_optimizers()["optimizer"]
        draws, turn = torch.Generator().manual_seed(0), iter(range(10**6))

        def call() -> None:
            batch = batches[next(turn) % len(batches)]
            if ours:
                loss, terms = module.loss(batch, draws)
                pastes.append(float(terms["pasted"]))
            else:
                loss = plain(ctx, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if not bool(loss.isfinite()):
                raise RuntimeError(f"{what}: the loss is not finite")

        return call

    found = interleave({"eir": stepper(True), "plain": stepper(False)}, options.times(runs), 2, options.sync)
    channels, size = later.ctx.net.num_channels, tuple(batches[0].images.shape)
    per_picture = sum(pastes) / len(pastes)
    label = f"{what}: {size[0]} pictures of {size[-1]} px, {channels} channels, {per_picture:.0f} pastes a picture"
    detail = {"entries": len(later.ctx.bank or ()), "instance_pictures": int(sum(b.replayed.sum() for b in batches))}
    return overhead(label, found["eir"], found["plain"], at_most=1.15, **detail)


def loader(options: Options) -> list[Row]:
    """Training batches of two workers from JPEG files, with and without pasting in the main process."""
    from css.data.options import LoaderConfig
    from css.data.voc import VOC
    from css.methods.eir import EIR
    from css.settings import NetworkConfig
    from css.task import Task

    crop, batch, pictures, drawn, runs = (64, 4, 40, 40, 2) if options.quick else (512, 24, 600, 120, 20)
    config = LoaderConfig(batch_size=batch, crop=crop, num_workers=2)
    with voc_folder(pictures, drawn) as home:
        reader = VOC(root=home, augmented=False)
        size = sum(path.stat().st_size for path in (home / "JPEGImages").iterdir()) / pictures / 1024
        later = later_step(
            reader,
            Task("15-5", 20, ()),
            NetworkConfig(name="tiny"),
            config,
            folder=home.parent / "memory",
            method=EIR(),
            device=options.device,
        )
        epochs = _Epochs(options, later)
        for number in range(-2, 2 * options.times(runs)):  # the first two start the workers
            epochs.run(number, pasting=number % 4 in (1, 2))
    what = f"500 x 375 px JPEG of {size:.0f} KiB, crop {crop}, batches of {batch}, 2 workers"
    pasted = f"pasting ({later.ctx.net.num_channels} channels, 3 pastes a picture)"
    rows = []
    for pasting, extra in ((True, pasted), (False, "no pasting")):
        seen, least = epochs.seen[pasting], PICTURES_PER_SECOND if pasting else None
        rows.append(value(f"{what}, {extra}", "pictures/s", [run.rate for run in seen], at_least=least))
        if all(run.workers for run in seen):
            main, workers = (
                1000 * statistics.median(getattr(run, name) / run.pictures for run in seen)
                for name in ("main", "workers")
            )
            label = f"the same by CPU time, two free cores: {main:.1f} ms a picture here, {workers:.1f} ms in workers"
            rows.append(value(label, "pictures/s", [run.rate_of_two_cores for run in seen], at_least=least))
    return rows


@dataclass
class _Run:
    """One epoch: seconds on the wall, and of computing in the main process and in the workers."""

    pictures: int
    wall: float
    main: float
    workers: float

    @property
    def rate(self) -> float:
        return self.pictures / self.wall

    @property
    def rate_of_two_cores(self) -> float:
        """What the computing takes if the three processes have two cores to themselves and wait for nothing else."""
        return self.pictures / max(self.main, (self.main + self.workers) / 2)


class _Epochs:
    """Epochs of the training loader, timed one by one."""

    def __init__(self, options: Options, later: LaterStep) -> None:
        later.data.setup("fit")
        self.options, self.later = options, later
        self.loader = later.data.train_dataloader()
        self.seen: dict[bool, list[_Run]] = {True: [], False: []}

    def run(self, number: int, *, pasting: bool) -> None:
        """One epoch; negative ones are not counted."""
        import torch
        from css.ops.labels import one_hot

        later, draws, pictures = self.later, torch.Generator().manual_seed(number + 2), 0
        later.data.train_sampler.set_epoch(number + 2)
        workers, main, wall = _worker_seconds(), time.process_time(), time.perf_counter()
        for batch in self.loader:
            batch = batch.to(self.options.device)
            if pasting:  # labels as they are in place of pseudo-labels: no network runs
                target = one_hot(batch.labels, later.ctx.net.num_channels)
                later.method.mixed(later.ctx, batch, batch.labels, target, draws)
            pictures += len(batch)
        self.options.sync()
        wall, main = time.perf_counter() - wall, time.process_time() - main
        if number >= 0:
            self.seen[pasting].append(_Run(pictures, wall, main, _worker_seconds() - workers))


def _worker_seconds() -> float:
    """Seconds of computing of this process's children so far; 0 where the system does not say."""
    total = 0.0
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            cells = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            total += (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory(options: Options) -> list[Row]:
    """Peak memory of region distillation next to that of plain binary cross-entropy, each in a process of its own."""
    channels, known, side, images = (21, 16, 128, 1) if options.quick else (151, 146, 512, 2)
    runs = options.times(5)
    found: dict[str, list[float]] = {"binary": [], "two_region": [], "mib": []}
    for _ in range(runs):
        for kind, raised in found.items():
            raised.append(peak_memory(kind, channels, known, side, images) / 2**20)
    what = f"{images} pictures of {side} px, {channels} channels, {known} of them old: forward and backward"
    return [
        against(f"region distillation, {variant}, {what}", "MiB", found[variant], found["binary"], at_most=1.3)
        for variant in ("two_region", "mib")
    ]


def index(options: Options) -> list[Row]:
    """Which classes are in ten thousand masks: one parallel pass, a plain loop, and the cache."""
    import numpy as np
    from css.data.voc import VOC
    from PIL import Image

    count = 50 if options.quick else 10_000
    with voc_folder(count, min(count, 120)) as home:
        first = VOC(root=home, augmented=False).items("train")
        size = sum(item.mask.stat().st_size for item in first) / count / 1024

        def from_cache() -> list[tuple[int, ...]]:
            return VOC(root=home, augmented=False).class_sets("train")

        def anew() -> list[tuple[int, ...]]:
            shutil.rmtree(home.parent / "cache")
            return from_cache()

        def loop() -> list[tuple[int, ...]]:
            paths = [item.mask for item in VOC(root=home, augmented=False).items("train")]
            return [tuple(sorted(set(np.unique(np.array(Image.open(path))).tolist()) - {0, 255})) for path in paths]

        if loop() != from_cache() or anew() != from_cache():
            raise RuntimeError("the index differs from a loop over the masks")
        found = interleave({"pass": anew, "loop": loop}, options.times(5), 0)
        cached = interleave({"cache": from_cache}, options.times(20), 2)["cache"]
    masks = f"{count} masks of 500 x 375 px, {size:.1f} KiB each, names checked"
    return [
        speedup(f"{masks}: one parallel pass, against np.unique in a loop", found["pass"], found["loop"]),
        value(f"{masks}: from the cache", "s", cached.wall, below=1.0),
    ]


SECTIONS = {
    "step": ("A training step of EIR against two teacher forwards and plain BCE", step),
    "loader": ("Pictures a second of the loader alone", loader),
    "memory": ("Peak memory of the distillation against plain BCE's", memory),
    "index": ("Classes of ten thousand masks", index),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("css", options, SECTIONS)


if __name__ == "__main__":
    main()
