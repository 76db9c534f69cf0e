"""Low-rank adapters (LoRA) of equal or unequal ranks: start, exact aggregation, layers, PEFT's format.

Importing ``fedcore.lora`` loads no torch; the names below are imported when they are first used. ``from_peft`` and
``to_peft`` need the extra ``polymodal-fedcore[peft]``.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "LoraLinear": "linear",
    "RankError": "init",
    "adapter_state": "state",
    "aggregate_concat_qr": "aggregate",
    "export_plain": "adapter",
    "from_peft": "peft",
    "inject": "injection",
    "kaiming_init": "init",
    "load_adapter_state": "state",
    "pad_columns": "aggregate",
    "pad_rows": "aggregate",
    "qr_init": "init",
    "residual_factors": "aggregate",
    "to_peft": "peft",
}

__all__ = [
    "LoraLinear",
    "RankError",
    "adapter_state",
    "aggregate_concat_qr",
    "export_plain",
    "from_peft",
    "inject",
    "kaiming_init",
    "load_adapter_state",
    "pad_columns",
    "pad_rows",
    "qr_init",
    "residual_factors",
    "to_peft",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"fedcore.lora.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
