"""How close a method stays to the unmodified model: distributions under teacher forcing on the model's own answer.

Source: LightVLM 4 ("Fidelity without labels").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

CHUNK = 256
"""tokens compared at a time: in float64 with a vocabulary of 150,000, 300 MB"""
__all__ = ["Answers", "Forced", "compare", "force", "generate", "lengths_of"]


@dataclass
class Answers:
    """Greedy answers of the unmodified model to a batch, and what it expected at each token.

    Args:
        ids: (B, G) int64; after the end of an answer: padding.
        lengths: (B,) int64 tokens of each answer, its end included.
        logits: (B, G, V) float32 before each token; None where they are not wanted.
    """

    ids: Tensor
    lengths: Tensor
    logits: Tensor | None = None


@dataclass
class Forced:
    """What a method's distributions are beside those of the unmodified model, for a batch.

    Args:
        kl: (B,) float64, KL(full || method) in nats, mean over the tokens of an answer.
        agree: (B,) float64, share of tokens with the same most likely one.
        diverged: (B,) int64, first token with another most likely one; -1: none.
        lengths: (B,) int64 tokens compared.
    """

    kl: Tensor
    agree: Tensor
    diverged: Tensor
    lengths: Tensor


class _Recorder(LogitsProcessor):
    """Keeps the logits of every step in main memory; with ``forced`` (B, G) makes ``generate`` give these tokens."""

    def __init__(self, forced: Tensor | None = None) -> None:
        self.forced = forced
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record, and let only the given token through."""
        self.logits.append(scores.detach().float().cpu().clone())
        if self.forced is None:
            return scores
        wanted = self.forced[:, len(self.logits) - 1, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def generate(model: Any, inputs: dict[str, Tensor], tokens: int, record: bool = False) -> Answers:
    """Greedy answers of at most ``tokens`` tokens; with ``record`` their logits too."""
    recorder = _Recorder()
    ids = _run(model, inputs, tokens, recorder if record else None)
    logits = torch.stack(recorder.logits, dim=1) if record else None
    return Answers(ids, lengths_of(model, ids), logits)


def force(model: Any, inputs: dict[str, Tensor], answers: Answers) -> Tensor:
    """(B, G, V) float32 logits of ``model`` before each token of given answers, its cache growing as in decoding.

    Tokens go in one after the other: a method that compresses the cache does so while the answer grows.
    """
    recorder = _Recorder(answers.ids)
    _run(model, inputs, answers.ids.shape[1], recorder)
    return torch.stack(recorder.logits, dim=1)


def compare(answers: Answers, logits: Tensor) -> Forced:
    """Logits (B, G', V) of a method beside the recorded ones; G' may be shorter than G where all answers have ended."""
    assert answers.logits is not None
    steps = min(logits.shape[1], answers.logits.shape[1])
    valid = torch.arange(steps) < answers.lengths.cpu()[:, None]
    parts = [_chunk(answers.logits[:, i : i + CHUNK], logits[:, i : i + CHUNK]) for i in range(0, steps, CHUNK)]
    terms, equal = (torch.cat(part, dim=1)[:, :steps] for part in zip(*parts, strict=True))
    count = valid.sum(1).clamp(min=1)
    kl = (terms * valid).sum(1) / count
    same = equal | ~valid
    first = torch.where(same.all(1), -torch.ones_like(count), (~same).long().argmax(1))
    agree = (same & valid).sum(1) / count
    return Forced(kl, agree.double(), first, valid.sum(1))


def _chunk(full: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """KL (B, n) and whether the most likely token is the same (B, n), of logits (B, n, V) and (B, n or more, V)."""
    full, ours = full[:, : ours.shape[1]].double().cpu(), ours[:, : full.shape[1]].double().cpu()
    p, q = full.log_softmax(-1), ours.log_softmax(-1)
    # Tokens that the model never gives (logit -inf on both sides) count nothing.
    terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0), full.argmax(-1) == ours.argmax(-1)


def lengths_of(model: Any, ids: Tensor) -> Tensor:
    """(B,) tokens of each answer up to its end token, that one included."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device, dtype=ids.dtype))
    whole = torch.full((len(ids),), ids.shape[1], device=ids.device)
    return torch.where(is_end.any(1), is_end.long().argmax(1) + 1, whole)


def _run(model: Any, inputs: dict[str, Tensor], tokens: int, recorder: _Recorder | None) -> Tensor:
    """New tokens (B, G) of greedy decoding, whatever the checkpoint's own settings are."""
    processors = LogitsProcessorList([recorder] if recorder is not None else [])
    pad = model.generation_config.pad_token_id
    ends = model.generation_config.eos_token_id
    if pad is None:
        pad = ends if isinstance(ends, int) else (ends or [0])[0]
    ids: Tensor = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
        repetition_penalty=1.0, pad_token_id=pad, logits_processor=processors,
    )  # fmt: skip
    return ids[:, inputs["input_ids"].shape[1] :]
