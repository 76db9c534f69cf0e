"""Prompt learning for missing modalities on frozen encoders. Nothing heavy is imported until a name is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from missing_modal.batch import Batch
    from missing_modal.classifier import Classifier
    from missing_modal.methods import METHODS
    from missing_modal.prompts import CorrelatedPrompts
    from missing_modal.tables import missing_table

__version__ = "0.1.0"
__all__ = ["METHODS", "Batch", "Classifier", "CorrelatedPrompts", "__version__", "missing_table"]

_HOME = {
    "Batch": "batch",
    "Classifier": "classifier",
    "CorrelatedPrompts": "prompts",
    "METHODS": "methods",
    "missing_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'missing_modal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"missing_modal.{_HOME[name]}"), name)
