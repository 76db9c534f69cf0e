"""Configuration of ``css-train``: what ``--help`` lists and YAML presets set. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.config import RunConfig
from polymodal.errors import UserError

from css.data.base import SegData
from css.data.options import LoaderConfig
from css.data.shapes import Shapes

__all__ = ["CSSConfig", "MemoryConfig", "NetworkConfig", "OptimConfig"]

Setting = Literal["overlap", "disjoint", "sequential", "partitioned"]


@dataclass
class NetworkConfig:
    """The segmentation network."""

    name: str = "deeplabv3_resnet101"
    """tiny, deeplabv3_resnet50, deeplabv3_resnet101, timm:NAME, hf:FOLDER, mmseg:CONFIG"""
    weights: Path | None = None
    """file with backbone weights (.pth or .safetensors; torchvision's names for ResNets); none: random"""
    width: int = 16
    """channels of the tiny network"""
    output_stride: Literal[8, 16] = 16
    """pixels of the image a pixel of DeepLab's features"""
    dropout: float = 0.1
    """dropout before the last convolution of DeepLab, 0..1"""


@dataclass
class OptimConfig:
    """SGD and its schedule; rates of step 0 and of later steps."""

    lr: float = 1e-3
    """backbone's rate in step 0"""
    later_lr: float = 1e-4
    """backbone's rate in later steps"""
    head_factor: float = 10.0
    """rate of neck and heads, in backbone rates"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = True
    """Nesterov's form of the momentum"""
    weight_decay: float = 1e-4
    """decay; see decay_later"""
    decay_later: Literal["new_head", "all"] = "new_head"
    """what decays in later steps (step 0: everything)"""
    schedule: Literal["poly", "warm_poly", "constant"] = "poly"
    """per optimizer step"""
    power: float = 0.9
    """of the polynomial"""
    warmup: float = 0.1
    """share of a step with linear warm-up (warm_poly), 0..1"""

    def __post_init__(self) -> None:
        for name in ("lr", "later_lr", "head_factor"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}={getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"optim.warmup={self.warmup}; expected 0 <= warmup < 1, a share of the step")


@dataclass
class MemoryConfig:
    """What is kept of earlier steps, for methods that replay."""

    budget: int = 100
    """entries over all old classes together"""
    connectivity: Literal[4, 8] = 4
    """neighbours that make pixels one object"""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise UserError(f"memory.budget={self.budget}; expected 0 or more")


@dataclass
class CSSConfig(RunConfig):
    """Continual semantic segmentation."""

    task: str = "2-1"
    """classes of the base step and of each later step, or offline"""
    setting: Setting = "overlap"
    """which pictures a step has: overlap, disjoint, sequential, partitioned"""
    order: list[int] | None = None
    """class ids in learning order (default: as in the data set)"""
    method: str = "eir"
    """see --list-methods"""
    method_options: dict[str, Any] = field(default_factory=dict)
    """options of the method, e.g. {threshold: 0.5}"""
    defaults_by_method: dict[str, Any] = field(default_factory=dict)
    """options of methods by their names, from a preset; method_options wins"""
    later_epochs: int = 0
    """epochs of later steps (0: trainer.max_epochs)"""
    data: SegData = field(default_factory=Shapes, metadata={"class_typed": True})
    """reader of the data set"""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def options_of_method(self) -> dict[str, Any]:
        """Options of the chosen method: the preset's for this method, then those given.

        Raises:
            UserError: the preset's are no mapping.
        """
        found = self.defaults_by_method.get(self.method) or {}
        if not isinstance(found, dict):
            raise UserError(f"defaults_by_method.{self.method}={found!r}; expected a mapping of options")
        return {**found, **self.method_options}
