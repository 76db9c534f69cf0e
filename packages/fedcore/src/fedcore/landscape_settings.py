"""Configuration of ``fed-landscape``. No torch.

The parser runs a module's ``if TYPE_CHECKING`` imports to understand its annotations, hence a module without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polymodal.errors import UserError

__all__ = ["LandscapeConfig", "gather_runs"]

FLAGS = ("--debug", "--print_config", "--help", "-h")
"""options without a value"""


@dataclass
class LandscapeConfig:
    """Curvature, sharpness and loss surface of trained models."""

    runs: list[Path] = field(default_factory=list)
    """run folders of fed-train, or checkpoint files in them"""
    checkpoint: Literal["last", "best"] = "last"
    """which checkpoint of a run folder"""
    split: Literal["train", "val", "test"] = "train"
    """samples that the loss is measured on"""
    samples: int = 1000
    """at most so many of them, the same for every run (0: all)"""
    batch_size: int = 500
    """samples of a forward pass"""
    iterations: int = 200
    """Hessian products of the power iteration, at most"""
    tolerance: float = 0.01
    """residual at which the power iteration stops, as a share of the eigenvalue"""
    radius: float = 0.1
    """distance of the sharpness, as a share of each filter's length"""
    directions: int = 20
    """random directions of the sharpness"""
    surface_radius: float = 1.0
    """half the side of the surface, as a share of each filter's length"""
    points: int = 21
    """points a side of the surface, odd (0: no surface)"""
    seed: int = 0
    """of the random directions"""
    out: Path | None = None
    """folder for landscape.json and the pictures (default: figures/ of each run)"""
    data_root: Path | None = None
    """another folder with the runs' data"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    threads: int | None = None
    """intra-op CPU threads (default 1)"""

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("batch_size", 1), ("iterations", 1), ("directions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}; expected at least {least}")
        for name in ("tolerance", "radius", "surface_radius"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}; expected more than 0")
        if self.points and (self.points < 3 or self.points % 2 == 0):
            raise UserError(f"points={self.points}; expected an odd number from 3, or 0 for no surface")


def gather_runs(arguments: Sequence[str]) -> list[str]:
    """Arguments without option name become ``--runs [...]``."""
    import json

    rest: list[str] = []
    runs: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            runs.append(word)
            continue
        rest.append(word)
        if "=" not in word and word not in FLAGS and waiting and not waiting[0].startswith("--"):
            rest.append(waiting.pop(0))
    return rest + ([f"--runs={json.dumps(runs, ensure_ascii=False)}"] if runs else [])
