"""Low-rank adapters as options of the commands. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.errors import UserError

__all__ = ["LoraConfig", "numbers", "words"]


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) on a frozen base; off unless ranks are given."""

    ranks: Any = field(default_factory=list)
    """ranks of the clients, e.g. 2,4,6, repeated in turn where there are more clients (default: that of the adapter)"""
    targets: Any = field(default_factory=list)
    """linear layers that get an adapter, by the end of their name, e.g. query,value (default: by the model)"""
    head: Any = field(default_factory=list)
    """layers that are trained whole, by the end of their name (default: the classifier)"""
    scaling: float = 2.0
    """s in base + s B A, the same for all ranks"""
    alpha: float | None = None
    """PEFT's alpha: s = alpha / rank instead of scaling"""
    unequal_scaling: bool = False
    """accept that alpha over unequal ranks gives clients different s"""
    dropout: float = 0.0
    """of the adapters' input, 0..1"""
    init: Literal["auto", "kaiming", "qr", "qr_scaled"] = "auto"
    """auto: as the algorithm has it; kaiming: A random, B zero; qr: split of the weight; qr_scaled: of small size"""
    init_rms: float = 1e-4
    """root mean square entry of B A after qr_scaled"""
    adapter: Path | None = None
    """PEFT adapter folder whose factors the run starts from"""
    pretrain_epochs: int = 0
    """epochs of training the whole base on samples that no client gets, before it is frozen (0: none)"""
    pretrain_share: float = 0.2
    """share of the training samples with these labels that is set apart for that, 0..1"""
    pretrain_labels: Any = field(default_factory=list)
    """labels for that, e.g. 0,1,2,3,4 (default: all)"""
    pretrain_data: dict[str, Any] = field(default_factory=dict)
    """options of the reader that differ for that, e.g. {rotate: 0}"""
    pretrain_lr: float = 1e-3
    """rate of AdamW for that"""
    pretrain_batch_size: int = 32
    """samples of a step of that"""

    def __post_init__(self) -> None:
        self.ranks = numbers("lora.ranks", self.ranks)
        self.pretrain_labels = numbers("lora.pretrain_labels", self.pretrain_labels, least=0)
        self.targets, self.head = words(self.targets), words(self.head)
        self.adapter = None if self.adapter is None else Path(self.adapter).expanduser()
        for name, good, expected in (
            ("scaling", self.scaling > 0, "more than 0"),
            ("alpha", self.alpha is None or self.alpha > 0, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "0 <= dropout < 1"),
            ("init_rms", self.init_rms > 0, "more than 0"),
            ("pretrain_epochs", self.pretrain_epochs >= 0, "0 (none) or more"),
            ("pretrain_share", 0 < self.pretrain_share < 1, "0 < pretrain_share < 1"),
            ("pretrain_lr", self.pretrain_lr > 0, "more than 0"),
            ("pretrain_batch_size", self.pretrain_batch_size >= 1, "at least 1"),
        ):
            if not good:
                raise UserError(f"lora.{name}={getattr(self, name)}; expected {expected}")
        if self.alpha is not None and len(set(self.ranks)) > 1 and not self.unequal_scaling:
            raise UserError(
                f"lora.alpha={self.alpha:g} over ranks {','.join(map(str, self.ranks))} scales clients differently; "
                "give lora.scaling, the same for all, or --lora.unequal_scaling true to have it so"
            )

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return bool(self.ranks) or self.adapter is not None

    @property
    def pretrains(self) -> bool:
        """Whether the base is trained first."""
        return self.on and self.pretrain_epochs > 0

    def scaling_of(self, rank: int) -> float:
        """Scaling s of a client with this rank."""
        return self.scaling if self.alpha is None else self.alpha / rank


def words(value: Any) -> list[str]:
    """``"a,b"``, ``["a", "b"]`` or one number, as the command line reads names like ``3``, as a list."""
    items = value if isinstance(value, list | tuple) else [] if value is None else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def numbers(name: str, value: Any, least: int = 1) -> list[int]:
    """``"2,4,6"``, ``4`` or ``[2, 4, 6]`` as a list.

    Raises:
        UserError: not whole numbers of at least ``least``.
    """
    found = words(value)
    if not all(item.isdecimal() and int(item) >= least for item in found):
        raise UserError(f"{name}={value}; expected whole numbers of at least {least}, e.g. 2,4,6")
    return [int(item) for item in found]
