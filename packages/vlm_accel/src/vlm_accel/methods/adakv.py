"""AdaKV: SnapKV's score, heads of a layer compete for its entries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from polymodal.errors import UserError

from vlm_accel.budget import KVBudget
from vlm_accel.methods.snapkv import SnapKV

__all__ = ["AdaKV"]


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with one budget for all heads of a layer: a head with spread attention keeps more entries.

    Heads of unequal length cannot be stored in one tensor, so entries are **masked, not freed** (as in kvpress):
    fewer entries count, no byte is saved. A budget ``ratio:0.3`` is taken as ``ada:0.3``.

    Source: Feng et al. 2024, Ada-KV (arXiv 2407.11550), algorithm 1; every head keeps its best fifth (LightVLM 5).
    """

    def kv(self) -> KVBudget:
        """Half of the entries of each layer."""
        return KVBudget.ada(0.5, sink=0, recent=0, window=self.window)

    def adapt(self, budget: KVBudget) -> KVBudget:
        """``ratio`` becomes ``ada``.

        Raises:
            UserError: another kind, which has no budget to share between heads.
        """
        if budget.kind not in ("ratio", "ada"):
            raise UserError(f"AdaKV needs a share of each layer, not {budget.kind}; use ada:0.5 or ratio:0.5")
        return dataclasses.replace(budget, kind="ada")
