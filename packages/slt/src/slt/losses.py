"""Losses of both stages as pure functions of model and batch; weight transfer between stages; parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from torch import Tensor, nn

from slt.config import LossConfig
from slt.ops.contrastive import contrastive_loss, gather_with_gradient, masked_mean, question_triplet_loss

if TYPE_CHECKING:
    from slt.data.collate import Batch
    from slt.models.translator import SLTModel

__all__ = [
    "TransferReport",
    "parameter_groups",
    "split_target",
    "stage1_loss",
    "stage2_loss",
    "token_cross_entropy",
    "transfer_stage1",
]

Logs = dict[str, Tensor]
FRESH_IN_STAGE_2 = ("fusion.",)


def split_target(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder input and labels from the encoder form of a text.

    Args:
        ids: (batch, L) int64 ``words </s> <tag>``, padded at the right.
        mask: (batch, L) bool.

    Returns:
        Decoder input ``<tag> words`` (batch, L-1), labels ``words </s>`` (batch, L-1), and the labels' mask. Input at
        masked places is arbitrary; rows without a token are fully masked.
    """
    last = (mask.sum(1, keepdim=True) - 1).clamp_min(0)
    tag = ids.gather(1, last)
    return torch.cat([tag, ids[:, :-2]], dim=1), ids[:, :-1], mask[:, 1:]


def token_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy over valid tokens, in float32 (or float64); 0 where there is none.

    Args:
        logits: (batch, L, vocabulary).
        labels: (batch, L) int64.
        mask: (batch, L) bool, True = counts.
        smoothing: label smoothing, 0..1: this share of the target is spread evenly over the vocabulary.

    Returns:
        Scalar.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    targets = labels.masked_fill(~mask, -100)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing, reduction="sum")
    return total / mask.sum().clamp_min(1)


def _pad_to(ids: Tensor, length: int) -> Tensor:
    return F.pad(ids, (0, length - ids.shape[1]))


def _stack(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several (ids, mask) batches as one, padded to the longest."""
    length = max(ids.shape[1] for ids, _ in rows)
    return torch.cat([_pad_to(i, length) for i, _ in rows]), torch.cat([_pad_to(m, length) for _, m in rows])


def _restoration(model: SLTModel, batch: Batch, config: LossConfig, kinds: tuple[str, ...]) -> Logs:
    """Cross-entropy of restoring masked texts, one term for each of ``question`` and ``sentence`` asked for.

    Both kinds go through text encoder and decoder in one call.
    """
    clean = {
        "question": (batch.question_ids, batch.question_mask),
        "sentence": (batch.sentence_ids, batch.sentence_mask),
    }
    masked = {
        "question": (batch.masked_question_ids, batch.masked_question_mask),
        "sentence": (batch.masked_sentence_ids, batch.masked_sentence_mask),
    }
    kinds = tuple(kind for kind in kinds if clean[kind][0].shape[1] > 0)
    if not kinds:
        return {}
    ids, mask = _stack([masked[kind] for kind in kinds])
    with torch.set_grad_enabled(torch.is_grad_enabled() and not config.detach_text_encoder):
        states = model.encode_text(ids, mask)
    decoder_input, labels, label_mask = split_target(*_stack([clean[kind] for kind in kinds]))
    logits = model.restore_logits(states, mask, decoder_input)
    count = len(kinds)
    parts = zip(logits.chunk(count), labels.chunk(count), label_mask.chunk(count), strict=True)
    return {
        f"restore_{kind}": token_cross_entropy(part, label, valid, config.restore_smoothing)
        for kind, (part, label, valid) in zip(kinds, parts, strict=True)
    }


@dataclass(frozen=True)
class _Encoded:
    """What both stages compute once: states of questions and signs."""

    question: Tensor
    question_mask: Tensor
    sign: Tensor
    sign_mask: Tensor

    @property
    def present(self) -> Tensor:
        """(batch,) bool: rows with a question."""
        return self.question_mask.any(1)


def _encode(model: SLTModel, batch: Batch, questions: bool = True, video: bool = True) -> _Encoded:
    sign, sign_mask = model.encode_video(batch.frames, batch.lengths) if video else model.no_video(batch)
    ids, mask = batch.question_ids, batch.question_mask
    if not questions:
        ids, mask = ids[:, :0], mask[:, :0]
    return _Encoded(model.encode_text(ids, mask), mask, sign, sign_mask)


def _contrastive(model: SLTModel, batch: Batch, encoded: _Encoded, config: LossConfig) -> Logs:
    """The pairs with a weight, over the global batch; pairs with a question use the rows that have one."""
    gathered = {"v": gather_with_gradient(model.pool_video(encoded.sign, encoded.sign_mask))}
    if config.w_vq or config.w_qs:
        gathered["q"] = gather_with_gradient(model.pool_text(encoded.question, encoded.question_mask))
    if config.w_vs or config.w_qs:
        states = model.encode_text(batch.sentence_ids, batch.sentence_mask)
        gathered["s"] = gather_with_gradient(model.pool_text(states, batch.sentence_mask))
    rows = gather_with_gradient(encoded.present.to(torch.uint8)) > 0
    ids = gather_with_gradient(batch.positives) if config.contrastive == "multi" else None
    terms: Logs = {}
    for pair, weight in (("vs", config.w_vs), ("vq", config.w_vq), ("qs", config.w_qs)):
        if not weight:
            continue
        a, b = gathered[pair[0]], gathered[pair[1]]
        if "q" in pair:
            a, b = a[rows], b[rows]
        if a.shape[0] == 0:
            terms[f"contrastive_{pair}"] = a.sum() + b.sum()  # zero, but part of the graph on every rank
            continue
        positives = None if ids is None else ids[rows] if "q" in pair else ids
        terms[f"contrastive_{pair}"] = contrastive_loss(a, b, model.logit_scale, config.contrastive, positives)
    return terms


def _contrastive_weights(config: LossConfig, scale: float = 1.0) -> dict[str, float]:
    pairs = (("vs", config.w_vs), ("vq", config.w_vq), ("qs", config.w_qs))
    return {f"contrastive_{pair}": scale * weight for pair, weight in pairs}


def _total(terms: Logs, weights: Mapping[str, float], like: Tensor) -> tuple[Tensor, Logs]:
    loss = like.new_zeros(())
    for name, term in terms.items():
        loss = loss + weights.get(name, 1.0) * term
    return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


def stage1_loss(model: SLTModel, batch: Batch, config: LossConfig, step: int) -> tuple[Tensor, Logs]:
    """Alignment: contrastive terms and restoration of masked questions and sentences.

    L1 = w_vs L_vs + w_vq L_vq + w_qs L_qs + lambda_ssl (L_ssl(question) + L_ssl(sentence)).

    Args:
        model: the model; its translator's encoder pools the video, its decoder restores texts.
        batch: clips, texts and their masked copies. Rows without a question take no part in question terms.
        config: weights.
        step: optimizer steps done; restoration happens where ``step`` is a multiple of ``ssl_every``.

    Returns:
        The loss and the detached terms by name (unweighted), with ``loss`` itself.

    Source: arXiv 2509.14036, our reading, sections 3.5 to 3.7.
    """
    weights = _contrastive_weights(config)
    terms: Logs = {}
    if any(weights.values()):
        encoded = _encode(model, batch, questions=bool(config.w_vq or config.w_qs))
        terms |= _contrastive(model, batch, encoded, config)
    if config.lambda_ssl and step % config.ssl_every == 0:
        kinds = ("question", "sentence") if config.restore_questions else ("sentence",)
        terms |= _restoration(model, batch, config, kinds)
    weights |= dict.fromkeys(("restore_question", "restore_sentence"), config.lambda_ssl)
    return _total(terms, weights, model.logit_scale)


def stage2_loss(model: SLTModel, batch: Batch, config: LossConfig, step: int) -> tuple[Tensor, Logs]:
    """Translation: cross-entropy of the sentence, restoration of the question, contrastive terms on request.

    L2 = CE(S | fusion(Q, V)) + lambda_q L_ssl(question) + lambda_c L_con + lambda_triplet L_triplet.

    Args:
        model: the model.
        batch: clips, texts and their masked copies.
        config: weights.
        step: optimizer steps done; restoration happens where ``step`` is a multiple of ``ssl_every``.

    Returns:
        The loss and the detached terms by name (unweighted), with ``loss`` itself.

    Source: arXiv 2509.14036, our reading, section 3.7; the triplet loss is GBT's, section 5.
    """
    others = bool(config.lambda_c or config.lambda_triplet)
    encoded = _encode(model, batch, questions=model.uses_question or others, video=model.uses_video or others)
    tokens, mask, _ = model.fuse(encoded.question, encoded.question_mask, encoded.sign, encoded.sign_mask)
    decoder_input, labels, label_mask = split_target(batch.sentence_ids, batch.sentence_mask)
    logits = model.translate_logits(tokens, mask, decoder_input)
    terms: Logs = {"translation": token_cross_entropy(logits, labels, label_mask, config.label_smoothing)}
    weights = {"restore_question": config.lambda_q, "triplet": config.lambda_triplet}
    if config.lambda_q and step % config.ssl_every == 0:
        terms |= _restoration(model, batch, config, ("question",))
    if config.lambda_c:
        weights |= _contrastive_weights(config, config.lambda_c)
        terms |= _contrastive(model, batch, encoded, config)
    if config.lambda_triplet:
        terms["triplet"] = _triplet(encoded)
    return _total(terms, weights, model.logit_scale)


def _triplet(encoded: _Encoded) -> Tensor:
    rows = encoded.present
    video = masked_mean(encoded.sign, encoded.sign_mask)[rows]
    question = masked_mean(encoded.question, encoded.question_mask)[rows]
    return question_triplet_loss(video, question) if video.shape[0] else video.sum()


@dataclass(frozen=True)
class TransferReport:
    """What a stage-2 model took from stage 1."""

    loaded: tuple[str, ...]
    """parameters and statistics that were copied"""
    fresh: tuple[str, ...]
    """parameters that start new in stage 2: the fusion's"""
    dropped: tuple[str, ...]
    """entries of stage 1 that were left behind: the fusion's"""

    def __str__(self) -> str:
        """One line for the log."""
        loaded, fresh, dropped = len(self.loaded), len(self.fresh), len(self.dropped)
        return f"stage 1 -> 2: {loaded} tensors loaded, {fresh} new (fusion), {dropped} dropped"


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def transfer_stage1(model: SLTModel, state_dict: Mapping[str, Tensor]) -> TransferReport:
    """Load backbone, encoders and decoder of stage 1 into a stage-2 model; the fusion starts fresh.

    Args:
        model: the stage-2 model, changed in place.
        state_dict: weights of a stage-1 model; a common prefix ``model.`` is removed.

    Returns:
        What was loaded, what is new, what was dropped.

    Raises:
        UserError: a name besides the fusion's is missing, unexpected or of another shape. Nothing is loaded then.
    """
    if state_dict and all(name.startswith("model.") for name in state_dict):
        state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
    target = model.state_dict()
    wanted = {name for name in target if not name.startswith(FRESH_IN_STAGE_2)}
    given = {name for name in state_dict if not name.startswith(FRESH_IN_STAGE_2)}
    problems = []
    if missing := sorted(wanted - given):
        problems.append(f"missing {_first(missing)}")
    if unexpected := sorted(given - wanted):
        problems.append(f"unexpected {_first(unexpected)}")
    shapes = sorted(name for name in wanted & given if target[name].shape != state_dict[name].shape)
    if shapes:
        name = shapes[0]
        problems.append(
            f"{len(shapes)} other shapes, first {name}: {tuple(state_dict[name].shape)} in stage 1, "
            f"{tuple(target[name].shape)} in stage 2 (another vocabulary or width?)"
        )
    if problems:
        raise UserError(
            f"the stage-1 checkpoint does not fit the stage-2 model: {'; '.join(problems)}; use the model and data "
            "options of stage 1"
        )
    model.load_state_dict({name: state_dict[name] for name in wanted}, strict=False)
    fresh = tuple(sorted(set(target) - wanted))
    return TransferReport(tuple(sorted(wanted)), fresh, tuple(sorted(set(state_dict) - given)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: matrices and kernels decay; biases, norms, scalars and the video token do not.

    Args:
        model: any module; shared parameters count once, frozen ones are left out.
        weight_decay: decay of the first group.

    Returns:
        Two groups in a fixed order (the second with decay 0).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
