"""Fully connected layers with ReLU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from polymodal.errors import UserError
from torch import nn

__all__ = ["MLP"]


class MLP(nn.Sequential):
    """Flattened input, hidden layers with ReLU, logits (B, num_classes).

    Args:
        num_classes: outputs.
        input_shape: shape of one input; any, it is flattened.
        hidden: widths of the hidden layers; none: softmax regression.

    Raises:
        UserError: a width below 1.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], hidden: Sequence[int] = (200,)) -> None:
        widths = [math.prod(input_shape), *hidden, num_classes]
        if min(widths) < 1:
            raise UserError(f"mlp: widths {widths}; expected at least 1 each")
        layers: list[nn.Module] = [nn.Flatten()]
        for width, wider in itertools.pairwise(widths):
            layers += [nn.Linear(width, wider), nn.ReLU()]
        super().__init__(*layers[:-1])
