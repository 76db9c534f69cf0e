"""Gaussian noise and secret cohorts from the operating system's entropy, never from a training seed.

Every call makes a generator of its own from fresh entropy. There is no state between rounds that a checkpoint could
keep, a forked process could share, or a resumed run could repeat.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng
from torch import Tensor

__all__ = ["NoiseSource"]

CHUNK = 2**16
"""numbers drawn at once: they stay in the processor's cache"""
DRAWS = 4
"""summed for one number in secure mode"""


class NoiseSource:
    """The only source of privacy noise.

    Modes, as a report names them:

    - ``os_seeded``: Philox 4x64 with 256 bits of entropy from ``secrets``, anew for each call.
    - ``os_csprng`` (``secure``): every bit from the operating system; Gaussians by Box and Muller in float64, four of
      them summed and halved, so that the last bits of a released number do not betray the draw (Mironov 2012; Holohan
      and Braghin 2021). About ten times slower. The noise is continuous, in floating point: neither a discrete Gaussian
      nor secure aggregation.
    - ``deterministic`` (``test_seed``): a function of seed and round, for tests of exact resume. Gives no privacy.

    Args:
        secure: all bits from the operating system.
        test_seed: root seed of the test switch; None outside of tests.

    Raises:
        UserError: both.
    """

    described: ClassVar[dict[str, str]] = {
        "os_seeded": "Philox with 256 bits of the system's entropy a draw",
        "os_csprng": "the system's random bytes, four Gaussians summed",
        "deterministic": "TEST SWITCH: from the run's seed, no privacy",
    }

    def __init__(self, *, secure: bool = False, test_seed: int | None = None) -> None:
        if secure and test_seed is not None:
            raise UserError("privacy.secure_noise and privacy.deterministic_noise_for_tests exclude each other")
        self.mode = "os_csprng" if secure else "os_seeded" if test_seed is None else "deterministic"
        self._seed = test_seed

    def __reduce__(self) -> NoReturn:
        raise TypeError("a source of privacy noise is never saved or copied")

    def _generator(self, purpose: str, round: int) -> np.random.Generator:
        if self._seed is not None:
            return numpy_rng(self._seed, "privacy", purpose, round)
        entropy = [secrets.randbits(32) for _ in range(8)]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy, pool_size=8)))

    def add(self, totals: Sequence[Tensor], deviation: float, round: int, purpose: str = "noise") -> None:
        """Add independent N(0, deviation^2) to every element of ``totals``, in place.

        Args:
            totals: contiguous float64 tensors of any shapes, on any device.
            deviation: 0 adds nothing.
            round: index of the round; of use to the test switch only.
            purpose: further name of the draw, of use to the test switch only.
        """
        if deviation == 0:
            return
        draw: Any = _secure_normal if self.mode == "os_csprng" else self._generator(purpose, round).standard_normal
        for total in totals:
            flat = total.view(-1)
            for first in range(0, flat.numel(), CHUNK):
                part = flat[first : first + CHUNK]
                part.add_(torch.from_numpy(draw(part.numel())).to(part.device), alpha=deviation)

    def poisson(self, num_clients: int, probability: float, round: int) -> list[int]:
        """Clients that take part: each by itself with ``probability``; ascending, perhaps none."""
        if self.mode == "os_csprng":
            draws = _secure_uniform(num_clients)
        else:
            draws = self._generator("cohort", round).random(num_clients)
        return np.flatnonzero(draws < probability).tolist()

    def fixed(self, num_clients: int, size: int, round: int) -> list[int]:
        """``size`` clients, uniformly without replacement, ascending."""
        if self.mode == "os_csprng":
            return sorted(secrets.SystemRandom().sample(range(num_clients), size))
        drawn = self._generator("cohort", round).choice(num_clients, size=size, replace=False)
        return sorted(int(i) for i in drawn)


def _secure_uniform(count: int) -> npt.NDArray[Any]:
    """Uniform in [0, 1), 53 bits each."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    found: npt.NDArray[Any] = (bits >> np.uint64(11)) * 2.0**-53
    return found


def _secure_normal(count: int) -> npt.NDArray[Any]:
    """Standard normals, each half the sum of four."""
    half = (DRAWS * count + 1) // 2
    uniform = _secure_uniform(2 * half)
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:half]))  # log of (0, 1]
    angle = (2 * np.pi) * uniform[half:]
    drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    summed: npt.NDArray[Any] = drawn[: DRAWS * count].reshape(DRAWS, count).sum(axis=0)
    return summed / math.sqrt(DRAWS)
