"""``css-eval``: IoU by class, confusion and pictures of any checkpoint on any split, in a run folder of its own."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from css.data import READERS
from css.eval_settings import EvalConfig, gather, loader_for, reader_for, run_config_of

if TYPE_CHECKING:
    import numpy as np
    from polymodal.run import Run

    from css.checkpoint import Loaded
    from css.data.datamodule import CSSDataModule
    from css.report import StepReport

__all__ = ["count_confusion", "evaluate", "existing", "main", "signature"]

EXAMPLE = """
css-eval runs/css/RUN                                   # the last finished step, test pictures
css-eval runs/css/RUN/steps/01 --split val
css-eval RUN/steps/05/weights.safetensors --data voc --data.root DIR/VOC2012 --eval_size native
"""
_log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``css-eval``; returns the exit code."""
    return command(
        evaluate,
        EvalConfig,
        prog="css-eval",
        example=EXAMPLE,
        choices={"data": {"run": "css.eval_settings.RunData", **READERS}},
        argv=gather(sys.argv[1:], "checkpoint"),
    )


def evaluate(config: EvalConfig) -> None:
    """Segment a split, write scores, tables and pictures into a new run folder, print the table.

    Raises:
        UserError: bad options, checkpoint or data.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    path = existing(config.checkpoint, "css-eval CHECKPOINT")
    set_threads(config.threads)
    from polymodal.devices import pick_device

    from css.checkpoint import load_network
    from css.data.datamodule import CSSDataModule
    from css.methods import METHODS

    device = pick_device(config.device)
    loaded = load_network(path)
    meta, run_config = loaded.meta, run_config_of(loaded.path)
    reader = reader_for(config.data, run_config, meta, path)
    config = dataclasses.replace(config, data=reader, seed=run_config.seed if run_config else config.seed)
    loader = loader_for(config, run_config, meta)
    data = CSSDataModule(reader, loaded.task, meta["setting"], int(meta["step"]), loader, seed=config.seed)
    if config.split == "val" and not len(data.val_dataloader()):
        raise UserError(f"--split val: {reader.name} has no such pictures with a class seen so far; take another split")
    described = {**reader.describe(), "task": meta["task"], "setting": meta["setting"], "order": list(meta["order"])}
    if described["fingerprint"] != meta["fingerprint"]:
        _log.warning("%s was trained on other pictures or labels than these of %s", path, reader.name)
    info = METHODS.info(meta["method"])
    with Run.start(
        "css",
        config,
        name=f"{reader.name}-{meta['task']}-{info.name}-eval",
        method=info.name,
        fidelity=info.fidelity,
        data=described,
        job_type="eval",
        axes={f"{config.split}/*": "task"},
    ) as run:
        run.note(checkpoint=str(loaded.path), split=config.split, step=meta["step"], device=device)
        report = _measure(config, run, loaded, data, device)
        metrics = {f"{config.split}/{name}": value for name, value in report.metrics().items()}
        how = signature(loader.eval_size, loader.crop, loader.unseen_as)
        run.note(metric_signatures=dict.fromkeys(metrics, how))
        run.log({**metrics, "task": float(meta["step"])}, 0)
        run.finish(metrics)
    _show(run, report, f"{reader.name} {config.split}, {report.images} pictures, {how}: {loaded.path}")


def signature(eval_size: str, crop: int, unseen_as: str) -> str:
    """How an mIoU was measured, in one line: pictures, and what counts."""
    pictures = f"centre crop {crop}" if eval_size == "crop" else "whole pictures"
    return f"one confusion matrix, {pictures}, unseen classes: {unseen_as}, absent classes: 0"


def count_confusion(loaded: Loaded, data: CSSDataModule, split: str, device: str) -> tuple[np.ndarray, int]:
    """Segment a split.

    Returns:
        (S, S) counts, rows truth, and the number of pictures.
    """
    import numpy as np
    import torch
    from polymodal.progress import counted

    from css.metrics import confusion_matrix

    net, channels = loaded.net.to(device), loaded.net.num_channels
    total, images = np.zeros((channels, channels), np.int64), 0
    loader = data.loader(split, shard=False)
    with torch.inference_mode():
        for batch in counted(loader, f"{split} batches segmented", len(loader)):
            found = loaded.method.predict(net.full_logits(batch.images.to(device)))
            total += confusion_matrix(batch.labels, found, channels)
            images += len(batch)
    return total, images


def existing(checkpoint: Path | None, usage: str) -> Path:
    """The checkpoint, before torch is imported: a wrong path is told at once."""
    if checkpoint is None:
        raise UserError(f"no checkpoint given; usage: {usage}, a run folder of css-train or a file in one")
    path = checkpoint.expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run folder of css-train or a file in one")
    return path


def _measure(config: EvalConfig, run: Run, loaded: Loaded, data: CSSDataModule, device: str) -> StepReport:
    """Segment, and write everything into the run folder."""
    from css.pictures import confusion_plot, prediction_grid, save_picture
    from css.report import StepReport, write_report
    from css.samples import log_picture, segment_some
    from css.task import Task

    meta, names, step = loaded.meta, list(loaded.meta["class_names"]), int(loaded.meta["step"])
    confusion, images = count_confusion(loaded, data, config.split, device)
    task = Task(meta.get("report_task", meta["task"]), meta["num_classes"], tuple(meta["order"]))
    report = StepReport.of(confusion, task, names, step, images=images)
    write_report(run.folder, report)
    _write_csv(run.folder / "classes.csv", class_rows(report))
    labels = ["background", *(score.name for score in report.classes)]
    _write_csv(
        run.folder / "confusion.csv",
        [["truth", *labels], *([n, *r] for n, r in zip(labels, confusion.tolist(), strict=True))],
    )
    title = f"{data.reader.name} {config.split} after step {step}"
    save_picture(
        confusion_plot(confusion, labels, f"{title}: % of the true class"), run.folder / "figures" / "confusion.png"
    )
    if config.pictures:
        path = run.folder / "figures" / "predictions.png"
        shown = segment_some(loaded.net, loaded.method, data, config.split, loaded.task, config.pictures)
        save_picture(prediction_grid(shown, names, title), path)
        log_picture(run, f"{config.split}/predictions", path, step)
    return report


def class_rows(report: StepReport) -> list[list[Any]]:
    """Header and rows of ``classes.csv``: IoU in percent in full precision, pixels of truth, prediction and both."""
    assert report.confusion is not None  # it was made from one
    matrix = report.confusion
    header = ["channel", "id", "name", "learnt_in", "iou", "truth", "predicted", "correct"]
    known: list[tuple[int, int, str, Any, float]] = [(0, 0, "background", "", report.background_iou)]
    known += [(s.channel, s.raw, s.name, s.step, s.iou) for s in report.classes]
    rows = [
        [*row, int(matrix[row[0]].sum()), int(matrix[:, row[0]].sum()), int(matrix[row[0], row[0]])] for row in known
    ]
    return [header, *rows]


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    from polymodal.files import write_text

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def _show(run: Run, report: StepReport, headline: str) -> None:
    from css.report import class_table

    sys.stdout.write(f"\n{headline}\n\n{class_table(report)}\nrun folder  {run.folder}\n")
    sys.stdout.write(f"pictures    {run.folder / 'figures'}\nmore        polymodal report {run.folder} --html\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")
