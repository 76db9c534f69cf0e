"""Initial values as a function of (seed, name): never of torch's global generator, never of the order of building."""

from __future__ import annotations

import math

import torch
from polymodal.seeding import generator
from torch import Tensor, nn

__all__ = ["Draws", "bare_linear"]


def bare_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose values are still to be set; the global generator is left as it was.

    Not ``nn.utils.skip_init``: its first call imports torch's decompositions, seconds of every start.
    """
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(inputs, outputs)


class Draws:
    """Draws named initial values.

    Args:
        seed: root seed.
        names: of the method; the same part of another method gets other values.
    """

    def __init__(self, seed: int, *names: str) -> None:
        self._seed, self._names = seed, ("missing_modal", *names)

    def normal(self, name: str, *shape: int, std: float = 0.02) -> Tensor:
        """N(0, std^2) of ``shape``, float32."""
        return torch.empty(*shape).normal_(0, std, generator=generator(self._seed, *self._names, name))

    def xavier(self, name: str, outputs: int, inputs: int) -> Tensor:
        """(outputs, inputs), Xavier-uniform."""
        weight = torch.empty(outputs, inputs)
        bound = math.sqrt(6 / (inputs + outputs))
        return weight.uniform_(-bound, bound, generator=generator(self._seed, *self._names, name))

    def linear(self, name: str, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer with torch's default initial values: weight and bias uniform in +-1/sqrt(inputs)."""
        layer = bare_linear(inputs, outputs)
        draw = generator(self._seed, *self._names, name)
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            layer.weight.uniform_(-bound, bound, generator=draw)
            layer.bias.uniform_(-bound, bound, generator=draw)
        return layer
