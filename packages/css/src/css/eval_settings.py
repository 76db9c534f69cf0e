"""Configuration of ``css-eval`` and ``css-predict``, and the configuration of the run behind a checkpoint. No torch.

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

from css.data import READERS
from css.data.base import SegData
from css.data.options import LoaderConfig
from css.settings import CSSConfig

__all__ = ["EvalConfig", "PredictConfig", "RunData", "gather", "reader_for", "run_config_of"]

Device = Literal["auto", "cpu", "cuda", "mps"]
_FLAGS = ("--debug", "--print_config")
"""Options that take no value."""


@dataclass
class RunData(SegData):
    """Placeholder on the command line: the data of the checkpoint's run, some options replaced.

    Args:
        root: another folder with the same data set; default: where the run had it.
        split_files: another folder with split files; default: the run's.
    """

    name: ClassVar[str] = "run"

    def resolve(self, base: SegData) -> SegData:
        """``base`` with the options that were given here."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


@dataclass
class EvalConfig(JobConfig):
    """IoU by class and confusion of a trained network on any split."""

    seed: int = 0
    """of the setting partitioned, for --split train; the training run's where its config.yaml is there"""
    checkpoint: Path | None = None
    """run folder of css-train (its last finished step), step folder, weights.safetensors or a .ckpt file"""
    split: Literal["test", "val", "train"] = "test"
    """part of the data; of train, the pictures of the checkpoint's step, with labels of all classes seen"""
    eval_size: Literal["crop", "native"] = "crop"
    """central crop of the picture resized to the training crop (the published protocol), or whole pictures"""
    unseen_as: Literal["background", "ignore"] | None = None
    """label of classes not learnt yet (default: the training run's)"""
    batch_size: int | None = None
    """pictures in a batch (default: the training run's; 1 for native)"""
    num_workers: int | None = None
    """processes that decode pictures (default: the training run's)"""
    pictures: int = 6
    """pictures in the grid image / truth / prediction (0: none)"""
    device: Device = "auto"
    """where to compute; float32 everywhere"""
    data: SegData = field(default_factory=RunData, metadata={"class_typed": True})
    """the training run's data where not given"""


@dataclass
class PredictConfig:
    """Segment pictures with a trained network."""

    checkpoint: Path | None = None
    """run folder of css-train (its last finished step), step folder, weights.safetensors or a .ckpt file"""
    images: list[str] = field(default_factory=list)
    """picture files, or folders of them; one or more"""
    out: Path | None = None
    """folder that receives masks/, overlays/ and classes.json"""
    short_side: int | None = None
    """shorter side of what the network sees, pixels (default: the training crop, as in the test; 0: as the file)"""
    overwrite: bool = False
    """replace masks that are there"""
    device: Device = "auto"
    """where to compute; float32 everywhere"""
    threads: int | None = None
    """intra-op CPU threads (default 1)"""


def gather(arguments: Sequence[str], single: str, several: str = "") -> list[str]:
    """Arguments without option name become ``--<single>``; ``--<several> A B``, repeated or not, one JSON list.

    JSON, because the parser reads values as YAML, in which a file called ``no`` is not a text.
    """
    rest: list[str] = []
    values: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        option, eq, value = word.partition("=")
        if several and option == f"--{several}":
            values += [value] if eq else []
            while not eq and waiting and not waiting[0].startswith("--"):
                values.append(waiting.pop(0))
        elif word.startswith("-"):
            rest.append(word)
            if not eq and word not in _FLAGS and waiting and not waiting[0].startswith("--"):
                rest.append(waiting.pop(0))
        else:
            rest.append(f"--{single}={word}")
    return rest + ([f"--{several}={json.dumps(values, ensure_ascii=False)}"] if values else [])


def run_config_of(path: Path) -> CSSConfig | None:
    """Configuration of the run that a file or folder lies in; None where no ``config.yaml`` of css-train is around it.

    Raises:
        UserError: a configuration that this version does not understand.
    """
    from polymodal.cli import parse_config

    path = path.expanduser().absolute()
    for folder in (path, *path.parents[:3]):  # a weight file lies in steps/NN, a checkpoint in checkpoints
        file = folder / "config.yaml"
        if file.is_file() and (folder / "manifest.json").is_file():
            try:
                config = parse_config(CSSConfig, ["--config", str(file)], presets="css", choices={"data": READERS})
            except UserError as error:
                raise UserError(f"{file}: {error}; was the run written by another version of polymodal-css?") from error
            assert isinstance(config, CSSConfig)  # None only with --print_config
            return config
    return None


def reader_for(data: SegData, run: CSSConfig | None, meta: Mapping[str, Any], path: Path) -> SegData:
    """The data to look at: what was given, or the run's.

    Args:
        data: as on the command line.
        run: configuration of the training run, where it is known.
        meta: what the checkpoint says of itself.
        path: the checkpoint, for messages.

    Raises:
        UserError: no data known, or data of other classes than the network's.
    """
    name = str(meta["data"])
    if isinstance(data, RunData):
        if run is None:
            raise UserError(
                f"{path}: no config.yaml of its run around it says where {name} is; give --data and --data.root"
            )
        data = data.resolve(run.data)
    have, want = data.class_names(), list(meta["class_names"])
    if have != want:
        place = next((i for i, pair in enumerate(zip(have, want, strict=False)) if pair[0] != pair[1]), None)
        detail = (
            f"{len(have)} and {len(want)} of them"
            if place is None
            else f"class {place + 1} is {have[place]!r} and {want[place]!r}"
        )
        raise UserError(
            f"--data {data.name} has other classes than {path} was trained on ({name}): {detail}; give the data set of "
            "the training run, or train on this one"
        )
    return data


def loader_for(config: EvalConfig, run: CSSConfig | None, meta: Mapping[str, Any]) -> LoaderConfig:
    """Loader options of an evaluation: the run's, with those given."""
    loader = run.loader if run is not None else LoaderConfig()
    given: dict[str, Any] = {
        "eval_batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "unseen_as": config.unseen_as,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(loader, crop=int(meta["crop"]), eval_size=config.eval_size, saliency=None, **changed)
