"""``slt-eval``: translate a split with a trained model and audit the scores, or audit anybody's translations."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from slt.data import READERS
from slt.data.base import Item
from slt.eval_settings import EvalConfig, RunData
from slt.predictions import read_predictions, read_references

if TYPE_CHECKING:
    from polymodal.run import Run

    from slt.checkpoint import Trained
    from slt.data.options import LoaderConfig
    from slt.probes import TextOptions

__all__ = ["evaluate", "main", "translate_split"]

EXAMPLE = """
slt-eval --checkpoint runs/slt/RUN                 # translate and score the test split of its data
slt-eval --checkpoint runs/slt/RUN --split dev --data.root DIR
slt-eval --pred mine.jsonl --name my_model --data phoenix2014t --data.root DIR
slt-eval --pred mine.txt --reference test.jsonl --level char
"""
PREFIX = {"test": "test", "dev": "val"}
"""Split -> first part of metric names."""


@dataclass(frozen=True)
class References:
    """Texts of a reference file: what a reader says about itself, without a data set behind it."""

    path: Path
    level: str
    lowercase: bool
    append_period: bool = False

    def describe(self, items: Sequence[Item]) -> dict[str, Any]:
        """Name and fingerprint for the manifest."""
        digest = hashlib.sha256()
        for item in sorted(items, key=lambda i: i.id):
            digest.update(repr((item.id, item.sentence, item.question)).encode())
        options = {"level": self.level, "lowercase": self.lowercase, "append_period": self.append_period}
        return {"name": self.path.stem, "fingerprint": digest.hexdigest(), "references": str(self.path), **options}


def main() -> int:
    """Entry point of ``slt-eval``; returns the exit code."""
    return command(
        evaluate,
        EvalConfig,
        prog="slt-eval",
        example=EXAMPLE,
        choices={"data": {"run": "slt.eval_settings.RunData", **READERS}},
    )


def evaluate(config: EvalConfig) -> None:
    """Translate or read translations, write the audit into a new run folder, print it.

    Raises:
        UserError: bad options, files or data.
    """
    from polymodal.seeding import set_threads

    from slt.checkpoint import locate

    if (config.checkpoint is None) == (config.pred is None):
        raise UserError("give --checkpoint RUN (translate, then score) or --pred FILE (score what is there)")
    if config.reference is not None and config.pred is None:
        raise UserError("--reference goes with --pred; a checkpoint is scored on --data")
    if config.checkpoint is not None:
        locate(config.checkpoint)  # before torch is imported: a wrong path is told at once
    set_threads(config.threads)
    if config.checkpoint is not None:
        _evaluate_checkpoint(config, config.checkpoint)
    elif config.pred is not None:
        _score_file(config, config.pred)


# ------------------------------------------------------------------ a checkpoint


def _evaluate_checkpoint(config: EvalConfig, path: Path) -> None:
    from polymodal.run import Run

    from slt.checkpoint import load_trained
    from slt.methods import FUSIONS

    trained = load_trained(path, config.data, config.device)
    data, fusion = trained.config.data, trained.config.model.fusion
    config = dataclasses.replace(config, data=data, seed=trained.config.seed)
    items, described = data.items(config.split), data.describe()
    blind, note = _question_only(config, items, described["fingerprint"], trained)
    with Run.start(
        "slt",
        config,
        name=f"{data.name}-{fusion}-eval",
        method=fusion,
        fidelity=FUSIONS.info(fusion).fidelity,
        data=described,
        job_type="eval",
    ) as run:
        run.note(checkpoint=str(trained.file), split=config.split, device=str(trained.module.device))
        variants = _variants(config, items, fusion)
        found = translate_split(trained, config.split, _loader(config, trained), variants)
        found |= blind
        _finish(config, run, data, items, found, data.items("train"), fusion, note)


def _loader(config: EvalConfig, trained: Trained) -> LoaderConfig:
    """The run's loader options, with those of this evaluation."""
    loader = trained.config.loader
    if config.num_workers is not None:
        loader = dataclasses.replace(loader, num_workers=config.num_workers)
    if config.feature_cache is not None:
        loader = dataclasses.replace(loader, feature_cache=config.feature_cache)
    return loader


def _variants(config: EvalConfig, items: Sequence[Item], fusion: str) -> dict[str, dict[str, str]]:
    """Name of a row -> question by clip: as they are, other clips', none."""
    from slt.probes import question_variants

    variants = {fusion: {item.id: item.question for item in items}}
    return variants | (question_variants(items, fusion, config.seed) if config.probes else {})


def translate_split(
    trained: Trained, split: str, loader: LoaderConfig, variants: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Translate every clip of a split, once for each set of questions; frames are read and encoded once.

    Args:
        trained: the model; its configuration names the data.
        split: ``train``, ``dev`` or ``test``.
        loader: loader options.
        variants: name -> question by clip id.

    Returns:
        Name -> translation by clip id.
    """
    from polymodal.progress import progress_line

    from slt.data.datamodule import SLTDataModule
    from slt.probes import translate_variants
    from slt.train import cached_reader

    loader = dataclasses.replace(loader, cache_frames=False)  # every clip is read once
    module, reader = trained.module, cached_reader(dataclasses.replace(trained.config, loader=loader))
    data = SLTDataModule(reader, module.tokenizer, loader, load_frames=module.model.uses_video)
    return translate_variants(module, data, split, variants, progress_line(f"{split} clips translated"))


# ------------------------------------------------------------------ a file of translations


def _score_file(config: EvalConfig, path: Path) -> None:
    from polymodal.run import Run

    from slt.data.synthetic import Synthetic

    texts: TextOptions
    train: Sequence[Item] = ()
    if config.reference is not None:
        if not isinstance(config.data, RunData):
            raise UserError("--reference and --data exclude each other; references and questions come from one of them")
        items = read_references(config.reference, config.lowercase)
        source = References(config.reference, config.level or "word", config.lowercase)
        texts, described = source, source.describe(items)
    else:
        if config.level or config.lowercase:
            raise UserError("--level and --lowercase go with --reference; with --data use --data.lowercase")
        data = config.data.resolve(Synthetic()) if isinstance(config.data, RunData) else config.data
        config = dataclasses.replace(config, data=data)
        items, train, described, texts = data.items(config.split), data.items("train"), data.describe(), data
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name or path.stem).lstrip(".") or "predictions"
    found = {name: read_predictions(path, [item.id for item in items])}
    blind, note = _question_only(config, items, described["fingerprint"], None)
    with Run.start("slt", config, name=name, method=name, data=described, job_type="eval") as run:
        run.note(predictions=str(path), split=config.split)
        found |= {row: made for row, made in blind.items() if row != name}
        _finish(config, run, texts, items, found, train, name, note)


# ------------------------------------------------------------------ both


def _question_only(
    config: EvalConfig, items: Sequence[Item], fingerprint: str, trained: Trained | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The row ``question_only`` where it can be had, else a note that says how to get it."""
    ids, path = [item.id for item in items], config.question_only
    if not any(item.question for item in items) or (trained and trained.config.model.fusion == "question_only"):
        return {}, []
    if path is not None and not path.is_dir():
        return {"question_only": read_predictions(path, ids, option="--question_only")}, []
    if path is not None:
        return {"question_only": _question_only_run(config, path, ids, fingerprint)}, []
    if trained is not None:
        own = _stored_predictions(trained.folder, trained.manifest, config.split, fingerprint)
        if own is not None:
            return {"question_only": read_predictions(own, ids)}, []
    return {}, [
        "question_only left out: train a model that sees questions only (slt-train --fusion question_only with the "
        "same data) and add --question_only RUN; without it the score may be the question's alone."
    ]


def _question_only_run(config: EvalConfig, folder: Path, ids: list[str], fingerprint: str) -> dict[str, str]:
    from polymodal.run import read_manifest

    from slt.checkpoint import load_trained

    manifest = read_manifest(folder)
    stored = _stored_predictions(folder, manifest, config.split, fingerprint)
    if stored is not None:
        return read_predictions(stored, ids)
    if manifest.get("method") != "question_only" or config.reference is not None:
        raise UserError(
            f"--question_only {folder}: no predictions/question_only.jsonl for {config.split} of these data; give a "
            "run of slt-train --fusion question_only, or a file of predictions"
        )
    trained = load_trained(folder, config.data, config.device)
    questions = {item.id: item.question for item in config.data.items(config.split)}
    loader, variants = _loader(config, trained), {"question_only": questions}
    return translate_split(trained, config.split, loader, variants)["question_only"]


def _stored_predictions(folder: Path, manifest: dict[str, Any], split: str, fingerprint: str) -> Path | None:
    """What a run wrote for the question-only model, if it did so for this split of these very data."""
    path = folder / "predictions" / "question_only.jsonl"
    same = manifest.get("split", "test") == split and manifest.get("data", {}).get("fingerprint") == fingerprint
    return path if same and path.is_file() else None


def _finish(
    config: EvalConfig,
    run: Run,
    texts: TextOptions,
    items: Sequence[Item],
    found: dict[str, dict[str, str]],
    train: Sequence[Item],
    model: str,
    notes: Sequence[str],
) -> None:
    """Audit, metrics and signatures into the run folder, the report onto the terminal."""
    from slt.probes import audit_metrics, record_audit
    from slt.train import show

    prefix = PREFIX[config.split]
    report = record_audit(
        run, texts, items, found, train, model=model, samples=config.samples, split=prefix, notes=notes
    )
    run.note(metric_signatures={f"{prefix}/{key}": text for key, text in report.signatures.items()})
    metrics = {f"{prefix}/{key}": value for key, value in report.row(model).scores.items()}
    metrics |= audit_metrics(report, prefix)
    run.log(metrics, 0)
    run.finish(metrics)
    where = config.reference or f"{run.manifest['data']['name']} {config.split}"
    sys.stdout.write(f"\n{where}: {config.checkpoint or config.pred}\n")
    show(run, metrics, report, prefix)
