"""Control: entries at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_accel.methods.base import CacheMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["RandomKV"]

_FIRST = "random_first"
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomKV(CacheMethod):
    """Each entry draws one number when it is made and keeps it: what survives does not depend on how often one asks.

    The draw is a function of seed, layer, head and the entry's place after the sample's padding, so that a padded
    sample keeps what it keeps alone.

    Source: control of LightVLM 5 (arXiv 2509.00419).
    """

    needs_queries: ClassVar[bool] = False

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n) uniform in [0, 1)."""
        first = view.state.get(_FIRST)
        if first is None:
            places = torch.where(view.valid[:, 0], view.index[:, 0], torch.iinfo(torch.int64).max)
            first = view.state[_FIRST] = places.amin(1)
        head = torch.arange(view.valid.shape[1], device=view.index.device)[None, :, None]
        place = view.index - first[:, None, None]
        mixed = _mix(_mix(_mix(place + 1) + head + 1) + (view.layer + 1) * 0x9E3779B1 + view.seed)
        return mixed.to(torch.float32) / 2.0**32


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 (two multiply-xorshift rounds): no generator, no state, the same on any device."""
    x = x & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)
