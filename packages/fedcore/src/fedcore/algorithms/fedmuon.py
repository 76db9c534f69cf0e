"""FedMuon: orthogonalised local steps from an averaged momentum, aligned with the last global move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from fedcore.algorithm import Algorithm, Client, Context, GradFn, Local, RoundLr, Step, Tree
from fedcore.ops.adam import adam_step_, moment_dtype
from fedcore.ops.lowrank import pack, unpack
from fedcore.ops.matrices import (
    FEW,
    ConvScale,
    MuonParams,
    add_product_,
    gather,
    matrix_layout,
    pieces,
    scatter_,
    spans_of,
)
from fedcore.ops.newton_schulz import NsDtype, NsForm, Orth, polar_factors
from fedcore.spec import ParamSpec

__all__ = ["FedMuon"]

PAPER = {"nesterov": False, "orth": "svd", "mu_lr": 1.0, "conv_scale": "none"}
"""What the paper's text says where the authors' script does something else."""


@dataclass(frozen=True, kw_only=True)
class FedMuon(Algorithm):
    """Federated Muon with momentum aggregation and alignment.

    Local step of the matrices (class M):
    ``M <- beta M + (1 - beta) g``, ``U = (1 - beta) g + beta M``,
    ``x <- (1 - h lam) x - h c O(U) - gamma eta D`` with ``h = eta mu_lr (1 - gamma)``, ``c = sqrt(max(1, rows/cols))``;
    of the rest (class A): AdamW at ``eta (1 - gamma)`` from zero state in every round, and the same alignment step.
    Server: ``x <- x + mean(x_K - x)``, ``D <- -mean(x_K - x) / (K eta)``, ``M of the next round <- mean M_K``.

    ``gamma=0, aggregate_momentum=False`` is Local Muon. Clients keep nothing between rounds. In round 0, D is zero and
    the move has the strength ``1 - gamma``. LoRA factors A and B are averaged one by one, which is not the average of
    their products. A tensor without gradient keeps its momentum and moves by the alignment only.

    Args:
        gamma: weight of the alignment, 0 <= gamma < 1 (the paper's alpha).
        beta: momentum.
        nesterov: step along ``(1 - beta) g + beta M`` instead of M.
        mu_lr: rate of class M over that of class A.
        orth: ``quintic`` Newton-Schulz, ``polar_express`` (flatter spectrum at the same cost) or ``svd`` (exact).
        ns_steps: steps of the iteration.
        ns_eps: added to the norm of a matrix.
        ns_dtype: number format of the iteration; ``auto``: bfloat16 on an accelerator unless the model is float64.
        ns_form: ``gram`` iterates on ``U U^T``, ``standard`` on U; ``auto`` takes the one with less arithmetic.
        muon_params: ``all2d``: class M is all tensors of two or more dimensions, as in the authors' script;
            ``hidden``: only hidden linear and convolution layers and adapters (recommended for language models).
        conv_scale: c of convolutions from their ``flattened`` matrix, from kh / kw as in the ``official`` script, or
            ``none``: c = 1 for all tensors.
        aggregate_momentum: start from the mean momentum of the last cohort instead of zero.
        align: take the alignment step; without it gamma counts as 0.
        momentum_rank_ratio: 0 uploads the momentum whole, q in (0, 1) as the factors of a truncated SVD that take at
            most the share q of it.
        adam_beta1: of class A.
        adam_beta2: of class A.
        adam_eps: of class A, added to the root of the corrected second moment.
        variant: ``code`` (the options as given) or ``paper``: nesterov=False, orth=svd, mu_lr=1, conv_scale=none.

    Source: Liu et al. 2025, arXiv 2510.27403, with the authors' script where the paper's text could not be read; not
    the methods of the same name of arXiv 2509.26337 and 2510.03866. Deviations: c of convolutions, frozen tensors are
    left alone, everything trainable is averaged.
    """

    lr: float = 3e-4
    round_lr: RoundLr = "cosine"
    weight_decay: float = 0.01
    gamma: float = 0.5
    beta: float = 0.98
    nesterov: bool = True
    mu_lr: float = 10.0
    orth: Orth = "quintic"
    ns_steps: int = 5
    ns_eps: float = 1e-7
    ns_dtype: NsDtype = "auto"
    ns_form: NsForm = "auto"
    muon_params: MuonParams = "all2d"
    conv_scale: ConvScale = "flattened"
    aggregate_momentum: bool = True
    align: bool = True
    momentum_rank_ratio: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    variant: Literal["code", "paper"] = "code"

    layout: ClassVar[Any] = None
    """``MatrixLayout`` of the model, after ``bind``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", 0 <= self.gamma < 1, "0 <= gamma < 1, 0 is no alignment")
        for name in ("beta", "adam_beta1", "adam_beta2"):
            self.check(name, 0 <= getattr(self, name) < 1, f"0 <= {name} < 1")
        for name in ("mu_lr", "ns_eps", "adam_eps"):
            self.check(name, getattr(self, name) > 0, "more than 0")
        self.check("ns_steps", 1 <= self.ns_steps < 100, "1 to 99; 5 is usual")
        self.check("momentum_rank_ratio", self.momentum_rank_ratio >= 0, "0 (whole) or more; 0.05 keeps 5 %")
        choices = {"orth": Orth, "ns_dtype": NsDtype, "ns_form": NsForm, "muon_params": MuonParams}
        for name, kind in {**choices, "conv_scale": ConvScale, "variant": Literal["code", "paper"]}.items():
            self.check(name, getattr(self, name) in get_args(kind), " | ".join(get_args(kind)))
        if self.variant == "paper":
            self._take_paper()

    def _take_paper(self) -> None:
        """Set what ``variant="paper"`` says; an option given otherwise is an error, since it would be ignored."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in PAPER.items():
            good = getattr(self, name) in (defaults[name], value)
            self.check(name, good, f"{value} under variant=paper; use variant=code to choose it")
            object.__setattr__(self, name, value)

    def bind(self, spec: ParamSpec) -> Self:
        """Find the classes and shapes of all tensors."""
        bound = super().bind(spec)
        object.__setattr__(bound, "layout", matrix_layout(spec, self.muon_params))
        return bound

    @property
    def alignment(self) -> float:
        """Gamma, or 0 where the alignment is off."""
        return self.gamma if self.align else 0.0

    # ------------------------------------------------------------------ a round

    def server_init(self, params: Tensor) -> Tree:
        """Mean momentum and last direction, both zero; neither where its switch is off."""
        server: Tree = {}
        if self.aggregate_momentum:
            server["momentum"] = params.new_zeros(self.layout.num_matrix)
        if self.alignment:
            server["direction"] = torch.zeros_like(params)
        return server

    def broadcast(self, server: Tree, params: Tensor, ctx: Context, client: Client) -> tuple[Tensor, Tree]:
        """Parameters, mean momentum and direction: 3 P down."""
        return params, dict(server)

    def local_init(
        self, params: Tensor, message: Tree, state: Tree, ctx: Context, full_grad: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Local]:
        """The message as it came; a client's own momentum is made in its first step."""
        return params, Local(message)

    def local_step(self, params: Tensor, grad_fn: GradFn, batch: Any, local: Local, step: Step) -> tuple[Tensor, Local]:
        """AdamW for class A, momentum and orthogonal steps for class M, alignment for all."""
        grad, _ = grad_fn(params, batch, rng=step.rng)
        if not step.k:
            self._begin(params, local)
        kept = self._keep(params, local, step, grad_fn.missing) if grad_fn.missing else ()
        factor = self._clip_factor(grad)
        if self.layout.rest:
            self._adamw(params, grad, factor, local.own, step)
        grad.mul_((1 - self.beta) * factor)
        self._average(grad, local, step)
        self._move(params, grad, step)
        for place, value in kept:
            place.copy_(value)
        if "direction" in local.shared:
            params.add_(local.shared["direction"], alpha=-self.alignment * step.lr)
        return params, local

    def local_finish(
        self, start: Tensor, params: Tensor, message: Tree, state: Tree, local: Local, ctx: Context
    ) -> tuple[Tree, Tree]:
        """Move and momentum: 2 P up, or less with ``momentum_rank_ratio``."""
        upload = {"delta": params - start}
        if self.aggregate_momentum:
            momentum = self.layout.to_wire(local.own["momentum"])
            if self.momentum_rank_ratio:
                upload["factors"] = pack(momentum, self.layout.shapes, self.momentum_rank_ratio)
            else:
                upload["momentum"] = momentum
        return upload, state

    def decode(self, upload: Tree) -> Tree:
        """The momentum that the factors stand for."""
        if "factors" not in upload:
            return upload
        momentum = unpack(upload["factors"], self.layout.shapes, self.momentum_rank_ratio)
        return {"delta": upload["delta"], "momentum": momentum}

    def server_step(self, server: Tree, params: Tensor, reduced: Any, ctx: Context) -> tuple[Tensor, Tree]:
        """Average; the direction is the mean move over K times the base rate (not that of class M)."""
        delta = reduced["delta"]
        after: Tree = {}
        if self.aggregate_momentum:
            after["momentum"] = reduced["momentum"]
        if self.alignment:
            after["direction"] = delta / -(ctx.steps * ctx.lr)
        return params + delta, after

    # ------------------------------------------------------------------ parts of a local step

    def _begin(self, params: Tensor, local: Local) -> None:
        """A client's own tensors, with the client dimension of ``params``; ``_average`` fills the momentum."""
        own, clients = local.own, params.shape[:-1]
        own["momentum"] = params.new_empty(*clients, self.layout.num_segment)
        for start, stop in self.layout.gaps:
            own["momentum"][..., start:stop] = 0.0
        if self.layout.rest:
            for name in ("m", "v"):
                own[name] = params.new_zeros(*clients, self.layout.num_rest, dtype=moment_dtype(params.dtype))

    def _clip_factor(self, grad: Tensor) -> Tensor | float:
        """What ``grad`` (..., P) is multiplied by so that its norm is at most ``clip_grad``."""
        if not self.clip_grad:
            return 1.0
        return torch.clamp(self.clip_grad / grad.norm(dim=-1, keepdim=True), max=1.0)

    def _adamw(self, params: Tensor, grad: Tensor, factor: Tensor | float, own: Tree, step: Step) -> None:
        """Move class A: in place where its spans are few, which spares copies, else gathered into one vector."""
        spans, rate = self.layout.rest, step.lr * (1 - self.alignment)
        numbers = {
            "rate": rate,
            "b1": self.adam_beta1,
            "b2": self.adam_beta2,
            "eps": self.adam_eps,
            "c1": 1 - self.adam_beta1 ** (step.k + 1),
            "c2": 1 - self.adam_beta2 ** (step.k + 1),
            "decay": rate * self.weight_decay,
        }
        if params.ndim > 1 or len(spans) > FEW:
            values = gather(params, spans)
            adam_step_(values, gather(grad, spans).mul_(factor), own["m"], own["v"], **numbers)
            scatter_(params, spans, values)
            return
        for (start, stop), (low, high) in zip(spans, spans_of(spans), strict=True):
            clipped = grad[start:stop].mul_(factor)
            adam_step_(params[start:stop], clipped, own["m"][low:high], own["v"][low:high], **numbers)

    def _average(self, grad: Tensor, local: Local, step: Step) -> None:
        """Update the momentum with ``grad``, which holds ``(1 - beta) g`` and becomes U."""
        layout, momentum, before = self.layout, local.own["momentum"], local.shared.get("momentum")
        segments = list(zip(layout.segments, spans_of(layout.segments), strict=True))
        if step.k:
            for (start, stop), (low, high) in segments:
                part = momentum[..., low:high]
                torch.add(grad[..., start:stop], part, alpha=self.beta, out=part)
        else:
            wire = spans_of(layout.matrices)
            for (start, stop), (low, high), (first, last) in zip(layout.matrices, layout.places, wire, strict=True):
                part = momentum[..., low:high]
                if before is None:
                    part.copy_(grad[..., start:stop])
                else:
                    torch.add(grad[..., start:stop], before[first:last], alpha=self.beta, out=part)
        for (start, stop), (low, high) in segments:
            if self.nesterov:
                grad[..., start:stop].add_(momentum[..., low:high], alpha=self.beta)
            else:
                grad[..., start:stop] = momentum[..., low:high]

    def _move(self, params: Tensor, direction: Tensor, step: Step) -> None:
        """Decay class M and move it along the orthogonalised U, which is overwritten."""
        rate = step.lr * self.mu_lr * (1 - self.alignment)
        keep = 1 - rate * self.weight_decay
        for matrix, left, right in self.layout.factors(direction, self._factors):
            alpha = -rate * matrix.scale(self.conv_scale)
            add_product_(matrix.view(params), left, right, beta=keep, alpha=alpha)

    def _factors(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"ns_dtype": self.ns_dtype, "ns_form": self.ns_form}
        return polar_factors(matrices, self.orth, steps=self.ns_steps, eps=self.ns_eps, **options)

    def _keep(
        self, params: Tensor, local: Local, step: Step, missing: tuple[tuple[int, int], ...]
    ) -> list[tuple[Tensor, Tensor]]:
        """Places that a step must not change because they have no gradient, with what belongs there."""
        layout, own, before = self.layout, local.own, local.shared.get("momentum")
        kept: list[tuple[Tensor, Tensor]] = []
        for start, stop in missing:
            views = [params[..., start:stop]]
            for low, high, at in pieces(layout.rest, start, stop):
                views.extend(own[name][..., at : at + high - low] for name in ("m", "v"))
            kept.extend((view, view.clone()) for view in views)
            for low, high, wire in pieces(layout.matrices, start, stop):
                ((_, _, at),) = pieces(layout.segments, low, high)
                place = own["momentum"][..., at : at + high - low]
                if step.k:
                    kept.append((place, place.clone()))
                else:  # nothing is in there yet
                    old = torch.zeros_like(place) if before is None else before[wire : wire + high - low]
                    kept.append((place, old.expand_as(place)))
        return kept
