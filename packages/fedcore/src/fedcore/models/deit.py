"""A small vision transformer for small pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.models.lenet import picture_shape

__all__ = ["DeiTTiny"]


class DeiTTiny(nn.Module):
    """Patches, class token, learned positions, pre-norm blocks, one linear layer on the class token.

    The same computation and parameter names as timm's ``VisionTransformer`` of these sizes, without distillation.

    Args:
        num_classes: outputs.
        input_shape: (channels, height, width); sides that ``patch`` divides.
        patch: side of a patch, pixels.
        dim: width of the tokens.
        depth: blocks.
        heads: attention heads of a block; they divide ``dim``.
        mlp_ratio: width of the hidden layer of a block, by ``dim``.

    Raises:
        UserError: sizes that do not divide.

    Source: Touvron et al. 2021, DeiT; sizes for 32x32 pictures from fedswa.md section 3.5.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        patch: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        channels, height, width = picture_shape("deit_tiny", input_shape)
        if min(patch, dim, depth, heads) < 1 or dim % heads:
            raise UserError(f"deit_tiny: dim={dim}, depth={depth}, heads={heads}; expected heads that divide dim")
        if height % patch or width % patch:
            raise UserError(
                f"deit_tiny: pictures of {height}x{width} and patch={patch}; expected a patch that divides both"
            )
        tokens = (height // patch) * (width // patch)
        self.patch_embed = nn.Conv2d(channels, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads, int(dim * mlp_ratio)) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(_start)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> logits (B, num_classes)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _Attention(nn.Module):
    """Queries, keys and values from one matrix, by kind, then by head, as in timm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return result


def _start(module: nn.Module) -> None:
    """Timm's first weights."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
