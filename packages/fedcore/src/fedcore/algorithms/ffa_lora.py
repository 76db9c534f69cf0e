"""FFA-LoRA: A frozen where it started, B trained and averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from polymodal.errors import UserError

from fedcore.algorithms._lora import LoraAlgorithm

if TYPE_CHECKING:
    from fedcore.spec import ParamSpec

__all__ = ["FFALoRA"]


@dataclass(frozen=True, kw_only=True)
class FFALoRA(LoraAlgorithm):
    """``B = sum_k p_k B_k`` over one A that all share and nobody trains, so the average of the products is exact.

    A neither trains nor travels: r d numbers a layer each way. With unequal ranks the server's product is exact as long
    as the A of a smaller rank has the first rows of the larger ones (``lora.init=kaiming`` has); a smaller client gets
    a cut of it.

    Source: Sun et al. 2024, FFA-LoRA (arXiv 2403.12313); equal ranks there, unequal ones are ours.
    """

    unsent: ClassVar[str] = "a"

    def still(self, round: int) -> str:
        """A."""
        return "a"

    def bind(self, spec: ParamSpec) -> Self:
        """Check that all clients share one A.

        Raises:
            UserError: they do not, or scale it differently.
        """
        bound = super().bind(spec)
        for rank, layout in bound.layouts.items():
            for big, small in zip(bound.own.layers, layout.layers, strict=True):
                whole, its = big.a.view(spec.starts[max(spec.starts)]), small.a.view(spec.starts[rank])
                if big.scaling != small.scaling or not torch.equal(whole[: small.rank], its):
                    raise UserError(
                        "FFALoRA freezes one A for all clients, but those of different ranks differ; "
                        "use --lora.init kaiming with --lora.scaling, or one rank"
                    )
        return bound
