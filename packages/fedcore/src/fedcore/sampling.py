"""Who takes part in a round and in which order a client sees its data: functions of (seed, round, client)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from polymodal.errors import UserError
from polymodal.seeding import derive, generator, numpy_rng
from torch import Tensor

__all__ = ["LocalPlan", "cohort_size", "sample_cohort"]


def cohort_size(num_clients: int, fraction: float) -> int:
    """``round(N * fraction)``, at least one client.

    Raises:
        UserError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction}; expected 0 < fraction <= 1, 0.1 samples one client in ten")
    return max(1, round(num_clients * fraction))


def sample_cohort(seed: int, round: int, num_clients: int, size: int) -> list[int]:
    """``size`` of ``num_clients`` clients, uniformly without replacement, in ascending order."""
    drawn = numpy_rng(seed, "cohort", round).choice(num_clients, size=size, replace=False)
    return sorted(int(i) for i in drawn)


@dataclass(frozen=True)
class LocalPlan:
    """How a client walks through its data in a round.

    Args:
        batch_size: samples of a local step; the last batch of an epoch may be smaller.
        local_epochs: passes over the client's data (E).
        max_steps: largest number of local steps (0: no cap).
        shuffle: a new order each epoch; otherwise stored order.
        seed: root seed.
        exact: every client with data takes exactly ``max_steps`` steps, however many passes that needs, so that K
            tells nothing about its data (privacy).

    Raises:
        UserError: a batch size or number of epochs below one, a negative cap, or ``exact`` without ``max_steps``.
    """

    batch_size: int = 50
    local_epochs: int = 1
    max_steps: int = 0
    shuffle: bool = True
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "local_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.max_steps < 0:
            raise UserError(f"max_steps={self.max_steps}; expected 0 (no cap) or more")
        if self.exact and not self.max_steps:
            raise UserError("the same number of steps for every client needs max_steps, that number")

    def steps(self, samples: int) -> int:
        """K = E * ceil(n / B), at most ``max_steps``; 0 without data."""
        if self.exact:
            return self.max_steps if samples else 0
        steps = self.local_epochs * -(-samples // self.batch_size)
        return min(steps, self.max_steps) if self.max_steps else steps

    def samples(self, samples: int) -> int:
        """Samples that a client with ``samples`` of its own trains on in a round, repeats counted."""
        epochs, steps = divmod(self.steps(samples), max(1, -(-samples // self.batch_size)))
        return epochs * samples + min(steps * self.batch_size, samples)

    def batches(self, round: int, client: int, samples: int) -> list[Tensor]:
        """Indices (B,) of each local step of a client in a round."""
        draw = generator(self.seed, "order", round, client) if self.shuffle else None
        steps, found = self.steps(samples), []
        for _ in range(steps if self.exact else self.local_epochs):
            order = torch.randperm(samples, generator=draw) if self.shuffle else torch.arange(samples)
            found += order.split(self.batch_size)
            if len(found) >= steps:
                break
        return found[:steps]

    def rng(self, round: int, client: int) -> int:
        """Seed of the client's draws in a round; step k adds k."""
        return derive(self.seed, "local", round, client)
