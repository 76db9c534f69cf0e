"""Federated methods: one file each, all with the interface of ``fedcore.algorithm.Algorithm``.

Created by ``create(name, **options)``. Importing this table loads no method and no torch.
"""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["ALGORITHMS", "create"]

_FEDSWA = "Liu et al. 2025, FedSWA (arXiv 2507.20016)"
_FEDSAM = "Qu et al. 2022, FedSAM and MoFedSAM (arXiv 2206.02618)"
_FEDMUON = "Liu et al. 2025, FedMuon (arXiv 2510.27403)"
_FEDOPT = "Reddi et al. 2021, FedOpt (arXiv 2003.00295)"
_FEDADAMW = "Liu et al. 2025, FedAdamW (arXiv 2510.27486)"
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
        # ---- orthogonalised local steps
        MethodInfo(
            name="fedmuon",
            target="fedcore.algorithms.fedmuon:FedMuon",
            paper=_FEDMUON,
            summary="local Muon from the averaged momentum, aligned with the last global move",
            tags=("tier1", "muon"),
            fidelity="code",
        ),
        MethodInfo(
            name="local_muon",
            target="fedcore.algorithms.local_muon:LocalMuon",
            paper=_FEDMUON,
            summary="local Muon, plain average of the local models",
            tags=("tier2", "muon"),
            fidelity="code",
        ),
        # ---- local AdamW
        MethodInfo(
            name="fedadamw",
            target="fedcore.algorithms.fedadamw:FedAdamW",
            paper=_FEDADAMW,
            summary="AdamW whose second moment travels as block means, steps lean to the last global move",
            tags=("tier1", "adamw"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="local_adamw",
            target="fedcore.algorithms.local_adamw:LocalAdamW",
            paper=_FEDADAMW,
            summary="AdamW on the clients, plain average of the models",
            tags=("tier2", "adamw"),
        ),
        MethodInfo(
            name="local_adam",
            target="fedcore.algorithms.local_adam:LocalAdam",
            paper=_FEDADAMW,
            summary="Adam with L2 on the clients, plain average of the models",
            tags=("tier3", "adamw"),
        ),
        MethodInfo(
            name="agg_v",
            target="fedcore.algorithms.agg_v:AggV",
            paper=_FEDADAMW,
            summary="AdamW whose second moment is averaged elementwise",
            tags=("tier2", "adamw"),
        ),
        MethodInfo(
            name="agg_m",
            target="fedcore.algorithms.agg_m:AggM",
            paper=_FEDADAMW,
            summary="AdamW whose first moment is averaged, steps held within a cap",
            tags=("tier3", "adamw"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="agg_vm",
            target="fedcore.algorithms.agg_vm:AggVM",
            paper=_FEDADAMW,
            summary="AdamW whose two moments are averaged elementwise",
            tags=("tier3", "adamw"),
        ),
        MethodInfo(
            name="fedlada",
            target="fedcore.algorithms.fedlada:FedLADA",
            paper="Sun et al. 2023, FedLADA (arXiv 2308.00522)",
            summary="Adam with averaged second moment, steps mixed with the last global move",
            tags=("tier2", "adamw"),
            fidelity="code",
        ),
        MethodInfo(
            name="fedcm_adamw",
            target="fedcore.algorithms.fedcm_adamw:FedCMAdamW",
            paper=_FEDADAMW,
            summary="AdamW on gradients mixed with the last global move",
            tags=("tier3", "adamw"),
        ),
        MethodInfo(
            name="scaffold_adamw",
            target="fedcore.algorithms.scaffold_adamw:ScaffoldAdamW",
            paper=_FEDADAMW,
            summary="AdamW on gradients corrected by control variates",
            tags=("tier3", "adamw", "state"),
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
        # ---- client-level differential privacy
        MethodInfo(
            name="dp_fedpgn",
            target="fedcore.algorithms.dp_fedpgn:DPFedPGN",
            paper="Liu et al. 2025, DP-FedPGN (arXiv 2510.27504)",
            summary="steps lean to the private estimate of the global gradient, the rest is clipped (LS: smoothing)",
            tags=("tier1", "dp"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dp_fedavg",
            target="fedcore.algorithms.dp_fedavg:DPFedAvg",
            paper="McMahan et al. 2018, DP-FedAvg (arXiv 1710.06963)",
            summary="local SGD, noisy mean of clipped moves (options: server_momentum, smoothing)",
            tags=("tier2", "dp"),
        ),
        MethodInfo(
            name="dp_fedsam",
            target="fedcore.algorithms.dp_fedsam:DPFedSAM",
            paper="Shi et al. 2023, DP-FedSAM (arXiv 2303.11242)",
            summary="local sharpness-aware steps, noisy mean of clipped moves (topk: sparse moves)",
            tags=("tier2", "dp"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="fed_smp",
            target="fedcore.algorithms.fed_smp:FedSMP",
            paper="Hu et al. 2022, Fed-SMP (arXiv 2202.07178)",
            summary="DP-FedAvg on common random coordinates, new in each round",
            tags=("tier2", "dp"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dp_blur",
            target="fedcore.algorithms.dp_blur:DPBlur",
            paper="Cheng et al. 2022, BLUR and LUS (arXiv 2203.03106)",
            summary="DP-FedAvg with clients held within the clip's reach (topk: sparse moves)",
            tags=("tier2", "dp"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dp_scaffold",
            target="fedcore.algorithms.dp_scaffold:DPScaffold",
            paper="Noble et al. 2022, DP-SCAFFOLD (arXiv 2111.09278)",
            summary="control variates, clipped together with the move",
            tags=("tier2", "dp", "state"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dp_fedcm",
            target="fedcore.algorithms.dp_fedcm:DPFedCM",
            paper="Xu et al. 2021, FedCM (arXiv 2106.10874)",
            summary="FedCM with the whole move clipped: DP-FedPGN without its residual",
            tags=("tier2", "dp"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dp_mofedsam",
            target="fedcore.algorithms.dp_mofedsam:DPMoFedSAM",
            paper=_FEDSAM,
            summary="MoFedSAM with the whole move clipped",
            tags=("tier3", "dp"),
            fidelity="reconstruction",
        ),
        # ---- low-rank adapters of equal or unequal ranks
        MethodInfo(
            name="ilora",
            target="fedcore.algorithms.ilora:ILoRA",
            paper="Zhou et al. 2025, ILoRA (arXiv 2511.16069)",
            summary="adapters of unequal ranks: QR start, exact aggregate factored again, control variates",
            tags=("tier1", "lora", "state"),
            fidelity="code",
        ),
        MethodInfo(
            name="fedit",
            target="fedcore.algorithms.fedit:FedIT",
            paper="Zhang et al. 2023, FedIT (arXiv 2305.05644)",
            summary="adapters: each factor averaged by itself, smaller ranks padded with zeros",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="ffa_lora",
            target="fedcore.algorithms.ffa_lora:FFALoRA",
            paper="Sun et al. 2024, FFA-LoRA (arXiv 2403.12313)",
            summary="adapters: A frozen, B averaged",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="rolora",
            target="fedcore.algorithms.rolora:RoLoRA",
            paper="Chen et al. 2025, RoLoRA (arXiv 2502.01755)",
            summary="adapters: A and B trained and averaged in turn, one rank",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="flora",
            target="fedcore.algorithms.flora:FLoRA",
            paper="Wang et al. 2024, FLoRA (arXiv 2409.05976)",
            summary="adapters: stacked, merged into the frozen weight, begun anew",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="flexlora",
            target="fedcore.algorithms.flexlora:FlexLoRA",
            paper="Bai et al. 2024, FlexLoRA (arXiv 2402.11505)",
            summary="adapters: average of the products, cut to each rank by SVD",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="hetlora",
            target="fedcore.algorithms.hetlora:HetLoRA",
            paper="Cho et al. 2024, HetLoRA (arXiv 2401.06432)",
            summary="adapters: padded with zeros, weighed by the size of their product; ranks may shrink",
            tags=("tier2", "lora", "state"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="fedex_lora",
            target="fedcore.algorithms.fedex_lora:FedExLoRA",
            paper="Singhal et al. 2024, FedEx-LoRA (arXiv 2410.09432)",
            summary="adapters: averaged, what their product misses goes to the frozen weight, one rank",
            tags=("tier2", "lora"),
        ),
        MethodInfo(
            name="lora_fair",
            target="fedcore.algorithms.lora_fair:LoRAFAIR",
            paper="Bian et al. 2024, LoRA-FAIR (arXiv 2411.14961)",
            summary="adapters: averaged, B corrected towards the average of the products",
            tags=("tier2", "lora"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="lora_head",
            target="fedcore.algorithms.lora_head:LoRAHead",
            paper="baseline of ILoRA's comparison, 2025 (arXiv 2511.16069)",
            summary="the head alone is trained, adapters stay: the floor of comparisons",
            tags=("tier3", "lora"),
        ),
    ],
)


def create(name: str, /, **options: Any) -> Any:
    """Create the algorithm ``name`` with its options; UserError for unknown names and options."""
    return ALGORITHMS.create(name, **options)
