"""HetLoRA: factors padded with zeros and weighed by the size of their product; ranks may shrink by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Client, Context, Local, Tree
from fedcore.algorithms._lora import LoraAlgorithm
from fedcore.algorithms._lora_layout import Factors, Layer, Part, padded_mean

__all__ = ["HetLoRA"]


@dataclass(frozen=True, kw_only=True)
class HetLoRA(LoraAlgorithm):
    """FedIT with weights ``||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F`` in each layer; the head is averaged by p_k.

    With ``prune > 0`` a client penalises the last rows of its factors, those beyond ``floor(gamma r)`` (at least one
    row is kept), by ``prune ||A_last|| ||B_last||``. Where this product is smaller after a round than at its start, the
    rows are dropped for good: they are zero from then on, on this client. They still travel as zeros.

    Equal sizes, or none at all, are FedIT.

    Source: Cho et al. 2024, HetLoRA (arXiv 2401.06432), recalled and not read again: our reading.

    Args:
        prune: weight of the penalty; 0 leaves ranks alone.
        gamma: share of the rank that is not penalised, 0 < gamma < 1.
    """

    keeps_state: ClassVar[bool] = True

    prune: float = 0.0
    gamma: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("prune", self.prune >= 0, "0 (off) or more")
        self.check("gamma", 0 < self.gamma < 1, "0 < gamma < 1")

    # ------------------------------------------------------------------ client

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``rank`` (layers,) that the client still uses."""
        return {"rank": torch.tensor([layer.rank for layer in self.own.layers])}

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[..., Tensor]
    ) -> tuple[Tensor, Local]:
        """The model received, without rows that were dropped: zero factors have no gradient and stay zero."""
        start, local = super().local_init(params, message, state, ctx, full_grad)
        if self.prune:
            local.own["rank"] = state["rank"]
            start = self._kept(start, state["rank"])
        return start, local

    def adjusted(self, params: Tensor, grad: Tensor, local: Local) -> Tensor:
        """The loss gradient plus that of the penalty."""
        if not self.prune:
            return grad
        for layer, (a, b), (size_a, size_b) in self._last(params, local.own["rank"]):
            layer.a.view(grad).add_(a * _ratio(size_b, size_a), alpha=self.prune)
            layer.b.view(grad).add_(b * _ratio(size_a, size_b), alpha=self.prune)
        return grad

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Drop the last rows that have shrunk."""
        if not self.prune:
            return super().local_finish(start, params, message, state, local, ctx)
        before, after = (
            torch.cat([(a * b).flatten(-2) for _, _, (a, b) in self._last(vector, state["rank"])], dim=-1)
            for vector in (start, params)
        )
        rank = torch.where(after < before, self._inner(state["rank"]), state["rank"])
        upload, _ = super().local_finish(start, self._kept(params, rank), message, state, local, ctx)
        return upload, {"rank": rank}

    def _inner(self, rank: Tensor) -> Tensor:
        """``max(1, floor(gamma r))`` of ranks (..., layers)."""
        return (rank.double() * self.gamma).floor().to(rank.dtype).clamp_(min=1)

    def _kept(self, params: Tensor, rank: Tensor) -> Tensor:
        """A copy of ``params`` (..., P), or (clients, P), with zeros beyond ``rank`` (..., layers)."""
        new = params.expand(*rank.shape[:-1], params.shape[-1]).clone()
        for i, layer in enumerate(self.own.layers):
            gone = torch.arange(layer.rank, device=rank.device) >= rank[..., i : i + 1]
            a, b = layer.factors(new)
            a.masked_fill_(gone.unsqueeze(-1), 0.0)
            b.masked_fill_(gone.unsqueeze(-2), 0.0)
        return new

    def _last(self, params: Tensor, rank: Tensor) -> list[tuple[Layer, Factors, Factors]]:
        """Each layer with its last rows of A and columns of B, zero elsewhere, and their norms (..., 1, 1)."""
        found = []
        inner = self._inner(rank)
        for i, layer in enumerate(self.own.layers):
            row = torch.arange(layer.rank, device=rank.device)
            last = (row >= inner[..., i : i + 1]) & (row < rank[..., i : i + 1])
            a, b = layer.factors(params)
            a, b = a * last.unsqueeze(-1), b * last.unsqueeze(-2)
            sizes = a.norm(dim=(-2, -1), keepdim=True), b.norm(dim=(-2, -1), keepdim=True)
            found.append((layer, (a, b), sizes))
        return found

    # ------------------------------------------------------------------ server

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Averages by the size of each client's product."""
        for index, layer in enumerate(self.own.layers):
            factors = [self.scaled(part, index) for part in parts]
            weights = _weights(factors, [part.weight for part in parts])
            for item, dim in ((layer.a, 0), (layer.b, 1)):
                found = [(weight, pair[dim]) for weight, pair in zip(weights, factors, strict=True)]
                item.view(new).copy_(padded_mean(found, item.view(params), dim))
        return server


def _weights(factors: Sequence[Factors], shares: Sequence[float]) -> list[float]:
    """``||B A||_F`` of each client over their sum; ``shares`` where all are zero."""
    sizes = []
    for a, b in factors:
        a, b = a.double(), b.double()
        sizes.append(float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()))  # without the d x k product
    total = sum(sizes)
    return [size / total for size in sizes] if total > 0 else list(shares)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, 0 where ``below`` is 0."""
    return torch.where(below > 0, above / below, 0.0)
