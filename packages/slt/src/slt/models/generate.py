"""Beam search through transformers' ``generate`` with a key-value cache; the input is encoded once, not per beam."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, MBartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from slt.config import VocabInfo

__all__ = ["generate", "generation_config"]


def generation_config(
    vocab: VocabInfo, num_beams: int, max_new_tokens: int, length_penalty: float = 1.0, use_cache: bool = True
) -> GenerationConfig:
    """Deterministic search that starts with the language tag and never writes a special token but the end."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty if num_beams > 1 else 1.0,
        use_cache=use_cache,
        pad_token_id=vocab.pad_id,
        eos_token_id=vocab.eos_id,
        decoder_start_token_id=vocab.tag_id,
        suppress_tokens=sorted({vocab.pad_id, vocab.tag_id, *vocab.special_ids} - {vocab.eos_id}),
    )


@torch.no_grad()
def generate(
    translator: MBartForConditionalGeneration,
    encoded: BaseModelOutput,
    mask: Tensor,
    vocab: VocabInfo,
    num_beams: int = 4,
    max_new_tokens: int = 150,
    length_penalty: float = 1.0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Decode encoder states.

    Args:
        translator: the mBART model whose decoder is used.
        encoded: states (batch, L, d) of its encoder.
        mask: (batch, L) bool, at least one True per row.
        vocab: special ids.
        num_beams: beams; 1 is greedy.
        max_new_tokens: longest output, end included.
        length_penalty: exponent of the length in the beam score.
        use_cache: keep keys and values of earlier tokens; False re-decodes the prefix (for comparisons).

    Returns:
        Token ids per row, without tag, end and padding.
    """
    ids = translator.generate(
        encoder_outputs=encoded,
        attention_mask=mask.to(torch.long),
        generation_config=generation_config(vocab, num_beams, max_new_tokens, length_penalty, use_cache),
    )
    return [_strip(row, vocab.eos_id) for row in ids[:, 1:].tolist()]


def _strip(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id)] if eos_id in row else row
