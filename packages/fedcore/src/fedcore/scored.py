"""A plain model with the scores that its data set is reported by, beside accuracy and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.data.metrics import METRICS
from fedcore.tasks import PlainTask

__all__ = ["ScoredTask"]


class ScoredTask(PlainTask):
    """``PlainTask`` whose evaluation gathers all predictions.

    Args:
        module: gives logits (B, C), or (B, 1) for a regression.
        loss: ``loss(outputs, targets) -> mean``.
        scores: names in ``fedcore.data.metrics``.
    """

    def __init__(self, module: nn.Module, loss: Callable[[Tensor, Any], Tensor], scores: Sequence[str]) -> None:
        super().__init__(module, loss)
        self.scores = tuple(scores)

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """The scores and the mean loss."""
        total, predicted, wanted = torch.zeros((), dtype=torch.float64), [], []
        for inputs, targets in batches:
            outputs = self.module(inputs)
            total += self._loss(outputs, targets).detach().double().cpu() * len(targets)
            guess = outputs.detach().float().squeeze(-1) if targets.is_floating_point() else outputs.argmax(dim=1)
            predicted.append(guess.cpu().numpy())
            wanted.append(targets.cpu().numpy())
        if not wanted:
            raise UserError("the data set to evaluate on is empty")
        guesses, truth = np.concatenate(predicted), np.concatenate(wanted)
        return {name: METRICS[name](guesses, truth) for name in self.scores} | {"loss": float(total) / len(truth)}
