"""Methods: one file each. Created by ``create(name, **options)``; importing this table loads no method and no torch."""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["METHODS", "create"]

_DCP = "Hu et al. 2024, Deep Correlated Prompting (arXiv 2410.06558)"


def _row(name: str, cls: str, paper: str, summary: str, tags: tuple[str, ...], fidelity: Any = "code") -> MethodInfo:
    return MethodInfo(name, f"missing_modal.methods.{name}:{cls}", paper, summary, tags, fidelity)


METHODS = Registry(
    "method",
    [
        _row("dcp", "DCP", _DCP, "deep correlated, dynamic and modal-common prompts", ("prompts",)),
        _row("head_only", "HeadOnly", _DCP, "frozen towers, linear head: the floor of every comparison", ("control",)),
    ],
)


def create(name: str, **options: Any) -> Any:
    """The method called ``name`` with its options (UserError for an unknown name or option)."""
    return METHODS.create(name, **options)
