"""What a method decides about a continual step. A method knows no trainer, no files and no data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from css.ops.predict import predict

if TYPE_CHECKING:
    from css.data.batch import Batch
    from css.memory.bank import InstanceBank
    from css.models.network import CSSNet

__all__ = ["STARTS", "Method", "StepContext", "check_start", "start_heads"]

STARTS = ("background", "zero", "random")
"""How the heads of new classes may start."""


@dataclass
class StepContext:
    """What a loss may look at.

    Args:
        step: continual step, from 0.
        net: network being trained, with the heads of all steps up to this one.
        num_old: classes of earlier steps, channels 1..num_old.
        num_new: classes of this step, channels num_old+1..num_old+num_new.
        old: network of the step before, frozen, in eval mode, with 1 + num_old channels; None in step 0.
        bank: decoded instances of old classes, where the method replays them.
    """

    step: int
    net: CSSNet
    num_old: int
    num_new: int
    old: CSSNet | None = None
    bank: InstanceBank | None = None

    @property
    def teacher(self) -> CSSNet:
        """The old network; asked for in later steps only."""
        assert self.old is not None
        return self.old

    @torch.no_grad()
    def old_logits(self, images: Tensor) -> Tensor:
        """Logits of the old network at image size.

        Args:
            images: (batch, 3, H, W).

        Returns:
            (batch, 1 + num_old, H, W), without gradient.
        """
        return self.teacher.full_logits(images)


class Method(ABC):
    """Base class: a subclass is one file, its options are the arguments of its constructor.

    Attributes:
        memory: what is kept between steps: nothing, ``instances`` (crops of single objects), ``images`` (whole
            pictures with their partial labels).
        mix: how replayed pictures meet the new ones: ``concat`` (each entry once an epoch) or ``half`` of each batch.
        offline: all classes are learnt at once, whatever the task (joint training).
        softmax: logits compete (argmax with background) instead of standing alone (sigmoid above 0.5).
        detach_background: the background head reads features without gradient.
        unknown: the network has a head for "unknown" (SSUL).
        head: form of a head: a 1x1 convolution, or 3x3 convolution, normalisation, ReLU and 1x1 convolution.
        freeze_norm: in later steps normalisation layers keep their statistics and are not trained, dropout is off.
    """

    memory: ClassVar[Literal["none", "instances", "images"]] = "none"
    mix: ClassVar[Literal["concat", "half"]] = "concat"
    offline: ClassVar[bool] = False
    softmax: ClassVar[bool] = False
    detach_background: ClassVar[bool] = True
    unknown: ClassVar[bool] = False
    head: ClassVar[Literal["linear", "ssul"]] = "linear"
    freeze_norm: ClassVar[bool] = True

    @abstractmethod
    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch.

        Args:
            ctx: networks and sizes of the step.
            batch: pictures and labels of the step.
            generator: CPU generator for every draw of the method.

        Returns:
            Scalar with gradient; its terms by name, detached scalars.
        """

    def uses_memory(self) -> bool:
        """Whether this configuration replays anything (parts of a method may be switched off)."""
        return self.memory != "none"

    def uses_bank(self) -> bool:
        """Whether the loss draws single instances itself (pasting)."""
        return False

    def replays(self) -> bool:
        """Whether entries of the memory are pictures of the training set."""
        return self.uses_memory()

    @torch.no_grad()
    def init_new_head(self, ctx: StepContext) -> None:
        """Start values of the newest head, in later steps; the default copies the background head into each class."""
        from css.models.heads import copy_background

        copy_background(ctx.net)

    def trainable(self, ctx: StepContext) -> dict[nn.Parameter, float]:
        """Parameters that are frozen or have a rate of their own: parameter -> factor of its rate (0 freezes it)."""
        return {}

    def prepare(self, ctx: StepContext, batches: Iterable[Batch]) -> None:  # noqa: B027 (most methods need nothing)
        """Statistics that a step needs before it starts (PLOP's thresholds); must not draw at random.

        Args:
            ctx: networks and sizes of the step; only ``old`` may be looked at, so that a resumed run finds the same.
            batches: the step's training pictures without augmentation, read when iterated.
        """

    def predict(self, logits: Tensor) -> Tensor:
        """Labels (batch, H, W) of logits (batch, channels, H, W)."""
        return logits.argmax(1) if self.softmax else predict(logits)


def check_start(init: str) -> str:
    """``init`` itself.

    Raises:
        UserError: none of ``STARTS``.
    """
    if init not in STARTS:
        raise UserError(f"init={init!r}; expected one of {', '.join(STARTS)}")
    return init


def start_heads(net: CSSNet, init: str, bias: float) -> None:
    """Start values of the newest head: a copy of the background's, zero or random weights with a given bias."""
    from css.models import heads

    if init == "background":
        heads.copy_background(net)
    elif init == "zero":
        heads.constant(net, bias)
    else:
        heads.random(net, bias)
