"""Towers, batches and plain loops for the benchmark of missing_modal; its process of its own for peak memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if __package__ in (None, ""):  # started as a file: its folder would hide the package missing_modal
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from missing_modal.backbones.small import small_image, small_patches, small_text
from missing_modal.batch import Batch
from missing_modal.classifier import Classifier
from missing_modal.data.base import MMData, Sample, Task
from missing_modal.methods.dcp import DCP
from missing_modal.tables import draw_masks
from missing_modal.world import CHANNELS, CONTEXT, PATCHES, VOCABULARY
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower
    from missing_modal.prompts import DynamicAttention

MODALITIES = ("image", "text")


@dataclass(frozen=True)
class Shape:
    """Sizes of two towers, of the prompts and of a batch; heads are 64 wide, as in CLIP."""

    widths: tuple[int, int] = (256, 192)
    blocks: int = 8
    side: int = 224
    patch: int = 16
    context: int = 77
    vocabulary: int = 1000
    features: int = 128
    classes: int = 23
    batch: int = 20
    length: int = 36
    depth: int = 6

    @property
    def name(self) -> str:
        """Widths, blocks and batch, for rows."""
        return f"{self.blocks} blocks of {self.widths[0]} and {self.widths[1]}, batch {self.batch}"


SMALL = Shape(widths=(64, 64), blocks=2, side=32, patch=8, context=20, features=16, batch=6, length=6, depth=2)
CLIP_B16 = Shape(widths=(768, 512), blocks=12, vocabulary=49408, features=512, batch=60)


def two_towers(shape: Shape) -> list[Tower]:
    """An image and a text tower with random weights."""
    sizes: list[dict[str, Any]] = [
        {"width": width, "depth": shape.blocks, "heads": width // 64, "features": shape.features}
        for width in shape.widths
    ]
    return [
        small_image(shape.side, shape.patch, **sizes[0]),
        small_text(shape.vocabulary, shape.context, **sizes[1]),
    ]


def classifier(shape: Shape, towers: Sequence[Tower], **options: Any) -> Classifier:
    """DCP on these towers; the same initial values each time."""
    return Classifier(towers, DCP(length=shape.length, depth=shape.depth), shape.classes, **options)


def draw_batch(shape: Shape, kind: str = "both", ratio: float = 0.7, longest: int | None = None) -> Batch:
    """A batch under a drawn missing table, as the loader packs it.

    Args:
        shape: sizes.
        kind, ratio: of the table.
        longest: ids of the longest text, start and end included; the shortest has half as many. None: all positions.
    """
    draw = torch.Generator().manual_seed(1)
    count, longest = shape.batch, longest or shape.context
    masks = draw_masks(count, kind, ratio, 0, "benchmark", "train").tolist()
    held = {name: [i for i, mask in enumerate(masks) if mask >> bit & 1] for bit, name in enumerate(MODALITIES)}
    images = torch.randn(count, 3, shape.side, shape.side, generator=draw)
    texts = torch.randint(1, shape.vocabulary - 2, (count, shape.context), generator=draw)
    texts[:, 0] = shape.vocabulary - 2
    shortest = longest if longest == shape.context else longest // 2
    for row, end in enumerate(torch.linspace(longest, shortest, count).round().long().tolist()):
        texts[row, end - 1] = shape.vocabulary - 1
        texts[row, end:] = 0
    texts[held["text"][0]] = texts[0]  # the longest is among those that are there
    whole = {"image": images, "text": texts}
    return Batch(
        ids=[str(number) for number in range(count)],
        masks=masks,
        inputs={name: whole[name][rows] for name, rows in held.items() if rows},
        rows={name: torch.tensor(rows) for name, rows in held.items() if rows},
        labels=torch.arange(count) % shape.classes,
        lengths={"text": longest} if held["text"] else {},
    )


def macs(shape: Shape, runs: Sequence[int], text_rows: int) -> float:
    """Multiply-adds of both towers' blocks, forward.

    Args:
        shape: sizes.
        runs: samples that go through the image and the text tower.
        text_rows: token rows of a text.
    """
    total = 0.0
    for width, count, tokens in zip(shape.widths, runs, ((shape.side // shape.patch) ** 2 + 1, text_rows), strict=True):
        rows = shape.length + tokens
        total += count * shape.blocks * (12 * width**2 * rows + 2 * rows**2 * width)
    return total


# ------------------------------------------------------------------ the plain loop (specification 9)


def plain_logits(model: Classifier, batch: Batch, together: bool) -> Tensor:
    """What the released code computes, in its order: no skipping, no cut, prompts made sample by sample.

    Placeholders of what is missing are encoded, their features set to zero; dynamic prompts are an ordinary attention
    with keys and values of all tokens.

    Args:
        model: supplies parameters and towers.
        batch: packed samples.
        together: both towers run on the whole batch, as in the released code; False: on one sample at a time.
    """
    inputs = []
    for tower in model.towers:
        name = tower.spec.name
        held = tower.placeholder(len(batch))
        if name in batch.inputs:
            held = held.to(batch.inputs[name].device, batch.inputs[name].dtype)
            held[batch.rows[name]] = batch.inputs[name]
        inputs.append(held)
    learner: Any = model.prompter.prompts
    prompts = [_prompts_of_sample(learner, mask) for mask in batch.masks]
    if together:
        return _encode(model, inputs, prompts, batch.masks)
    logits = [
        _encode(model, [x[i : i + 1] for x in inputs], prompts[i : i + 1], batch.masks[i : i + 1])
        for i in range(len(batch))
    ]
    return torch.cat(logits)


@dataclass
class _Prompts:
    """Of one sample, by modality: correlated (J of (n, d)), common (n, d), queries (n, d)."""

    deep: list[list[Tensor]]
    common: list[Tensor]
    queries: list[Tensor]


def _prompts_of_sample(learner: Any, mask: int) -> _Prompts:
    state = [static[0 if mask >> place & 1 else 1] for place, static in enumerate(learner.static)]
    deep: list[list[Tensor]] = [[] for _ in state]
    for step in range(learner.depth):
        joined = torch.cat(state, dim=-1)
        state = [generators[step](joined) for generators in learner.generators]
        for place, rows in enumerate(state):
            deep[place].append(rows)
    source = learner.common([mask])[0]
    return _Prompts(deep, [make(source) for make in learner.common_maps], [q([mask])[0] for q in learner.queries])


def _encode(model: Classifier, inputs: Sequence[Tensor], prompts: Sequence[_Prompts], masks: Sequence[int]) -> Tensor:
    learner: Any = model.prompter.prompts
    features = []
    for number, (tower, x) in enumerate(zip(model.towers, inputs, strict=True)):
        tokens = tower.embed(x)
        kind = tokens.dtype
        deep = [torch.stack([one.deep[number][j] for one in prompts]).to(kind) for j in range(learner.depth)]
        common = torch.stack([one.common[number] for one in prompts]).to(kind)
        queries = torch.stack([one.queries[number] for one in prompts])
        dynamic = _attend(learner.attention[number], queries, tokens).to(kind)
        h = torch.cat([deep[0], common, dynamic, tokens], dim=1)
        mask = tower.mask(h.shape[1], h)
        for block in range(tower.spec.depth):
            if 0 < block < len(deep):
                h = torch.cat([deep[block], h[:, learner.n :]], dim=1)
            h = tower.block(block, h, mask)
        row = h[torch.arange(len(h), device=h.device), tower.pool_rows(x) + h.shape[1] - tokens.shape[1]]
        there = torch.tensor([mask >> number & 1 for mask in masks], device=h.device)
        features.append(model.prompter.finish(number, row) * there[:, None])
    joined = torch.cat(features, dim=1)
    with torch.autocast(joined.device.type, enabled=False):
        logits: Tensor = model.head(joined.to(model.head.weight.dtype))
    return logits


def _attend(attention: DynamicAttention, queries: Tensor, tokens: Tensor) -> Tensor:
    """Attention with one head: keys and values of all tokens, (b, n, d)."""
    weights, shifts = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    tokens = tokens.to(queries.dtype)
    query, key, value = (
        functional.linear(x, weight, shift)
        for x, weight, shift in zip((queries, tokens, tokens), weights, shifts, strict=True)
    )
    mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    out: Tensor = attention.out_proj(mixed)
    return out


def require_same(forwards: Mapping[str, Callable[[], Tensor]], tolerance: float = 1e-5) -> None:
    """Whether all give the first one's logits (``tolerance``, absolute).

    Raises:
        RuntimeError: they differ.
    """
    with torch.inference_mode():
        found = {name: forward() for name, forward in forwards.items()}
    first = next(iter(found.values()))
    for name, logits in found.items():
        apart = (logits - first).abs().max().item()
        if not apart <= tolerance:
            raise RuntimeError(f"{name}: logits differ by {apart:.2g}, more than {tolerance:g}")


# ------------------------------------------------------------------ training steps


class Step:
    """One training step: forward, cross-entropy, backward, AdamW on what is trained; gradients are dropped after it.

    Args:
        model: its parameters are trained, at a rate so low that repeated steps stay where they are.
        forward: (B, C) logits.
        labels: (B,).
        others: further tensors that get gradients (weights of towers), which no optimizer takes.
    """

    def __init__(
        self, model: Classifier, forward: Callable[[], Tensor], labels: Tensor | None, others: Sequence[Tensor] = ()
    ) -> None:
        assert labels is not None  # all batches here are labelled
        self.forward, self.labels, self.others = forward, labels, list(others)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-6, betas=(0.9, 0.98), weight_decay=2e-2, fused=True)

    def __call__(self) -> None:
        """The step."""
        functional.cross_entropy(self.forward(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for tensor in self.others:
            tensor.grad = None


def with_gradients(towers: Sequence[Tower]) -> tuple[list[Tower], list[Tensor]]:
    """Towers of the same weights whose weights ask for gradients, and these weights."""
    twins = [tower.tuned() for tower in towers]
    return [twin for twin, _ in twins], [weight for _, module in twins for weight in module.parameters()]


# ------------------------------------------------------------------ the evaluation matrix


@dataclass
class Arrays(MMData):
    """Random samples for a split ``test``: patches and ids of the two-modality world, or pixels and ids of a shape."""

    count: int = 0
    labels: int = 2
    shape: Shape | None = None

    name: ClassVar[str] = "arrays"

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Several labels a sample beyond two classes, as in MM-IMDb."""
        return "binary" if self.labels == 2 else "multilabel"

    def class_names(self) -> list[str]:
        """Numbers."""
        return [str(number) for number in range(self.labels)]

    def read_split(self, split: str) -> list[Sample]:
        """Samples of ``test``; the others are empty."""
        if split != "test":
            return []
        rng, shape = np.random.default_rng(0), self.shape
        size = (PATCHES, CHANNELS) if shape is None else (3, shape.side, shape.side)
        last, context = (VOCABULARY - 1, CONTEXT) if shape is None else (shape.vocabulary - 1, shape.context)
        images = rng.normal(size=(self.count, *size)).astype(np.float32)
        texts = rng.integers(1, last, (self.count, context))
        texts[:, -1] = last
        several = rng.integers(0, 2, (self.count, self.labels))
        return [
            Sample(
                f"{i:06d}",
                {"image": images[i], "text": texts[i]},
                i % 2 if self.labels == 2 else tuple(several[i].tolist()),
            )
            for i in range(self.count)
        ]

    def describe(self) -> dict[str, Any]:
        """Name and size."""
        return {"name": self.name, "fingerprint": f"{self.count}x{self.labels}"}


def world_classifier(classes: int) -> Classifier:
    """DCP on towers of the built-in world: width 32, three blocks."""
    towers = [small_patches(PATCHES, CHANNELS), small_text(VOCABULARY, CONTEXT)]
    return Classifier(towers, DCP(length=6, depth=2, reduction=4), classes)


# ------------------------------------------------------------------ memory


def peak_memory(kind: str, quick: bool) -> float:
    """MiB by which a training step raises the peak of a process of its own (Linux).

    Args:
        kind: ``frozen``, ``gradients`` (the towers' weights ask for gradients), ``dense`` (frozen, nothing skipped).
        quick: tiny sizes.
    """
    command = [sys.executable, __file__, kind, "quick" if quick else "full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout)


def _raised(kind: str, shape: Shape) -> float:
    towers, others = two_towers(shape), list[Tensor]()
    if kind == "gradients":
        towers, others = with_gradients(towers)
    model, batch = classifier(shape, towers, skip=kind != "dense"), draw_batch(shape)
    step = Step(model, lambda: model(batch), batch.labels, others)
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 2**20


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    _raised(sys.argv[1], SMALL)  # code and pools that the first call loads
    chosen = replace(SMALL, widths=(128, 128), batch=60) if sys.argv[2] == "quick" else Shape()
    sys.stdout.write(str(_raised(sys.argv[1], chosen)))
