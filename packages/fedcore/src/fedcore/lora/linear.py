"""A linear layer with a low-rank adapter on it; names of parameters are PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.lora.init import check_rank, kaiming_init

__all__ = ["LoraLinear", "is_linear", "is_transposed", "sizes_of"]


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers (GPT-2): a linear layer whose weight is stored (k, d)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether an adapter can go on it."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def sizes_of(layer: Any) -> tuple[int, int]:
    """(d, k) of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


class _Factor(nn.Linear):
    """A linear layer whose values are set by its owner: torch's own start would move the global generator."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class LoraLinear(nn.Module):
    """``y = base(x) + scaling B A dropout(x)`` with a frozen base.

    Parameters are called ``base_layer.weight``, ``lora_A.<adapter>.weight`` (r, k) and ``lora_B.<adapter>.weight``
    (d, r), as in PEFT, so that its files and our ``find_adapters`` read both alike.

    Args:
        base_layer: ``nn.Linear``, or the ``Conv1D`` of transformers; its parameters are frozen.
        rank: r, 1 to min(d, k).
        scaling: s (alpha / r in PEFT).
        dropout: probability on the adapter's input, 0 <= dropout < 1.
        adapter_name: of the one adapter.
        factors: A (r, k) and B (d, r) to start from (default: ``kaiming_init`` from torch's global generator).

    Raises:
        UserError: no linear layer, weights of integers, or numbers out of their range.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scaling: float = 1.0,
        dropout: float = 0.0,
        adapter_name: str = "default",
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not is_linear(base_layer):
            raise UserError(f"{type(base_layer).__name__} is no linear layer; adapters go on nn.Linear and Conv1D")
        weight: Any = base_layer.weight
        if not weight.is_floating_point():
            raise UserError(f"weights of {weight.dtype} take no adapter here; load the model in floating point")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout}; expected 0 <= dropout < 1")
        self.out_features, self.in_features = sizes_of(base_layer)
        check_rank(rank, self.out_features, self.in_features)
        self.fan_in_fan_out = is_transposed(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.active_adapters = [adapter_name]
        self.scaling: dict[str, float] = {adapter_name: float(scaling)}
        self.lora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(dropout) if dropout else nn.Identity()})
        made: dict[str, Any] = {"bias": False, "dtype": weight.dtype, "device": weight.device}
        a, b = _Factor(self.in_features, rank, **made), _Factor(rank, self.out_features, **made)
        self.lora_A, self.lora_B = nn.ModuleDict({adapter_name: a}), nn.ModuleDict({adapter_name: b})
        self.load_factors(*(factors or kaiming_init(rank, self.in_features, self.out_features)))

    @property
    def adapter_name(self) -> str:
        """Name of the adapter."""
        return self.active_adapters[0]

    @property
    def rank(self) -> int:
        """Rank r of the adapter."""
        return int(self.factors[0].shape[0])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The parameters A (r, k) and B (d, r)."""
        a: Any = self.lora_A[self.adapter_name]
        b: Any = self.lora_B[self.adapter_name]
        return a.weight, b.weight

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its number format or device."""
        found: Tensor = self.base_layer.get_parameter("weight")
        return found

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        found: Tensor | None = self.base_layer._parameters["bias"]
        return found

    @torch.no_grad()
    def load_factors(self, a: Tensor, b: Tensor) -> None:
        """Copy A (r, k) and B (d, r) in; ValueError where the shapes are others."""
        for own, given in zip(self.factors, (a, b), strict=True):
            if own.shape != given.shape:
                raise ValueError(f"factor of shape {tuple(given.shape)}; expected {tuple(own.shape)}")
            own.copy_(given)

    def delta_weight(self) -> Tensor:
        """``scaling B A``, of the shape of the base's weight."""
        a, b = self.factors
        delta = self.scaling[self.adapter_name] * (b @ a)
        return delta.mT if self.fan_in_fan_out else delta

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) -> (..., d)."""
        name = self.adapter_name
        # the scaling goes on the r inner values, which are fewer than the d outer ones
        inner = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        outputs: Tensor = self.base_layer(x) + self.lora_B[name](inner)
        return outputs

    def extra_repr(self) -> str:
        """Rank and scaling in the printed model."""
        return f"rank={self.rank}, scaling={self.scaling[self.adapter_name]:g}"
