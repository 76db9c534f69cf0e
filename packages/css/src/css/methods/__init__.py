"""What is done against forgetting: one file a method, all with the interface of ``css.methods.base.Method``.

Created by ``METHODS.create(name, **options)``. Importing this table loads no method and no torch.
"""

from polymodal.registry import MethodInfo, Registry

__all__ = ["METHODS"]

_EIR = "Yin et al. 2025, EIR (arXiv 2503.22136)"
_MIB = "Cermelli et al. 2020, MiB (arXiv 2002.00718)"
_PLOP = "Douillard et al. 2021, PLOP (arXiv 2011.11390)"
_SSUL = "Cha et al. 2021, SSUL (arXiv 2106.11562)"
_DKD = "Baek et al. 2022, DKD (arXiv 2210.05941)"

METHODS = Registry(
    "method",
    [
        MethodInfo(
            name="eir",
            target="css.methods.eir:EIR",
            paper=_EIR,
            summary="pasted instances of old classes, pseudo-labels and region distillation (our reading)",
            tags=("sigmoid", "instances", "distillation"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="ft",
            target="css.methods.ft:FineTuning",
            paper=_EIR,
            summary="labels of the step and nothing else: how much is forgotten",
            tags=("sigmoid", "baseline"),
            fidelity="code",
        ),
        MethodInfo(
            name="joint",
            target="css.methods.joint:Joint",
            paper=_EIR,
            summary="all classes at once, whatever the task: what could be reached",
            tags=("sigmoid", "baseline", "offline"),
            fidelity="code",
        ),
        MethodInfo(
            name="pl",
            target="css.methods.pl:PseudoLabels",
            paper=_EIR,
            summary="fine-tuning where the old network labels the background it is sure about",
            tags=("sigmoid", "baseline"),
            fidelity="code",
        ),
        MethodInfo(
            name="replay",
            target="css.methods.replay:ImageReplay",
            paper=_EIR,
            summary="pseudo-labels plus stored whole pictures with the labels of their own step (our reading)",
            tags=("sigmoid", "images", "baseline"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="mib",
            target="css.methods.mib:MiB",
            paper=_MIB,
            summary="softmax whose background stands for all old classes in the loss, for all new ones in distillation",
            tags=("softmax", "distillation"),
            fidelity="paper",
        ),
        MethodInfo(
            name="plop",
            target="css.methods.plop:PLOP",
            paper=_PLOP,
            summary="features distilled as strip means at three scales, pseudo-labels by entropy",
            tags=("softmax", "distillation"),
            fidelity="paper",
        ),
        MethodInfo(
            name="ssul",
            target="css.methods.ssul:SSUL",
            paper=_SSUL,
            summary="frozen network, new heads start from a head for unknown objects (our reading)",
            tags=("sigmoid", "frozen"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="ssul_m",
            target="css.methods.ssul_m:SSULM",
            paper=_SSUL,
            summary="SSUL with stored pictures in half of each batch (our reading)",
            tags=("sigmoid", "frozen", "images"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="dkd",
            target="css.methods.dkd:DKD",
            paper=_DKD,
            summary="logits distilled as what speaks for and what against a class, heads start from a negative unit",
            tags=("sigmoid", "distillation"),
            fidelity="code",
        ),
        MethodInfo(
            name="dkd_m",
            target="css.methods.dkd_m:DKDM",
            paper=_DKD,
            summary="DKD with stored pictures in the training set",
            tags=("sigmoid", "distillation", "images"),
            fidelity="code",
        ),
    ],
)
