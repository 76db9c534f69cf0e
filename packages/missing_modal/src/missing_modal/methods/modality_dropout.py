"""Fine-tuning with modality dropout: in training each modality of a sample is dropped at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from polymodal.errors import UserError

from missing_modal.batch import Batch
from missing_modal.methods.base import Context, Method, Prompter

__all__ = ["ModalityDropout"]


@dataclass(frozen=True)
class ModalityDropout(Method):
    """Copies of the towers, their norms and projections are trained; no prompts.

    Args:
        rate: probability with which each modality that a sample has is dropped in a training step, 0 <= rate < 1; were
            all dropped, one of them, drawn uniformly, stays. 0: plain fine-tuning.
        tune: False keeps the towers frozen and trains norms, projections and head.

    Source: a rival of Hu et al. 2024 (arXiv 2410.06558), DCP 5; our reading of which
    modality stays when all were dropped.
    """

    rate: float = 0.3
    tune: bool = True

    @property
    def tunes_towers(self) -> bool:
        """As ``tune`` says."""
        return self.tune

    def build(self, context: Context) -> Prompter:
        """Norms and projections of all towers, trained (UserError for a rate that is no probability below one)."""
        if not 0 <= self.rate < 1:
            raise UserError(f"rate={self.rate}; expected a probability, 0 <= rate < 1")
        return _Dropout(context, self.rate)


class _Dropout(Prompter):
    """Args: the context, and the rate."""

    def __init__(self, context: Context, rate: float) -> None:
        super().__init__(context)
        self.rate = rate
        self.outputs.requires_grad_(True)

    def thin(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with modalities dropped. Each sample takes M + 1 draws, whatever it has."""
        names = self.context.modalities
        draws = torch.rand(len(batch), len(names) + 1, generator=generator, dtype=torch.float64).tolist()
        masks = []
        for mask, draw in zip(batch.masks, draws, strict=True):
            kept = sum(1 << place for place in range(len(names)) if mask >> place & 1 and draw[place] >= self.rate)
            present = [place for place in range(len(names)) if mask >> place & 1]
            masks.append(kept or 1 << present[int(draw[-1] * len(present))])
        return batch.restrict(masks, names)
