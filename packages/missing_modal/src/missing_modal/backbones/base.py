"""What a frozen encoder (tower) of one modality offers to prompts: its blocks, one at a time (DCP 3.7)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from polymodal.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tower", "TowerSpec", "state_hash"]


@dataclass(frozen=True)
class TowerSpec:
    """Sizes of a tower, and what methods copy of it.

    Args:
        name: modality. width: d. depth: blocks (0: features only, nothing can be inserted). features: e. heads: H.
        norm_weight, norm_bias: (d,) of the last LayerNorm; norm_eps its epsilon.
        projection: (d, e) applied after it; None: e = d, no projection.
        train_projection: DCP trains a copy of the image projection, never of the text projection (DCP 3.5).
    """

    name: str
    width: int
    depth: int
    features: int
    heads: int
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    projection: Tensor | None
    train_projection: bool


class Tower(ABC):
    """A frozen encoder. It is no ``nn.Module``, so that it never gets into a checkpoint or an optimizer by accident.

    Attributes:
        spec: sizes.
        identity: ``kind:name`` of the weights, for messages and exports.
        causal: whether row i sees rows <= i only.
    """

    spec: TowerSpec
    identity: str
    causal: bool = False

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Inputs (b, ...) -> token rows before block 0, (b, S, d), positions added (for depth 0: features (b, e))."""

    @abstractmethod
    def block(self, index: int, h: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """One block on (b, R, d).

        Args:
            index: 0-based.
            h: rows.
            mask: additive (R, R) or (b, 1, R, R), or None.
            extra: keys and values (b, E, d) that join this block's own **after** the key and value projections, before
                the heads are split; every row sees them (MMP's attention level).
        """

    @abstractmethod
    def pool_rows(self, x: Tensor) -> Tensor:
        """(b,) int64: which token row of the inputs x is read at the end (CLS, end of text), prompts not counted."""

    @abstractmethod
    def placeholder(self, count: int) -> Tensor:
        """Inputs that stand for ``count`` missing samples (DCP 4.2)."""

    def length(self, x: Tensor) -> int | None:
        """Token rows that matter for inputs x; None: all. A causal tower may cut what lies behind the last end of text.

        One look at the device; data modules may cut on the host instead.
        """
        return None

    def mask(self, rows: int, like: Tensor) -> Tensor | None:
        """Additive mask for ``rows`` rows, prompts included: upper triangle -inf where causal, else None."""
        if not self.causal:
            return None
        return torch.full((rows, rows), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """All weights by name, for the hash and for moving."""

    def tuned(self) -> tuple[Tower, torch.nn.Module]:
        """A copy of the tower whose weights are trained, and the module whose parameters these are (fine-tuning).

        Without the last norm and projection, of which a method has its own copies. The copy reads its weights from the
        module at each call, so that moving the module moves them. UserError where a tower cannot be trained.
        """
        raise UserError(f"{self.identity}: this tower cannot be fine-tuned; choose a method that keeps it frozen")

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tower:
        """Move the frozen weights (in place) and return the tower."""


def state_hash(tower: Tower) -> str:
    """sha256 over names, shapes, dtypes and bytes of all weights, independent of the device."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state().items()):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(flat.shape)}|{flat.dtype}|".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
