"""ILoRA: clients of unequal ranks from one QR split, aggregated exactly and factored again, with control variates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from polymodal.errors import UserError
from torch import Tensor

from fedcore.algorithm import Client, Context, Local, Tree, clip_norm
from fedcore.algorithms._lora_layout import Part
from fedcore.algorithms._lora_merge import MergingLora
from fedcore.lora.aggregate import aggregate_concat_qr

__all__ = ["ILoRA"]


@dataclass(frozen=True, kw_only=True)
class ILoRA(MergingLora):
    """``sum_k p_k B_k A_k = Q R`` from the concatenated factors; a client of rank r gets ``B = Q[:, :r], A = R[:r]``.

    Adapters start from a QR split of the frozen weight (``lora.init=qr_scaled``). In each local step, AdamW (or SGD)
    is given ``g + c - c_k``: c_k is the client's mean gradient at the model it received in its last round, c the mean
    of all clients' variates, cut to the client's rank. The server adds ``(c_k^+ - c_k) / N``. The first round has no
    correction. Clients that are not sampled keep their c_k.

    ``residual="drop"`` (paper) loses what the cut leaves out, and every client keeps its own frozen weight;
    ``fold`` sends that too and moves the frozen weights, so that all clients start from the exact average.

    Sends ``r (d + k)`` numbers a layer each way, twice with control variates; ``fold`` up to r_tot (d + k) down. A
    client keeps its variate.

    ``cv=False`` with one client is local training. ``decomposition="svd", cv=False`` is FlexLoRA from another start.

    Source: arXiv 2511.16069, by summaries of its sections 5.1 and 5.2 and the authors' scripts (the full text was not
    readable); what these do otherwise is listed in NOTES.md. Ours: thin aggregation, canonical signs, the mean gradient
    as c_k, ``covering``, ``fold``, ``qr_pivoted``, ``svd``, ``control_batches`` and ``cv_transport``.

    Args:
        decomposition: ``qr`` (paper), ``qr_pivoted``, or ``svd``, the best approximation of each rank.
        residual: ``drop`` (paper) or ``fold``.
        cv: control variates on.
        cv_rows: what a row of c is divided by: the number of clients whose rank has it (``covering``), or of ``all``
            clients as in the official code, where rows of few clients are corrected by a fraction of what they need.
        cv_transport: turn variates to the new factors' directions by ``B_new^T B_old``, columns at length 1.
        control_batches: batches of the round that c_k is taken from, at most one pass (0: all data).
        control_scale: factor of c_k (official code: about one over the batch size, by mistake).
    """

    keeps_state: ClassVar[bool] = True
    default_init: ClassVar[str] = "qr_scaled"

    decomposition: Literal["qr", "qr_pivoted", "svd"] = "qr"
    residual: Literal["drop", "fold"] = "drop"
    cv: bool = True
    cv_rows: Literal["covering", "all"] = "covering"
    cv_transport: bool = False
    control_batches: int = 0
    control_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("qr", "qr_pivoted", "svd")
        self.check("decomposition", self.decomposition in known, "qr, qr_pivoted or svd")
        self.check("residual", self.residual in ("drop", "fold"), "drop or fold")
        self.check("cv_rows", self.cv_rows in ("covering", "all"), "covering or all")
        self.check("control_batches", self.control_batches >= 0, "0 (all data) or more")
        self.check("control_scale", self.control_scale > 0, "more than 0; cv=False turns variates off")
        object.__setattr__(self, "shifts_base", self.residual == "fold")
        object.__setattr__(self, "keeps_state", self.cv)

    # ------------------------------------------------------------------ server to client

    def server_init(self, params: Tensor) -> Tree:
        """``c`` (P,), zero, and what ``fold`` keeps."""
        return super().server_init(params) | ({"c": torch.zeros_like(params)} if self.cv else {})

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Factors, head and c of the client's rank."""
        vector, message = super().broadcast(server, params, ctx, client)
        if self.cv:
            message = message | {"c": self.own.cut(server["c"], self.layouts[client.rank], gradient=True)}
        return vector, message

    def news(self, server: Tree, params: Tensor, client: Client) -> Tree:
        """The rows and columns beyond the client's rank: with its own, they are the exact average."""
        found: Tree = {}
        for i, (big, small) in enumerate(zip(self.own.layers, self.layouts[client.rank].layers, strict=True)):
            a, b = big.factors(params)
            found[f"news_a.{i}"] = torch.cat([a[small.rank :], server[f"news_a.{i}"]])
            found[f"news_b.{i}"] = torch.cat([b[:, small.rank :], server[f"news_b.{i}"]], dim=1)
        return found

    # ------------------------------------------------------------------ client

    def client_init(self, ctx: Context, client: Client) -> Tree:
        """``c`` (P,), zero; with ``cv_transport`` also the directions it belongs to."""
        if not self.cv:
            return {}
        zero = torch.zeros(self.spec.numel, dtype=self.spec.dtype)
        return {"c": zero} | (self._directions(zero) if self.cv_transport else {})

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[..., Tensor]
    ) -> tuple[Tensor, Local]:
        """The correction ``c - c_k``, the same in all steps, and the next c_k."""
        start, local = super().local_init(params, message, state, ctx, full_grad)
        if not self.cv:
            return start, local
        variate = self._turned(state["c"], state, self._directions(start)) if self.cv_transport else state["c"]
        fresh = full_grad(start, batches=self.control_batches) if self.control_batches else full_grad(start)
        fresh = clip_norm(fresh, self.clip_grad).mul_(self.control_scale)
        local.own |= {"correction": message["c"] - variate, "fresh": fresh, "change": fresh - variate}
        return start, local

    def adjusted(self, params: Tensor, grad: Tensor, local: Local) -> Tensor:
        """``g + c - c_k``."""
        return grad.add_(local.own["correction"]) if self.cv else grad

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Factors, head and ``c_k^+ - c_k`` to the server; the client keeps ``c_k^+``."""
        upload, state = super().local_finish(start, params, message, state, local, ctx)
        if not self.cv:
            return upload, state
        fresh = local.own["fresh"]
        kept = self._directions(start.expand_as(fresh)) if self.cv_transport else {}
        return upload | {"variate": local.own["change"]}, {"c": fresh} | kept

    # ------------------------------------------------------------------ server

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Factor the exact average again; move the frozen weights and c."""
        state = self.merged(server, params, parts, ctx) if self.shifts_base else {}
        for index, layer in enumerate(self.own.layers):
            factors, weights = [self.scaled(part, index) for part in parts], [part.weight for part in parts]
            rank = layer.rank
            if self.shifts_base:
                most = min(layer.b.shape[0], layer.a.shape[1])
                rank = max(rank, min(sum(len(a) for a, _ in factors), most))
            ((a, b),) = aggregate_concat_qr(factors, weights, [rank], self.decomposition)
            layer.a.view(new).copy_(a[: layer.rank])
            layer.b.view(new).copy_(b[:, : layer.rank])
            if self.shifts_base:
                state |= {f"news_a.{index}": a[layer.rank :], f"news_b.{index}": b[:, layer.rank :]}
        if self.cv:
            c = self._moved(server["c"], parts, ctx)
            state["c"] = self._turned(c, self._directions(params), self._directions(new)) if self.cv_transport else c
        return state

    def _moved(self, c: Tensor, parts: Sequence[Part], ctx: Context) -> Tensor:
        """The old c plus the changes of all variates, padded with zeros, over N or over the clients with the row."""
        total = torch.zeros_like(c)
        for part in parts:
            change = part.upload["variate"]
            for big, small in zip(self.own.layers, part.layout.layers, strict=True):
                (a, b), (its_a, its_b) = big.factors(total), small.factors(change)
                a[: small.rank].add_(its_a, alpha=big.scaling / small.scaling)
                b[:, : small.rank].add_(its_b)
            for mine, its in zip(self.own.whole, part.layout.whole, strict=True):
                mine.view(total).add_(its.view(change))
        for index, big in enumerate(self.own.layers):
            a, b = big.factors(total)
            clients = self._clients_with(index, ctx).to(total)
            a.div_(clients.unsqueeze(1))
            b.div_(clients)
        for item in self.own.whole:
            item.view(total).div_(ctx.num_clients)
        return c + total

    def _clients_with(self, index: int, ctx: Context) -> Tensor:
        """(r,) what the change of each row of a layer is divided by."""
        rank = self.own.layers[index].rank
        if self.cv_rows == "all":
            return torch.full((rank,), ctx.num_clients)
        rows = torch.arange(rank)
        covering = [count * (rows < self.layouts[key].layers[index].rank) for key, count in self.spec.clients.items()]
        return torch.stack(covering).sum(dim=0)

    def usable(self, reduced: Any, round: int) -> list[Part]:
        """As for all methods; an upload without a variate means that the two sides do not run the same method.

        Raises:
            UserError: a variate is missing or of a wrong size.
        """
        parts = super().usable(reduced, round)
        for part in parts if self.cv else []:
            if part.upload.get("variate", torch.empty(0)).numel() != part.layout.spec.numel:
                raise UserError(f"no control variate from client {part.client}; give clients and server the same cv")
        return parts

    # ------------------------------------------------------------------ directions of variates

    def _directions(self, flat: Tensor) -> Tree:
        """``basis.<i>`` (..., d, r): columns of B at length 1, zero where they are zero."""
        found = {}
        for i, layer in enumerate(self.own.layers):
            b = layer.b.view(flat)
            size = b.norm(dim=-2, keepdim=True)
            found[f"basis.{i}"] = torch.where(size > 0, b / size, 0.0)
        return found

    def _turned(self, c: Tensor, old: Tree, new: Tree) -> Tensor:
        """A variate (..., P) with rows of A and columns of B turned by ``B_new^T B_old``."""
        turned = c.clone()
        for i, layer in enumerate(self.own.layers):
            turn = new[f"basis.{i}"].mT @ old[f"basis.{i}"]
            (a, b), (to_a, to_b) = layer.factors(c), layer.factors(turned)
            to_a.copy_(turn @ a)
            to_b.copy_(b @ turn.mT)
        return turned
