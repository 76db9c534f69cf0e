"""Timing by interleaved runs in one process: statistics, table, JSON; README.md's tables are made from the JSON."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
VERSIONS = ("torch", "torchvision", "lightning", "transformers", "numpy", "wandb")


@dataclass
class Samples:
    """Seconds of each run: on the wall, and of this process's own computing (CPU)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One line of a table.

    ``ratio`` is baseline / ours for a speed-up, ours / baseline for an overhead; ``low`` and ``high`` are the quartiles
    of what the target is about (ratio of neighbouring runs, or the value itself where there is no baseline).
    """

    what: str
    unit: str
    ours: float
    baseline: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    cpu_ratio: float | None = None
    target: str | None = None
    met: bool | None = None
    runs: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (linear interpolation); one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleave(
    functions: Mapping[str, Callable[[], Any]], runs: int, warmup: int = 2, sync: Callable[[], None] | None = None
) -> dict[str, Samples]:
    """Time functions in turns (A B, B A, A B, ...), so that a change in the machine's load hits all alike."""
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    samples = {name: Samples() for name in names}
    for run in range(runs):
        for name in names if run % 2 == 0 else reversed(names):
            if sync is not None:
                sync()
            cpu, wall = time.process_time(), time.perf_counter()
            functions[name]()
            if sync is not None:
                sync()
            samples[name].wall.append(time.perf_counter() - wall)
            samples[name].cpu.append(time.process_time() - cpu)
    return samples


def speedup(what: str, ours: Samples, baseline: Samples, *, at_least: float | None = None, **detail: Any) -> Row:
    """How many times faster ``ours`` is."""
    row = _compared(what, ours, baseline, baseline, ours, detail)
    if at_least is not None:
        row.target, row.met = f">= {at_least:.2f}", bool(row.ratio is not None and row.ratio >= at_least)
    return row


def overhead(what: str, ours: Samples, baseline: Samples, *, at_most: float | None = None, **detail: Any) -> Row:
    """How much longer ``ours`` takes; 1.05 is 5 % longer."""
    row = _compared(what, ours, baseline, ours, baseline, detail)
    if at_most is not None:
        row.target, row.met = f"<= {at_most:.2f}", bool(row.ratio is not None and row.ratio <= at_most)
    return row


def _compared(
    what: str, ours: Samples, baseline: Samples, top: Samples, bottom: Samples, detail: dict[str, Any]
) -> Row:
    low, _, high = quartiles([a / b for a, b in zip(top.wall, bottom.wall, strict=True)])
    return Row(
        what=what,
        unit="ms",
        ours=1000 * statistics.median(ours.wall),
        baseline=1000 * statistics.median(baseline.wall),
        ratio=statistics.median(top.wall) / statistics.median(bottom.wall),
        low=low,
        high=high,
        cpu_ratio=statistics.median(top.cpu) / max(statistics.median(bottom.cpu), 1e-9),
        runs=len(ours.wall),
        detail=detail,
    )


def value(
    what: str,
    unit: str,
    values: Sequence[float],
    *,
    below: float | None = None,
    at_least: float | None = None,
    **detail: Any,
) -> Row:
    """A figure without a baseline (a rate, a share): its median and quartiles."""
    low, middle, high = quartiles(values)
    row = Row(what=what, unit=unit, ours=middle, low=low, high=high, runs=len(values), detail=detail)
    if below is not None:
        row.target, row.met = f"< {below:g} {unit}", middle < below
    if at_least is not None:
        row.target, row.met = f">= {at_least:g} {unit}", middle >= at_least
    return row


def against(
    what: str, unit: str, ours: Sequence[float], baseline: Sequence[float], *, at_most: float | None = None
) -> Row:
    """Figures other than times next to those of a baseline: ratio of the medians, ours / baseline."""
    low, _, high = quartiles([a / b for a, b in zip(ours, baseline, strict=True)])
    top, bottom = statistics.median(ours), statistics.median(baseline)
    row = Row(what, unit, top, bottom, top / bottom, low, high, runs=len(ours))
    if at_most is not None:
        row.target, row.met = f"<= {at_most:.2f}", top / bottom <= at_most
    return row


# ---------------------------------------------------------------------------------------------------- command


@dataclass
class Options:
    """What every benchmark takes."""

    sections: list[str]
    runs: int
    quick: bool
    threads: int
    device: str
    out: Path | None

    def sync(self) -> None:
        """Wait for the device."""
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()

    def times(self, runs: int) -> int:
        """``runs`` of a section unless the user set a number; 2 with ``--quick``."""
        return 2 if self.quick else self.runs or runs


def parse(description: str, sections: Sequence[str], argv: Sequence[str] | None = None) -> Options:
    """Read the command line and set the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"which of {', '.join(sections)} (default: all)")
    parser.add_argument("--runs", type=int, default=0, help="measured runs of each row (default: the section's own)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two runs: does it work? Prints only")
    given = parser.parse_args(argv)
    unknown = [name for name in given.sections if name not in sections]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(sections)}")
    import torch

    torch.set_num_threads(given.threads)
    save = not given.no_save and (not given.quick or given.out != RESULTS)
    return Options(
        given.sections or list(sections),
        given.runs,
        given.quick,
        given.threads,
        given.device,
        given.out if save else None,
    )


def run_sections(
    name: str, options: Options, sections: Mapping[str, tuple[str, Callable[[Options], list[Row]]]]
) -> list[Path]:
    """Run the chosen sections; each prints a table and writes ``<out>/<name>_<section>.json`` as soon as it is done."""
    written = []
    for key in options.sections:
        title, function = sections[key]
        load = os.getloadavg()
        rows = function(options)
        if options.quick:  # sizes so small that no target makes sense
            rows = [replace(row, target=None, met=None) for row in rows]
        report = {
            "schema": "polymodal.benchmark",
            "schema_version": 1,
            "name": f"{name}_{key}",
            "title": title,
            "command": f"python benchmarks/{name}.py {key}",
            **_circumstances(options),
            "load_at_start": [round(x, 2) for x in load],
            "load_at_end": [round(x, 2) for x in os.getloadavg()],
            "rows": [asdict(row) for row in rows],
        }
        sys.stdout.write(f"\n{title}\n\n{table(report)}\n")
        sys.stdout.flush()
        if options.out is not None:
            from polymodal.files import write_json

            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / f"{name}_{key}.json", report)
            written.append(options.out / f"{name}_{key}.json")
    return written


def _circumstances(options: Options) -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "quick": options.quick,
        "device": _device(options.device),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "versions": {
            "python": platform.python_version(),
            "polymodal": metadata.version("polymodal"),
            **{name: metadata.version(name) for name in VERSIONS},
        },
    }


def _device(name: str) -> str:
    import torch

    if name != "cpu":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout, with ``+`` where tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ----------------------------------------------------------------------------------------------------- tables


def table(report: Mapping[str, Any]) -> str:
    """A report as a Markdown table and a line on how it was measured."""
    lines = ["| what | ours | baseline | ratio | quartiles | ratio of CPU time | target | met | runs |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|---:|"]
    for row in report["rows"]:
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        cells = [
            row["what"],
            f"{_number(row['ours'])} {row['unit']}",
            "" if row["baseline"] is None else f"{_number(row['baseline'])} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
            "" if row["low"] is None else f"{_number(row['low'])} – {_number(row['high'])}",
            "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.3f}",
            row["target"] or "",
            met,
            str(row["runs"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(
        f"{k} {v}" for k, v in report["versions"].items() if k in ("torch", "lightning", "transformers")
    )
    lines.append("")
    lines.append(
        f"`{report['command']}` on {report['device']}, {report['threads']} thread(s) of {report['cores']} cores, load "
        f"{report['load_at_start'][0]} at the start and {report['load_at_end'][0]} at the end, {versions}, "
        f"commit {report['commit'] or 'unknown'}, {report['date'][:10]}."
    )
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def refreshed(readme: str, results: Path = RESULTS) -> str:
    """``readme`` with the text between each pair of ``<!-- NAME -->`` and ``<!-- /NAME -->`` made from NAME.json."""

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[1]}.json"
        body = table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not measured yet."
        return f"<!-- {match[1]} -->\n{body}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme_file = HERE / "README.md"
    readme_file.write_text(refreshed(readme_file.read_text(encoding="utf-8")), encoding="utf-8")
