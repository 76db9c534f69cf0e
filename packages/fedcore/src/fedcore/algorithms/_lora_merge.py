"""Methods on adapters that keep the exact average by moving the frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.algorithm import Client, Context, Tree
from fedcore.algorithms._lora import LoraAlgorithm
from fedcore.algorithms._lora_layout import Factors, Layout, Part

__all__ = ["MergingLora"]


@dataclass(frozen=True, kw_only=True)
class MergingLora(LoraAlgorithm):
    """Base of methods whose clients all start a round from the same weight, whatever their rank.

    For each layer the server keeps the weight ``W_t = W_0 + D_t``, in float32 or more. A client that is sent the
    factors (B, A) has the frozen weight ``W_t - s B A``. After training, W is the exact average of the clients' weights
    ``frozen_k + s_k B_k A_k``, that is ``D_{t+1} = D_t + sum_k p_k s_k (B_k A_k - B A)``. Methods differ in the factors
    that are sent next.

    What travels for this are factors, a sum of ranks r_tot a layer, to clients that reported in the round before; the
    others need the whole of D, d x k numbers. Both count as bytes; the frozen weights are moved by the engine.
    """

    shifts_base: ClassVar[bool] = True

    def server_init(self, params: Tensor) -> Tree:
        """``merged.<i>`` D (d, k) of each layer, zero, and ``present``, who reported last."""
        if not self.shifts_base:
            return {}
        wide = torch.promote_types(params.dtype, torch.float32)
        state = {
            f"merged.{i}": params.new_zeros(layer.b.shape[0], layer.a.shape[1], dtype=wide)
            for i, layer in enumerate(self.own.layers)
        }
        return state | {"present": torch.zeros(0, dtype=torch.int64, device=params.device)}

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """The model, and what the client's frozen weights need."""
        vector, message = super().broadcast(server, params, ctx, client)
        if not self.shifts_base or ctx.round == 0:
            return vector, message
        if client.id in server["present"].tolist():
            return vector, message | self.news(server, params, client)
        return vector, message | {name: value for name, value in server.items() if name.startswith("merged.")}

    def news(self, server: Tree, params: Tensor, client: Client) -> Tree:
        """Factors of the last round's change, for a client that reported in it."""
        return {name: value for name, value in server.items() if name.startswith("news_")}

    def base_shift(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> Tree:
        """``W_t - s B A`` less what the client's model came with, by name of the frozen weight."""
        if not self.shifts_base or ctx.round == 0:
            return {}
        vector = self.sent(params, client.rank, ctx.round)
        return self._shift(server, self.layouts[client.rank], self.spec.starts[client.rank], vector)

    def evaluation_shift(self, server: Tree, params: Tensor) -> Tree:
        """The same for the largest rank with the server's factors."""
        if not self.shifts_base:
            return {}
        return self._shift(server, self.own, self.spec.starts[max(self.layouts)], params)

    def _shift(self, server: Tree, layout: Layout, start: Tensor, vector: Tensor) -> Tree:
        """D + s (B_0 A_0 - B A), in the form that the frozen weight is stored in."""
        found = {}
        for i, layer in enumerate(layout.layers):
            shift = server[f"merged.{i}"]
            (a0, b0), (a, b) = layer.factors(start), layer.factors(vector)
            if not (torch.equal(a0, a) and torch.equal(b0, b)):  # equal ones cancel exactly
                shift = torch.addmm(shift, b0.to(shift), a0.to(shift), alpha=layer.scaling)
                shift.addmm_(b.to(shift), a.to(shift), alpha=-layer.scaling)
            found[layer.base] = shift.T if layer.transposed else shift
        return found

    def merged(self, server: Tree, params: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """The new D of each layer and who reported.

        Args:
            server: server state.
            params: (P,) of this round.
            parts: uploads.
            ctx: the round.
        """
        vectors = {part.rank: self.sent(params, part.rank, ctx.round) for part in parts}
        state: Tree = {"present": server["present"].new_tensor([part.client for part in parts])}
        for i in range(len(self.own.layers)):
            old, rows, columns = server[f"merged.{i}"], [], []
            for part in parts:
                layer = part.layout.layers[i]
                (a, b), (a0, b0) = part.raw(i), layer.factors(vectors[part.rank])
                weight = part.weight * layer.scaling
                rows += [a.to(old) * weight, a0.to(old) * -weight]
                columns += [b.to(old), b0.to(old)]
            state[f"merged.{i}"] = torch.addmm(old, torch.cat(columns, dim=1), torch.cat(rows))
        return state

    def stacked(self, parts: Sequence[Part]) -> Tree:
        """``news_a.<i>`` (r_tot, k) and ``news_b.<i>`` (d, r_tot): the concatenated factors of all uploads."""
        found: Tree = {}
        for i in range(len(self.own.layers)):
            factors: list[Factors] = [self.scaled(part, i) for part in parts]
            found[f"news_a.{i}"] = torch.cat([a * part.weight for (a, _), part in zip(factors, parts, strict=True)])
            found[f"news_b.{i}"] = torch.cat([b for _, b in factors], dim=1)
        return found
