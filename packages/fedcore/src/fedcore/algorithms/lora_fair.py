"""LoRA-FAIR: averaged factors, with B corrected towards the average of the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._lora import LoraAlgorithm
from fedcore.algorithms._lora_layout import Part

__all__ = ["LoRAFAIR"]


@dataclass(frozen=True, kw_only=True)
class LoRAFAIR(LoraAlgorithm):
    """A and B averaged as in FedIT; sent are A and ``B + dB`` with the ridge regression of what the product misses.

    ``dB = argmin ||sum_k p_k B_k A_k - (B + dB) A||^2 + lam ||dB||^2``, which is
    ``(sum_k p_k B_k A_k - B A) A^T (A A^T + lam I)^-1``; the d x k product is never made. Sends r (d + k) numbers a
    layer each way.

    ``lam -> inf`` is FedIT.

    Source: Bian et al. 2024, LoRA-FAIR (arXiv 2411.14961), in the closed form that ILoRA's authors compare with; the
    paper's own objective is said to be a cosine similarity and was not read again: our reading.

    Args:
        lam: weight lambda of the ridge, more than 0 (official scripts: 0.01).
    """

    lam: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", self.lam > 0, "more than 0")

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Averages, then the correction of B."""
        super().merge(server, params, new, parts, ctx)
        for index, layer in enumerate(self.own.layers):
            wide = torch.promote_types(new.dtype, torch.float32)
            a, b = (value.to(wide) for value in layer.factors(new))
            there = max(part.layout.layers[index].rank for part in parts)  # rows beyond are as they were
            missed = b[:, there:] @ (a[there:] @ a.T) - b @ (a @ a.T)
            for part in parts:
                its_a, its_b = (value.to(wide) for value in self.scaled(part, index))
                missed += part.weight * (its_b @ (its_a @ a.T))
            gram = a @ a.T + self.lam * torch.eye(layer.rank, dtype=wide, device=a.device)
            layer.b.view(new).copy_(b + torch.linalg.solve(gram, missed.T).T)
        return server
