"""Speed of missing-modality prompts: skipped towers, prompt tables, cut texts, frozen weights, the evaluation matrix.

python benchmarks/missing_modal.py              # all sections, about ten minutes on one thread
python benchmarks/missing_modal.py skip         # some of them
python benchmarks/missing_modal.py gpu --device cuda
python benchmarks/missing_modal.py --quick      # does it run?
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package missing_modal behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import (
    Options,
    Row,
    Samples,
    against,
    interleave,
    overhead,
    parse,
    run_sections,
    speedup,
    value,
)

if TYPE_CHECKING:
    from benchmarks._mm_inputs import Shape

KINDS, RATES, SEEDS = ("both", "image", "text"), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0), (0, 1, 2, 3, 4)
"""of the full evaluation matrix"""


def _shape(options: Options) -> Shape:
    from benchmarks._mm_inputs import SMALL, Shape

    return SMALL if options.quick else Shape()


def _inference(function: Callable[[], Any]) -> Callable[[], Any]:
    """Without a graph."""
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return function()

    return call


def loop(options: Options) -> list[Row]:
    """Everything together against the plain loop over samples, with the same logits."""
    from benchmarks._mm_inputs import Step, classifier, draw_batch, plain_logits, require_same, two_towers

    shape = _shape(options)
    model, rows = classifier(shape, two_towers(shape)), []
    for what, longest, runs in (("titles", 16 if not options.quick else 8, 5), ("full texts", shape.context, 3)):
        batch = draw_batch(shape, longest=longest)
        forwards = {
            "ours": partial(model, batch),
            "batched": partial(plain_logits, model, batch, True),
            "single": partial(plain_logits, model, batch, False),
        }
        require_same(forwards)
        for mode in ("training step", "inference"):
            train = mode != "inference"
            functions = {k: Step(model, f, batch.labels) if train else _inference(f) for k, f in forwards.items()}
            found = interleave(functions, options.times(runs), 1, options.sync)
            label = f"{what} of {longest} tokens, {shape.name}: {mode}"
            rows += [
                speedup(f"{label}, against prompts by sample, towers in batches", found["ours"], found["batched"]),
                speedup(f"{label}, against one sample at a time", found["ours"], found["single"]),
            ]
    return rows


def skip(options: Options) -> list[Row]:
    """The tower of a missing modality left out, against a dense batch that encodes placeholders."""
    from benchmarks._mm_inputs import Step, classifier, draw_batch, macs, require_same, two_towers

    shape = _shape(options)
    towers, rows = two_towers(shape), []
    ours, dense = classifier(shape, towers), classifier(shape, towers, skip=False)
    for kind in KINDS:
        batch = draw_batch(shape, kind)
        forwards = {"ours": partial(ours, batch), "dense": partial(dense, batch)}
        require_same(forwards)
        counts = [len(batch.rows[name]) for name in ("image", "text")]
        every = [shape.batch, shape.batch]
        ideal = macs(shape, every, shape.context) / macs(shape, counts, shape.context)
        for mode in ("training step", "inference"):
            models = {"ours": ours, "dense": dense}
            functions = {
                key: Step(models[key], forward, batch.labels) if mode != "inference" else _inference(forward)
                for key, forward in forwards.items()
            }
            found = interleave(functions, options.times(7 if kind == "both" else 5), 1, options.sync)
            rows.append(
                speedup(
                    f"70 % {kind}, {shape.name}: {mode} (MAC ratio {ideal:.2f})",
                    found["ours"],
                    found["dense"],
                    at_least=1.35 if kind == "both" and mode == "training step" else None,
                    macs=ideal,
                )
            )
    return rows


def tables(options: Options) -> list[Row]:
    """Prompt tables once a step, for the patterns of the batch, against once for each sample."""
    from benchmarks._mm_inputs import CLIP_B16, SMALL, Step, classifier, draw_batch, two_towers

    shape = _shape(options)
    batch = draw_batch(shape)
    patterns = sorted(set(batch.masks))
    model = classifier(shape, two_towers(shape))
    learner: Any = model.prompter.prompts
    functions: dict[str, Callable[[], Any]] = {
        "step": Step(model, partial(model, batch), batch.labels),
        "once": lambda: _backward(learner, [learner.tables(patterns)]),
        "loop": lambda: _backward(learner, [learner.tables([mask]) for mask in batch.masks]),
    }
    found = interleave(functions, options.times(11), 2, options.sync)
    step, once, each = (found[key].wall for key in ("step", "once", "loop"))
    label = f"{shape.name}, depth {shape.depth}"
    rows = [
        value(
            f"{label}: tables of {len(patterns)} patterns, share of the training step",
            "%",
            [100 * a / b for a, b in zip(once, step, strict=True)],
        ),
        value(
            f"{label}: tables for each sample, share of a step that makes them",
            "%",
            [100 * c / (b - a + c) for a, b, c in zip(once, step, each, strict=True)],
        ),
        speedup(f"{label}: tables, forward and backward, against those for each sample", found["once"], found["loop"]),
    ]
    from missing_modal.prompts import CorrelatedPrompts

    large = SMALL if options.quick else CLIP_B16
    wide = CorrelatedPrompts(list(large.widths), large.length, large.depth)
    masks = draw_batch(replace(large, side=large.patch)).masks
    timed = interleave(
        {
            "once": lambda: _backward(wide, [wide.tables(patterns)]),
            "loop": lambda: _backward(wide, [wide.tables([mask]) for mask in masks]),
        },
        options.times(11),
        2,
    )
    what = f"widths of ViT-B/16 ({large.widths[0]} and {large.widths[1]}), batch {large.batch}"
    rows.append(speedup(f"{what}: the same", timed["once"], timed["loop"]))
    return rows


def _backward(learner: Any, found: list[Any]) -> None:
    """Backward pass of tables, as if every value mattered alike; the gradients are dropped."""
    import torch

    values = [
        tensor
        for one in found
        for tensor in [*(rows for deep in one.deep for rows in deep), *one.common, *one.probe]
        if tensor is not None
    ]
    torch.stack([tensor.sum() for tensor in values]).sum().backward()
    learner.zero_grad(set_to_none=True)


def cut(options: Options) -> list[Row]:
    """Rows behind the batch's last end of text left out, against all positions."""
    from benchmarks._mm_inputs import Step, classifier, draw_batch, macs, require_same, two_towers

    shape = _shape(options)
    towers, rows = two_towers(shape), []
    short, whole = classifier(shape, towers), classifier(shape, towers, cut=False)
    longest = 8 if options.quick else 16
    for kind, ratio, label in (("both", 0.7, "70 % both"), ("image", 1.0, "texts alone")):
        batch = draw_batch(shape, kind, ratio, longest)
        models = {"ours": short, "whole": whole}
        forwards = {key: partial(model, batch) for key, model in models.items()}
        require_same(forwards)
        counts = [len(batch.rows.get(name, ())) for name in ("image", "text")]
        ideal = macs(shape, counts, shape.context) / macs(shape, counts, longest)
        for mode in ("training step", "inference"):
            functions = {
                key: Step(models[key], forward, batch.labels) if mode != "inference" else _inference(forward)
                for key, forward in forwards.items()
            }
            found = interleave(functions, options.times(7), 1, options.sync)
            what = f"{label}, {longest} of {shape.context} positions, {shape.name}: {mode} (MAC ratio {ideal:.2f})"
            rows.append(speedup(what, found["ours"], found["whole"], macs=ideal))
    return rows


def frozen(options: Options) -> list[Row]:
    """A training step on frozen towers against the same step whose backward pass also makes weight gradients."""
    from benchmarks._mm_inputs import Step, classifier, draw_batch, require_same, two_towers, with_gradients

    shape = _shape(options)
    batch, towers = draw_batch(shape), two_towers(shape)
    model = classifier(shape, towers)
    twins, weights = with_gradients(towers)
    other = classifier(shape, twins)
    forwards = {"frozen": partial(model, batch), "gradients": partial(other, batch)}
    require_same(forwards)
    functions: dict[str, Callable[[], Any]] = {
        "forward": _inference(forwards["frozen"]),
        "frozen": Step(model, forwards["frozen"], batch.labels),
        "gradients": Step(other, forwards["gradients"], batch.labels, weights),
    }
    found = interleave(functions, options.times(11), 1, options.sync)
    what = f"70 % both, {shape.name}: training step"
    return [
        speedup(f"{what}, against one with weight gradients", found["frozen"], found["gradients"]),
        overhead(f"{what}, frozen towers, over a forward pass", found["frozen"], found["forward"], at_most=2.5),
        overhead(f"{what}, weight gradients, over a forward pass", found["gradients"], found["forward"]),
    ]


def memory(options: Options) -> list[Row]:
    """Peak memory of a training step, each in a process of its own."""
    from benchmarks._mm_inputs import peak_memory

    found: dict[str, list[float]] = {"frozen": [], "gradients": [], "dense": []}
    for _ in range(options.times(3)):
        for kind, raised in found.items():
            raised.append(peak_memory(kind, options.quick))
    what = f"70 % both, {_shape(options).name}: training step"
    return [
        against(f"{what}, frozen towers, against weight gradients", "MiB", found["frozen"], found["gradients"]),
        against(f"{what}, missing towers skipped, against a dense batch", "MiB", found["frozen"], found["dense"]),
    ]


def matrix(options: Options) -> list[Row]:
    """All cells of the evaluation matrix against the passes that they are looked up in."""
    from missing_modal.matrix import sweep
    from missing_modal.passes import run_passes
    from missing_modal.settings import LoaderConfig

    from benchmarks._mm_inputs import Arrays, classifier, two_towers, world_classifier

    shape = _shape(options)
    few, many, some = (40, 40, 6) if options.quick else (2000, 8000, 40)
    cases = [
        ("two classes, towers of 3 blocks of 32", world_classifier(2), Arrays(count=few), 256, 5),
        ("23 labels, towers of 3 blocks of 32", world_classifier(23), Arrays(count=many, labels=23), 256, 3),
        (f"23 labels, {shape.name}", classifier(shape, two_towers(shape)),
         Arrays(count=some, labels=23, shape=shape), shape.batch, 3),
    ]  # fmt: skip
    rows = []
    cells = len(KINDS) * len(RATES) * len(SEEDS)
    for label, model, reader, batch, runs in cases:
        reader.samples("test")
        loader, passes, whole = LoaderConfig(eval_batch_size=batch), Samples(), Samples()
        for run in range(options.times(runs) + 1):
            clocks = [(time.process_time(), time.perf_counter())]
            cache = run_passes(model, reader, "test", loader)
            clocks.append((time.process_time(), time.perf_counter()))
            found = list(sweep(cache, KINDS, RATES, SEEDS, "arrays"))
            clocks.append((time.process_time(), time.perf_counter()))
            if len(found) != cells:
                raise RuntimeError(f"{len(found)} cells in place of {cells}")
            for samples, end in ((passes, 1), (whole, 2)) if run else ():
                samples.cpu.append(clocks[end][0] - clocks[0][0])
                samples.wall.append(clocks[end][1] - clocks[0][1])
        what = f"{reader.count} samples, {label}"
        each = [1000 * (a - b) / cells for a, b in zip(whole.wall, passes.wall, strict=True)]
        rows += [
            overhead(f"{what}: {cells} cells and their 3 passes, over the passes", whole, passes, at_most=1.2),
            value(f"{what}: a cell", "ms", each),
        ]
    return rows


def gpu(options: Options) -> list[Row]:
    """Sizes of CLIP ViT-B/16 on an accelerator, towers in bfloat16, training as under bf16-mixed."""
    import torch

    from benchmarks._mm_inputs import (
        CLIP_B16,
        SMALL,
        Step,
        classifier,
        draw_batch,
        macs,
        plain_logits,
        require_same,
        two_towers,
        with_gradients,
    )

    if options.device == "cpu" and not options.quick:
        raise SystemExit("the section gpu needs --device cuda")
    shape, device = (SMALL if options.quick else CLIP_B16), options.device
    longest = 8 if options.quick else 16
    batch, whole = draw_batch(shape, longest=longest).to(device), draw_batch(shape).to(device)
    single = [tower.to(device) for tower in two_towers(shape)]
    half = [tower.to(device, torch.bfloat16) for tower in two_towers(shape)]
    full = classifier(shape, single).to(device)
    require_same({"ours": partial(full, batch), "plain loop": partial(plain_logits, full, batch, True)}, 1e-3)
    twins, weights = with_gradients(half)
    ours, dense = (classifier(shape, half, skip=skipping).to(device) for skipping in (True, False))
    other = classifier(shape, twins).to(device)

    def mixed(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                return function()

        return call

    counts = [len(whole.rows[name]) for name in ("image", "text")]
    ideal = macs(shape, [shape.batch] * 2, shape.context) / macs(shape, counts, shape.context)
    plan: list[tuple[str, Any, Callable[[], Any], list[Any]]] = [
        ("ours", ours, mixed(partial(ours, whole)), []),
        ("dense", dense, mixed(partial(dense, whole)), []),
        ("gradients", other, mixed(partial(other, whole)), weights),
        ("float32", full, partial(full, whole), []),
        ("titles", ours, mixed(partial(ours, batch)), []),
        ("plain", ours, mixed(partial(plain_logits, ours, batch, True)), []),
    ]
    rows = []
    for mode in ("training step", "inference"):
        functions = {
            key: Step(model, forward, whole.labels, others) if mode != "inference" else _inference(forward)
            for key, model, forward, others in plan
        }
        found = interleave(functions, options.times(20), 3, options.sync)
        what = f"{shape.name}, bfloat16, 70 % both: {mode}"
        least = 1.35 if mode == "training step" else None
        rows += [
            speedup(f"{what}, against a dense batch (MAC ratio {ideal:.2f})", found["ours"], found["dense"],
                    at_least=least, macs=ideal),
            speedup(f"{what}, against float32 towers", found["ours"], found["float32"]),
            speedup(f"{what}, titles of {longest} tokens, against prompts by sample", found["titles"], found["plain"]),
        ]  # fmt: skip
        if mode == "training step":
            rows.append(speedup(f"{what}, against one with weight gradients", found["ours"], found["gradients"]))
    return rows


SECTIONS = {
    "loop": ("All together against the plain loop over samples", loop),
    "skip": ("Missing towers skipped, against a dense batch", skip),
    "tables": ("Prompt tables once a step", tables),
    "cut": ("Texts cut at the last end of text", cut),
    "frozen": ("Frozen towers without weight gradients", frozen),
    "memory": ("Peak memory of a training step", memory),
    "matrix": ("The evaluation matrix against its passes", matrix),
}
GPU = {"gpu": ("CLIP ViT-B/16's sizes on an accelerator", gpu)}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    names = [*SECTIONS, *GPU]
    options = parse((__doc__ or "").splitlines()[0], names, argv)
    if options.sections == names and options.device == "cpu":
        options.sections = list(SECTIONS)
    run_sections("missing_modal", options, SECTIONS | GPU)


if __name__ == "__main__":
    main()
