"""Continual semantic segmentation: enhanced instance replay and its rivals, any task, any data, any backbone.

Importing ``css`` loads no torch; the names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "CSSModule": "css.module",
    "CSSNet": "css.models.network",
    "FeatureExtractor": "css.models.base",
    "InstanceBank": "css.memory.bank",
    "InstanceMemory": "css.memory.store",
    "Item": "css.data.base",
    "Method": "css.methods.base",
    "SegData": "css.data.base",
    "StepContext": "css.methods.base",
    "Task": "css.task",
    "balanced_sample": "css.ops.sample",
    "confusion_matrix": "css.metrics",
    "forgetting": "css.metrics",
    "load_network": "css.checkpoint",
    "paste_batch": "css.ops.paste",
    "paste_instance": "css.ops.paste",
    "predict": "css.ops.predict",
    "pseudo_label": "css.ops.labels",
    "rank_cells": "css.ops.paste",
    "region_distillation": "css.ops.distill",
    "segmentation_report": "css.metrics",
    "soft_binary_loss": "css.ops.losses",
}

__all__ = [
    "CSSModule",
    "CSSNet",
    "FeatureExtractor",
    "InstanceBank",
    "InstanceMemory",
    "Item",
    "Method",
    "SegData",
    "StepContext",
    "Task",
    "__version__",
    "balanced_sample",
    "confusion_matrix",
    "forgetting",
    "load_network",
    "paste_batch",
    "paste_instance",
    "predict",
    "pseudo_label",
    "rank_cells",
    "region_distillation",
    "segmentation_report",
    "soft_binary_loss",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'css' has no attribute {name!r}")
