"""``slt-data``: check, describe, convert and cache data sets; write question files and the synthetic world."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.cli import command, subcommands
from polymodal.errors import UserError
from polymodal.progress import progress_line

from slt.data import READERS
from slt.data.base import SPLITS, SLTData
from slt.data.leak import THRESHOLD
from slt.data.synthetic import Synthetic

__all__ = ["main"]

EXAMPLE = """
slt-data validate --data phoenix2014t --data.root DIR        # layout, questions, leakage, some frames
slt-data stats --data csl_daily --data.root DIR              # sizes; what the questions alone are worth
slt-data build --source template --data phoenix2014t --data.root DIR --out DIR/questions
slt-data synth --out DIR                                     # a small world in PHOENIX layout
"""
_log = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """Options of every command that reads a data set."""

    data: SLTData = field(default_factory=Synthetic, metadata={"class_typed": True})
    """reader of the data set"""


@dataclass
class ValidateConfig(DataConfig):
    """Check layout, annotation, question files and clips."""

    frames: Literal["none", "sample", "all"] = "sample"
    """decode no clip, the ends of 20 clips a split, or every frame of every clip"""
    threshold: float = THRESHOLD
    """largest share of a sentence's content tokens that its question may repeat, 0..1"""
    allow_leaks: bool = False
    """report leaking questions instead of failing"""


@dataclass
class BuildConfig(DataConfig):
    """Write question files: from templates, or converted from the predecessor's files."""

    source: Literal["template", "gbt"] = "template"
    """template: topic questions from a keyword table; gbt: the predecessor's files"""
    out: Path | None = None
    """folder for {train,dev,test}.jsonl; empty: where the reader looks for questions"""
    train: Path | None = None
    """gbt: file of the training split"""
    dev: Path | None = None
    """gbt: file of the dev split"""
    test: Path | None = None
    """gbt: file of the test split"""
    layout: Literal["phoenix", "csl"] | None = None
    """gbt: form of the lines; empty: by the first line"""
    seed: int = 0
    """template: chooses among wordings"""
    overwrite: bool = False
    """replace question files"""


@dataclass
class StatsConfig(DataConfig):
    """Sizes, texts, leakage, and the scores of the questions alone."""


@dataclass
class CacheConfig(DataConfig):
    """Write a cache of decoded frames, or of the features of a frozen ResNet-18."""

    what: Literal["frames", "features"] = "frames"
    """frames: uint8 pictures of one size; features: 512 numbers a frame, for a frozen backbone without augmentation"""
    out: Path | None = None
    """folder to write; empty: in the user's cache"""
    size: int = 256
    """frames: height and width, pixels (loader.resize must be the same)"""
    weights: Path | None = None
    """features: file with ImageNet weights of torchvision's resnet18"""
    frame_size: int = 224
    """features: height and width that the backbone sees, pixels"""
    resize: int = 256
    """features: height and width before the centre crop, pixels"""
    device: str = "cpu"
    """features: where the backbone runs"""
    workers: int = 1
    """frames: decoding threads"""
    overwrite: bool = False
    """replace an existing cache"""


@dataclass
class SynthConfig:
    """Write the synthetic world: glyphs that move, in the layout of PHOENIX-2014T."""

    out: Path | None = None
    """folder for worlds; empty: the user's cache, where slt-train looks"""
    seed: int = 0
    """seed of glyphs, sentences and noise"""
    sizes: tuple[int, int, int] = (1500, 300, 300)
    """clips in train, dev and test"""
    frame_size: int = 24
    """height and width, pixels"""
    noise: float = 0.1
    """standard deviation of the pixel noise, in units of the glyph's contrast"""
    distractors: int = 0
    """words of other topics in a question, 0..3"""


@dataclass
class TrimConfig(DataConfig):
    """Cut an mBART checkpoint down to the pieces that the training texts use."""

    model: Path | None = None
    """folder of an mBART checkpoint"""
    out: Path | None = None
    """folder to write"""


@dataclass
class FingerspellingConfig:
    """Join real letter recordings into words: a folder for --data poses."""

    lexicon: Path | None = None
    """folder assets/fingerspelling_lexicon of the package spoken-to-signed"""
    out: Path | None = None
    """folder to write"""
    split: Literal["recordings", "words"] = "recordings"
    """recordings: sign languages are held out; words: words are held out, recordings are shared"""
    folds: int = 5
    """recordings: number of folds"""
    fold: int = 0
    """recordings: the fold to test on"""
    letter_frames: int = 12
    """frames per letter; 0: all"""
    seed: int = 0
    """wording of questions, held-out words"""


def validate(config: ValidateConfig) -> None:
    """Check a data set and print what was found.

    Raises:
        UserError: the first thing that is wrong.
    """
    from slt.data.leak import check_leaks, format_reports
    from slt.data.survey import broken_clips, leak_reports

    data = config.data
    data.check()
    sizes = ", ".join(f"{split} {len(data.items(split))}" for split in SPLITS)
    _say(f"{data.name}: layout, annotation and questions can be read ({sizes} clips)")
    reports = leak_reports(data, config.threshold)
    _say("\n" + format_reports([report for _, report in reports]) + "\n")
    problems = broken_clips(data, config.frames, progress=progress_line("clips decoded"))
    for problem in problems[:20]:
        _say(f"broken: {problem}")
    if problems:
        raise UserError(f"{len(problems)} clips cannot be decoded, first: {problems[0]}")
    for path, report in reports:
        if not config.allow_leaks:
            check_leaks(path, report)
    _say("ok" if config.frames != "none" else "ok (no frame was decoded)")


def build(config: BuildConfig) -> None:
    """Write question files and print their leakage.

    Raises:
        UserError: bad input files, ids or sentences that do not fit the annotation, or existing files.
    """
    from slt.data.gbt import convert
    from slt.data.leak import format_reports, leak_report
    from slt.data.questions import match_questions, write_questions
    from slt.data.survey import raw_sentences
    from slt.data.templates import build_template_questions

    data = config.data
    out = config.out or data.questions or data.questions_default()
    if out is None:
        raise UserError("no folder to write to; give --out DIR, or the data set's folder with --data.root DIR")
    files = {"train": config.train, "dev": config.dev, "test": config.test}
    splits = [split for split in SPLITS if config.source == "template" or files[split] is not None]
    if not splits:
        raise UserError("--source gbt needs at least one of --train FILE, --dev FILE, --test FILE")
    taken = [path for split in splits if (path := out / f"{split}.jsonl").exists()]
    if taken and not config.overwrite:
        raise UserError(f"{taken[0]} exists; choose another folder with --out, or replace it with --overwrite true")
    made = {}
    for split in splits:
        sentences, file = raw_sentences(data, split), files[split]
        if config.source == "template" or file is None:
            made[split] = build_template_questions(sentences, data.language, config.seed)
        else:
            rows = convert(file, config.layout)
            made[split] = list(match_questions(file, rows, sentences, allow_missing=data.allow_missing).values())
    for split, questions in made.items():
        count = write_questions(out / f"{split}.jsonl", questions)
        _say(f"{out / f'{split}.jsonl'}: {count} questions")
    _say("\n" + format_reports([leak_report(split, rows, data.language) for split, rows in made.items()]))
    _say(f"\nuse them: slt-train --data {data.name} --data.root {data.root or 'DIR'} --data.questions {out}")


def stats(config: StatsConfig) -> None:
    """Print tables about a data set."""
    from slt.data.leak import format_reports
    from slt.data.survey import leak_reports, statistics_text

    _say(statistics_text(config.data))
    _say("\n" + format_reports([report for _, report in leak_reports(config.data)]))


def cache(config: CacheConfig) -> None:
    """Write a cache and print its size.

    Raises:
        UserError: a folder that exists, a broken clip, too little space, or unusable weights.
    """
    from polymodal.data import cache_dir

    from slt.data.cache import build_feature_cache, build_frame_cache

    data = config.data
    if config.what == "features" and config.weights is None:
        raise UserError("--what features needs --weights FILE, trained weights of torchvision's resnet18")
    out = config.out or cache_dir("slt", config.what, f"{data.name}-{data.fingerprint()[:12]}")
    start, progress = time.monotonic(), progress_line("clips cached")
    if config.what == "frames":
        total = build_frame_cache(
            data, out, size=config.size, workers=config.workers, overwrite=config.overwrite, progress=progress
        )
    else:
        from slt.config import ModelConfig
        from slt.models.backbones import build_backbone

        total = build_feature_cache(
            data,
            build_backbone(ModelConfig(backbone="resnet18", backbone_weights=str(config.weights))),
            out,
            frame_size=config.frame_size,
            resize=config.resize,
            device=config.device,
            overwrite=config.overwrite,
            progress=progress,
        )
    seconds = time.monotonic() - start
    _say(
        f"{out}: {total['clips']} clips, {total['frames']} frames, {total['bytes'] / 2**20:.1f} MiB "
        f"in {seconds:.1f} s ({total['frames'] / seconds:.0f} frames/s)"
    )


def synth(config: SynthConfig) -> None:
    """Write the synthetic world and say how it is used."""
    data = Synthetic(
        root=config.out,
        world_seed=config.seed,
        sizes=config.sizes,
        frame_size=config.frame_size,
        noise=config.noise,
        distractors=config.distractors,
    )
    data.prepare()
    counts = ", ".join(f"{split} {len(data.items(split))}" for split in SPLITS)
    _say(f"{data.world()}: {counts} clips")
    _say(
        f"read it as PHOENIX: --data phoenix2014t --data.root {data.home()} --data.questions {data.questions_default()}"
    )


def trim(config: TrimConfig) -> None:
    """Trim an mBART checkpoint to the training texts.

    Raises:
        UserError: no model or output folder given, or no mBART checkpoint.
    """
    if config.model is None or config.out is None:
        raise UserError("trimming needs --model DIR (an mBART checkpoint) and --out DIR")
    from slt.tokenizer import trim_vocabulary

    texts = [text for item in config.data.items("train") for text in (item.sentence, item.question) if text]
    tokenizer = trim_vocabulary(config.model, texts, config.out, config.data.language)
    _say(f"{config.out}: {tokenizer.vocab_size} pieces for {len(texts)} texts")
    _say(f"use it: slt-train --model.pretrained_text {config.out} --tokenizer.path {config.out}")


def fingerspelling(config: FingerspellingConfig) -> None:
    """Build the fingerspelling data set.

    Raises:
        UserError: no folders given, an incomplete lexicon, or bad options.
    """
    if config.lexicon is None or config.out is None:
        raise UserError(
            "give --lexicon DIR (assets/fingerspelling_lexicon of the package spoken-to-signed: pip download "
            "spoken-to-signed --no-deps, then unpack the wheel as a zip) and --out DIR"
        )
    from slt.data.fingerspelling import build_fingerspelling

    counts = build_fingerspelling(
        config.lexicon,
        config.out,
        split=config.split,
        folds=config.folds,
        fold=config.fold,
        letter_frames=config.letter_frames,
        seed=config.seed,
    )
    _say(f"{config.out}: " + ", ".join(f"{split} {count}" for split, count in counts.items()) + " words")
    _say(f"use it: slt-train --data poses --data.root {config.out}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


_TABLE: dict[str, tuple[str, Callable[[Any], None], type[Any], str]] = {
    "validate": ("check layout, questions, leakage and clips", validate, ValidateConfig, "--frames all"),
    "build": ("write question files (template, gbt)", build, BuildConfig, "--source template --out DIR"),
    "stats": ("sizes, texts, and what the questions alone are worth", stats, StatsConfig, ""),
    "cache": ("cache decoded frames or frozen features", cache, CacheConfig, "--what frames --workers 4"),
    "synth": ("write the synthetic world in PHOENIX layout", synth, SynthConfig, "--out DIR"),
    "trim": ("trim an mBART checkpoint to the training texts", trim, TrimConfig, "--model DIR --out DIR"),
    "fingerspelling": (
        "spell words with real letter recordings",
        fingerspelling,
        FingerspellingConfig,
        "--lexicon DIR --out DIR",
    ),
}


def _runner(name: str) -> Callable[[Sequence[str]], int]:
    _, function, config_class, options = _TABLE[name]
    data = "data" in config_class.__dataclass_fields__
    example = f"slt-data {name}{' --data phoenix2014t --data.root DIR' if data else ''} {options}".rstrip()

    def run(arguments: Sequence[str]) -> int:
        return command(
            function,
            config_class,
            prog=f"slt-data {name}",
            example=example,
            choices={"data": READERS} if data else None,
            argv=arguments,
        )

    return run


def main() -> int:
    """Entry point of ``slt-data``; returns the exit code."""
    return subcommands(
        {name: (row[0], _runner(name)) for name, row in _TABLE.items()}, prog="slt-data", example=EXAMPLE
    )
