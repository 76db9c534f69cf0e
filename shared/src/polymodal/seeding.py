"""Random draws as a function of names, never of worker or call order; thread count of small models."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["derive", "generator", "numpy_rng", "seed_global", "seed_step", "set_threads"]


def derive(seed: int, *names: str | int) -> int:
    """Seed of one named draw: a 63-bit integer from the root seed and the names.

    Args:
        seed: root seed of the run.
        names: what the draw is for, e.g. ``("augment", epoch, sample_id)``. ``1`` and ``"1"`` are different names.

    Returns:
        Integer in [0, 2**63), the same on every machine, process and Python version.
    """
    text = repr((int(seed), *(n if isinstance(n, str) else int(n) for n in names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded by ``derive(seed, *names)``."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator seeded by ``derive(seed, *names)``."""
    import numpy as np

    return np.random.default_rng(derive(seed, *names))


def seed_step(seed: int, *names: str | int) -> torch.Generator:
    """Seed the global torch generators for one training step and return a generator of its own for the loss.

    Dropout draws from torch's global generator. Seeding it by name makes those draws a function of the step, so that
    a resumed run repeats them without any generator state in the checkpoint.

    Args:
        seed: root seed of the run.
        names: what identifies the step: epoch, batch index, rank (each rank draws its own dropout masks).

    Returns:
        A CPU generator for the explicit draws of ``TaskModule.loss``.
    """
    seed_global(derive(seed, "global", *names))
    return generator(seed, "loss", *names)


def seed_global(seed: int) -> None:
    """``torch.manual_seed`` for the devices in use.

    The original queues the seed, with a formatted stack trace, for every kind of device that was not started: slow for
    something done at each step, and a queue that grows for as long as the process lives.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def set_threads(threads: int | None) -> int:
    """Set torch's intra-op threads; ``None`` means one.

    One thread is the default because small models gain little from more, and lose much on a busy machine, where OpenMP
    threads spin while they wait for one that has no core; large models on idle machines gain from ``--threads``.

    Returns:
        The number of threads in force.

    Raises:
        UserError: fewer than one thread.
    """
    import torch

    count = 1 if threads is None else threads
    if count < 1:
        from polymodal.errors import UserError

        raise UserError(f"threads={threads}; expected at least 1, this machine has {os.cpu_count()} cores")
    torch.set_num_threads(count)
    return count
