"""FedAdamW: AdamW on the clients, with block means of its second moment and the last global move handed over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithms._adam import AdamFamily, Moment
from fedcore.ops.blocks import Blocks, hessian_blocks, tensor_blocks

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["FedAdamW"]

_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "code2025-07": {"mix": True, "v_blocks": "tensor", "bias": "code"},
    "code2025-11": {"v_blocks": "full", "bias": "code"},
}


@dataclass(frozen=True, kw_only=True)
class FedAdamW(AdamFamily):
    """AdamW on the clients; v starts a round from means over blocks and clients, steps lean to the last global move.

    Local step k of K, the t-th of all: ``theta <- (1 - eta lambda) theta - eta (mhat / (sqrt(vhat) + eps) + alpha D)``
    with ``mhat = m / (1 - b1^k)``, since m starts every round from zero, and ``vhat = v / (1 - b2^t)``, since v does
    not. D is the mean move of the round before over ``-K eta``. Which blocks the paper means by its Hessian is
    our reading (``fedcore.ops.blocks``); ``bound.blocks.table()`` prints them.

    The first round is ``local_adamw``; ``alpha=0, v_blocks="none"`` is ``local_adamw`` in all. Without decay, mean
    moves obey ``Delta_r = L_r + alpha (eta_r / eta_{r-1}) Delta_{r-1}``: a heavy ball over rounds.

    Sends ``2 P + blocks`` floats and t down, ``P + blocks`` up; clients keep nothing.

    Source: arXiv 2510.27486, by a transcription of its equations whose decay has the wrong sign; engineering after the
    authors' scripts.

    Args:
        alpha: weight of the last global move, 0 <= alpha < 1 (official: 0.5; 0.9 for GLUE).
        v_blocks: blocks of v: by ``hessian``, one a ``tensor``, ``full`` v without blocks, or ``none``, v from zero.
        mix: weight Adam's step by ``1 - alpha``, as the scripts up to July 2025 do.
        bias: bias correction of m by k (``local``), or by t as in the authors' ``code``, which makes the first steps
            of all later rounds smaller.
        variant: ``paper``, or a preset of the three options above: ``code2025-07`` (mix, tensor, code) or
            ``code2025-11`` (full, code).
    """

    alpha: float = 0.5
    v_blocks: Literal["hessian", "tensor", "full", "none"] = "hessian"
    mix: bool = False
    bias: Literal["local", "code"] = "local"
    variant: Literal["paper", "code2025-07", "code2025-11"] = "paper"

    blocks: ClassVar[Blocks | None] = None
    """``Blocks`` of the model after ``bind``, where v is divided into blocks."""

    def __post_init__(self) -> None:
        self._apply_variant()
        super().__post_init__()
        self.check("alpha", 0 <= self.alpha < 1, "0 <= alpha < 1, 0 leaves the last global move out")
        self.check("v_blocks", self.v_blocks in ("hessian", "tensor", "full", "none"), "hessian, tensor, full or none")
        self.check("bias", self.bias in ("local", "code"), "local or code")

    def _apply_variant(self) -> None:
        """Set the options of the preset; UserError where one of them was given another value."""
        if self.variant not in _VARIANTS:
            raise UserError(f"variant={self.variant!r}; expected {', '.join(_VARIANTS)}")
        defaults = {item.name: item.default for item in fields(self)}
        for name, value in _VARIANTS[self.variant].items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise UserError(f"{name}={given} with variant={self.variant}, which sets {value}; give one of the two")
            object.__setattr__(self, name, value)

    @property
    def carried(self) -> tuple[Moment, ...]:
        """Second moment, unless ``v_blocks`` is ``none``."""
        return () if self.v_blocks == "none" else ("v",)

    @property
    def weights(self) -> tuple[float, float]:
        """``1`` or ``1 - alpha``, and ``alpha``."""
        return 1.0 - self.alpha if self.mix else 1.0, self.alpha

    @property
    def clocked(self) -> bool:
        """Where v is carried, or m is corrected by t."""
        return bool(self.carried) or self.bias == "code"

    def corrections(self, k: int, t: int) -> tuple[float, float]:
        """By k or t for m, by t for a v that is carried."""
        return 1 - self.b1 ** (t if self.bias == "code" else k), 1 - self.b2 ** (t if self.carried else k)

    def bind(self, spec: ParamSpec) -> Self:
        """Divide the parameters into blocks."""
        bound = super().bind(spec)
        divide = {"hessian": hessian_blocks, "tensor": tensor_blocks}.get(self.v_blocks)
        object.__setattr__(bound, "blocks", divide(spec) if divide else None)
        return bound

    def pack(self, moment: Tensor) -> Tensor:
        """Block means, or the vector itself."""
        return self.blocks.mean(moment) if self.blocks else moment

    def packed_size(self) -> int:
        """Number of blocks, or of parameters."""
        return len(self.blocks) if self.blocks else super().packed_size()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Each element gets the mean of its block."""
        return self.blocks.expand(packed, like) if self.blocks else super().unpack(packed, like)
