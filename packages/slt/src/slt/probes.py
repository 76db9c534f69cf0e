"""Predictions that an audit needs: the model with other questions, without one, and a model without the video."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Protocol

import lightning as L
from polymodal.files import write_json, write_text
from polymodal.seeding import numpy_rng

from slt.audit import AuditReport, audit_report
from slt.predictions import write_predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polymodal.run import Run

    from slt.data.base import Item
    from slt.data.datamodule import SLTDataModule
    from slt.module import SLTModule
    from slt.settings import SLTConfig
    from slt.tokenizer import Tokenizer

__all__ = ["TextOptions", "audit_run", "predict", "question_only_predictions", "record_audit", "shuffled_questions"]

log = logging.getLogger(__name__)


class TextOptions(Protocol):
    """What scores must know about texts; every reader does."""

    @property
    def level(self) -> str:
        """Unit of scores, ``word`` or ``char``."""

    @property
    def lowercase(self) -> bool:
        """Whether texts are lower-cased."""

    @property
    def append_period(self) -> bool:
        """Whether " ." was appended to the references."""


def shuffled_questions(questions: list[str], seed: int) -> list[str]:
    """Each question replaced by another item's: a random cyclic order, so that no item keeps its own place.

    Args:
        questions: N questions.
        seed: root seed.

    Returns:
        N questions; with N = 1 the same one.
    """
    order = numpy_rng(seed, "shuffled questions").permutation(len(questions))
    result = list(questions)
    for position, index in enumerate(order):
        result[int(index)] = questions[int(order[(position + 1) % len(order)])]
    return result


def predict(module: SLTModule, data: SLTDataModule, questions: dict[str, str] | None = None) -> dict[str, str]:
    """Translations of the test split by id, with other questions where given."""
    import torch

    module.eval()
    found: dict[str, str] = {}
    with torch.inference_mode():
        for batch in data.test_batches(questions):
            texts = module.translate(batch.to(module.device))
            found.update(zip(batch.ids, texts, strict=True))
    return found


def question_only_predictions(config: SLTConfig, run: Run, tokenizer: Tokenizer) -> dict[str, str]:
    """Train a model that sees questions only, with the settings of stage 2, and translate the test split.

    Frames are neither decoded nor encoded. No checkpoint is kept: a run killed here trains the probe again.
    """
    from polymodal.trainer import quiet_lightning

    from slt.data.datamodule import SLTDataModule
    from slt.train import build_module

    loader = dataclasses.replace(config.loader, question_dropout=0.0)
    data = SLTDataModule(config.data, tokenizer, loader, seed=config.seed, load_frames=False)
    loss = dataclasses.replace(config.loss, lambda_q=0.0, lambda_c=0.0, lambda_triplet=0.0)
    module = build_module(dataclasses.replace(config, loss=loss), tokenizer, stage=2, fusion="question_only")
    trainer = _bare_trainer(config, run)
    log.info("training the question-only probe")
    with quiet_lightning():
        trainer.fit(module, datamodule=data)
    return predict(module, data)


def _bare_trainer(config: SLTConfig, run: Run) -> L.Trainer:
    settings = config.trainer
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        max_epochs=settings.max_epochs,
        max_steps=settings.max_steps,
        gradient_clip_val=settings.clip_grad or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )


def audit_run(config: SLTConfig, run: Run, module: SLTModule, data: SLTDataModule, tokenizer: Tokenizer) -> AuditReport:
    """Score the tested model next to its probes; writes ``audit.json``, ``audit.md`` and the table of samples."""
    items = config.data.items("test")
    ids = [item.id for item in items]
    questions = {item.id: item.question for item in items}
    model = {name: record["hypothesis"] for name, record in module.records.items()}
    found: dict[str, dict[str, str]] = {config.model.fusion: model}
    if any(questions.values()):
        if config.model.fusion not in ("none", "question_only"):
            other = shuffled_questions(list(questions.values()), config.seed)
            found["shuffled_question"] = predict(module, data, dict(zip(ids, other, strict=True)))
            found["empty_question"] = predict(module, data, dict.fromkeys(ids, ""))
        if config.audit.question_only and config.model.fusion != "question_only":
            if config.trainer.devices == 1:
                found["question_only"] = question_only_predictions(config, run, tokenizer)
            else:  # the other processes are gone by now, and a trainer would wait for them
                log.info(
                    "the question-only probe trains on one device only: slt-train --fusion question_only, "
                    "then slt-eval --question_only RUN"
                )
    train, samples = config.data.items("train"), config.audit.samples
    return record_audit(run, config.data, items, found, train, model=config.model.fusion, samples=samples)


def record_audit(
    run: Run,
    texts: TextOptions,
    items: Sequence[Item],
    found: dict[str, dict[str, str]],
    train_items: Sequence[Item],
    *,
    model: str,
    samples: int = 8,
    split: str = "test",
    notes: Sequence[str] = (),
) -> AuditReport:
    """Score translations and write ``audit.json``, ``audit.md``, ``predictions/*.jsonl`` and the table of samples.

    Args:
        run: receives the files.
        texts: the reader, or whatever knows what was done to the texts.
        items: the clips that were translated.
        found: name of the row -> translation by id; ``shuffled_question`` is shown next to the model in the samples.
        train_items: for ``question_1nn``; none leaves it out.
        model: the row to audit.
        samples: clips in the table.
        split: prefix of the table's name, ``test`` or ``val``.
        notes: lines below the table.
    """
    report = audit_report(
        [item.sentence for item in items],
        [item.question for item in items],
        {name: [made[item.id] for item in items] for name, made in found.items()},
        train_items,
        texts.level,
        model=model,
        lowercase=texts.lowercase,
        append_period=texts.append_period,
    )
    report = dataclasses.replace(report, notes=[*report.notes, *notes])
    write_json(run.folder / "audit.json", report.to_dict())
    write_text(run.folder / "audit.md", report.to_markdown())
    for name, made in found.items():
        write_predictions(run.folder / "predictions" / f"{name}.jsonl", {item.id: made[item.id] for item in items})
    other = found.get("shuffled_question")
    columns = ["id", "question", "reference", "translation", *(["with another question"] if other else [])]
    rows: list[list[Any]] = [
        [item.id, item.question, item.sentence, found[model][item.id], *([other[item.id]] if other else [])]
        for item in items[:samples]
    ]
    run.log_table(f"{split}/translations", columns, rows)
    return report
