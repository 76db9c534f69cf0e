"""Federated methods: one file each, all with the interface of ``fedcore.algorithm.Algorithm``.

Created by ``create(name, **options)``. Importing this table loads no method and no torch.
"""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["ALGORITHMS", "create"]

_FEDSWA = "Liu et al. 2025, FedSWA (arXiv 2507.20016)"
_FEDSAM = "Qu et al. 2022, FedSAM and MoFedSAM (arXiv 2206.02618)"
_FEDOPT = "Reddi et al. 2021, FedOpt (arXiv 2003.00295)"
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
        # ---- sharpness-aware local steps
        MethodInfo(
            name="fedsam",
            target="fedcore.algorithms.fedsam:FedSAM",
            paper=_FEDSAM,
            summary="local sharpness-aware minimisation",
            tags=("tier2", "sam"),
        ),
        MethodInfo(
            name="fedasam",
            target="fedcore.algorithms.fedasam:FedASAM",
            paper="Caldarola et al. 2022, FedASAM (arXiv 2203.11834)",
            summary="FedSAM in a ball scaled by the size of each parameter",
            tags=("tier2", "sam"),
        ),
        MethodInfo(
            name="mofedsam",
            target="fedcore.algorithms.mofedsam:MoFedSAM",
            paper=_FEDSAM,
            summary="FedSAM with the last global move as momentum",
            tags=("tier2", "sam"),
        ),
        MethodInfo(
            name="fedlesam",
            target="fedcore.algorithms.fedlesam:FedLESAM",
            paper="Fan et al. 2024, FedLESAM (arXiv 2405.18890)",
            summary="perturbs along the global model's own move, one backward pass a step",
            tags=("tier2", "sam", "state"),
        ),
        MethodInfo(
            name="fedgamma",
            target="fedcore.algorithms.fedgamma:FedGAMMA",
            paper="Dai et al. 2023, FedGAMMA (IEEE TNNLS)",
            summary="SCAFFOLD on sharpness-aware gradients",
            tags=("tier3", "sam", "state"),
            fidelity="code",
        ),
        MethodInfo(
            name="fednsam",
            target="fedcore.algorithms.fednsam:FedNSAM",
            paper="Liu et al. 2026, FedNSAM (arXiv 2602.23827)",
            summary="FedSAM from where the server's momentum leads",
            tags=("tier3", "sam"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="fedspeed",
            target="fedcore.algorithms.fedspeed:FedSpeed",
            paper="Sun et al. 2023, FedSpeed (arXiv 2302.10429)",
            summary="corrected proximal steps on partly perturbed gradients",
            tags=("tier3", "sam", "state"),
            fidelity="reconstruction",
        ),
        # ---- adaptive server
        MethodInfo(
            name="fedadam",
            target="fedcore.algorithms.fedadam:FedAdam",
            paper=_FEDOPT,
            summary="the server runs Adam on the mean move",
            tags=("tier2", "server"),
        ),
        MethodInfo(
            name="fedyogi",
            target="fedcore.algorithms.fedyogi:FedYogi",
            paper=_FEDOPT,
            summary="FedAdam whose second moment moves by bounded steps",
            tags=("tier3", "server"),
        ),
        MethodInfo(
            name="fedadagrad",
            target="fedcore.algorithms.fedadagrad:FedAdagrad",
            paper=_FEDOPT,
            summary="the server runs Adagrad on the mean move",
            tags=("tier3", "server"),
        ),
    ],
)


def create(name: str, /, **options: Any) -> Any:
    """Create the algorithm ``name`` with its options; UserError for unknown names and options."""
    return ALGORITHMS.create(name, **options)
