"""``css-train``: learn the classes of a task step after step, test after each, report what was kept."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from css.data import READERS
from css.methods import METHODS
from css.settings import CSSConfig

if TYPE_CHECKING:
    from polymodal.run import Run

    from css.report import StepReport

__all__ = ["main", "train"]

EXAMPLE = """
css-train                                    # shapes world, task 2-1, about two minutes
css-train --data voc --data.root DIR/VOC2012 --task 15-1 --setting overlap
css-train --method mib --seed 1              # a rival on the same data
css-train --resume runs/css/RUN              # go on after Ctrl-C or a crash
"""
DEFAULT_PRESETS = {"": "shapes", "shapes": "shapes", "voc": "voc_15-1", "ade20k": "ade_100-50", "pairs": "pairs"}


def main() -> int:
    """Entry point of ``css-train``; returns the exit code."""
    return command(
        train,
        CSSConfig,
        prog="css-train",
        example=EXAMPLE,
        presets="css",
        choices={"data": READERS},
        default_presets=DEFAULT_PRESETS,
        aliases={"model": "network.name", "epochs": "trainer.max_epochs"},
        list_methods=list_methods,
    )


def list_methods() -> str:
    """Methods with paper and fidelity, one line each."""
    width = max(len(row.name) for row in METHODS)
    return "\n".join(f"{row.name:<{width}}  {row.fidelity:<14}  {row.summary}  [{row.paper}]" for row in METHODS)


def train(config: CSSConfig) -> None:
    """Run all steps of the task and print the result.

    Raises:
        UserError: bad data, options, task or checkpoint.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    from css.job import Job

    set_threads(config.threads)
    config.data.check()
    info = METHODS.info(config.method)
    job = Job(config)
    job.check()
    if config.dry_run:
        sys.stdout.write(job.plan() + "\n")
        return
    facts = {"task": config.task, "setting": config.setting, "order": list(job.task.order)}
    _refuse_other_run(config, {**facts, "method": info.name, "seed": config.seed})
    with Run.start(
        "css",
        config,
        name=f"{config.data.name}-{config.task}-{info.name}",
        method=info.name,
        fidelity=info.fidelity,
        data={**config.data.describe(), **facts},
        axes={"test/*": "task"},
    ) as run:
        reports = job.run_steps(run)
        final = job.finish(run, reports) if run.is_writer else {}
        run.finish(final)
    if run.is_writer:
        _show(run, reports)


def _refuse_other_run(config: CSSConfig, facts: dict[str, Any]) -> None:
    """Before a run goes on: what its finished steps were trained for must be what this command asks for.

    Raises:
        UserError: another task, setting, class order, method or seed.
    """
    from polymodal.run import find_resume, read_manifest

    if not config.resume:
        return
    folder, _ = find_resume(config.resume, "css", config)
    manifest = read_manifest(folder)
    if manifest["task"] != "css":
        return  # Run.start says so
    before = {**manifest["data"], "method": manifest["method"], "seed": manifest["seed"]}
    for key, now in facts.items():
        if before.get(key, now) != now:
            raise UserError(
                f"--resume {folder}: a run with {key} {before[key]}, not {now}; leave --{key} out to continue it, or "
                "--resume to start a new run"
            )


def _show(run: Run, reports: list[StepReport]) -> None:
    """The closing table, the run folder, the command that shows more, the W&B upload command."""
    from css.report import closing_table

    sys.stdout.write("\n" + closing_table(reports) + "\n")
    sys.stdout.write(f"\nrun folder  {run.folder}\npictures    {run.folder / 'figures'}\n")
    sys.stdout.write(f"more        polymodal report {run.folder} --html\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")
