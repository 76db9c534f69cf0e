"""PyramidKV: SnapKV's score, more entries in early layers than in late ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vlm_accel.budget import KVBudget
from vlm_accel.methods.snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budgets fall from layer to layer along a line; the mean share is the budget's.

    A budget ``ratio:0.3`` is taken as ``pyramid:0.3``; ``uniform`` and ``ada`` stay what they are.

    Source: Cai et al. 2024, PyramidKV (arXiv 2406.02069), section 4.2; constants as in LightVLM 5 (NVIDIA/kvpress).
    """

    def kv(self) -> KVBudget:
        """Half of the prefill in the mean over layers."""
        return KVBudget.pyramid(0.5, sink=0, recent=0, window=self.window)

    def adapt(self, budget: KVBudget) -> KVBudget:
        """``ratio`` becomes ``pyramid``."""
        return dataclasses.replace(budget, kind="pyramid") if budget.kind == "ratio" else budget
