"""StreamingLLM: the first entries and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.budget import KVBudget
from vlm_accel.methods.base import CacheMethod

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import CacheView

__all__ = ["StreamingLLM"]

_PLACES = "streaming_places"


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """The budget's first ``sink`` entries (attention sinks) and the last b - sink.

    Source: Xiao et al. 2023, StreamingLLM (arXiv 2309.17453), section 3.2.

    Args:
        rerotate: turn kept keys so that the cache has no gap in its positions, as the original does ("positions within
            the cache"). Only distances matter to rotary embeddings, so the last entry keeps its place and the sinks
            move up to the recent ones; the model's own positions stay logical. In bfloat16 a sink is rounded again at
            each compression.
    """

    rerotate: bool = False
    needs_queries: ClassVar[bool] = False
    same_for_heads: ClassVar[bool] = True

    def kv(self) -> KVBudget:
        """Half of each layer's prefill, four sinks."""
        return KVBudget.ratio(0.5, recent=1, window=1)

    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n): the later the better; sinks are protected by the budget."""
        rows = torch.arange(view.valid.shape[-1], device=view.valid.device, dtype=torch.float32)
        return rows.expand(view.valid.shape)

    def moved(self, view: CacheView, rows: Tensor, layer: Any) -> None:
        """Turn the kept keys to places without gaps."""
        if not self.rerotate:
            return
        index = view.index[:, 0]
        known = view.state.get(_PLACES)
        # entries that came after the last compression stand at their logical positions
        places = index if known is None else torch.cat([known, index[:, known.shape[1] :]], 1)
        old = places.gather(1, rows)
        count = rows.shape[1]
        new = old[:, -1:] - torch.arange(count - 1, -1, -1, device=rows.device)
        layer.keys = _turn(layer.keys, new - old, view)
        view.state[_PLACES] = new


def _turn(keys: Tensor, by: Tensor, view: CacheView) -> Tensor:
    """Rotate keys (B, K, m, d) on by (B, m) positions, in float32."""
    rotary: Any = view.kwargs.get("rotary_emb")
    rope = view.kwargs.get("position_embeddings")
    parameters = getattr(getattr(view.module, "config", None), "rope_parameters", None) or {}
    if rotary is None or rope is None or getattr(rotary, "inv_freq", None) is None:
        raise UserError("StreamingLLM: rerotate needs one plain rotary embedding for all layers; leave it out")
    if rope[0].dim() != 3 or "mrope_section" in parameters:
        raise UserError("StreamingLLM: rerotate is for one-dimensional positions, M-RoPE has three; leave it out")
    if not getattr(view.module, "use_rope", True):  # SmolLM3 leaves some layers unrotated
        return keys
    angles = by[..., None].float() * rotary.inv_freq.float()
    cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
    turned, rest = keys[..., : cos.shape[-1]].float(), keys[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(keys.dtype), rest], -1)
