"""The command ``polymodal``: everything that looks at runs and installations and trains nothing."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from polymodal.cli import run_guarded, subcommands
from polymodal.errors import UserError

__all__ = ["main"]

_EXAMPLE = """\
polymodal report runs/ --against none        table over seeds with paired differences
polymodal report runs/ --html                one page with curves and samples
polymodal compare runs/slt/A runs/slt/B      what differs between two runs
polymodal list                               methods of the installed packages
polymodal doctor                             is this installation whole?"""

_FORMS = ("md", "csv", "html", "tex")


def main() -> int:
    """Entry point of the console script; returns the exit code."""
    return subcommands(
        {
            "report": ("table, curves and page from run folders", _guarded("report", _report)),
            "compare": ("configuration and metric differences of runs", _guarded("compare", _compare)),
            "list": ("methods of the installed packages, with paper", _guarded("list", _list)),
            "doctor": ("versions, devices, what is missing for which extra", _guarded("doctor", _doctor)),
            "dashboard": ("apply a package's panel layout to a W&B project", _guarded("dashboard", _dashboard)),
            "experiments": ("run a grid of settings and seeds, tabulate it", _guarded("experiments", _experiments)),
        },
        prog="polymodal",
        example=_EXAMPLE,
    )


def _guarded(name: str, function: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """The command with ``--debug`` and one-line errors; its own exit code counts where it returns."""

    def call(arguments: Sequence[str]) -> int:
        codes = [0]

        def run() -> None:
            with contextlib.suppress(SystemExit):  # how argparse ends after --help; its errors are a UserError here
                codes.append(function([a for a in arguments if a != "--debug"]))

        return run_guarded(run, prog=f"polymodal {name}", debug="--debug" in arguments) or codes[-1]

    return call


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


class _Parser(argparse.ArgumentParser):
    def __init__(self, name: str, summary: str, example: str) -> None:
        description = f"{summary}\n\nExample:\n{textwrap.indent(example, '  ')}"
        prog = f"polymodal {name}"
        super().__init__(prog=prog, description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """An unknown option or a wrong value."""
        raise UserError(f"{message}; `{self.prog} --help` shows the options")


def _report(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "report",
        "One table a task from run folders: mean and deviation over seeds, paired differences.",
        "polymodal report runs/ --metric test/bleu4 'test/rouge*' --against none\n"
        "polymodal report runs/ --by fusion.mode --where data.name=synthetic --html --plot --out report/",
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], help="run folders or folders of runs")
    parser.add_argument("--by", default="method", help="rows: dotted keys of manifest or config [method]")
    parser.add_argument("--metric", nargs="+", default=[], help="columns: names or patterns [test scores]")
    parser.add_argument("--where", nargs="+", default=[], help="KEY=VALUE conditions; VALUE may be a pattern")
    parser.add_argument("--against", default=None, help="baseline of the paired differences")
    parser.add_argument("--format", choices=_FORMS, default="md", help="what is printed [md]")
    parser.add_argument("--html", action="store_true", help="also write report.html, one file with curves and samples")
    parser.add_argument("--plot", action="store_true", help="also write one PNG a metric: mean and deviation")
    parser.add_argument("--out", type=Path, default=None, help="folder for files; the printed report goes there too")
    parser.add_argument("--mix", action="store_true", help="allow different data or metric definitions in one table")
    parser.add_argument("--unfinished", action="store_true", help="include runs that did not come to their end")
    options = parser.parse_args(arguments)
    from polymodal.report import ReportOptions, collect, render, write_report

    asked = ReportOptions(
        runs=tuple(options.runs),
        by=options.by,
        metrics=tuple(options.metric),
        where=tuple(options.where),
        against=options.against,
        mix=options.mix,
        unfinished=options.unfinished,
    )
    reports = collect(asked)
    sys.stdout.write(render(reports, options.format, asked))
    forms = [options.format] if options.out is not None else []
    forms += ["html"] if options.html and "html" not in forms else []
    if forms or options.plot:
        folder = options.out or options.runs[0] / "report"
        for path in write_report(reports, asked, folder, forms, options.plot):
            sys.stderr.write(f"wrote {path}\n")
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "compare",
        "What differs between runs: configuration, circumstances and metrics side by side.",
        "polymodal compare runs/slt/synthetic-ssaw-20250101-100000 runs/slt/synthetic-none-20250101-100500",
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[], help="two run folders or more")
    options = parser.parse_args(arguments)
    from polymodal.compare import compare

    sys.stdout.write(compare(options.runs).to_markdown())
    return 0


def _list(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "list",
        "Methods of all installed packages: name, fidelity, paper, summary.\n"
        "Fidelity: paper (its equations), code (its official code), reconstruction (our reading).",
        "polymodal list --package slt",
    )
    parser.add_argument("--package", default="", help="show this one only")
    parser.add_argument("--format", choices=("text", "md"), default="text", help="text or md [text]")
    options = parser.parse_args(arguments)
    from polymodal.discovery import installed_packages, listing

    sys.stdout.write(listing(installed_packages(), options.package, options.format) + "\n")
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "doctor",
        "Looks at versions, import names, devices, the W&B account and folders. Changes and sends nothing.\n"
        "Exit code 1 if something is broken.",
        "polymodal doctor",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that training would write to [runs]")
    options = parser.parse_args(arguments)
    from polymodal.doctor import examine, report_text

    findings = examine(options.runs)
    sys.stdout.write(report_text(findings) + "\n")
    return int(any(f.state == "fail" for f in findings))


def _dashboard(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "dashboard",
        "Writes a package's panel layout into a W&B project as a saved view (extra: polymodal[dashboards]).\n"
        "Without an account: polymodal report runs/ --html.",
        "polymodal dashboard --package slt --entity my-team --project polymodal-slt\n"
        "polymodal dashboard --package slt --dry-run",
    )
    parser.add_argument("--package", default="", help="import name, e.g. slt")
    parser.add_argument("--entity", default=None, help="W&B team or user [the account's default]")
    parser.add_argument("--project", default="", help="W&B project [polymodal-<package>]")
    parser.add_argument("--name", default="", help="name of the view [polymodal <package>]")
    parser.add_argument("--dry-run", action="store_true", help="print the layout as JSON and write nothing")
    options = parser.parse_args(arguments)
    from polymodal.dashboards import apply_layout, layout_for
    from polymodal.discovery import installed_packages

    known = [p.module for p in installed_packages()]
    if options.package not in known:
        raise UserError(f"--package {options.package or '(none)'}: installed packages are {', '.join(known)}")
    layout = layout_for(options.package)
    if options.dry_run:
        sys.stdout.write(layout.to_json() + "\n")
        return 0
    address = apply_layout(layout, options.project or f"polymodal-{options.package}", options.entity, options.name)
    sys.stdout.write(f"{address}\n")
    return 0


def _experiments(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "experiments",
        "A grid of settings and seeds from a YAML file: one process and one JSON file a cell; finished ones are kept.",
        "polymodal experiments run packages/slt/experiments/fusion.yaml --jobs 2\n"
        "polymodal experiments table packages/slt/experiments/fusion.yaml --against none",
    )
    parser.add_argument("action", choices=("run", "table", "plan"), help="run, table, or plan (show commands)")
    parser.add_argument("file", type=Path, help="experiment file")
    parser.add_argument("--jobs", type=int, default=1, help="run: cells at a time [1]")
    parser.add_argument("--runs", type=Path, default=None, help="run: folder for run folders [runs/experiments]")
    parser.add_argument("--against", default=None, help="table: baseline [the file's]")
    parser.add_argument("--format", choices=("md", "csv", "tex"), default="md", help="table: format [md]")
    parser.add_argument("--out", type=Path, default=None, help="table: write to this file instead of printing")
    parser.add_argument("--mix", action="store_true", help="table: allow different data or metric definitions")
    options = parser.parse_args(arguments)
    from polymodal.experiments import load_experiment

    experiment = load_experiment(options.file, options.runs)
    if options.action == "plan":
        for cell in experiment.grid():
            sys.stdout.write(shlex.join(experiment.arguments(cell)) + "\n")
        return 0
    if options.action == "run":
        return _run_cells(experiment, options.jobs)
    return _print_table(experiment, options)


def _run_cells(experiment: Any, jobs: int) -> int:
    from polymodal.experiments import run_experiment

    records = run_experiment(experiment, jobs)
    failed = [f"{r['cell']}-seed{r['seed']}" for r in records if r["status"] != "finished"]
    sys.stdout.write(f"{len(records) - len(failed)} of {len(records)} cells finished: {experiment.results}\n")
    if failed:
        sys.stdout.write(f"failed: {', '.join(failed)}; run again to try them once more\n")
    return int(bool(failed))


def _print_table(experiment: Any, options: Any) -> int:
    from polymodal.experiments import table_of
    from polymodal.files import write_text
    from polymodal.tables import FORMATS

    text = FORMATS[options.format]([table_of(experiment, options.against, options.mix)])
    if options.out is None:
        sys.stdout.write(text)
    else:
        write_text(options.out, text)
        sys.stderr.write(f"wrote {options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
