"""Methods: one file each. Created by ``create(name, **options)``; importing this table loads no method and no torch."""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["METHODS", "create"]

_ILLAVA = "Hu et al. 2024, iLLaVA (arXiv 2412.06263)"


def _row(
    name: str, target: str, paper: str, summary: str, tags: tuple[str, ...], fidelity: Any = "paper"
) -> MethodInfo:
    return MethodInfo(name, f"vlm_accel.methods.{target}", paper, summary, tags, fidelity)


METHODS = Registry(
    "method",
    [
        _row(
            "rank1", "rank1:Rank1", _ILLAVA, "the least attended fold into one of them (v1)", ("vision", "llm"), "code"
        ),
        _row(
            "recycle",
            "recycle:Recycle",
            _ILLAVA,
            "the least attended flow into a few kept ones",
            ("vision", "llm"),
            "code",
        ),
        _row("shift", "shift:Shift", _ILLAVA, "the last token folds into its neighbour", ("vision", "llm"), "code"),
        _row("drop", "drop:Drop", _ILLAVA, "the least attended are deleted", ("vision", "llm"), "code"),
        _row(
            "lightvlm",
            "lightvlm:LightVLM",
            "Hu et al. 2025, LightVLM (arXiv 2509.00419)",
            "pyramid of merging in the decoder, cache window in decoding",
            ("llm", "vision", "cache"),
            "reconstruction",
        ),
    ],
)


def create(name: str, **options: Any) -> Any:
    """The method called ``name`` with its options (UserError for an unknown name or option)."""
    return METHODS.create(name, **options)
