"""The floor of every comparison: the head alone is trained, adapters stay as they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from polymodal.errors import UserError

from fedcore.algorithms._lora import LoraAlgorithm

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["LoRAHead"]


@dataclass(frozen=True, kw_only=True)
class LoRAHead(LoraAlgorithm):
    """FedAvg of the tensors that are trained whole; the factors neither train nor travel.

    Source: no paper's method; the floor under the methods of ILoRA's comparison (arXiv 2511.16069).
    """

    unsent: ClassVar[str] = "ab"

    def still(self, round: int) -> str:
        """Both factors."""
        return "ab"

    def bind(self, spec: ParamSpec) -> Self:
        """Find the head; UserError where all but the factors is frozen."""
        bound = super().bind(spec)
        if not bound.own.whole:
            raise UserError("nothing to train beside the adapters; name a head, e.g. --lora.head classifier")
        return bound
