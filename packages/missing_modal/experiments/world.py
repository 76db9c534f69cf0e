"""All methods on the two-modality world (DCP 8): three seeds through ``mm-matrix``, and what is claimed of them.

    python packages/missing_modal/experiments/world.py           # from the repository's root; goes on where it stopped
    python packages/missing_modal/experiments/world.py --table   # only the tables of what is there

Each model is trained with one kind of missing rows (image, text, both; 70 %) and tested under every kind at seven
rates, five tables each. One JSON a model lies in ``results/world/cells``; ``summary.md`` there is what the README of
this folder shows; models and logits stay out of version control.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from polymodal.files import write_text
from polymodal.stats import paired_difference
from polymodal.tables import markdown

RESULTS = Path(__file__).parent / "results" / "world"
SEEDS = (0, 1, 2)
RATE = 0.7
BASELINE = "deep_prompts"
METHODS = (
    *("dcp", "deep_prompts", "mmp_input", "head_only", "mmp_attention", "vpt", "coop", "maple", "msp"),
    *("zero_imputation", "mean_imputation", "modality_dropout"),
)
COLUMNS = {
    "both 70": ("both", ""),
    "complete rows": ("both", "/complete"),
    "no text": ("both", "/image"),
    "no image": ("both", "/text"),
    "image 70": ("image", ""),
    "text 70": ("text", ""),
}
"""Heading -> what is missing in training and in the test, and which rows count."""
CLAIMS = (
    ("dcp", "deep_prompts"),
    ("mmp_input", "deep_prompts"),
    ("dcp", "mmp_input"),
    ("dcp", "head_only"),
    ("dcp", "modality_dropout"),
)
Scores = dict[str, dict[str, dict[int, float]]]
"""Method -> column -> seed -> accuracy in percent."""


def read(folder: Path = RESULTS) -> Scores:
    """Accuracies at 70 %, averaged over the test tables, of the models that are there."""
    found: Scores = {}
    for method in METHODS:
        for heading, (kind, rows) in COLUMNS.items():
            for seed in SEEDS:
                path = folder / "cells" / f"{method}-{kind}-{RATE:g}-seed{seed}.json"
                if not path.is_file():
                    continue
                cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
                values = [
                    value
                    for tested, ratio, value in zip(
                        cells["kind"], cells["ratio"], cells[f"test/accuracy{rows}"], strict=True
                    )
                    if tested == kind and ratio == RATE
                ]
                found.setdefault(method, {}).setdefault(heading, {})[seed] = 100 * statistics.fmean(values)
    return found


def said(by_seed: Mapping[int, float]) -> str:
    """Mean and deviation over seeds."""
    if not by_seed:
        return "–"
    spread = f" ± {statistics.stdev(by_seed.values()):.1f}" if len(by_seed) > 1 else ""
    return f"{statistics.fmean(by_seed.values()):.1f}{spread}"


def table(found: Scores) -> str:
    """Methods x columns as Markdown."""
    lines = [[method, *(said(columns.get(name, {})) for name in COLUMNS)] for method, columns in found.items()]
    return markdown(["method", *COLUMNS], lines)


def differences(found: Scores) -> str:
    """Paired differences of the claims as Markdown."""
    lines = []
    for ours, other in CLAIMS:
        for heading in COLUMNS:
            a, b = (found.get(name, {}).get(heading, {}) for name in (ours, other))
            difference = paired_difference(a, b)
            if difference is None:
                continue
            each = ", ".join(f"{a[seed] - b[seed]:+.1f}" for seed in sorted(a.keys() & b.keys()))
            interval = "" if difference.low is None else f" [{difference.low:+.1f}, {difference.high:+.1f}]"
            lines.append([f"{ours} - {other}", heading, f"{difference.mean:+.1f}{interval}", each])
    return markdown(["difference", "of", "mean, points [95 %]", "by seed"], lines)


def report(folder: Path = RESULTS) -> str:
    """Both tables."""
    found = read(folder)
    return f"{table(found)}\n\n{differences(found)}\n"


def main() -> int:
    """Run what is not there, write and show the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only the tables of what is there")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    arguments = parser.parse_args()
    if not arguments.table:
        from missing_modal.matrix_command import main as run

        given = ["--methods", *METHODS, "--seeds", *map(str, SEEDS), "--against", BASELINE, "--name", "world"]
        sys.argv = ["mm-matrix", *given, "--results", str(RESULTS), "--jobs", str(arguments.jobs)]
        code = run()
        if code:
            return code
    text = report()
    write_text(RESULTS / "summary.md", text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
