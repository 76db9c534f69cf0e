"""The translation task on the shared training layer: losses of both stages, generation, metrics, optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.seeding import derive
from polymodal.task import TaskModule
from torch import Tensor

from slt import metrics as scores
from slt.config import LossConfig, ModelConfig
from slt.data.collate import Batch
from slt.losses import parameter_groups, stage1_loss, stage2_loss
from slt.models.translator import SLTModel
from slt.settings import DecodeConfig, OptimConfig
from slt.tokenizer import Tokenizer

__all__ = ["CHECKPOINT_VERSION", "SLTModule", "check_vocabulary"]

CHECKPOINT_VERSION = 1
"""Schema of what a checkpoint says under ``slt``; a newer one is refused."""


class SLTModule(TaskModule):
    """Stage 1 (alignment) or stage 2 (translation) of question-based sign language translation.

    Args:
        model: settings of the network.
        loss: weights of the loss terms.
        optim: optimizer and schedule of this stage.
        tokenizer: texts to ids and back; its fingerprint goes into checkpoints.
        stage: 1 or 2.
        level: unit of BLEU and ROUGE, ``word`` or ``char``.
        decode: beam search.
        max_new_tokens: longest translation in tokens.
        seed: root seed; weights start from the draw named ``init``.

    Attributes:
        total_steps: length of the schedule where something other than Lightning's trainer, which knows it, drives the
            module.

    Source: arXiv 2509.14036, our reading, section 3.7.
    """

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        optim: OptimConfig,
        tokenizer: Tokenizer,
        *,
        stage: int = 2,
        level: str = "word",
        decode: DecodeConfig | None = None,
        max_new_tokens: int = 60,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        torch.manual_seed(derive(seed, "init"))
        self.model = SLTModel(model, tokenizer.vocab)
        self.loss_config, self.optim, self.tokenizer = loss, optim, tokenizer
        self.stage, self.level = stage, level
        self.decode = decode or DecodeConfig()
        self.max_new_tokens = max_new_tokens
        self.total_steps: int | None = None

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the stage; the batch brings its corrupted texts, so nothing is drawn here but dropout."""
        function = stage1_loss if self.stage == 1 else stage2_loss
        return function(self.model, batch, self.loss_config, self.global_step if self._trainer is not None else 0)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Any]:
        """Stage 1: loss terms per sample; stage 2: reference, translation, question."""
        if self.stage == 1:
            _, terms = stage1_loss(self.model, batch, self.loss_config, 0)
            record = {name: float(value) for name, value in terms.items()}
            return {name: record for name in batch.ids}
        testing = self._trainer is not None and self.trainer.testing
        beams = self.decode.beams if testing or self._trainer is None else self.decode.val_beams
        texts = self.translate(batch, beams)
        rows = zip(batch.ids, batch.sentences, texts, batch.questions, strict=True)
        return {name: {"reference": ref, "hypothesis": hyp, "question": ask} for name, ref, hyp, ask in rows}

    def translate(
        self, batch: Batch, beams: int | None = None, video: tuple[Tensor, Tensor] | None = None
    ) -> list[str]:
        """Translations of a batch by beam search; ``video``: result of ``model.encode_batch``, where it is there."""
        ids = self.model.generate(
            batch,
            beams or self.decode.beams,
            self.max_new_tokens,
            length_penalty=self.decode.length_penalty,
            video=video,
        )
        return [self.tokenizer.decode(row) for row in ids]

    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """Stage 1: mean loss terms; stage 2: BLEU-1..4, ROUGE-L (both), chrF, unique-sentence BLEU-4, word accuracy."""
        rows = list(records.values())
        if self.stage == 1:
            return {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
        references, hypotheses = [r["reference"] for r in rows], [r["hypothesis"] for r in rows]
        return scores.scores(references, hypotheses, self.level)

    def configure_optimizers(self) -> Any:
        """Optimizer with decay on matrices only; linear warm-up, then cosine to ``min_lr``, per step."""
        groups = parameter_groups(self.model, self.optim.weight_decay)
        settings = self.optim
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, settings.lr, momentum=settings.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, settings.lr, betas=(settings.betas[0], settings.betas[1]), fused=True)
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the vocabulary's fingerprint, and the length limit, so that translating needs no training data."""
        checkpoint["slt"] = {
            "schema_version": CHECKPOINT_VERSION,
            "vocabulary": self.tokenizer.sha,
            "stage": self.stage,
            "max_new_tokens": self.max_new_tokens,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another vocabulary."""
        check_vocabulary(checkpoint, self.tokenizer)


def check_vocabulary(checkpoint: dict[str, Any], tokenizer: Tokenizer, where: str = "checkpoint") -> None:
    """Refuse a checkpoint of another vocabulary.

    Raises:
        UserError: the fingerprints differ.
    """
    found = checkpoint.get("slt", {}).get("vocabulary")
    if found != tokenizer.sha:
        raise UserError(
            f"{where} has vocabulary {found}, the data and tokenizer options give {tokenizer.sha}; use the data, "
            "questions and tokenizer it was trained with (its run folder has them in config.yaml and tokenizer/)"
        )


def _schedule(settings: OptimConfig, total: int) -> Any:
    """Factor of the learning rate by step."""
    warm = int(settings.warmup * total)
    floor = settings.min_lr / settings.lr

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if settings.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warm) / max(1, total - warm))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
