"""Configuration of ``mm-eval`` and ``mm-predict``, and the configuration of the run behind a checkpoint. No torch.

The parser runs a module's ``if TYPE_CHECKING`` imports to understand its annotations, hence a module without any.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from polymodal.config import JobConfig
from polymodal.errors import UserError

from missing_modal.data import READERS, MissingConfig, MMData
from missing_modal.settings import LoaderConfig, MMConfig

__all__ = [
    "BackboneChoice",
    "EvalConfig",
    "MissingChoice",
    "PredictConfig",
    "RunData",
    "existing",
    "gather",
    "loader_for",
    "missing_for",
    "reader_for",
    "run_config_of",
]

Device = Literal["auto", "cpu", "cuda", "mps"]
_FLAGS = ("--debug", "--print_config")
"""Options that take no value."""
_INPUTS = ("image", "text", "audio", "tabular")
_LISTS = ("without", "sample")


@dataclass
class RunData(MMData):
    """Placeholder on the command line: the data of the checkpoint's run.

    Args:
        root: another folder with the same data set; default: where the run had it.
    """

    name: ClassVar[str] = "run"

    def resolve(self, base: MMData) -> MMData:
        """``base`` with the root that was given here."""
        return base if self.root is None else dataclasses.replace(base, root=self.root)


@dataclass
class BackboneChoice:
    """The encoders, where they are not where the training run had them."""

    name: str | None = None
    """open_clip:MODEL, hf_clip:FOLDER, small (default: the training run's)"""
    weights: Path | None = None
    """file with their weights; small: towers.safetensors of the run (default: the training run's)"""


@dataclass
class MissingChoice:
    """What is missing in the evaluated split; what is not given is as in the training run's."""

    kind: str | None = None
    """image, text, both; any, only:NAME for other modalities; none: everything that the data have"""
    ratio: float | None = None
    """share of the rows that lack something, 0..1"""
    seed: int | None = None
    """of the table"""
    tables: Path | None = None
    """folder with tables in place of drawn ones"""


@dataclass
class EvalConfig(JobConfig):
    """Scores by pattern of a trained model on any split, under any missing table."""

    checkpoint: Path | None = None
    """run folder of mm-train (its best weights), a file of checkpoints/ or an exported .safetensors"""
    split: Literal["test", "val", "train"] = "test"
    """part of the data"""
    batch_size: int | None = None
    """samples in a batch (default: the training run's)"""
    num_workers: int | None = None
    """processes that decode (default: the training run's)"""
    device: Device = "auto"
    """where to compute; float32 everywhere"""
    export: Path | None = None
    """folder that also receives trainable.safetensors and baked.safetensors"""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """number format of baked.safetensors"""
    data: MMData = field(default_factory=RunData, metadata={"class_typed": True})
    """the training run's data where not given"""
    missing: MissingChoice = field(default_factory=MissingChoice)
    backbone: BackboneChoice = field(default_factory=BackboneChoice)


@dataclass
class PredictConfig:
    """Classes of one sample, or of the rows of a JSONL file, whatever they lack."""

    checkpoint: Path | None = None
    """run folder of mm-train (its best weights), a file of checkpoints/ or an exported .safetensors"""
    inputs: dict[str, str] = field(default_factory=dict)
    """one sample: --image FILE --text TEXT --audio FILE --tabular 1,2,3, --inputs.NAME VALUE; the others are missing"""
    jsonl: Path | None = None
    """file with a sample a line: {"id": ..., "image": FILE, "text": TEXT, ...}; null or absent: missing"""
    sample: list[str] = field(default_factory=list)
    """ids of samples of the training run's data"""
    without: list[str] = field(default_factory=list)
    """modalities to be left out, as if they were missing"""
    out: Path | None = None
    """JSONL file for the results (default: a line a sample on the terminal)"""
    overwrite: bool = False
    """replace the file of results"""
    top: int = 3
    """classes that are printed for a sample"""
    calibrated: bool = True
    """divide logits by the temperature of the sample's pattern"""
    batch_size: int = 64
    """samples in a batch"""
    device: Device = "auto"
    """where to compute; float32 everywhere"""
    threads: int | None = None
    """intra-op CPU threads (default 1)"""
    backbone: BackboneChoice = field(default_factory=BackboneChoice)

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}; expected at least 1")


def gather(arguments: Sequence[str]) -> list[str]:
    """Arguments as the parser takes them.

    An argument without option name is the checkpoint; the values of ``--image``, ``--text``, ``--inputs.NAME`` become
    one JSON object, those of ``--without`` and ``--sample`` JSON lists. JSON, because the parser reads values as YAML,
    in which the text ``no`` is not a text.
    """
    inputs: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        option, eq, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            rest.append(word if word.startswith("-") else f"--checkpoint={word}")
        elif name in _LISTS:
            values = [value] if eq else _taken(waiting)
            if name == "without":  # names have no commas, ids of samples may
                values = [part for one in values for part in one.split(",") if part]
            lists.setdefault(name, []).extend(values)
        elif (name in _INPUTS or option.startswith("--inputs.")) and (eq or waiting):
            value = value if eq else waiting.pop(0)
            inputs[option.removeprefix("--").removeprefix("inputs.")] = value
        else:
            rest.append(word)
            if not eq and option not in _FLAGS and waiting and not waiting[0].startswith("--"):
                rest.append(waiting.pop(0))
    rest += [f"--{name}={json.dumps(values, ensure_ascii=False)}" for name, values in lists.items()]
    return rest + ([f"--inputs={json.dumps(inputs, ensure_ascii=False)}"] if inputs else [])


def _taken(waiting: list[str]) -> list[str]:
    """What stands in front of the next option, taken out."""
    found = []
    while waiting and not waiting[0].startswith("--"):
        found.append(waiting.pop(0))
    return found


def existing(checkpoint: Path | None, usage: str) -> Path:
    """The checkpoint, before torch is imported: a wrong path is told at once.

    Raises:
        UserError: none given, or nothing there.
    """
    where = "give a run folder of mm-train, a file of its checkpoints/, or an exported .safetensors file"
    if checkpoint is None:
        raise UserError(f"no checkpoint given; usage: {usage}; {where}")
    path = checkpoint.expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {where}")
    return path


def run_config_of(path: Path) -> MMConfig | None:
    """Configuration of the run that a file or folder lies in; None where no ``config.yaml`` of mm-train is around it.

    Raises:
        UserError: a configuration that this version does not understand.
    """
    from polymodal.cli import parse_config

    path = path.expanduser().absolute()
    for folder in (path, *path.parents[:2]):  # files lie in checkpoints/ and export/
        file = folder / "config.yaml"
        if file.is_file() and (folder / "manifest.json").is_file():
            try:
                arguments = ["--config", str(file)]
                config = parse_config(MMConfig, arguments, presets="missing_modal", choices={"data": READERS})
            except UserError as error:
                raise UserError(
                    f"{file}: {error}; was the run written by another version of missing_modal, or by mm-eval?"
                ) from error
            assert isinstance(config, MMConfig)  # None only with --print_config
            return config
    return None


def reader_for(data: MMData, run: MMConfig | None, meta: Mapping[str, Any], path: Path) -> MMData:
    """The data to look at: what was given, or the run's.

    Args:
        data: as on the command line.
        run: configuration of the training run, where it is known.
        meta: what the model says of itself.
        path: its file, for messages.

    Raises:
        UserError: no data known, or data of other classes or modalities than the model's.
    """
    if isinstance(data, RunData):
        if run is None:
            raise UserError(
                f"{path}: no config.yaml of its run around it says where {meta.get('data', 'its data')} is; give "
                "--data and --data.root"
            )
        data = data.resolve(run.data)
    for what, have, want in (
        ("classes", data.class_names(), list(meta["class_names"])),
        ("modalities", list(data.modalities), list(meta["modalities"])),
        ("kind of labels", [data.task], [meta["task"]]),
    ):
        if list(have) != want:
            place = next((i for i, pair in enumerate(zip(have, want, strict=False)) if pair[0] != pair[1]), None)
            detail = (
                f"{len(have)} and {len(want)} of them" if place is None else f"{have[place]!r}, not {want[place]!r}"
            )
            raise UserError(
                f"--data {data.name} has other {what} than {path} was trained on ({detail}); give the data set of "
                "the training run, or train on this one"
            )
    return data


def missing_for(base: MissingConfig, given: MissingChoice) -> MissingConfig:
    """The run's missing tables with what was given; a table that was drawn anew takes the place of files."""
    changed: dict[str, Any] = {}
    if given.kind is not None:
        changed |= {"kind": given.kind, "test_kind": given.kind}
    if given.ratio is not None:
        changed |= {"ratio": given.ratio, "test_ratio": given.ratio}
    if given.seed is not None:
        changed["seed"] = given.seed
    if changed or given.tables is not None:
        changed["tables"] = given.tables
    return dataclasses.replace(base, **changed)


def loader_for(config: EvalConfig, run: MMConfig | None) -> LoaderConfig:
    """Loader options of an evaluation: the run's, with those given."""
    given = {"eval_batch_size": config.batch_size, "num_workers": config.num_workers}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(run.loader if run is not None else LoaderConfig(), **changed)
