"""Federated methods: one file each, all with the interface of ``fedcore.algorithm.Algorithm``.

Created by ``create(name, **options)``. Importing this table loads no method and no torch.
"""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["ALGORITHMS", "create"]

_FEDAVG = "McMahan et al. 2017, FedAvg (arXiv 1602.05629)"

ALGORITHMS = Registry(
    "algorithm",
    [
        # ---- local SGD
        MethodInfo(
            name="fedavg",
            target="fedcore.algorithms.fedavg:FedAvg",
            paper=_FEDAVG,
            summary="local SGD, plain average of the local models",
            tags=("tier2", "sgd"),
        ),
    ],
)


def create(name: str, /, **options: Any) -> Any:
    """Create the algorithm ``name`` with its options; UserError for unknown names and options."""
    return ALGORITHMS.create(name, **options)
