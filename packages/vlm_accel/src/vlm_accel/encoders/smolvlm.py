"""SmolVLM and Idefics3: SigLIP tiles, padded where a picture is small, a connector with scale x scale cells.

Read in transformers 5.23. Text stands between the tiles of an image, so every tile is a segment. Padded patches are
masked in the attention: they count neither as keys nor as queries of a score, and go before any patch of the picture
(``padding.ValidFirst``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_accel.encoders.surgery import Parts
from vlm_accel.encoders.tiled import TiledCall, TiledEncoder, attended

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SmolVLMEncoder"]


class SmolVLMEncoder(TiledEncoder):
    """The vision model and connector of SmolVLM and Idefics3."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = getattr(model, "model", model)
        self.tower = self.inner.vision_model
        self.projector = self.inner.connector.modality_projection
        self.blocks = list(self.inner.vision_model.encoder.layers)
        self.used = len(self.blocks)
        vision = self.inner.config.vision_config
        self.width, self.heads, self.mlp = vision.hidden_size, vision.num_attention_heads, vision.intermediate_size
        self.side = self.inner.config.scale_factor
        self.group = self.side**2

    def parts(self, block: Any) -> Parts:
        """Plain pre-norm blocks."""
        return Parts(block.layer_norm1, block.self_attn, attended(block.self_attn), block.layer_norm2, block.mlp)

    def padding(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Patches of the picture; whether any is padding is read back once per call, as the model reads its tiles."""
        mask = kwargs.get("patch_attention_mask")
        if mask is None or bool(mask.all()):
            return None
        valid: Tensor = mask.flatten(1).bool()
        return valid

    def adjust(self, call: TiledCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The mask of the rows left: 4-D on both axes, 2-D (FlashAttention) on its one."""
        named = "attention_mask" in kwargs
        mask = kwargs["attention_mask"] if named else (args[1] if len(args) > 1 else None)
        if mask is None:
            return None
        rows = call.rows
        assert rows is not None
        if mask.dim() == 2:
            mask = mask.gather(1, rows)
        else:
            heads, wide = mask.shape[1], rows.shape[1]
            mask = mask.expand(-1, -1, call.patches, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
            mask = mask.gather(3, rows[:, None, None].expand(-1, heads, wide, -1))
        return (args, {**kwargs, "attention_mask": mask}) if named else ((args[0], mask, *args[2:]), kwargs)
