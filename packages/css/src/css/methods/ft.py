"""Fine-tuning: what happens without any care for old classes."""

from __future__ import annotations

import torch
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import Method, StepContext, check_start, start_heads
from css.ops.labels import one_hot
from css.ops.losses import soft_binary_loss

__all__ = ["FineTuning"]


class FineTuning(Method):
    """Binary cross-entropy on the labels of the step alone; old classes are background there and are forgotten.

    Args:
        init: start of new heads in later steps: ``background`` copies the background head into each, ``zero`` has
            zero weights and bias ``init_bias``, ``random`` draws weights and has bias ``init_bias``.
        init_bias: see ``init``.

    Source: the lower bound of every paper of the field; loss and start of heads as Yin et al. 2025, arXiv 2503.22136,
    and Baek et al. 2022 (DKD).
    """

    def __init__(self, init: str = "background", init_bias: float = -4.0) -> None:
        self.init, self.init_bias = check_start(init), init_bias

    @torch.no_grad()
    def init_new_head(self, ctx: StepContext) -> None:
        """As ``init`` says."""
        start_heads(ctx.net, self.init, self.init_bias)

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """``soft_binary_loss`` of the logits at image size against one-hot labels."""
        logits = ctx.net.full_logits(batch.images)
        loss = soft_binary_loss(logits, one_hot(batch.labels, logits.shape[1]))
        return loss, {"bce": loss.detach()}
