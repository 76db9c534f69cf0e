"""FlexLoRA: the average of the products, cut to each client's rank by SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedcore.algorithm import Context, Tree
from fedcore.algorithms._lora import LoraAlgorithm
from fedcore.algorithms._lora_layout import Part
from fedcore.lora.aggregate import aggregate_concat_qr

__all__ = ["FlexLoRA"]


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(LoraAlgorithm):
    """``sum_k p_k B_k A_k = U S V^T``; a client of rank r gets ``B = U_r S_r^(1/2)`` and ``A = S_r^(1/2) V_r^T``.

    The best rank-r approximation of the exact average; the part beyond is lost. The d x k matrix is never made. Sends
    r (d + k) numbers a layer each way.

    Source: Bai et al. 2024, FlexLoRA (arXiv 2402.11505).
    """

    def merge(self, server: Tree, params: Tensor, new: Tensor, parts: Sequence[Part], ctx: Context) -> Tree:
        """Factors of the largest rank; a smaller client is sent their first rows and columns."""
        for index, layer in enumerate(self.own.layers):
            factors, weights = [self.scaled(part, index) for part in parts], [part.weight for part in parts]
            (found,) = aggregate_concat_qr(factors, weights, [layer.rank], "svd")
            for target, value in zip(layer.factors(new), found, strict=True):
                target.copy_(value)
        return server
