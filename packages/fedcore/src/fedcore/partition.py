"""Who has which samples: label-skewed, sharded, even, or natural partitions of a training set over clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from polymodal.errors import UserError
from polymodal.seeding import numpy_rng

from fedcore.partition_base import Partition
from fedcore.partition_flwr import from_flwr

__all__ = [
    "Partition",
    "bin_targets",
    "by_column",
    "dirichlet_client",
    "dirichlet_label",
    "from_flwr",
    "iid",
    "shards",
]


def dirichlet_client(
    targets: np.ndarray,
    num_clients: int,
    alpha: float,
    seed: int = 0,
    samples_per_client: int | None = None,
    *,
    refill: bool = True,
) -> Partition:
    """Label mix of each client from a Dirichlet distribution, all clients of one size: the papers' partition.

    For each client p ~ Dirichlet(alpha, ..., alpha) over the classes that occur, then ``samples_per_client`` classes
    i.i.d. from p; each takes the next sample from a shuffled stack of its class. An empty stack is refilled with all
    samples of the class, so some samples are on several clients and others on none (``Partition.repeated``). With
    ``refill=False`` an empty class is drawn no more: no sample occurs twice.

    Args:
        targets: (N,) class of each training sample.
        num_clients: clients.
        alpha: concentration, > 0; the less, the fewer classes a client has.
        seed: of all draws.
        samples_per_client: n_i; N // num_clients by default.
        refill: as above.

    Raises:
        UserError: a value out of its range, or too few samples for a partition without repeats.

    Source: fedswa.md section 4 (partition of the papers' scripts; our class lookup is searchsorted).
    """
    targets = _labels(targets)
    _check_clients(num_clients, len(targets))
    _check_alpha(alpha)
    each = len(targets) // num_clients if samples_per_client is None else samples_per_client
    if each < 1:
        raise UserError(f"samples_per_client={each}; expected at least 1")
    if not refill and each * num_clients > len(targets):
        raise UserError(
            f"{num_clients} clients with {each} samples each need {each * num_clients} samples, the data set has"
            f" {len(targets)}; choose samples_per_client <= {len(targets) // num_clients}, or allow refill"
        )
    rng = numpy_rng(seed, "partition", "dirichlet_client")
    members = [np.flatnonzero(targets == label) for label in np.unique(targets)]
    stacks = [rng.permutation(indices) for indices in members]
    used = np.zeros(len(members), dtype=np.int64)
    clients = []
    for _ in range(num_clients):
        mix = rng.dirichlet(np.full(len(members), alpha))
        chosen: list[int] = []
        for label in _draw_classes(rng, mix, each):
            if used[label] == len(stacks[label]):
                if refill:
                    stacks[label], used[label] = rng.permutation(members[label]), 0
                else:
                    left = np.array([len(s) for s in stacks]) - used
                    label = _draw_left(rng, mix, left)
            chosen.append(int(stacks[label][used[label]]))
            used[label] += 1
        clients.append(chosen)
    how = {"scheme": "dirichlet_client", "clients": num_clients, "alpha": alpha, "seed": seed}
    return Partition.of(clients, len(targets), how | {"samples_per_client": each, "refill": refill})


def dirichlet_label(
    targets: np.ndarray, num_clients: int, alpha: float, seed: int = 0, min_samples: int = 1
) -> Partition:
    """Samples of each class split over the clients by a Dirichlet distribution: every sample is on one client.

    Sizes of clients differ. Clients with fewer than ``min_samples`` are filled up with samples drawn from the client
    that is largest at that moment (``how["moved"]`` counts them), instead of drawing again until none is small: that
    may never end.

    Args:
        targets: (N,) class of each training sample.
        num_clients: clients.
        alpha: concentration, > 0.
        seed: of all draws.
        min_samples: least samples of a client; 0 allows empty ones, which a run then leaves out.

    Raises:
        UserError: a value out of its range, or fewer than ``num_clients * min_samples`` samples.
    """
    targets = _labels(targets)
    _check_clients(num_clients, len(targets))
    _check_alpha(alpha)
    if min_samples < 0 or min_samples * num_clients > len(targets):
        raise UserError(
            f"min_samples={min_samples} for {num_clients} clients; expected 0..{len(targets) // num_clients}: the data"
            f" set has {len(targets)} samples"
        )
    rng = numpy_rng(seed, "partition", "dirichlet_label")
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1]
        cuts = np.minimum(np.round(ends * len(members)).astype(np.int64), len(members))
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    clients = [list(np.concatenate(part)) for part in parts]
    moved = 0
    for client in clients:
        while len(client) < min_samples:
            giver = max(clients, key=len)
            client.append(giver.pop(int(rng.integers(len(giver)))))
            moved += 1
    how = {"scheme": "dirichlet_label", "clients": num_clients, "alpha": alpha, "seed": seed}
    return Partition.of(clients, len(targets), how | {"min_samples": min_samples, "moved": moved})


def shards(targets: np.ndarray, num_clients: int, shards_per_client: int = 2, seed: int = 0) -> Partition:
    """Samples sorted by class, cut into equal shards, dealt out at random: most clients have few classes.

    Args:
        targets: (N,) class of each training sample.
        num_clients: clients.
        shards_per_client: shards dealt to each.
        seed: of the deal.

    Raises:
        UserError: fewer samples than shards.

    Source: McMahan et al. 2017, arXiv 1602.05629, section 3.
    """
    targets = _labels(targets)
    _check_clients(num_clients, len(targets))
    total = num_clients * shards_per_client
    if shards_per_client < 1 or total > len(targets):
        raise UserError(
            f"shards_per_client={shards_per_client}; expected 1..{len(targets) // num_clients} for {len(targets)}"
            f" samples on {num_clients} clients"
        )
    rng = numpy_rng(seed, "partition", "shards")
    order = rng.permutation(len(targets))
    pieces = np.array_split(order[np.argsort(targets[order], kind="stable")], total)
    deal = rng.permutation(total).reshape(num_clients, shards_per_client)
    clients = [np.concatenate([pieces[piece] for piece in hand]) for hand in deal]
    how = {"scheme": "shards", "clients": num_clients, "shards_per_client": shards_per_client, "seed": seed}
    return Partition.of(clients, len(targets), how)


def iid(n: int, num_clients: int, seed: int = 0) -> Partition:
    """Equal shares at random; sizes differ by one sample at most.

    Args:
        n: samples of the training set.
        num_clients: clients.
        seed: of the shuffle.

    Raises:
        UserError: fewer samples than clients.
    """
    _check_clients(num_clients, n)
    order = numpy_rng(seed, "partition", "iid").permutation(n)
    return Partition.of(np.array_split(order, num_clients), n, {"scheme": "iid", "clients": num_clients, "seed": seed})


def by_column(groups: np.ndarray, names: Sequence[str] = ()) -> Partition:
    """One client for each value of a column, in sorted order: natural clients.

    Args:
        groups: (N,) value of each training sample: number or text.
        names: names by number; otherwise the values themselves.

    Raises:
        UserError: no sample.
    """
    groups = np.asarray(groups)
    if groups.ndim != 1 or not len(groups):
        raise UserError(f"by_column: a column of shape {groups.shape}; expected one value a sample")
    values = np.unique(groups)
    clients = [np.flatnonzero(groups == value) for value in values]
    called = tuple(names[int(value)] if len(names) else str(value) for value in values)
    return Partition.of(clients, len(groups), {"scheme": "by_column", "clients": len(values)}, called)


def bin_targets(targets: np.ndarray, bins: int = 5) -> np.ndarray:
    """Numbers of a regression (N,) cut into ``bins`` classes of equal width, int64, for label-skewed partitions."""
    targets = np.asarray(targets, dtype=np.float64)
    low, high = float(targets.min()), float(targets.max())
    if low == high:
        return np.zeros(len(targets), dtype=np.int64)
    return np.minimum((targets - low) / (high - low) * bins, bins - 1).astype(np.int64)


# ------------------------------------------------------------------ pieces


def _draw_classes(rng: np.random.Generator, mix: np.ndarray, count: int) -> list[int]:
    ends = np.cumsum(mix)
    chosen = np.searchsorted(ends / ends[-1], rng.random(count), side="right")
    return [int(place) for place in np.minimum(chosen, len(mix) - 1)]


def _draw_left(rng: np.random.Generator, mix: np.ndarray, left: np.ndarray) -> int:
    """One class among those with samples left, by the client's mix; evenly where that gives them no mass."""
    weights = np.where(left > 0, mix, 0.0)
    if not weights.sum() > 0:
        weights = (left > 0).astype(float)
    return _draw_classes(rng, weights, 1)[0]


def _labels(targets: Any) -> np.ndarray:
    labels = np.asarray(targets)
    if labels.ndim != 1 or not len(labels):
        raise UserError(f"targets of shape {labels.shape}; expected one class a sample, (N,)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError("targets are not class numbers; cut the numbers of a regression into classes with bin_targets")
    return labels


def _check_clients(num_clients: int, samples: int) -> None:
    if not 1 <= num_clients <= samples:
        raise UserError(f"{num_clients} clients for {samples} samples; expected 1..{samples}")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise UserError(f"alpha={alpha}; expected more than 0 (papers: 0.1, 0.3, 0.6)")
