"""Heads of the network, and the rules by which the newest one starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from css.models.network import CSSNet

__all__ = [
    "balanced_bias",
    "classifier",
    "constant",
    "copy_background",
    "from_unknown",
    "kaiming",
    "make_head",
    "random",
]

HeadKind = Literal["linear", "ssul"]


def make_head(features: int, classes: int, kind: HeadKind = "linear") -> nn.Module:
    """A head: features to logits of the classes of one step.

    Args:
        features: channels D of the feature map.
        classes: number of logits.
        kind: ``linear``: a 1x1 convolution; ``ssul``: 3x3 convolution, batch normalisation, ReLU, 1x1 convolution.

    Returns:
        Module (B, D, h, w) -> (B, classes, h, w); weights Kaiming-normal, biases 0.

    Source: DKD (linear); SSUL, Cha et al. 2021 (ssul).
    """
    head: nn.Module = nn.Conv2d(features, classes, 1)
    if kind == "ssul":
        trunk = nn.Conv2d(features, features, 3, padding=1, bias=False)
        head = nn.Sequential(trunk, nn.BatchNorm2d(features), nn.ReLU(), head)
    kaiming(head)
    return head


def kaiming(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Kaiming-normal convolution weights (fan-in, ReLU), zero biases; normalisation layers start as the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def classifier(head: nn.Module) -> nn.Conv2d:
    """The 1x1 convolution of a head, whose rows are the classes: weight (classes, D, 1, 1), bias (classes,)."""
    last = head[-1] if isinstance(head, nn.Sequential) else head
    assert isinstance(last, nn.Conv2d)
    return last


def _bias(head: nn.Module) -> Tensor:
    bias = classifier(head).bias
    assert bias is not None
    return bias


def _copy_rows(source: nn.Module, target: nn.Module) -> None:
    """Every class of ``target`` starts as the only class of ``source``, with its layers before the classifier."""
    if isinstance(source, nn.Sequential) and isinstance(target, nn.Sequential):
        target[:-1].load_state_dict(source[:-1].state_dict())
    classifier(target).weight.copy_(classifier(source).weight.expand_as(classifier(target).weight))
    _bias(target).copy_(_bias(source).expand_as(_bias(target)))


@torch.no_grad()
def copy_background(net: CSSNet) -> None:
    """Each class of the newest head starts as the background: its weights and bias are copied.

    Source: Baek et al. 2022 (DKD), ``init_novel_classifier``; EIR's scripts switch it on.
    """
    _copy_rows(net.heads[0], net.heads[-1])


@torch.no_grad()
def random(net: CSSNet, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
    """The newest head starts at random: Kaiming-normal weights.

    Args:
        net: network whose newest head is set.
        bias: start value of the biases; below zero, new classes start as absent (their sigmoid is small).
        generator: CPU generator of the draws; default: torch's global one. Only for heads on the CPU.
    """
    kaiming(net.heads[-1], generator)
    _bias(net.heads[-1]).fill_(bias)


@torch.no_grad()
def constant(net: CSSNet, bias: float, weight: float = 0.0) -> None:
    """The newest head's classifier starts as a constant: new classes are equally absent everywhere.

    Args:
        net: network whose newest head is set.
        bias: start value of the biases; -4 is a probability of 0.018.
        weight: start value of the weights of the 1x1 convolution.
    """
    classifier(net.heads[-1]).weight.fill_(weight)
    _bias(net.heads[-1]).fill_(bias)


@torch.no_grad()
def balanced_bias(net: CSSNet) -> None:
    """The background's probability is shared among background and new classes, so that none starts likelier.

    New weights are the background's; with n new classes, their biases and the background's become b - log(n + 1), so
    that their softmax mass together is what the background's was.

    Source: Cermelli et al. 2020 (MiB), section 3.3; PLOP does the same.
    """
    head = net.heads[-1]
    shared = _bias(net.heads[0]) - math.log(classifier(head).out_channels + 1)
    _copy_rows(net.heads[0], head)
    _bias(head).copy_(shared.expand_as(_bias(head)))
    _bias(net.heads[0]).copy_(shared)


@torch.no_grad()
def from_unknown(net: CSSNet) -> None:
    """Each class of the newest head starts as the class "unknown", with all layers of its head.

    Raises:
        ValueError: the network has no head for "unknown".

    Source: Cha et al. 2021 (SSUL), section 3.3.
    """
    if net.unknown is None:
        raise ValueError("the network has no head for unknown; build it with unknown=True")
    _copy_rows(net.unknown, net.heads[-1])
