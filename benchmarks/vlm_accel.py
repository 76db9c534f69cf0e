"""Speed of accelerated vision-language models: prefill, encoder, scoring, identity, decoding, against what MACs allow.

python benchmarks/vlm_accel.py                  # all sections, about a quarter of an hour on one thread
python benchmarks/vlm_accel.py prefill          # some of them
python benchmarks/vlm_accel.py gpu --device cuda
python benchmarks/vlm_accel.py --quick          # does it run?
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package vlm_accel behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, Samples, interleave, overhead, parse, run_sections, speedup, value
from benchmarks._vlm_inputs import QWEN7B, SMALL, Size, decode_seconds, prompt, vision_language_model


def prefill(options: Options) -> list[Row]:
    """keep35 and keep3 against the unmodified model."""
    size = SMALL if options.quick else Size()
    return _prefill(options, size, "float32", options.times(7), share=0.75)


def _prefill(options: Options, size: Size, dtype: str, runs: int, share: float, images: int = 1) -> list[Row]:
    import torch
    from vlm_accel import accelerate

    kind = getattr(torch, dtype)
    model = vision_language_model(size, options.device, kind)
    inputs = prompt(size, 1, options.device, kind, images=images)
    rows = []
    for name in ("keep35", "keep3"):
        with ExitStack() as stack:
            short = copy.deepcopy(model) if size.width < 2048 else model
            handle = None
            if short is not model:
                handle = stack.enter_context(accelerate(short, "lightvlm", schedule=name))
            found, handle = _alternate(model, short, handle, inputs, name, runs, options)
            ideal = handle.stats["ideal/prefill_speedup"]
            what = f"{name}, {size.layers} layers of {size.width}, {images * size.side**2} image tokens + 64, {dtype}"
            rows.append(
                speedup(
                    f"{what}: prefill (MAC ratio {ideal:.2f})",
                    found["ours"],
                    found["plain"],
                    at_least=share * ideal,
                    macs=ideal,
                )
            )
    return rows


def _alternate(
    model: Any, short: Any, handle: Any, inputs: dict[str, Any], name: str, runs: int, options: Options
) -> tuple[Mapping[str, Samples], Any]:
    """Forward of both in turns. Without a copy of the model (large ones) the acceleration is entered for each run."""
    import torch
    from vlm_accel import accelerate

    def forward(which: Any) -> None:
        with torch.inference_mode():
            which(**inputs, logits_to_keep=1, use_cache=True)

    if handle is not None:
        functions: dict[str, Callable[[], Any]] = {"ours": lambda: forward(short), "plain": lambda: forward(model)}
        return interleave(functions, runs, 2, options.sync), handle
    samples = {"ours": Samples(), "plain": Samples()}
    for run in range(runs + 2):
        for key in ("ours", "plain"):
            with ExitStack() as stack:
                if key == "ours":
                    handle = stack.enter_context(accelerate(model, "lightvlm", schedule=name))
                options.sync()
                cpu, wall = time.process_time(), time.perf_counter()
                forward(model)
                options.sync()
                if run >= 2:
                    samples[key].wall.append(time.perf_counter() - wall)
                    samples[key].cpu.append(time.process_time() - cpu)
    return samples, handle


def encoder(options: Options) -> list[Row]:
    """iLLaVA's image schedule on an encoder alone, batch 8."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from vlm_accel import Step, accelerate

    quick = options.quick
    layers, width, side, batch = (4, 64, 8, 2) if quick else (12, 512, 27, 8)
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8,
        image_size=14 * side, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SiglipVisionModel(config).eval()
    pixels = torch.randn(batch, 3, 14 * side, 14 * side)
    rows = []
    # The published schedule's shares (5 of 26 blocks in; 729 -> 361) at the same share of the depth, and a steeper one.
    for label, steps in (
        ("729 -> 361 from block 2", [Step("vision", layer, drop=92) for layer in (2, 3, 4, 5)]),
        ("729 -> 182 from block 2", [Step("vision", layer, ratio=0.25**0.25) for layer in (2, 3, 4, 5)]),
    ):
        steps = [Step("vision", 1, ratio=0.5)] if quick else steps
        for method in ("recycle", "rank1", "drop"):
            short = copy.deepcopy(model)
            with accelerate(short, method, schedule=steps) as handle, torch.inference_mode():
                found = interleave(
                    {"ours": lambda m=short: m(pixels), "plain": lambda: model(pixels)},
                    options.times(5),
                    1,
                    options.sync,
                )
                ideal = handle.stats["ideal/vision_speedup"]
            rows.append(
                speedup(
                    f"{method}, {label}, batch {batch} (MAC ratio {ideal:.2f})",
                    found["ours"],
                    found["plain"],
                    at_least=0.8 * ideal,
                    macs=ideal,
                )
            )
    return rows


def identity(options: Options) -> list[Row]:
    """Hooks in place, nothing shortened."""
    import torch
    from vlm_accel import accelerate, pyramid

    size = SMALL if options.quick else Size()
    model = vision_language_model(size)
    inputs = prompt(size, 1, "cpu", torch.float32)
    short = copy.deepcopy(model)
    with accelerate(short, "lightvlm", schedule=pyramid(1.0)), torch.inference_mode():
        found = interleave({"ours": lambda: short(**inputs), "plain": lambda: model(**inputs)}, options.times(11), 2)
    return [overhead("ratio 1 in all layers: prefill", found["ours"], found["plain"], at_most=1.02)]


class Stopwatch:
    """Seconds spent in a method of a class while it stands: score, merge, gathers of one step."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.original, self.seconds = owner, name, getattr(owner, name), 0.0
        original = self.original

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)

    def close(self) -> None:
        """Put the method back."""
        setattr(self.owner, self.name, self.original)


def scoring(options: Options) -> list[Row]:
    """Score and merge as a share of the prefill they shorten."""
    import torch
    from vlm_accel import accelerate
    from vlm_accel.llm.engine import Engine

    size = SMALL if options.quick else Size()
    model = vision_language_model(size)
    inputs = prompt(size, 1, "cpu", torch.float32)
    rows = []
    for name in ("keep35", "keep3"):
        for method in ("lightvlm", "drop"):
            with accelerate(model, method, schedule=name, kv="ratio:1.0"), torch.inference_mode():
                watch = Stopwatch(Engine, "_step")
                shares = []
                for run in range(options.times(7) + 2):
                    watch.seconds, start = 0.0, time.perf_counter()
                    model(**inputs, logits_to_keep=1, use_cache=True)
                    if run >= 2:
                        shares.append(100 * watch.seconds / (time.perf_counter() - start))
                watch.close()
            rows.append(value(f"{name}, {method}: score and merge, share of the prefill", "%", shares, below=5))
    return rows


def decode(options: Options) -> list[Row]:
    """Steps after the prefill, against DynamicCache and against a preallocated cache."""
    import torch
    from vlm_accel import accelerate, pyramid

    size = SMALL if options.quick else Size()
    steps = 8 if options.quick else 48
    model = vision_language_model(size)
    rows = []
    cases = [
        ("keep3, cache whole", {"schedule": "keep3", "kv": "ratio:1.0"}),
        ("keep3, cache ratio 0.5", {"schedule": "keep3"}),
        ("ratio 1, cache of 128", {"schedule": pyramid(1.0), "kv": "uniform:128"}),
        ("ratio 1, cache whole", {"schedule": pyramid(1.0)}),
    ]
    for batch in (1, 4):
        inputs = prompt(size, batch, "cpu", torch.float32)
        for label, settings in cases:
            short = copy.deepcopy(model)
            samples = {key: Samples() for key in ("ours", "dynamic", "static")}
            with accelerate(short, "lightvlm", **settings) as handle:
                for _ in range(options.times(3)):
                    for key, which in (("ours", short), ("dynamic", model), ("static", model)):
                        wall, cpu = decode_seconds(which, inputs, steps, options.sync, static=key == "static")
                        samples[key].wall.append(wall)
                        samples[key].cpu.append(cpu)
                ideal = handle.stats["ideal/decode_speedup"]
            what = f"{label}, batch {batch}: {steps} steps (bytes ratio {ideal:.2f})"
            rows.append(
                speedup(
                    f"{what} against DynamicCache", samples["ours"], samples["dynamic"], at_least=1 / 1.02, ideal=ideal
                )
            )
            rows.append(
                speedup(f"{what} against a preallocated cache", samples["ours"], samples["static"], ideal=ideal)
            )
    return rows


def gpu(options: Options) -> list[Row]:
    """Sizes of Qwen2.5-VL-7B in bfloat16, random weights: prefill of 1088 and 3428 tokens, decoding in batches."""
    import torch
    from vlm_accel import accelerate, pyramid

    if options.device == "cpu" and not options.quick:
        raise SystemExit("the section gpu needs --device cuda")
    size, dtype = (SMALL, "float32") if options.quick else (QWEN7B, "bfloat16")
    rows = _prefill(options, size, dtype, options.times(10), share=0.8)
    wide = replace(size, side=10 if options.quick else 58)
    rows += _prefill(options, wide, dtype, options.times(10), share=0.8)
    model = vision_language_model(size, options.device, getattr(torch, dtype))
    steps = 8 if options.quick else 256
    for batch in (1, 64, 256) if not options.quick else (1,):
        inputs = prompt(size, batch, options.device, getattr(torch, dtype))
        samples = {key: Samples() for key in ("ours", "plain")}
        for _ in range(options.times(3)):
            with accelerate(model, "lightvlm", schedule=pyramid(0.03), kv="uniform:512") as handle:
                samples["ours"].wall.append(decode_seconds(model, inputs, steps, options.sync)[0])
                ideal = handle.stats["ideal/decode_speedup"]
            samples["plain"].wall.append(decode_seconds(model, inputs, steps, options.sync)[0])
        for one in samples.values():
            one.cpu = list(one.wall)
        rows.append(
            speedup(
                f"budget 512, batch {batch}: {steps} steps (bytes ratio {ideal:.2f})",
                samples["ours"],
                samples["plain"],
                ideal=ideal,
            )
        )
    return rows


SECTIONS = {
    "prefill": ("Prefill of a shortened prompt against the unmodified model's", prefill),
    "encoder": ("An encoder with iLLaVA's steps against the unmodified one", encoder),
    "scoring": ("What scoring and merging cost", scoring),
    "identity": ("Hooks that shorten nothing", identity),
    "decode": ("Decoding with a shortened cache", decode),
}
GPU = {"gpu": ("Qwen2.5-VL-7B's sizes on an accelerator", gpu)}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    names = [*SECTIONS, *GPU]
    options = parse((__doc__ or "").splitlines()[0], names, argv)
    if options.sections == names and options.device == "cpu":
        options.sections = list(SECTIONS)
    run_sections("vlm_accel", options, SECTIONS | GPU)


if __name__ == "__main__":
    main()
