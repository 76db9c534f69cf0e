"""Training-free acceleration of vision-language models: fewer image tokens, a shorter prefill, a smaller cache.

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_accel import ops
    from vlm_accel.accelerate import accelerate
    from vlm_accel.budget import KVBudget
    from vlm_accel.merge_map import MergeMap
    from vlm_accel.presets import PRESETS
    from vlm_accel.schedule import Step, pyramid, resolve
    from vlm_accel.show import show

__version__ = "0.1.0"
__all__ = ["PRESETS", "KVBudget", "MergeMap", "Step", "__version__", "accelerate", "ops", "pyramid", "resolve", "show"]

_HOME = {
    "accelerate": "accelerate", "KVBudget": "budget", "MergeMap": "merge_map", "PRESETS": "presets", "Step": "schedule",
    "pyramid": "schedule", "resolve": "schedule", "show": "show",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("vlm_accel.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'vlm_accel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vlm_accel.{_HOME[name]}"), name)


class _Package(ModuleType):
    """Keeps ``accelerate`` and ``show`` the functions when the modules of those names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _HOME else value)


sys.modules[__name__].__class__ = _Package
