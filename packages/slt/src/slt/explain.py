"""What a translation rests on: the fusion's weights, and what each word loses when a piece of the input is taken away.

Weights say what the fusion lets through, which is not the same as what matters: a gate may be equal for all tokens
while the translation hangs on one word of the question. So evidence is worked out next to them, by occlusion: the fall
of the log-probability of each translated word (nats) when one word of the question is left out, or when the visual
tokens around a moment are blanked after fusion. Neighbouring tokens see overlapping frames, hence three at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slt.data.collate import Batch
from slt.module import SLTModule
from slt.ops.lengths import SCHEMES
from slt.tokenizer import Tokenizer

__all__ = ["Explanation", "explain", "token_edges", "token_spans", "unit_spans"]

WINDOW = 1
"""Visual tokens blanked on each side of the one in question."""
_STRIDE, _FIELD = 4, 16
"""Frames from one visual token to the next, and frames that one of them sees."""
_WEIGHT_NAMES = {"ssaw": "gate", "gbt": "share of the question"}
_WORD_MARK = "\u2581"
"""How sentencepiece writes the blank before a word."""


@dataclass(frozen=True)
class Explanation:
    """Weights and evidence of one translated clip.

    Args:
        words: words (or characters) of the translation, W of them.
        question: words (or characters) of the question that the model saw, N of them.
        question_weights: (N, 3): mean, 10th and 90th percentile of each word's weights; None where there are none.
        question_evidence: (N, W) nats.
        edges: (T + 1,) in frames: visual token t stands for the frames between edges t and t + 1.
        sign_weights: (T, 3) as ``question_weights``.
        sign_evidence: (T, W) nats.
        weight_name: what the weights are.
    """

    words: list[str]
    question: list[str]
    question_weights: np.ndarray | None
    question_evidence: np.ndarray
    edges: np.ndarray
    sign_weights: np.ndarray | None
    sign_evidence: np.ndarray
    weight_name: str


def token_edges(frames: int, tokens: int, scheme: str) -> np.ndarray:
    """Which frames the visual tokens stand for: bounds of the middle four of the 16 frames that each of them sees.

    Args:
        frames: frames of the clip.
        tokens: visual tokens T.
        scheme: padding scheme of the temporal convolutions.

    Returns:
        (T + 1,) increasing, in frames, from -0.5 (left side of frame 0) to ``frames`` - 0.5. A token sees six frames
        more on each side. The last token of ``gfslt`` may stand for no frame of its own.
    """
    first = (_FIELD - _STRIDE) / 2 - SCHEMES[scheme] - 0.5
    edges: np.ndarray = np.clip(first + _STRIDE * np.arange(tokens + 1.0), -0.5, frames - 0.5)
    edges[[0, -1]] = -0.5, frames - 0.5
    return edges


def unit_spans(text: str, level: str) -> list[tuple[int, int]]:
    """Where the words (level ``word``) or characters (``char``) of a text begin and end."""
    return [match.span() for match in re.finditer(r"\S+" if level == "word" else r"\S", text)]


def token_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Where the tokens of a text begin and end in it, without end and tag."""
    if tokenizer.kind != "pretrained":
        return unit_spans(text, tokenizer.kind)
    spans: list[tuple[int, int]] = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    return spans


def explain(module: SLTModule, batch: Batch, video: tuple[Tensor, Tensor], ids: Sequence[int]) -> Explanation:
    """Weights and evidence for the translation of one clip.

    Args:
        module: trained model in evaluation mode.
        batch: one clip with its question, on the module's device.
        video: ``module.model.encode_batch(batch)``.
        ids: token ids of the translation, without tag and end.

    Returns:
        The explanation; ``question_weights`` and ``sign_weights`` are both None for a fusion without weights.
    """
    model, signs, frames = module.model, video[0].shape[1], int(batch.lengths[0])
    words, groups = _output_words(module.tokenizer, ids, module.level)
    question, rows = _question_words(module, batch)
    with torch.inference_mode():
        tokens, mask, weights = model.fuse_batch(batch, video)
        whole = _scores(module, [(tokens, mask)], ids, groups)
        asked = (_without(module, batch, video, group) for group in rows)
        blanked = ((_blank(tokens, tokens.shape[1] - signs + t, signs - t, t), mask) for t in range(signs))
        question_evidence = whole - _scores(module, asked, ids, groups)
        sign_evidence = whole - _scores(module, blanked, ids, groups)
    question_weights, sign_weights = _split_weights(weights, batch.question_ids.shape[1], signs)
    return Explanation(
        words=words,
        question=question,
        question_weights=None if question_weights is None else _spread([question_weights[r].ravel() for r in rows]),
        question_evidence=question_evidence,
        edges=token_edges(frames, signs, model.config.padding),
        sign_weights=None if sign_weights is None else _spread(sign_weights),
        sign_evidence=sign_evidence,
        weight_name=_weight_name(module, weights),
    )


def _output_words(tokenizer: Tokenizer, ids: Sequence[int], level: str) -> tuple[list[str], list[list[int]]]:
    """Words of the translation and the positions of their tokens; for an empty one the decision to end."""
    groups: list[list[int]] = []
    for position, index in enumerate(ids):
        name = tokenizer.backend.id_to_token(int(index)) or ""
        inside = tokenizer.kind == "pretrained" and level == "word" and not name.startswith(_WORD_MARK)
        if inside and groups:
            groups[-1].append(position)
        else:
            groups.append([position])
    words = [tokenizer.decode([ids[position] for position in group]) for group in groups]
    kept = [(word, group) for word, group in zip(words, groups, strict=True) if word]
    if not kept:
        return ["(end)"], [[len(ids)]]
    return [word for word, _ in kept], [group for _, group in kept]


def _question_words(module: SLTModule, batch: Batch) -> tuple[list[str], list[list[int]]]:
    """Words of the question and the positions of their tokens; what was cut off or is not used is left out."""
    text = batch.questions[0]
    if not module.model.uses_question:
        return [], []
    seen = token_spans(module.tokenizer, text)[: max(0, int(batch.question_mask[0].sum()) - 2)]
    words, rows = [], []
    level = "word" if " " in text else module.level  # blanks are words even where scores count characters
    for start, end in unit_spans(text, level):
        group = [i for i, (first, last) in enumerate(seen) if first < end and start < last]
        if group:
            words.append(text[start:end])
            rows.append(group)
    return words, rows


def _without(
    module: SLTModule, batch: Batch, video: tuple[Tensor, Tensor], group: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Fused tokens and mask with some tokens of the question left out; without any word there is no question."""
    keep = [i for i in range(batch.question_ids.shape[1]) if i not in group]
    ids = batch.question_ids[:, keep if len(keep) > 2 else []]
    question_mask = torch.ones_like(ids, dtype=torch.bool)
    tokens, mask, _ = module.model.fuse(module.model.encode_text(ids, question_mask), question_mask, *video)
    return tokens, mask


def _blank(tokens: Tensor, place: int, after: int, before: int) -> Tensor:
    """Fused tokens with the one at ``place`` and its neighbours among the signs set to zero."""
    copy = tokens.clone()
    copy[:, place - min(WINDOW, before) : place + 1 + min(WINDOW, after - 1)] = 0.0
    return copy


def _scores(
    module: SLTModule, inputs: Iterable[tuple[Tensor, Tensor]], ids: Sequence[int], groups: Sequence[Sequence[int]]
) -> np.ndarray:
    """Log-probability of each word of a translation under each input: (inputs, words), nats."""
    vocab, device = module.tokenizer.vocab, module.device
    target = torch.tensor([*ids, vocab.eos_id], device=device)
    given = torch.tensor([[vocab.tag_id, *ids]], device=device)
    found: list[np.ndarray] = []
    for tokens, mask in inputs:
        logits = module.model.translate_logits(tokens, mask, given)[0].float()
        row = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0].double().cpu().numpy()
        found.append(np.array([row[list(group)].sum() for group in groups]))
    return np.stack(found) if found else np.zeros((0, len(groups)))


def _split_weights(weights: Tensor | None, asked: int, signs: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Weights by token of the question and by visual token, each (tokens, values); None for what has no weights.

    A weight per token (1, L, values) stays as it is; attention (1, heads, queries, keys) counts for its keys. Weights
    of some tokens only are those of the signs, attention to some tokens only is attention to the question.
    """
    if weights is None:
        return None, None
    table = weights[0] if weights.ndim == 3 else weights[0].permute(2, 0, 1).flatten(1)
    values = table.double().cpu().numpy()
    if len(values) == asked + signs:
        return (values[:asked] if asked else None), (values[asked:] if signs else None)
    return (None, values) if weights.ndim == 3 else (values, None)


def _weight_name(module: SLTModule, weights: Tensor | None) -> str:
    if weights is not None and weights.ndim == 4:
        return "attention"
    return _WEIGHT_NAMES.get(module.model.config.fusion, "weight")


def _spread(values: Iterable[np.ndarray]) -> np.ndarray:
    """Mean, 10th and 90th percentile of each array: (arrays, 3)."""
    rows = [[np.mean(v), np.percentile(v, 10), np.percentile(v, 90)] for v in values]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)
