"""``mm-eval``: scores by pattern of a trained model on any split under any missing table, in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from missing_modal.data import READERS, spell_manifest
from missing_modal.eval_settings import (
    EvalConfig,
    existing,
    gather,
    loader_for,
    missing_for,
    reader_for,
    run_config_of,
)

if TYPE_CHECKING:
    from polymodal.run import Run

    from missing_modal.checkpoint import Trained
    from missing_modal.data.base import MissingConfig, MMData
    from missing_modal.datamodule import MMDataModule
    from missing_modal.records import Packed
    from missing_modal.report import Report
    from missing_modal.settings import LoaderConfig
    from missing_modal.tables import MissingTable

__all__ = ["data_for", "evaluate", "main", "missing_text", "rows_of", "table_of"]

EXAMPLE = """
mm-eval runs/missing_modal/RUN                                   # the test split, as it was tested after training
mm-eval runs/missing_modal/RUN --missing.kind text --missing.ratio 1.0
mm-eval RUN/export/baked.safetensors --data mmimdb --data.root DIR --backbone.weights FILE
mm-eval runs/missing_modal/RUN --export small                    # the model as files to go on with, and to use
"""
PREDICTIONS = "predictions.jsonl"
_COMPARED = 64
"""samples on which exported files are compared with the model"""
_OF_THE_FILE = ("schema_version", "format_version", "kind", "stored", "computed", "temperatures", "baked")
"""what a header says of its own file, not of the model"""
_log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``mm-eval``; returns the exit code."""
    return command(
        evaluate,
        EvalConfig,
        prog="mm-eval",
        example=EXAMPLE,
        choices={"data": {"run": "missing_modal.eval_settings.RunData", **READERS}},
        aliases={"backbone": "backbone.name"},
        argv=gather(spell_manifest(sys.argv[1:])),
    )


def evaluate(config: EvalConfig) -> None:
    """Score a split, write report, predictions and figures into a new run folder, print the table.

    Raises:
        UserError: bad options, checkpoint, encoders, data or tables.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    path = existing(config.checkpoint, "mm-eval CHECKPOINT")
    set_threads(config.threads)
    run_config = run_config_of(path)
    from polymodal.devices import pick_device

    from missing_modal.checkpoint import load_trained
    from missing_modal.data.base import MissingConfig
    from missing_modal.methods import METHODS

    device = pick_device(config.device)
    trained = load_trained(path, config.backbone)
    reader = reader_for(config.data, run_config, trained.meta, path)
    missing = missing_for(run_config.missing if run_config else MissingConfig(), config.missing)
    config = dataclasses.replace(config, data=reader, seed=run_config.seed if run_config else config.seed)
    table = table_of(reader, missing, config.split)
    data = data_for(trained, reader, table, loader_for(config, run_config))
    described, told = reader.describe(), missing_text(table)
    if trained.meta.get("fingerprint") not in (None, described.get("fingerprint")):
        _log.warning("%s was trained on other samples than these of %s", path, reader.name)
    info = METHODS.info(trained.meta["method"])
    with Run.start(
        "missing_modal",
        config,
        name=f"{reader.name}-{info.name}-eval",
        method=info.name,
        fidelity=info.fidelity,
        data={**described, "missing": {config.split: told}},
        job_type="eval",
    ) as run:
        run.note(checkpoint=str(trained.path), split=config.split, device=device)
        report, metrics = _measure(config, run, trained, data, device, told)
        run.note(metric_signatures=dict.fromkeys(metrics, told))
        run.log(metrics, 0)
        run.finish(metrics)
    exported = _export(config, trained, data)
    _show(run, report, trained, exported)


def table_of(reader: MMData, missing: MissingConfig, split: str) -> MissingTable:
    """The missing table of a split.

    Raises:
        UserError: an empty split, an unknown kind, or a table of other data.
    """
    from missing_modal.tables import row_ids, table_for

    samples = reader.samples(split)
    if not samples:
        raise UserError(f"--split {split}: {reader.name} has no such samples; take another split")
    return table_for(missing, row_ids(samples), reader.name, split, tuple(reader.modalities))


def missing_text(table: MissingTable) -> str:
    """What a table takes away, for captions and signatures (without the seed, over which runs are averaged)."""
    return table.kind if table.kind in ("none", "custom") else f"{table.kind}, {100 * table.ratio:g} % of the rows"


def data_for(trained: Trained, reader: MMData, table: MissingTable, loader: LoaderConfig) -> MMDataModule:
    """Loaders of a split under its table."""
    from missing_modal.datamodule import MMDataModule
    from missing_modal.inputs import input_transforms
    from missing_modal.tables import combine, natural_mask

    names = tuple(reader.modalities)
    masks = [
        combine(natural_mask(sample.inputs, names), table.masks[sample.table_id])
        for sample in reader.samples(table.split)
    ]
    towers = trained.model.towers
    return MMDataModule(reader, {table.split: masks}, input_transforms(towers, reader.kinds), loader, towers=towers)


def rows_of(reader: MMData, split: str) -> dict[str, str] | None:
    """Sample id -> row, where the reader wants the probabilities of a row's samples averaged."""
    return {s.id: s.table_id for s in reader.samples(split)} if reader.average_rows else None


def _measure(
    config: EvalConfig, run: Run, trained: Trained, data: MMDataModule, device: str, told: str
) -> tuple[Report, dict[str, float]]:
    """Run the model over the split, and write everything into the run folder."""
    from missing_modal.figures import reliability, save
    from missing_modal.job import predict_records
    from missing_modal.metrics import report as scores
    from missing_modal.metrics import score_samples, summarise
    from missing_modal.records import pack
    from missing_modal.report import make_report, write_report

    module = trained.module(rows_of(data.reader, config.split))
    batches = data.loader(config.split, shard=False)
    packed = pack(predict_records(module, batches, device), module.task)
    report = make_report(
        packed,
        trained.temperatures,
        task=module.task,
        modalities=trained.modalities,
        method=trained.meta["method"],
        data=data.reader.name,
        split=config.split,
        missing=told,
        fitted_on=trained.calibrated_on,
    )
    write_report(run.folder, report)
    _write_predictions(run, trained, packed)
    picture = reliability(
        packed, trained.temperatures, module.task, title=f"{data.reader.name} {config.split}, missing: {told}"
    )
    save(run.folder / "figures" / "reliability.png", picture)
    prefix = f"{config.split}/"
    found = scores(packed.logits, packed.labels, packed.masks, module.task, trained.modalities, prefix)
    if trained.temperatures is not None:
        scaled = trained.temperatures.scale(packed.logits, packed.masks)
        after = summarise(score_samples(scaled, packed.labels, module.task))
        found |= {f"{prefix}{name}_calibrated": after[name] for name in ("nll", "ece")}
    return report, {name: value for name, value in found.items() if not math.isnan(value)}


def _write_predictions(run: Run, trained: Trained, packed: Packed) -> None:
    """A line a sample: what it had, what was found, what is true."""
    from polymodal.files import write_text

    from missing_modal.predictions import predictions

    names, several = list(trained.meta["class_names"]), trained.meta["task"] == "multilabel"
    found = predictions(packed.ids, packed.logits, packed.masks, trained.meta, trained.temperatures)
    lines = []
    for row, label in zip(found, packed.labels.tolist(), strict=True):
        truth = [name for name, one in zip(names, label, strict=True) if one] if several else names[label]
        lines.append(json.dumps({**row.to_json(), "label": truth}, ensure_ascii=False))
    write_text(run.folder / PREDICTIONS, "\n".join(lines) + "\n")


def _export(config: EvalConfig, trained: Trained, data: MMDataModule) -> list[str]:
    """Both files of the model; what rounding changes is measured on a batch."""
    if config.export is None:
        return []
    from polymodal.files import check_writable

    from missing_modal.export import write_exports

    folder = config.export.expanduser()
    check_writable(folder)
    trained.model.cpu()
    for tower in trained.model.towers:
        tower.to("cpu")
    first = data.first(config.split, _COMPARED)
    about: dict[str, Any] = {key: value for key, value in trained.meta.items() if key not in _OF_THE_FILE}
    if trained.calibrated_on:
        about["calibrated_on"] = trained.calibrated_on
    return write_exports(folder, trained.model, about, trained.temperatures, baked=config.export_dtype, batches=[first])


def _show(run: Run, report: Report, trained: Trained, exported: list[str]) -> None:
    from missing_modal.report import calibration_line, closing_table

    sys.stdout.write(f"\n{closing_table(report)}\n{calibration_line(report)}\n\nmodel       {trained.path}\n")
    for line in exported:
        sys.stdout.write(f"exported    {line}\n")
    sys.stdout.write(f"run folder  {run.folder}\nmore        polymodal report {run.folder} --html\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")
