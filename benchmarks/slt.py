"""Speed of sign language translation: packed frames, cached beam search, rates of each stage, data wait, step split.

python benchmarks/slt.py                  # all sections, about half an hour on one thread
python benchmarks/slt.py packed beam      # some of them
python benchmarks/slt.py --quick          # does it run?
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package slt behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, Samples, interleave, parse, run_sections, speedup, value
from benchmarks._slt_inputs import (
    PHOENIX_FRAMES,
    mixed_lengths,
    phoenix_folder,
    prefix_search,
    synthetic_config,
    translator,
)

FORWARD = "the whole forward pass"


def packed(options: Options) -> list[Row]:
    """Frame encoder over packed frames against clips padded to the longest."""
    sizes = [("resnet18", 64, mixed_lengths(8, 100), 20), ("tiny", 24, mixed_lengths(8), 20)]
    if options.quick:
        sizes = [("resnet18", 32, [2, 5], 2), ("tiny", 24, [3, 9], 2)]
    return [row for size in sizes for row in _packed(options, *size)]


def _packed(options: Options, backbone: Any, pixels: int, lengths: list[int], runs: int) -> list[Row]:
    import torch
    from slt.config import ModelConfig
    from slt.models.backbones import build_backbone

    torch.manual_seed(0)
    cnn = build_backbone(ModelConfig(backbone=backbone, width=64, heads=4, text_heads=4)).to(options.device)
    longest, valid = max(lengths), sum(lengths)
    clips = [torch.randint(256, (n, 3, pixels, pixels), dtype=torch.uint8) for n in lengths]
    together = torch.cat(clips).to(options.device)
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).flatten(0, 1).to(options.device)
    inside = (torch.arange(longest) < torch.tensor(lengths)[:, None]).flatten().to(options.device)

    def evaluation(frames: Any) -> Callable[[], None]:
        def call() -> None:
            cnn.eval()
            with torch.inference_mode():
                cnn(frames)

        return call

    def training(frames: Any, rows: Any) -> Callable[[], None]:
        def call() -> None:
            cnn.train()
            features = cnn(frames)
            (features if rows is None else features[rows]).sum().backward()

        return call

    bound = len(lengths) * longest / valid
    rows = []
    for what, ours, theirs in (
        ("forward", evaluation(together), evaluation(padded)),
        ("forward and backward", training(together, None), training(padded, inside)),
    ):
        found = interleave({"ours": ours, "padded": theirs}, options.times(runs), 1, options.sync)
        label = f"{backbone}, {pixels} px, {valid} frames of {len(lengths)} clips, padded {bound:.2f} times: {what}"
        detail = {"lengths": lengths, "frames_padded_over_valid": bound}
        rows.append(speedup(label, found["ours"], found["padded"], at_least=0.9 * bound, **detail))
    return rows


def beam(options: Options) -> list[Row]:
    """Beam search with keys and values kept, against decoding the prefix again at each token."""
    width, layers, tokens, vocabulary, source = (32, 1, 4, 50, 5) if options.quick else (1024, 3, 40, 3000, 31)
    rows = []
    for batch, runs in ((1, 20), (4, 6)):
        rows += _beam(options, batch, runs, width, layers, tokens, vocabulary, source)
    return rows


def _beam(
    options: Options, batch: int, runs: int, width: int, layers: int, tokens: int, vocabulary: int, source: int
) -> list[Row]:
    import torch
    from slt.models.generate import generate
    from transformers.modeling_outputs import BaseModelOutput

    model, vocab = translator(width, layers, tokens, vocabulary)
    model = model.to(options.device)
    states = torch.randn(batch, source, width, generator=torch.Generator().manual_seed(0)).to(options.device)
    mask = torch.ones(batch, source, dtype=torch.bool, device=options.device)

    def ours(use_cache: bool) -> list[list[int]]:
        return generate(model, BaseModelOutput(last_hidden_state=states), mask, vocab, 4, tokens, 1.0, use_cache)

    functions: dict[str, Callable[[], Any]] = {
        "cached": lambda: ours(True),
        "generate without a cache": lambda: ours(False),
        "a loop over prefixes": lambda: prefix_search(model, states, mask, vocab, 4, tokens),
    }
    texts = {name: function() for name, function in functions.items()}  # the warm-up
    found = interleave(functions, options.times(runs), 0, options.sync)
    attention = model.config._attn_implementation
    rows = []
    for name in list(functions)[1:]:
        same = sum(a == b for a, b in zip(texts["cached"], texts[name], strict=True))
        label = f"beam 4, width {width}, {layers} layers, {tokens} tokens, batch {batch}, against {name}"
        detail = {"source": source, "vocabulary": vocabulary, "attention": attention, "same_translations": same}
        rows.append(speedup(label, found["cached"], found[name], at_least=4.0, **detail))
    rows.append(_per_second(f"the same, batch {batch}, cached", batch, found["cached"]))
    return rows


def rates(options: Options) -> list[Row]:
    """Clips a second of decoding, frame encoder and generation, each alone."""
    return [*_synthetic_rates(options), *_phoenix_rates(options)]


def _per_second(what: str, count: float, samples: Samples, **detail: Any) -> Row:
    return value(what, "clips/s", [count / seconds for seconds in samples.wall], **detail)


def _synthetic_rates(options: Options) -> list[Row]:
    import torch
    from slt.data.transforms import ClipTransform
    from slt.train import build_module, data_module, make_tokenizer

    small = ["--data.sizes", "[8,4,4]"] if options.quick else []
    config = synthetic_config(*small)
    tokenizer = make_tokenizer(config)
    module = build_module(config, tokenizer, stage=2).to(options.device).eval()
    data = data_module(config, tokenizer)
    batch = next(iter(data.loader("test"))).to(options.device)
    items = config.data.items("test")[: len(batch)]
    transform = ClipTransform(config.loader.frame_size, config.loader.resize)
    model = module.model

    def decode() -> None:
        for item in items:
            transform(config.data.load(item, range(item.num_frames)))

    def encode() -> None:
        with torch.inference_mode():
            model.encode_video(batch.frames, batch.lengths)

    sign = model.encode_video(batch.frames, batch.lengths)

    def translate() -> None:
        model.encode_video = lambda *arguments: sign  # type: ignore[method-assign]  # generation alone
        try:
            model.generate(batch, 4, module.max_new_tokens)
        finally:
            del model.encode_video

    found = interleave({"decode": decode, "encode": encode, "translate": translate}, options.times(20), 1, options.sync)
    clip = f"synthetic world, {float(batch.lengths.float().mean()):.0f} frames of 24 px a clip"
    return [
        _per_second(f"{clip}: decode PNG files", len(items), found["decode"]),
        _per_second(f"{clip}: tiny CNN and temporal convolutions", len(batch), found["encode"], batch=len(batch)),
        _per_second(f"{clip}: text encoder, fusion, beam 4", len(batch), found["translate"], batch=len(batch)),
    ]


def _phoenix_rates(options: Options) -> list[Row]:
    import torch
    from PIL import Image
    from slt.config import ModelConfig
    from slt.data.cache import build_frame_cache, with_frame_cache
    from slt.data.phoenix import Phoenix2014T
    from slt.data.transforms import ClipTransform
    from slt.models.backbones import build_backbone
    from torchvision.transforms.v2 import functional as F

    frames, passed = (3, 2) if options.quick else (PHOENIX_FRAMES, 16)
    cnn = build_backbone(ModelConfig(backbone="resnet18")).to(options.device).eval()
    pixels = torch.randint(256, (passed, 3, 224, 224), dtype=torch.uint8).to(options.device)
    transform = ClipTransform(224, 256)
    with phoenix_folder((1, 0, 0), frames) as home:
        reader = Phoenix2014T(root=home)
        (item,) = reader.items("train")
        names = sorted(Path(item.source[0]).iterdir())
        size = sum(path.stat().st_size for path in names)
        build_frame_cache(reader, home.parent / "cache", splits=("train",))
        cached = with_frame_cache(reader, home.parent / "cache")

        def by_frame() -> None:
            images = [F.resize(Image.open(path).convert("RGB"), [256, 256]) for path in names]
            torch.stack([F.pil_to_tensor(F.center_crop(image, [224, 224])) for image in images])

        functions: dict[str, Callable[[], Any]] = {
            "decode": lambda: transform(reader.load(item, range(frames))),
            "by frame": by_frame,
            "cache": lambda: transform(cached.load(item, range(frames))),
        }
        found = interleave(functions, options.times(20), 1, options.sync)

    def encode() -> None:
        with torch.inference_mode():
            cnn(pixels)

    encoded = interleave({"encode": encode}, options.times(20), 1, options.sync)["encode"]
    clip = f"{frames} frames of 210 x 260 px, {size / frames / 1024:.0f} KiB each"
    return [
        _per_second(f"{clip}: decode, resize, crop", 1, found["decode"]),
        speedup(f"{clip}: decode, resize, crop, against PIL frame by frame", found["decode"], found["by frame"]),
        speedup(f"{clip}: from the frame cache, against PNG files", found["cache"], found["decode"]),
        _per_second(f"resnet18 at 224 px, clip of {frames} frames", passed / frames, encoded, frames_timed=passed),
    ]


def wait(options: Options) -> list[Row]:
    """Share of a training step spent waiting for data, of ``slt-train`` itself."""
    rows = []
    clips = "[32,4,4]" if options.quick else "[1500,8,8]"
    with tempfile.TemporaryDirectory() as temporary:
        world = ["--data", "synthetic", "--data.root", temporary, "--data.sizes", clips]
        epochs = ["--trainer.max_epochs", "2", "--trainer.log_every_steps", "1" if options.quick else "10"]
        rows += _waits(options, "slt-train, synthetic world", world, epochs, 24, Path(temporary) / "frames")
    frames = 2 if options.quick else 32
    paper = ["--config", "phoenix2014t_qa", "--stage", "2", "--trainer.max_epochs", "2", "--loader.batch_size", "2"]
    paper += ["--trainer.log_every_steps", "1", "--tokenizer.kind", "word", "--model.backbone_weights", "null"]
    for name, size in (("width", "64"), ("ffn", "64"), ("text_layers", "1"), ("encoder_layers", "1")):
        paper += [f"--model.{name}", size]  # a small translator: the frame encoder has to hide the decoding alone
    with phoenix_folder((4 if options.quick else 12, 2, 2), frames) as home:
        data = ["--data", "phoenix2014t", "--data.root", str(home)]
        what = f"slt-train, clips of {frames} frames, resnet18 at 224 px, augmented"
        rows += _waits(options, what, data, paper, 256, home.parent / "frames")
    return rows


def _waits(options: Options, what: str, data: list[str], train: list[str], size: int, cache: Path) -> list[Row]:
    _command("slt.data_command", ["cache", *data, "--size", str(size), "--out", str(cache)])
    off = ["--loader.cache_frames", "false"]
    rows = []
    for source, extra, below in (
        ("frame cache on disk", [*off, "--loader.frame_cache", str(cache)], 10.0),
        ("PNG files", off, None),
        ("frame cache in memory", ["--loader.cache_frames", "true"], 10.0),
    ):
        shares, steps = [], []
        with tempfile.TemporaryDirectory() as out:
            fixed = ["--audit.enabled", "false", "--log.wandb", "off", "--trainer.progress", "none", "--out", out]
            _command("slt.train", [*data, *train, *fixed, "--threads", str(options.threads), *extra])
            (file,) = Path(out).glob("slt/*/metrics.csv")
            for row in csv.DictReader(file.open(encoding="utf-8")):
                if row["epoch"] != "0" and row["name"] == "perf/data_wait":  # epoch 0 fills caches, also the disk's
                    shares.append(100 * float(row["value"]))
                if row["epoch"] != "0" and row["name"] == "perf/step_ms":
                    steps.append(float(row["value"]))
        label = f"{what}: wait on {source}"
        rows.append(value(label, "% of a step", shares, below=below, step_ms=round(statistics.median(steps), 1)))
    return rows


def _command(module: str, arguments: list[str]) -> None:
    """Run a console command as a user would, quietly."""
    code = f"import sys; from {module} import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def split(options: Options) -> list[Row]:
    """Where a training step of the synthetic preset goes."""
    import torch
    from slt.train import build_module, data_module, make_tokenizer

    config = synthetic_config(*(["--data.sizes", "[48,4,4]"] if options.quick else []))
    tokenizer = make_tokenizer(config)
    module = build_module(config, tokenizer, stage=2).to(options.device).train()
    data = data_module(config, tokenizer)
    data.setup("fit")
    module.total_steps = 1000
    optimizer = module.configure_optimizers()["optimizer"]
    model, clock = module.model, _Clock(options)
    decoder = model.translator
    for name, part in {
        "frame CNN": model.visual.backbone,
        "temporal convolutions": model.visual.temporal,
        "text encoder": model.text_encoder,
        "fusion": model.fusion,
        "translator's encoder": decoder.model.encoder,
        "translator's decoder": decoder.model.decoder,
        "output layer": decoder.lm_head,
    }.items():
        clock.watch(name, part)
    steps: list[dict[str, float]] = []
    epoch = 0
    while len(steps) < options.times(60) + 5:
        assert data.train_sampler is not None
        data.train_sampler.set_epoch(epoch)
        epoch += 1
        batches = iter(data.train_dataloader())
        for _ in range(len(data.train_sampler)):
            clock.start()
            batch = clock.time("data (decoded clips in memory)", lambda: next(batches).to(options.device))  # noqa: B023
            loss, _ = clock.time(FORWARD, lambda: module.loss(batch, torch.Generator()))  # noqa: B023
            optimizer.zero_grad(set_to_none=True)
            clock.time("backward pass", loss.backward)
            clock.time("clipping", lambda: torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0))
            clock.time("optimizer", optimizer.step)
            if epoch > 1:  # the first epoch decodes
                steps.append(clock.parts())
    return _shares(steps[5 : options.times(60) + 5])


class _Clock:
    """Seconds by part of one step; forward hooks time modules."""

    def __init__(self, options: Options) -> None:
        self.options, self.watched = options, set[str]()
        self.spent, self.began = dict[str, float](), dict[str, float]()

    def now(self) -> float:
        self.options.sync()
        # CPU time where possible: another process' turn in the middle of a part would count for that part.
        return time.process_time() if self.options.device == "cpu" else time.perf_counter()

    def start(self) -> None:
        self.spent = {}

    def add(self, name: str, began: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + self.now() - began

    def time(self, name: str, function: Callable[[], Any]) -> Any:
        began = self.now()
        result = function()
        self.add(name, began)
        return result

    def watch(self, name: str, module: Any) -> None:
        self.watched.add(name)
        module.register_forward_pre_hook(lambda *_: self.began.__setitem__(name, self.now()))
        module.register_forward_hook(lambda *_: self.add(name, self.began[name]))

    def parts(self) -> dict[str, float]:
        whole = self.spent.pop(FORWARD)
        inner = sum(seconds for name, seconds in self.spent.items() if name in self.watched)
        return {**self.spent, "rest of the forward pass": whole - inner}


def _shares(steps: list[dict[str, float]]) -> list[Row]:
    totals = [sum(step.values()) for step in steps]
    rows = []
    for name in steps[0]:
        shares = [100 * step.get(name, 0.0) / total for step, total in zip(steps, totals, strict=True)]
        middle = 1000 * statistics.median(step.get(name, 0.0) for step in steps)
        rows.append(value(f"{name} ({middle:.2f} ms)", "% of a step", shares, ms=round(middle, 3)))
    return [*sorted(rows, key=lambda row: -row.ours), value("whole step", "ms", [1000 * total for total in totals])]


SECTIONS = {
    "packed": ("Packed frames against padded frames through the frame encoder", packed),
    "beam": ("Cached beam search against decoding the prefix again", beam),
    "rates": ("Clips a second of each stage alone", rates),
    "wait": ("Waiting for data in training", wait),
    "split": ("A training step of the synthetic preset, by part (CPU time)", split),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("slt", options, SECTIONS)


if __name__ == "__main__":
    main()
