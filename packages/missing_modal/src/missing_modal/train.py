"""``mm-train``: prompts on frozen encoders, trained and tested with modalities missing, scored by what is present."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from missing_modal.data import READERS, spell_manifest
from missing_modal.methods import METHODS
from missing_modal.settings import MMConfig

if TYPE_CHECKING:
    from polymodal.run import Run

    from missing_modal.job import Job
    from missing_modal.report import Report

__all__ = ["ALIASES", "DEFAULT_PRESETS", "main", "train"]

EXAMPLE = """
mm-train                                     # two-modality world, 70 % missing, under a minute
mm-train --data mmimdb --data.root DIR --backbone open_clip:ViT-B-16-quickgelu --backbone.weights FILE
mm-train --data my.jsonl --backbone small    # own data: null where a modality is missing
mm-train --resume runs/missing_modal/RUN     # go on after Ctrl-C or a crash
"""
DEFAULT_PRESETS = {
    "": "world",
    "world": "world",
    "mmimdb": "mmimdb",
    "food101": "food101",
    "hatememes": "hatememes",
    "manifest": "manifest",
}
ALIASES = {"backbone": "backbone.name", "epochs": "trainer.max_epochs"}


def main() -> int:
    """Entry point of ``mm-train``; returns the exit code."""
    return command(
        train,
        MMConfig,
        prog="mm-train",
        example=EXAMPLE,
        presets="missing_modal",
        choices={"data": READERS},
        default_presets=DEFAULT_PRESETS,
        aliases=ALIASES,
        list_methods=list_methods,
        argv=spell_manifest(sys.argv[1:]),
    )


def list_methods() -> str:
    """Methods with paper and fidelity, one line each."""
    width = max(len(row.name) for row in METHODS)
    return "\n".join(f"{row.name:<{width}}  {row.fidelity:<14}  {row.summary}  [{row.paper}]" for row in METHODS)


def train(config: MMConfig) -> None:
    """Train, calibrate, test, and print the result.

    Raises:
        UserError: bad data, options, tables, weights or checkpoint.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    from missing_modal.job import Job

    set_threads(config.threads)
    config.data.check()
    info = METHODS.info(config.method)
    job = Job(config)
    job.check()
    if config.dry_run:
        sys.stdout.write(job.plan() + "\n")
        return
    facts = job.facts()
    _refuse_other_run(config, job, facts)
    with Run.start(
        "missing_modal",
        config,
        name=f"{config.data.name}-{info.name}",
        method=info.name,
        fidelity=info.fidelity,
        data=facts,
    ) as run:
        metrics, report = job.run(run)
        run.finish(metrics)
    if run.is_writer:
        _show(run, report)


def _refuse_other_run(config: MMConfig, job: Job, facts: Mapping[str, Any]) -> None:
    """Before a run goes on: what it was trained for must be what this command asks for.

    Raises:
        UserError: other missing tables, another method or option, other encoders, another seed.
    """
    from polymodal.run import find_resume, read_manifest

    if not config.resume:
        return
    folder, _ = find_resume(config.resume, "missing_modal", config)
    manifest = read_manifest(folder)
    if manifest["task"] != "missing_modal":
        return  # Run.start says so
    if manifest["data"].get("fingerprint") != facts.get("fingerprint"):
        raise UserError(f"--resume {folder}: the data changed since that run started; start a new run without --resume")
    before = {**manifest["data"], **manifest}
    now = {
        "seed": config.seed,
        "method": config.method,
        "method_options": job.meta()["method_options"],
        "missing": facts["missing"],
        "tables": facts["tables"],
        "backbone": job.backbone,
    }
    for key, asked in now.items():
        if before.get(key, asked) != asked:
            raise UserError(
                f"--resume {folder}: a run with {key} {before[key]}, not {asked}; give the run's own options to "
                "continue it, or leave out --resume to start a new run"
            )


def _show(run: Run, report: Report) -> None:
    """The closing table, the calibration line, the run folder, the command that shows more, the upload command."""
    from missing_modal.report import calibration_line, closing_table

    sys.stdout.write("\n" + closing_table(report) + "\n" + calibration_line(report) + "\n")
    sys.stdout.write(f"\nrun folder  {run.folder}\nmore        polymodal report {run.folder} --html\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")
