"""Tabular rows: feature tokens, and vectors that are features already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from torch.nn import functional

from missing_modal.backbones.base import Tower, TowerSpec
from missing_modal.backbones.transformer import ClassTower

__all__ = ["TabularTower", "VectorTower"]


class TabularTower(ClassTower):
    """Tokens of standardised numbers (b, F): token t is an affine map of its own g numbers (DCP 3.7).

    With g = 1 these are the feature tokens of FT-Transformer (Gorishniy et al. 2021): x_i w_i + b_i. Larger groups keep
    long vectors short: F numbers make ceil(F / g) tokens. No positions: each token's map is its own.
    Further weights: ``token.weight`` (T, g, d), ``token.bias`` (T, d).

    Args:
        inputs: F, numbers in a row.
        options: of ``TransformerTower``.
    """

    kind = "tabular"

    def __init__(self, *args: Any, inputs: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inputs = inputs
        tokens, group, _ = self._need("token.weight").shape
        if not (tokens - 1) * group < inputs <= tokens * group:
            raise UserError(f"{self.identity}: {inputs} numbers do not make {tokens} tokens of {group}")

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor besides the weights."""
        return super().config() | {"inputs": self.inputs}

    def embed(self, x: Tensor) -> Tensor:
        """(b, F) -> (b, 1 + T, d). UserError for rows of another length."""
        weight = self._weights["token.weight"]
        if x.shape[1] != self.inputs:
            raise UserError(f"{self.identity} {self.spec.name}: rows of {x.shape[1]} numbers; expected {self.inputs}")
        tokens, group, _ = weight.shape
        padded = functional.pad(x.to(weight.dtype), (0, tokens * group - self.inputs)).unflatten(1, (tokens, group))
        return self._tokens(torch.einsum("btg,tgd->btd", padded, weight) + self._weights["token.bias"])

    def placeholder(self, count: int) -> Tensor:
        """Zeros: the mean of standardised numbers."""
        weight = self._weights["token.weight"]
        return torch.zeros(count, self.inputs, dtype=weight.dtype, device=weight.device)


class VectorTower(Tower):
    """Vectors that are features already (b, e): no tokens, nothing is inserted (DCP 3.7)."""

    def __init__(self, name: str, features: int) -> None:
        self.identity = f"vector:{features}"
        ones = torch.ones(features)
        self.spec = TowerSpec(name, features, 0, features, 1, ones, torch.zeros(features), 1e-5, None, False)
        self._device: torch.device | str = "cpu"

    def embed(self, x: Tensor) -> Tensor:
        """The vectors themselves. UserError for another length."""
        if x.shape[1:] != (self.spec.features,):
            raise UserError(f"{self.spec.name}: vectors of {tuple(x.shape[1:])}; expected {self.spec.features} numbers")
        return x

    def block(self, index: int, h: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """There are no blocks."""
        raise IndexError(f"{self.identity} has no block {index}")

    def pool_rows(self, x: Tensor) -> Tensor:
        """There are no rows: zeros."""
        return torch.zeros(len(x), dtype=torch.long, device=x.device)

    def placeholder(self, count: int) -> Tensor:
        """Zeros."""
        return torch.zeros(count, self.spec.features, device=self._device)

    def state(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tower:
        """Nothing to move but placeholders."""
        self._device = device
        return self
