"""Federated methods: one file each, all with the interface of ``fedcore.algorithm.Algorithm``.

Created by ``create(name, **options)``. Importing this table loads no method and no torch.
"""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["ALGORITHMS", "create"]

_FEDSWA = "Liu et al. 2025, FedSWA (arXiv 2507.20016)"
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
        MethodInfo(
            name="fedprox",
            target="fedcore.algorithms.fedprox:FedProx",
            paper="Li et al. 2020, FedProx (arXiv 1812.06127)",
            summary="local SGD held near the model received",
            tags=("tier2", "sgd"),
        ),
        MethodInfo(
            name="scaffold",
            target="fedcore.algorithms.scaffold:Scaffold",
            paper="Karimireddy et al. 2020, SCAFFOLD (arXiv 1910.06378)",
            summary="control variates of clients and server against drift",
            tags=("tier2", "sgd", "state"),
        ),
        MethodInfo(
            name="fedcm",
            target="fedcore.algorithms.fedcm:FedCM",
            paper="Xu et al. 2021, FedCM (arXiv 2106.10874)",
            summary="the last global move as momentum in every local step",
            tags=("tier2", "sgd"),
        ),
        MethodInfo(
            name="fedacg",
            target="fedcore.algorithms.fedacg:FedACG",
            paper="Kim et al. 2024, FedACG (arXiv 2201.03172)",
            summary="clients start where the server's momentum leads",
            tags=("tier2", "sgd"),
        ),
        MethodInfo(
            name="feddyn",
            target="fedcore.algorithms.feddyn:FedDyn",
            paper="Acar et al. 2021, FedDyn (arXiv 2111.04263)",
            summary="dynamic regulariser that aligns local minima with the global one",
            tags=("tier2", "sgd", "state"),
        ),
        MethodInfo(
            name="fedswa",
            target="fedcore.algorithms.fedswa:FedSWA",
            paper=_FEDSWA,
            summary="local rate decays in every round, server steps beyond the average",
            tags=("tier1", "sgd"),
        ),
        MethodInfo(
            name="fedmoswa",
            target="fedcore.algorithms.fedmoswa:FedMoSWA",
            paper=_FEDSWA,
            summary="FedSWA with momentum-averaged control variates",
            tags=("tier1", "sgd", "state"),
        ),
        MethodInfo(
            name="server_swa",
            target="fedcore.algorithms.server_swa:ServerSWA",
            paper="Caldarola et al. 2022, server SWA (arXiv 2203.11834)",
            summary="FedAvg, evaluated at the mean of its last models (without their cyclic rate)",
            tags=("tier3", "sgd", "server"),
            fidelity="reconstruction",
        ),
    ],
)


def create(name: str, /, **options: Any) -> Any:
    """Create the algorithm ``name`` with its options; UserError for unknown names and options."""
    return ALGORITHMS.create(name, **options)
