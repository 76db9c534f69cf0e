"""Predictions that an audit needs: the model with other questions, without one, and a model without the video."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Protocol

from polymodal.devices import pick_device
from polymodal.files import write_json, write_text
from polymodal.seeding import numpy_rng

from slt.audit import AuditReport, audit_report
from slt.methods import FUSIONS
from slt.predictions import write_predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polymodal.run import Run

    from slt.data.base import Item
    from slt.data.datamodule import SLTDataModule
    from slt.module import SLTModule
    from slt.settings import SLTConfig
    from slt.tokenizer import Tokenizer

__all__ = [
    "TextOptions",
    "audit_metrics",
    "audit_run",
    "question_only_predictions",
    "question_variants",
    "record_audit",
    "shuffled_questions",
    "translate_variants",
]

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


def question_variants(items: Sequence[Item], fusion: str, seed: int) -> dict[str, dict[str, str]]:
    """What else to ask a model: name of the audit's row -> question by clip id.

    Args:
        items: the clips.
        fusion: the model's; one that looks at no question, or at nothing else, has no variants.
        seed: root seed of the shuffling.

    Returns:
        ``shuffled_question`` and ``empty_question``; nothing where no clip has a question.
    """
    questions = {item.id: item.question for item in items}
    if not any(questions.values()) or not {"question", "video"} <= set(FUSIONS.info(fusion).tags):
        return {}
    other = shuffled_questions(list(questions.values()), seed)
    return {
        "shuffled_question": dict(zip(questions, other, strict=True)),
        "empty_question": dict.fromkeys(questions, ""),
    }


def translate_variants(
    module: SLTModule,
    data: SLTDataModule,
    split: str,
    variants: Mapping[str, Mapping[str, str]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, str]]:
    """Translate every clip of a split in this process, once for each set of questions; frames are encoded once.

    Args:
        module: the model, on the device to compute on.
        data: loaders of the split.
        split: ``train``, ``dev`` or ``test``.
        variants: name -> question by clip id.
        progress: called with (clips done, clips in all).

    Returns:
        Name -> translation by clip id.
    """
    import torch

    module.eval()
    found: dict[str, dict[str, str]] = {name: {} for name in variants}
    done, total = 0, len(data.reader.items(split))
    with torch.inference_mode():
        for batch in data.loader(split, shard=False) if variants else ():
            batch = batch.to(module.device)
            video = module.model.encode_batch(batch)
            for name, questions in variants.items():
                asked = data.collate.ask(batch, [questions[i] for i in batch.ids]).to(module.device)
                found[name].update(zip(batch.ids, module.translate(asked, video=video), strict=True))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return found


def question_only_predictions(config: SLTConfig, run: Run, tokenizer: Tokenizer) -> dict[str, str]:
    """Train a model that sees questions only, with the settings of stage 2, and translate the test split.

    Frames are neither decoded nor encoded. No checkpoint is kept: a run killed here trains the probe again.
    """
    import lightning as L
    from polymodal.trainer import quiet_lightning, trainer_arguments

    from slt.data.datamodule import SLTDataModule
    from slt.train import build_module

    loader = dataclasses.replace(config.loader, question_dropout=0.0)
    data = SLTDataModule(config.data, tokenizer, loader, seed=config.seed, load_frames=False)
    loss = dataclasses.replace(config.loss, lambda_q=0.0, lambda_c=0.0, lambda_triplet=0.0)
    module = build_module(dataclasses.replace(config, loss=loss), tokenizer, stage=2, fusion="question_only")
    trainer = L.Trainer(
        **{
            **trainer_arguments(config.trainer),
            "logger": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "default_root_dir": run.folder,
        }
    )
    log.info("training the question-only probe")
    with quiet_lightning():
        trainer.fit(module, datamodule=data)
    module.to(_device(config))
    asked = {item.id: item.question for item in config.data.items("test")}
    return translate_variants(module, data, "test", {"question_only": asked})["question_only"]


def _device(config: SLTConfig) -> str:
    """Where to translate: Lightning moves a module back to the CPU when it is done with it."""
    accelerator = config.trainer.accelerator
    return pick_device("cuda" if accelerator == "gpu" else accelerator)


def audit_run(config: SLTConfig, run: Run, module: SLTModule, data: SLTDataModule, tokenizer: Tokenizer) -> AuditReport:
    """Score the tested model next to its probes; writes ``audit.json``, ``audit.md`` and the table of samples."""
    items, fusion = config.data.items("test"), config.model.fusion
    found = {fusion: {name: record["hypothesis"] for name, record in module.records.items()}}
    found |= translate_variants(module.to(_device(config)), data, "test", question_variants(items, fusion, config.seed))
    if config.audit.question_only and fusion != "question_only" and any(item.question for item in items):
        if config.trainer.devices == 1:
            found["question_only"] = question_only_predictions(config, run, tokenizer)
        else:  # the other processes are gone by now, and a trainer would wait for them
            log.info(
                "the question-only probe trains on one device only: slt-train --fusion question_only, "
                "then slt-eval --question_only RUN"
            )
    train, samples = config.data.items("train"), config.audit.samples
    return record_audit(run, config.data, items, found, train, model=fusion, samples=samples)


def audit_metrics(report: AuditReport, split: str) -> dict[str, float]:
    """The rows beside the audited one as metrics of a run: ``<split>/<row>/bleu4`` and ``<split>/overlap``."""
    others = {f"{split}/{row.name}/bleu4": row.scores["bleu4"] for row in report.rows if row.name != report.model}
    return {**others, f"{split}/overlap": report.overlap.rate}


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
