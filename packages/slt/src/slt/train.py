"""``slt-train``: align (stage 1), translate (stage 2), test, audit, show translations."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from slt.data import READERS
from slt.methods import FUSIONS
from slt.settings import SLTConfig

if TYPE_CHECKING:
    from polymodal.config import TrainerConfig
    from polymodal.run import Run

    from slt.audit import AuditReport
    from slt.data.base import SLTData
    from slt.data.datamodule import SLTDataModule
    from slt.module import SLTModule
    from slt.tokenizer import Tokenizer

__all__ = ["build_module", "main", "make_tokenizer", "train"]

log = logging.getLogger(__name__)

EXAMPLE = """
slt-train                                    # synthetic world, about two minutes
slt-train --data phoenix2014t --data.root DIR/PHOENIX-2014-T
slt-train --data csl_daily --data.root DIR --fusion concat --seed 1
slt-train --resume runs/slt/RUN              # go on after Ctrl-C or a crash
"""
DEFAULT_PRESETS = {
    "": "synthetic",
    "synthetic": "synthetic",
    "phoenix2014t": "phoenix2014t_qa",
    "csl_daily": "csl_daily_qa",
    "how2sign": "how2sign",
    "poses": "poses",
}


def main() -> int:
    """Entry point of ``slt-train``; returns the exit code."""
    return command(
        train,
        SLTConfig,
        prog="slt-train",
        example=EXAMPLE,
        presets="slt",
        choices={"data": READERS},
        default_presets=DEFAULT_PRESETS,
        aliases={"fusion": "model.fusion", "epochs": "trainer.max_epochs"},
        list_methods=list_methods,
    )


def list_methods() -> str:
    """Fusions with paper and fidelity, one line each."""
    width = max(len(row.name) for row in FUSIONS)
    return "\n".join(f"{row.name:<{width}}  {row.fidelity:<14}  {row.summary}  [{row.paper}]" for row in FUSIONS)


def make_tokenizer(config: SLTConfig) -> Tokenizer:
    """Tokenizer that the configuration asks for, built from the training split where it has no file.

    Raises:
        UserError: kind ``pretrained`` without a path, or an unreadable folder.
    """
    from slt.tokenizer import Tokenizer

    settings, data = config.tokenizer, config.data
    kind: str = settings.kind
    if kind == "auto":
        kind = "pretrained" if settings.path else data.level
    if kind == "pretrained":
        if settings.path is None:
            raise UserError("tokenizer.kind=pretrained needs --tokenizer.path DIR, the folder of an mBART tokenizer")
        return Tokenizer.from_pretrained(settings.path, data.language)
    texts = [text for item in data.items("train") for text in (item.sentence, item.question) if text]
    return Tokenizer.build(kind, texts, data.language, settings.min_count)


def longest_target(config: SLTConfig, tokenizer: Tokenizer) -> int:
    """Cap of generated tokens: as set, else 1.5 times the longest training target."""
    if config.decode.max_new_tokens:
        return config.decode.max_new_tokens
    longest = max(len(tokenizer.encode(item.sentence)) for item in config.data.items("train"))
    return min(config.model.max_positions, -(-3 * longest // 2))


def build_module(config: SLTConfig, tokenizer: Tokenizer, stage: int, fusion: str | None = None) -> SLTModule:
    """The module of a stage; ``fusion`` replaces the configured one (the question-only probe)."""
    import dataclasses

    from slt.module import SLTModule

    model = config.model
    if config.data.modality == "pose" and model.backbone == "pose":
        model = dataclasses.replace(model, pose_landmarks=config.data.landmarks)
    if fusion is not None and fusion != model.fusion:
        model = dataclasses.replace(model, fusion=fusion, fusion_options={})
    return SLTModule(
        model,
        config.loss,
        config.optim1 if stage == 1 else config.optim,
        tokenizer,
        stage=stage,
        level=config.data.level,
        decode=config.decode,
        max_new_tokens=longest_target(config, tokenizer),
        seed=config.seed,
    )


def train(config: SLTConfig) -> None:
    """Run the stages of the configuration and print the result.

    Raises:
        UserError: bad data, options or checkpoint.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    set_threads(config.threads)
    config.data.check()
    tokenizer = make_tokenizer(config)
    info = FUSIONS.info(config.model.fusion)
    if config.dry_run:
        sys.stdout.write(plan(config, tokenizer) + "\n")
        return
    module = build_module(config, tokenizer, stage=1 if config.stage == "1" else 2)
    with Run.start(
        "slt",
        config,
        name=f"{config.data.name}-{info.name}",
        method=info.name,
        fidelity=info.fidelity,
        data=config.data.describe(),
    ) as run:
        if run.is_writer:
            tokenizer.save(run.folder / "tokenizer")
        metrics, report = run_stages(config, run, module, tokenizer)
        run.finish(metrics)
    if run.is_writer:
        show(run, metrics, report)


def plan(config: SLTConfig, tokenizer: Tokenizer) -> str:
    """What would be trained, for ``--dry-run``."""
    module = build_module(config, tokenizer, 1 if config.stage == "1" else 2)
    count = sum(p.numel() for p in module.parameters())
    sizes = config.data.describe()["splits"]
    lines = [f"data       {config.data.name}: " + ", ".join(f"{k} {v['videos']} videos" for k, v in sizes.items())]
    lines += [f"questions  {sum(v['questions'] for v in sizes.values())} of {sum(v['videos'] for v in sizes.values())}"]
    lines += [f"vocabulary {tokenizer.vocab_size} ({tokenizer.kind})", f"model      {count:,} parameters"]
    lines += [f"fusion     {config.model.fusion} {config.model.fusion_options or ''}".rstrip()]
    epochs = (
        f"{config.stage1_epochs} + {config.trainer.max_epochs}"
        if config.stage == "both"
        else (str(config.stage1_epochs if config.stage == "1" else config.trainer.max_epochs))
    )
    return "\n".join([*lines, f"stages     {config.stage}, epochs {epochs}", "nothing was trained (dry run)"])


def run_stages(
    config: SLTConfig, run: Run, module: SLTModule, tokenizer: Tokenizer
) -> tuple[dict[str, float], AuditReport | None]:
    """Stage 1, weight transfer, stage 2, test, audit; each resumes from the run's checkpoint."""
    from polymodal.trainer import fit_and_test, stage_of_checkpoint

    from slt.metrics import signatures

    if config.stage == "1":
        trainer, data = stage1_trainer(config), data_module(config, tokenizer, config.stage1_batch_size)
        return fit_and_test(module, data, trainer, run, monitor="val/loss", mode="min", stage=1), None
    resumed_stage, offset = stage_of_checkpoint(run), 0
    if config.stage == "both":
        offset = align(config, run, module, tokenizer, skip=resumed_stage == 2)
    elif config.stage1_checkpoint is not None and resumed_stage is None:
        load_stage1(module, config.stage1_checkpoint)
    how = signatures(config.data.level, config.data.lowercase, config.data.append_period)
    run.note(metric_signatures={f"test/{name}": text for name, text in how.items()})
    data = data_module(config, tokenizer)
    metrics = fit_and_test(module, data, config.trainer, run, monitor="val/bleu4", stage=2, step_offset=offset)
    report = None
    if config.audit.enabled and run.is_writer:
        from slt.probes import audit_metrics, audit_run

        report = audit_run(config, run, module, data, tokenizer)
        metrics |= audit_metrics(report, "test")
    return metrics, report


def stage1_trainer(config: SLTConfig) -> TrainerConfig:
    """The trainer's settings with the epochs of stage 1."""
    import dataclasses

    return dataclasses.replace(config.trainer, max_epochs=config.stage1_epochs)


def align(config: SLTConfig, run: Run, module: SLTModule, tokenizer: Tokenizer, *, skip: bool) -> int:
    """Stage 1 of a run of both: train a module of its own and hand its best weights to ``module``.

    The stage-1 module is gone after this; at full size two would take the memory of both.

    Args:
        config: settings.
        run: the run.
        module: of stage 2; receives the weights.
        tokenizer: texts to ids.
        skip: the run goes on in stage 2, so there is nothing to train or to hand over.

    Returns:
        Optimizer steps of stage 1.
    """
    from polymodal.trainer import fit, load_best

    from slt.losses import transfer_stage1

    data = data_module(config, tokenizer, config.stage1_batch_size)
    steps = config.stage1_epochs * steps_per_epoch(data, config)
    if not skip:
        stage1 = build_module(config, tokenizer, stage=1)
        fit(stage1, data, stage1_trainer(config), run, monitor="val/loss", mode="min", stage=1)
        load_best(stage1, run, stage=1)
        log.info("%s", transfer_stage1(module.model, stage1.model.state_dict()))
    return steps if config.trainer.max_steps < 0 else min(steps, config.trainer.max_steps)


def data_module(config: SLTConfig, tokenizer: Tokenizer, batch_size: int = 0) -> SLTDataModule:
    """Loaders of the configured data; ``batch_size`` replaces the configured one where it is not 0."""
    import dataclasses

    from slt.data.datamodule import SLTDataModule

    loader = dataclasses.replace(config.loader, batch_size=batch_size) if batch_size else config.loader
    return SLTDataModule(
        cached_reader(config),
        tokenizer,
        loader,
        seed=config.seed,
        max_positions=config.model.max_positions,
    )


def cached_reader(config: SLTConfig) -> SLTData:
    """The reader, with frames or features from a cache where the configuration names one.

    Raises:
        UserError: no cache there, one of other settings, or features together with augmentation.
    """
    import dataclasses

    from slt.data.cache import with_feature_cache, with_frame_cache

    loader, features = config.loader, config.model.backbone == "features"
    if features != (loader.feature_cache is not None):
        raise UserError("model.backbone=features and loader.feature_cache go together; give both or none")
    if features and loader.augment != "none":
        raise UserError("cached features are of frames without augmentation; add --loader.augment none")
    reader = config.data
    if loader.frame_cache is not None:
        reader = with_frame_cache(reader, loader.frame_cache, loader.resize or loader.frame_size)
    if loader.feature_cache is not None:
        from slt.models.backbones import build_backbone

        frozen = build_backbone(dataclasses.replace(config.model, backbone="resnet18"))
        reader = with_feature_cache(
            reader, loader.feature_cache, frozen, frame_size=loader.frame_size, resize=loader.resize
        )
    return reader


def steps_per_epoch(data: SLTDataModule, config: SLTConfig) -> int:
    """Optimizer steps of one pass over the training data, before processes are started."""
    data.setup("fit")
    batches = len(data.train_sampler) if data.train_sampler is not None else 0
    batches = -(-batches // config.trainer.devices)
    return -(-batches // config.trainer.accumulate)


def load_stage1(module: SLTModule, path: Path) -> None:
    """Strict weight transfer from a stage-1 run folder or checkpoint file.

    Raises:
        UserError: no such file, another stage or vocabulary, or weights that do not fit.
    """
    from polymodal.callbacks import load_checkpoint

    from slt.losses import transfer_stage1
    from slt.module import check_vocabulary

    file = path
    if path.is_dir():  # a run of both stages keeps the first one's weights under a name of their own
        folder = path / "checkpoints"
        file = folder / "stage1.ckpt" if (folder / "stage1.ckpt").is_file() else folder / "best.ckpt"
    checkpoint = load_checkpoint(file)
    if checkpoint.get("slt", {}).get("stage") != 1:
        raise UserError(f"{file} is no checkpoint of stage 1; give a run of slt-train --stage 1 or both, or its file")
    check_vocabulary(checkpoint, module.tokenizer, str(file))
    log.info("%s", transfer_stage1(module.model, checkpoint["state_dict"]))


def show(run: Run, metrics: dict[str, float], report: AuditReport | None, split: str = "test") -> None:
    """The closing table, the run folder, the command that shows more, the W&B upload command."""
    if report is not None:
        sys.stdout.write("\n" + report.to_text())
    else:
        sys.stdout.write("\n" + "\n".join(f"{k:<24} {v:.3f}" for k, v in metrics.items()) + "\n")
    sys.stdout.write(samples_text(run, split))
    sys.stdout.write(f"\nrun folder  {run.folder}\nmore        polymodal report {run.folder} --html\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")


def samples_text(run: Run, split: str = "test") -> str:
    """Translations of the sample table, for the terminal."""
    import json

    path = run.folder / "samples" / f"{split}-translations.jsonl"
    if not path.is_file():
        return ""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [""]
    for row in rows[:4]:
        lines += [f"  question    {row['question'] or '(none)'}", f"  reference   {row['reference']}"]
        lines += [f"  translation {row['translation']}", ""]
    return "\n".join(lines[:-1]) + "\n"
