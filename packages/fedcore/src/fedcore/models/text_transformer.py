"""A small transformer encoder for texts, trained from scratch."""

from __future__ import annotations

import math

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

__all__ = ["TextTransformer"]

_STD = 0.02
_BASE = 10_000.0


class TextTransformer(nn.Module):
    """Token embeddings, sinusoid positions, pre-norm encoder blocks, mean over tokens, one linear layer.

    Padding (id 0) is masked in attention and left out of the mean. There is no dropout and no buffer: the same weights
    and ids give the same logits in training and evaluation, in any batch (up to rounding), and clients can be computed
    together. Projections are called ``query``, ``key``, ``value`` and ``output``, the last layer ``classifier``, so
    that adapters go where they go in BERT and RoBERTa (``--lora.targets query,value``).

    Args:
        num_classes: outputs.
        input_shape: (longest text,); any length is taken.
        vocabulary: number of token ids, padding included; 16385 are those of the readers' hashed words.
        width: width of the tokens, even.
        depth: blocks.
        heads: attention heads of a block; they divide ``width``.
        mlp_ratio: width of the hidden layer of a block, by ``width``.

    Raises:
        UserError: inputs that are no texts, or sizes that do not divide.

    Source: Vaswani et al. 2017, Attention Is All You Need (encoder, positions); Xiong et al. 2020, On Layer
    Normalization in the Transformer Architecture (norms before the sub-layers).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        vocabulary: int = 16385,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise UserError(
                f"model text_transformer takes token ids (length,); inputs here are {input_shape}: choose a picture"
                " model"
            )
        if min(vocabulary, width, depth, heads) < 1 or width % heads or width % 2 or int(width * mlp_ratio) < 1:
            raise UserError(
                f"text_transformer: vocabulary={vocabulary}, width={width}, depth={depth}, heads={heads},"
                f" mlp_ratio={mlp_ratio}; expected at least 1 each, an even width and heads that divide it"
            )
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.blocks = nn.ModuleList(_Block(width, heads, int(width * mlp_ratio)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        self.apply(_start)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, length) token ids -> logits (B, num_classes)."""
        tokens = self.embedding(ids)
        used = (ids != 0).to(tokens.dtype)
        # Not minus infinity: a text without any word would have no softmax.
        bias = ((1 - used) * (torch.finfo(tokens.dtype).min / 2))[:, None, None, :]
        tokens = tokens + _positions(tokens)
        for block in self.blocks:
            tokens = block(tokens, bias)
        weights = used / used.sum(dim=1, keepdim=True).clamp(min=1.0)
        logits: Tensor = self.classifier((self.norm(tokens) * weights.unsqueeze(-1)).sum(dim=1))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens), bias)
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class _Attention(nn.Module):
    """Scaled dot-product attention with one matrix each for queries, keys, values and output.

    Keys have no bias: it would add the same to all scores of a query, which changes no weight; its gradient is nothing
    but rounding, from which Adam makes whole steps.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = (
            layer(tokens).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # Not torch's fused attention: it can be neither derived twice (sharpness) nor computed for stacked clients.
        scores = query @ key.transpose(-2, -1) * (width // self.num_heads) ** -0.5 + bias
        mixed = scores.softmax(dim=-1) @ value
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


def _positions(tokens: Tensor) -> Tensor:
    """(length, width) sines and cosines of the size of a fresh embedding."""
    length, width = tokens.shape[-2:]
    place = torch.arange(length, dtype=tokens.dtype, device=tokens.device).unsqueeze(1)
    rates = torch.arange(0, width, 2, dtype=tokens.dtype, device=tokens.device) * (-math.log(_BASE) / width)
    angles = place * rates.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1) * (math.sqrt(2) * _STD)


def _start(module: nn.Module) -> None:
    """First weights: Glorot's, as small matrices of BERT's size (0.02) leave the order of words unlearnt for long."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)
        with torch.no_grad():
            module.weight[module.padding_idx or 0] = 0.0
