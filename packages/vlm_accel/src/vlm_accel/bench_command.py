"""``vlm-bench``: quality, cost and speed of many methods on one model, beside the unmodified model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command

from vlm_accel.bench.settings import BenchConfig

if TYPE_CHECKING:
    from polymodal.run import Run

    from vlm_accel.bench.subjects import Subject

__all__ = ["bench", "main"]

PROG = "vlm-bench"
EXAMPLE = """
vlm-bench                                                       # all methods on a small built-in model
vlm-bench --methods lightvlm recycle@vision random --ratios 0.5 0.25 0.1 --repeats 20
vlm-bench --model DIR --data DATA/chartqa/test.jsonl --methods lightvlm drop --schedule keep35
vlm-bench --resume auto                                         # go on with rows that are missing
"""
DEFAULT_PRESETS = {"": "built_in"}
LISTS = ("methods", "ratios", "tasks")
_log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``vlm-bench``; returns the exit code."""
    own = any(word.partition("=")[0] in ("--model", "--data") for word in sys.argv[1:])
    return command(
        bench,
        BenchConfig,
        prog=PROG,
        example=EXAMPLE,
        presets="vlm_accel",
        default_presets={} if own else DEFAULT_PRESETS,
        list_methods=list_methods,
        lists=LISTS,
    )


def list_methods() -> str:
    """Methods with where they act, paper and fidelity, one line each."""
    from vlm_accel.methods import METHODS

    return "\n".join(
        f"{info.name:14} {'/'.join(info.tags):28} {info.fidelity:15} {info.summary} ({info.paper})" for info in METHODS
    )


def bench(config: BenchConfig) -> None:
    """Measure the rows that are missing; write table, figure and files.

    Raises:
        UserError: bad options, model or data.
    """
    from vlm_accel.bench.cases import all_cases

    config.check()
    cases = all_cases(config)
    if config.dry_run:
        sys.stdout.write("".join(f"would measure {case.label}\n" for case in cases))
        return
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    set_threads(config.threads)
    samples = None if config.model is None else _read_data(config)
    subject = None if samples is None else _checkpoint(config, *samples)
    facts = subject.facts if subject is not None else _built_in_facts(config)
    with Run.start(
        "vlm_accel",
        config,
        name=f"bench-{facts['name']}",
        method=_short([case.method for case in cases]),
        data=facts,
        job_type="eval",
        axes=dict.fromkeys(("test/*", "fidelity/*", "tokens/*", "macs/*", "kv/*", "time/*", "speedup/*"), "row"),
    ) as run:
        if subject is None:
            subject = _built_in(config, run)
        final, text = _measure(config, run, subject)
        run.finish(final)
    sys.stdout.write(text)
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")


def _measure(config: BenchConfig, run: Run, subject: Subject) -> tuple[dict[str, float], str]:
    """Rows, files and figure; (final metrics, what is said at the end)."""
    from vlm_accel.bench.job import BenchJob
    from vlm_accel.bench.pareto import draw_pareto
    from vlm_accel.bench.report import columns_for, print_table, table_rows, write_results

    job = BenchJob(config, subject, config.results or run.folder / "cells")
    records = job.run(run)
    title = f"{subject.facts['name']}, {len(subject)} samples, seed {config.seed}"
    write_results(run.folder, records, title, notes(config, job.compared))
    figure = run.folder / "figures" / "pareto.png"
    draw_pareto(figure, records, title)
    _log_picture(run, figure)
    columns = columns_for(records)
    run.log_table("bench/rows", ["row", *(name for name, _, _ in columns)], table_rows(records, columns))
    sys.stdout.write("\n")
    print_table(records, title)
    final = {name: value for name, value in records[0]["metrics"].items() if name.startswith("test/")}
    run.note(metric_signatures={name: subject.signature(name) for name in final})
    for record in records[1:]:
        for name in ("test/accuracy", "test/retained", "fidelity/kl", "macs/total", "kv/bytes"):
            if name in record["metrics"]:
                short = name.removeprefix("test/").replace("/", "_")
                final[f"bench/{record['label']}/{short}"] = record["metrics"][name]
    lines = [f"note        {note}" for note in notes(config, job.compared)]
    lines += [f"run folder  {run.folder}", f"figure      {figure}"]
    lines += [
        f"table       {run.folder / 'table.md'} (all columns)",
        f"more        polymodal report {run.folder} --html",
    ]
    return final, "\n".join(lines) + "\n"


def notes(config: BenchConfig, compared: int) -> list[str]:
    """What a reader of the table must know."""
    found = [
        f"KL and argmax: teacher forcing on the unmodified model's greedy answer, {compared} samples",
        "MACs: vision and prefill of a timed turn; KV bytes: at its end (adakv masks entries: its bytes do not shrink)",
    ]
    if config.repeats:
        found.append(
            f"times: batch {config.size('time_batch')}, medians of {config.repeats} turns, the unmodified model in turn"
            " with each row; ideal: the ratio of MACs, or of bytes for a token"
        )
    if config.model is None and config.repeats:
        found.append("speed-ups of a model this small are those of Python's overhead: look at MACs and bytes")
    if config.model is None:
        found.append(
            "the tower's class row has learnt for two minutes: rows that rank by its attention (visionzip, prumerge,"
            " hired, fastervlm, evit) say little of these methods on real towers"
        )
    return found


def _built_in_facts(config: BenchConfig) -> dict[str, Any]:
    from vlm_accel.bench.built_in import describe

    return describe(config)


def _built_in(config: BenchConfig, run: Run) -> Subject:
    """The built-in model, trained in this run where it is not in the cache."""
    from vlm_accel.bench.built_in import cached_folder, is_cached, load_built_in, train_built_in
    from vlm_accel.bench.subjects import DigitSubject

    if not is_cached(config):
        _log.info("training the built-in model, about two minutes, once (kept in %s)", cached_folder(config).parent)
        train_built_in(config, run)
    return DigitSubject(config, load_built_in(config, config.attn))


def _read_data(config: BenchConfig) -> Any:
    from vlm_accel.data.jsonl import read_tasks

    assert config.data is not None
    return read_tasks(config.data, config.tasks, config.split, config.limit)


def _checkpoint(config: BenchConfig, samples: Any, fingerprint: str) -> Subject:
    from vlm_accel.bench.subjects import JsonlSubject
    from vlm_accel.loading import load_model

    assert config.model is not None
    vlm = load_model(config.model, config.dtype, config.device, config.attn)
    return JsonlSubject(config, vlm, samples, fingerprint)


def _short(methods: Sequence[str]) -> str:
    """Methods in a few words, for the manifest."""
    names = list(dict.fromkeys(methods))
    return "+".join(names) if len(names) < 4 else f"{len(names)} methods"


def _log_picture(run: Run, path: Path) -> None:
    """Show the figure in W&B, where the run is logged there."""
    from polymodal.logs import WandbLog

    for logger in run.loggers:
        if isinstance(logger, WandbLog):
            import wandb

            logger.run.log({"bench/pareto": wandb.Image(str(path))})
