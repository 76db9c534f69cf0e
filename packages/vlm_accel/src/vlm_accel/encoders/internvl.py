"""InternVL: fixed-size tiles with a class row, layer scale, a pixel shuffle whose scale gives the cells.

Read in transformers 5.23. An image is one unbroken run of placeholders, whatever its number of tiles, so the decoder's
runs are the segments; within the encoder every tile is ranked by itself. The class row is protected and gives the
``cls`` score and the attention of methods after the encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from vlm_accel.encoders.surgery import Parts
from vlm_accel.encoders.tiled import TiledCall, TiledEncoder, attended

if TYPE_CHECKING:
    from torch import nn

__all__ = ["InternVLEncoder"]


class InternVLEncoder(TiledEncoder):
    """InternVL's vision tower and projector.

    Raises:
        UserError: a model that reads several layers of its encoder.
    """

    by_tile = False

    def __init__(self, model: nn.Module) -> None:
        self.inner = getattr(model, "model", model)
        self.tower = self.inner.vision_tower
        self.projector = self.inner.multi_modal_projector
        config = self.inner.config
        self.blocks = list(self.inner.vision_tower.encoder.layer)
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise UserError(f"InternVL with vision_feature_layer={layer}: one layer is supported, such as -1")
        self.layer = layer
        depth = len(self.blocks)
        self.used = depth if layer == -1 else (layer if layer >= 0 else depth + 1 + layer)
        vision = config.vision_config
        self.width, self.heads, self.mlp = vision.hidden_size, vision.num_attention_heads, vision.intermediate_size
        self.num_prefix_tokens = 1
        self.side = int(1 / config.downsample_ratio)
        self.group = self.side**2

    def parts(self, block: Any) -> Parts:
        """Both branches go through a layer scale, the second one through dropout first."""

        def scale2(update: Any) -> Any:
            update = block.dropout(update)
            return update if block.lambda_2 is None else block.lambda_2 * update

        return Parts(
            block.layernorm_before,
            block.attention,
            attended(block.attention),
            block.layernorm_after,
            block.mlp,
            scale1=lambda update: block.lambda_1 * update,
            scale2=scale2,
        )

    def restore(self, call: TiledCall, output: Any) -> None:
        """The layer that the model reads: the last one after its norm, or a hidden state."""
        if self.layer == -1:
            super().restore(call, output)
            return
        states = list(output.hidden_states)
        states[self.layer] = call.whole(states[self.layer])
        output.hidden_states = tuple(states)
