"""Modality-specific prompts: one per modality, summed over what is present, held orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.methods._rows import RowPrompter, reach_of
from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["MSP"]


@dataclass(frozen=True)
class MSP(Method):
    """A prompt P_k per modality k; a pattern's prompt is the sum over the modalities that are present.

    Args:
        length: L.
        depth: J.
        orthogonality: weight of |<P_a, P_b>| / max(|P_a| |P_b|, 1e-8), the mean over pairs, towers and blocks.
        train_out: train what DCP trains besides prompts, so that only the prompts differ.

    Source: Jang et al. 2024 (arXiv 2312.15890), after the code of a later rival. It speaks of one joint transformer;
    that here each tower has a prompt P_k of its width for every modality k, and learns by it what else there is, is
    our reading. The inner product is taken over all rows of a block.
    """

    length: int = 36
    depth: int = 6
    orthogonality: float = 1.0
    train_out: bool = True

    def build(self, context: Context) -> Prompter:
        """One set of rows per modality, tower and block."""
        if self.orthogonality < 0:
            raise UserError(f"orthogonality={self.orthogonality}; expected a weight from 0 on")
        reach = reach_of(context, self.depth)
        return _SumPrompter(context, self.length, reach, self.train_out, self.orthogonality)


class _SumPrompter(RowPrompter):
    """Rows by modality, tower and block, summed by pattern.

    Args:
        context, length, reach, train_out: see ``RowPrompter``.
        weight: of the orthogonality term.
    """

    def __init__(self, context: Context, length: int, reach: Sequence[int], train_out: bool, weight: float) -> None:
        super().__init__(context, length, reach, train_out, "msp")
        self.weight = weight
        count = len(context.towers)
        #: by tower (M, J_m, L, d), None without prompts
        self.prompts = nn.ParameterList(
            nn.Parameter(self.draw.normal(tower.name, count, blocks, length, tower.width)) if blocks else None
            for tower, blocks in zip(context.towers, self.reach, strict=True)
        )

    def tables(self, masks: Sequence[int]) -> list[Tensor | None]:
        """By tower (T, J_m, L, d)."""
        return [None if value is None else torch.stack([_sum(value, mask) for mask in masks]) for value in self.prompts]

    def penalty(self, tables: Any) -> dict[str, Tensor]:
        """``orthogonality``, weighted."""
        terms = []
        for value in self.prompts:
            if value is None:
                continue
            flat = value.flatten(2)
            for a, b in combinations(range(len(flat)), 2):
                product = (flat[a] * flat[b]).sum(-1).abs()
                terms.append(product / (flat[a].norm(dim=-1) * flat[b].norm(dim=-1)).clamp_min(1e-8))
        return {"orthogonality": self.weight * torch.cat(terms).mean()} if terms and self.weight else {}


def _sum(value: Tensor, mask: int) -> Tensor:
    return torch.stack([one for place, one in enumerate(value) if mask >> place & 1]).sum(0)
