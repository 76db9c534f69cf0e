"""What a forward costs: multiply-accumulates (MAC) and bytes, in closed form (iLLaVA 8, LightVLM 8.1).

``torch.utils.flop_counter`` counts attention without its causal mask; with ``causal=False`` these formulas give
exactly half of what it counts (2 FLOP a MAC) for the blocks of encoders and decoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.encoders.base import EncoderAdapter

__all__ = ["DecoderShape", "EncoderShape", "decode_gain", "end_to_end_gain", "weight_bytes"]


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder's blocks: width D, MLP width F, gated MLP (3 D F a row) or plain (2 D F)."""

    width: int
    mlp: int
    gated: bool = False

    @classmethod
    def of(cls, encoder: EncoderAdapter) -> EncoderShape:
        """The sizes that an adapter names."""
        return cls(encoder.width, encoder.mlp, encoder.gated)

    def block(self, lengths: Iterable[int], mlp_rows: int) -> int:
        """MACs of one block.

        Args:
            lengths: rows of each image in the attention; rows attend within their image: 4 N D^2 + 2 N^2 D each.
            mlp_rows: rows in the MLP, all images together (after the merge).
        """
        attention = sum(4 * n * self.width**2 + 2 * n * n * self.width for n in lengths)
        return attention + (3 if self.gated else 2) * mlp_rows * self.width * self.mlp


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Args:
        layers: L. width: D. query: H * d. key: K * d (of keys; values alike). mlp: F of a gated MLP.
    """

    layers: int
    width: int
    query: int
    key: int
    mlp: int

    @classmethod
    def of(cls, config: Any, layers: int | None = None) -> DecoderShape:
        """From a transformers text config."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        key = (getattr(config, "num_key_value_heads", None) or heads) * head
        return cls(layers or config.num_hidden_layers, config.hidden_size, heads * head, key, config.intermediate_size)

    def layer(self, rows: int, cached: int = 0, causal: bool = True) -> int:
        """MACs of one layer for ``rows`` new tokens of one sequence behind ``cached`` entries.

        Projections rows (2 D Hd + 2 D Kd), attention 2 Hd x (pairs seen), MLP 3 rows D F.
        """
        pairs = rows * cached + (rows * (rows + 1) // 2 if causal else rows * rows)
        projections = rows * 2 * self.width * (self.query + self.key)
        return projections + 2 * self.query * pairs + 3 * rows * self.width * self.mlp

    def prefill(self, rows: Sequence[int], causal: bool = True) -> int:
        """MACs of a prefill of one sequence with ``rows[l]`` tokens in layer l."""
        return sum(self.layer(count, causal=causal) for count in rows)

    def kv_bytes(self, entries: Iterable[int], item: int) -> int:
        """Bytes of the cache of one sequence with ``entries`` per layer, ``item`` bytes a number."""
        return sum(2 * self.key * count * item for count in entries)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def decode_gain(weights: float, plain_cache: float, short_cache: float) -> float:
    """Ideal speed-up of a bandwidth-bound decode step: (W + kv) / (W + kv'), caches of the whole batch (LightVLM 8.1).

    Args:
        weights: bytes of the weights that a step reads.
        plain_cache: bytes of the unmodified cache, all sequences.
        short_cache: bytes of the shortened one.
    """
    return (weights + plain_cache) / (weights + short_cache)


def end_to_end_gain(shares: dict[str, float], gains: dict[str, float]) -> float:
    """1 / sum(share / gain): the speed-up of a whole run (LightVLM 8.1).

    Args:
        shares: share of each stage in the unmodified run's time, summing to 1.
        gains: speed-up of each stage; a stage that is not named gains nothing.
    """
    return 1 / sum(share / gains.get(stage, 1.0) for stage, share in shares.items())
