"""Methods: one file each. Created by ``create(name, **options)``; importing this table loads no method and no torch."""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["METHODS", "create"]

_DCP = "Hu et al. 2024, Deep Correlated Prompting (arXiv 2410.06558)"
_MMP = "Lee et al. 2023, Missing-Aware Prompts (arXiv 2303.03369)"
_VPT = "Jia et al. 2022, Visual Prompt Tuning (arXiv 2203.12119)"
_COOP = "Zhou et al. 2022, CoOp (arXiv 2109.01134)"
_MAPLE = "Khattak et al. 2023, MaPLe (arXiv 2210.03117)"
_MSP = "Jang et al. 2024, Modality-Specific Prompts (arXiv 2312.15890)"


def _row(name: str, cls: str, paper: str, summary: str, tags: tuple[str, ...], fidelity: Any = "code") -> MethodInfo:
    return MethodInfo(name, f"missing_modal.methods.{name}:{cls}", paper, summary, tags, fidelity)


METHODS = Registry(
    "method",
    [
        _row("dcp", "DCP", _DCP, "deep correlated, dynamic and modal-common prompts", ("prompts", "pattern")),
        _row("head_only", "HeadOnly", _DCP, "frozen towers, linear head: the floor of every comparison", ("control",)),
        _row(
            "deep_prompts",
            "DeepPrompts",
            _VPT,
            "prompts in every tower that do not know what is missing (our reading)",
            ("prompts",),
            "reconstruction",
        ),
        _row("vpt", "VPT", _VPT, "prompts in the image tower only, deep or shallow", ("prompts",), "reconstruction"),
        _row("coop", "CoOp", _COOP, "prompts in front of the text only (our reading)", ("prompts",), "reconstruction"),
        _row(
            "mmp_input",
            "MMPInput",
            _MMP,
            "independent prompts per pattern, block and tower, as rows (our reading for CLIP)",
            ("prompts", "pattern"),
            "reconstruction",
        ),
        _row(
            "mmp_attention",
            "MMPAttention",
            _MMP,
            "the same prompts as further keys and values (our reading for CLIP)",
            ("pattern",),
            "reconstruction",
        ),
        _row(
            "mmp_vilt",
            "MMPVilt",
            _MMP,
            "the published one: prompts per pattern and block on ViLT",
            ("pattern", "fused"),
        ),
        _row(
            "maple",
            "MaPLe",
            _MAPLE,
            "text prompts that are projected into the other towers (our reading, on sample text)",
            ("prompts",),
            "reconstruction",
        ),
        _row(
            "msp",
            "MSP",
            _MSP,
            "a prompt per modality, summed over what is present, held orthogonal (our reading for CLIP)",
            ("prompts", "pattern"),
            "reconstruction",
        ),
        _row(
            "zero_imputation",
            "ZeroImputation",
            _DCP,
            "a missing modality's placeholder is encoded and its feature kept (our reading)",
            ("control",),
            "reconstruction",
        ),
        _row(
            "mean_imputation",
            "MeanImputation",
            _DCP,
            "a missing modality gets the mean feature of the training set (our reading)",
            ("control",),
            "reconstruction",
        ),
        _row(
            "modality_dropout",
            "ModalityDropout",
            _DCP,
            "fine-tuned towers, each modality dropped at random in training (our reading)",
            ("tunes",),
            "reconstruction",
        ),
    ],
)


def create(name: str, **options: Any) -> Any:
    """The method called ``name`` with its options (UserError for an unknown name or option)."""
    return METHODS.create(name, **options)
