"""Queries, keys and positions of single rows, for every decoder (LightVLM 3.5 and 7.2).

Positions are gathered, never renumbered. Projections are done again on few rows rather than caught inside the
attention: one row of ``q_proj`` costs D^2 MAC, no attention function is replaced.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Rope", "gather_hidden", "gather_ids", "gather_rope", "head_counts", "rotated_keys", "rotated_queries"]

#: cos and sin, each (B or 1, t, d'), or (3, B, t, d') where older transformers keep M-RoPE's axes apart
Rope = tuple[Tensor, Tensor]


def gather_hidden(x: Tensor, rows: Tensor, sample: Tensor | None = None) -> Tensor:
    """Rows (S, r) of x (B, t, D) -> (S, r, D).

    Args:
        x: hidden states.
        rows: int64.
        sample: (S, 1) int64 sample of each line of ``rows``; None: line b is of sample b.
    """
    if sample is None:
        sample = torch.arange(x.shape[0], device=x.device)[:, None]
    flat = (rows + sample * x.shape[1]).flatten()
    # whole rows are copied: three times as fast as gather with an expanded index on a CPU
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, rows.shape)


def gather_rope(rope: Rope, rows: Tensor) -> Rope:
    """Rows (B, r) of cos and sin, on their second last axis."""
    return _gather_table(rope[0], rows), _gather_table(rope[1], rows)


def gather_ids(positions: Tensor | None, rows: Tensor) -> Tensor | None:
    """Rows (B, r) of position ids (B or 1, t) or (3, B, t)."""
    if positions is None:
        return None
    shape = (*positions.shape[:-2], *rows.shape)
    positions = positions.expand(*positions.shape[:-2], rows.shape[0], positions.shape[-1])
    return positions.gather(-1, rows.expand(shape))


def _gather_table(table: Tensor, rows: Tensor) -> Tensor:
    lead, width = table.shape[:-3], table.shape[-1]
    table = table.expand(*lead, rows.shape[0], *table.shape[-2:])
    return table.gather(-2, rows[..., None].expand(*lead, *rows.shape, width))


def head_counts(attention: nn.Module) -> tuple[int, int, int]:
    """(H, K, d): query heads, key/value heads, head size."""
    module: Any = attention
    size, groups = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    if size and groups and hasattr(module, "k_proj"):  # from the module: configs of transformers are slow to read
        kv_heads = module.k_proj.out_features // size
        return kv_heads * groups, kv_heads, size
    config = module.config
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size or config.hidden_size // heads)


def rotated_queries(attention: nn.Module, hidden: Tensor, rope: Rope | None, rows: Tensor | None = None) -> Tensor:
    """Queries as the attention module makes them.

    Args:
        attention: a decoder layer's ``self_attn``: ``q_proj``, or ``qkv_proj`` (Phi-3); optional ``q_norm``.
        hidden: (B, t, D) what the module is called with (normed).
        rope: its ``position_embeddings``; None: not rotated.
        rows: (B, r) int64; None: all t.

    Returns:
        (B, H, r, d).
    """
    return _project(attention, hidden, rope, rows, "q")


def rotated_keys(attention: nn.Module, hidden: Tensor, rope: Rope | None, rows: Tensor | None = None) -> Tensor:
    """Keys likewise, (B, K, r, d)."""
    return _project(attention, hidden, rope, rows, "k")


def _project(attention: Any, hidden: Tensor, rope: Rope | None, rows: Tensor | None, which: str) -> Tensor:
    if rows is not None:
        hidden = gather_hidden(hidden, rows)
        rope = None if rope is None else gather_rope(rope, rows)
    heads, kv_heads, size = head_counts(attention)
    if hasattr(attention, "qkv_proj"):
        joined = attention.qkv_proj(hidden)
        first = heads * size
        flat = joined[..., :first] if which == "q" else joined[..., first : first + kv_heads * size]
    else:
        flat = getattr(attention, f"{which}_proj")(hidden)
    norm: Any = getattr(attention, f"{which}_norm", None)
    # OLMo 2 norms the whole width, Qwen3 and Gemma 3 each head
    whole = norm is not None and norm.weight.shape[-1] == flat.shape[-1] != size
    flat = norm(flat) if whole else flat
    split = flat.view(*flat.shape[:-1], -1, size)
    split = norm(split) if norm is not None and not whole else split
    states = split.transpose(1, 2)
    if rope is None or not getattr(attention, "use_rope", True):  # SmolLM3 leaves some layers unrotated
        return states
    return _rotate(attention, states, rope)


def _rotate(attention: Any, states: Tensor, rope: Rope) -> Tensor:
    """The rotation of the model's own file: partial, interleaved and sectioned ones included."""
    module = sys.modules[type(attention).__module__]
    if rope[0].dim() == 4:  # transformers before the axes were joined ahead of the layers
        sections = attention.config.rope_parameters["mrope_section"]
        rotated: Tensor = module.apply_multimodal_rotary_pos_emb(states, states, *rope, sections)[0]
        return rotated
    rotated = module.apply_rotary_pos_emb(states, states, *rope)[0]
    return rotated
