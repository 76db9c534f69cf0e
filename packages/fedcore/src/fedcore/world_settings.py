"""Which clients and which model a run has, as options of the commands. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.errors import UserError

__all__ = ["ModelConfig", "PartitionConfig"]


@dataclass
class PartitionConfig:
    """Who has which samples."""

    scheme: Literal["dirichlet_client", "dirichlet_label", "shards", "iid", "column"] = "dirichlet_client"
    """dirichlet_client: label mix a client (papers); dirichlet_label: split of each label; column: natural clients"""
    clients: int = 40
    """number of clients (N); column: as many as there are"""
    alpha: float = 0.1
    """Dirichlet concentration, less is more skewed"""
    samples: int = 0
    """samples a client of dirichlet_client (0: training samples / clients)"""
    refill: bool = True
    """dirichlet_client deals a class again when it is used up, so that samples are on several clients (papers)"""
    shards: int = 2
    """shards a client"""
    seed: int | None = None
    """seed of the partition (default: the run's)"""
    file: Path | None = None
    """stored partition (JSON of fed-data) instead of all this"""

    def __post_init__(self) -> None:
        if self.file is not None:
            self.file = Path(self.file).expanduser()
        for name, least in (("clients", 1), ("shards", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise UserError(f"partition.{name}={getattr(self, name)}; expected at least {least}")


@dataclass
class ModelConfig:
    """What is trained."""

    name: str = "mlp"
    """mlp, lenet5, cnn, resnet18_gn, deit_tiny, bag, text_transformer, timm:NAME, hf:FOLDER"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the model, e.g. {hidden: [64]}"""
