"""Inputs of the css benchmarks: pictures of VOC's size in its layout, the networks of a later step, batches."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from css.data.base import SegData
    from css.data.batch import Batch
    from css.data.options import LoaderConfig
    from css.methods.base import StepContext
    from css.methods.eir import EIR
    from css.settings import NetworkConfig
    from css.task import Task

VOC_SIZE = (375, 500)
"""Height and width of most VOC pictures."""


def photograph(rng: np.random.Generator, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Picture (375, 500, 3) and mask (375, 500), uint8: an ellipse a class, each in its own part, over a background.

    Soft patches of colour, grain at three sizes; as JPEG of quality 95 about as many bytes as VOC's. Objects have
    VOC's border of ignored pixels around them.
    """
    height, width = VOC_SIZE
    picture = _smooth(rng, 6) * 60 + 115
    mask = np.zeros(VOC_SIZE, np.uint8)
    y, x = np.mgrid[:height, :width]
    for place, number in enumerate(classes):
        part = width / len(classes)
        centre, radius = ((rng.uniform(0.4, 0.6) * height, (place + rng.uniform(0.4, 0.6)) * part), 0.38 * part)
        distance = np.hypot((y - centre[0]) / rng.uniform(0.8, 1.6), x - centre[1])
        mask[distance <= radius + 5] = 255
        mask[distance <= radius] = number
        picture[distance <= radius + 2] = (_smooth(rng, 12) * 40 + rng.uniform(60, 200, 3))[distance <= radius + 2]
    for cells, strength in ((60, 10), (190, 9)):
        picture += _smooth(rng, cells) * strength
    picture += rng.normal(0, 5, VOC_SIZE)[..., None]
    return picture.clip(0, 255).astype(np.uint8), mask


def _smooth(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(375, 500, 3) values about 0, between random ones at ``cells`` points a row."""
    from PIL import Image

    points = rng.normal(0, 1, (3, cells, cells)).astype(np.float32)
    size = VOC_SIZE[::-1]
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in points], 2)


@contextmanager
def voc_folder(pictures: int, drawn: int) -> Iterator[Path]:
    """VOC 2012 with ``pictures`` training pictures, of which ``drawn`` differ and the others are links to these.

    While it is open, css keeps its caches beside it.
    """
    with _temporary() as folder:
        home = folder / "VOC2012"
        lists = home / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        names = [f"2007_{number:06d}" for number in range(pictures)]
        _write(home / "JPEGImages", home / "SegmentationClass", names, drawn, 20)
        (lists / "train.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        (lists / "val.txt").write_text("\n".join(names[:20]) + "\n", encoding="utf-8")
        yield home


@contextmanager
def ade_folder(pictures: int) -> Iterator[Path]:
    """ADE20K's layout and number of classes, with pictures of VOC's size; else as ``voc_folder``."""
    with _temporary() as folder:
        home = folder / "ADEChallengeData2016"
        for split, count in (("training", pictures), ("validation", 4)):
            names = [f"ADE_{split[:5]}_{number:08d}" for number in range(1, count + 1)]
            _write(home / "images" / split, home / "annotations" / split, names, count, 150)
        yield home


def _write(images: Path, masks: Path, names: list[str], drawn: int, classes: int) -> None:
    """JPEG pictures and palette masks; every class comes up in as many consecutive pictures as there are classes."""
    from css.data.files import write_mask
    from PIL import Image

    for folder in (images, masks):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        if number < drawn:
            other = (number + number // classes + 7) % classes
            chosen = tuple(sorted({number % classes + 1, other + 1}))[: 1 + number % 3]
            picture, mask = photograph(rng, chosen)
            Image.fromarray(picture).save(images / f"{name}.jpg", quality=95)
            write_mask(masks / f"{name}.png", mask)
        else:
            first = names[number % drawn]
            (images / f"{name}.jpg").hardlink_to(images / f"{first}.jpg")
            (masks / f"{name}.png").hardlink_to(masks / f"{first}.png")


@contextmanager
def _temporary() -> Iterator[Path]:
    """A temporary folder, with css's caches in it: nothing stays in the user's."""
    before = os.environ.get("POLYMODAL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POLYMODAL_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["POLYMODAL_CACHE"]
            else:
                os.environ["POLYMODAL_CACHE"] = before


@dataclass
class LaterStep:
    """Step 1 of a task, ready to train.

    Args:
        ctx: networks (teacher with random weights) and decoded instances.
        method: EIR.
        data: loaders of the step, instance pictures among the training pictures.
    """

    ctx: StepContext
    method: EIR
    data: Any

    def batches(self, count: int, device: str) -> list[Batch]:
        """Training batches, over epochs until there are ``count``."""
        self.data.setup("fit")
        found: list[Batch] = []
        epoch = 0
        while len(found) < count:
            self.data.train_sampler.set_epoch(epoch)
            found += [batch.to(device) for batch in self.data.train_dataloader()]
            epoch += 1
        return found[:count]


def later_step(
    reader: SegData,
    task: Task,
    network: NetworkConfig,
    loader: LoaderConfig,
    *,
    folder: Path,
    method: EIR,
    budget: int = 100,
    device: str = "cpu",
) -> LaterStep:
    """Step 1 of a task as ``css-train`` sets it up, but for a teacher that was not trained.

    Its logits are near 0: it is sure of nothing, and without pseudo-labels each picture gets the most instances.
    """
    import torch
    from css.data.datamodule import CSSDataModule
    from css.memory import make_memory
    from css.memory.bank import InstanceBank
    from css.methods.base import StepContext
    from css.models.build import build_network

    torch.manual_seed(0)
    memory = make_memory(
        "instances",
        folder,
        reader=reader,
        task=task,
        fingerprint=reader.fingerprint(),
        step=1,
        setting="overlap",
        previous=None,
        budget=budget,
        seed=0,
        split_seed=0,
    )
    replay = list(memory.entries) if method.replays() else []
    data = CSSDataModule(reader, task, "overlap", 1, loader, replay=replay, mix=method.mix)
    old = build_network(network, [len(task.steps[0])], method=method).to(device)
    with torch.no_grad():  # untrained statistics would let the logits grow beyond all bounds
        for batch in itertools.islice(data.plain_batches(), 4):
            old.train()(batch.images.to(device))
        for parameter in old.head_parameters():
            parameter.mul_(0.02)
    net = build_network(network, [len(ids) for ids in task.steps[:2]], method=method).to(device)
    ctx = StepContext(1, net, task.num_old(1), len(task.steps[1]), old=old.frozen_copy())
    net.load_earlier(old.state_dict())
    method.init_new_head(ctx)
    if method.freeze_norm:
        net.freeze_norm()
    net.train()
    ctx.bank = InstanceBank(memory, device)
    return LaterStep(ctx, method, data)


def peak_memory(kind: str, channels: int, known: int, side: int, images: int) -> int:
    """Bytes by which forward and backward pass of a loss raise the peak of a process of its own (Linux).

    Args:
        kind: ``binary`` or a variant of the region distillation.
        channels: of the new network.
        known: channels of the old one.
        side: of the pictures, pixels.
        images: in the batch.
    """
    command = [sys.executable, __file__, kind, *map(str, (channels, known, side, images))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout)


def _raised(kind: str, channels: int, known: int, side: int, images: int) -> int:
    """``peak_memory`` of this process; logits, targets and old logits were there before and do not count."""
    import torch
    from css.ops.distill import region_distillation
    from css.ops.labels import one_hot
    from css.ops.losses import soft_binary_loss

    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, channels, (images, side, side), generator=draws)
    logits = torch.empty(images, channels, side, side).normal_(generator=draws).requires_grad_()
    target = one_hot(labels, channels) if kind == "binary" else torch.empty(0)
    old = torch.empty(0) if kind == "binary" else torch.empty(images, known, side, side).normal_(generator=draws)
    before = _status("VmRSS")
    loss = soft_binary_loss(logits, target) if kind == "binary" else region_distillation(logits, old, labels, kind)
    loss.backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of this process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the package css behind css.py
    import torch

    torch.set_num_threads(1)
    loss_kind, (new, old, *size) = sys.argv[1], map(int, sys.argv[2:])
    _raised(loss_kind, new, old, 8, 1)  # code and pools that the first call loads
    sys.stdout.write(str(_raised(loss_kind, new, old, *size)))
