"""Accuracy of each model of a matrix under each pattern, all test rows with the same one: no table, no rate.

    python packages/missing_modal/experiments/by_pattern.py packages/missing_modal/experiments/results/six_views

Reads the logits that mm-matrix left in ``logits`` and writes ``patterns.json``; without logits, reads that file.
``patterns.md`` has accuracy by what is there (beyond two modalities: how many are there, and each one alone) and paired
differences to one method. Cells of more than two modalities are made slim: the accuracy over all rows stays, the other
scores and what they say by pattern, 63 columns each of a few rows, are left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from missing_modal.matrix import LogitCache
from missing_modal.patterns import all_masks, mask_name
from polymodal.errors import UserError
from polymodal.files import write_text
from polymodal.stats import paired_difference, summarise
from polymodal.tables import markdown

DIGITS = 4
KEPT = ("kind", "ratio", "seed", "test/accuracy")
"""Columns of slim cells."""
Scores = dict[str, dict[int, float]]
"""Heading -> seed -> accuracy in percent."""


def measure(folder: Path) -> dict[str, Any]:
    """Accuracies (0..1) by model and pattern, from the logits of the models whose cells are there.

    Raises:
        UserError: no logits there.
    """
    told = {path.stem for path in (folder / "cells").glob("*.json")}
    files = [p for p in sorted((folder / "logits").glob("*-test.npz")) if p.stem.removesuffix("-test") in told]
    if not files:
        raise UserError(f"{folder}: neither patterns.json nor logits; run mm-matrix with --results {folder.name}")
    models: dict[str, Any] = {}
    for path in files:
        cache, _ = LogitCache.load(path)
        masks = all_masks(cache.modalities)
        accuracy = []
        for mask in masks:
            logits = cache.logits(np.full(len(cache), mask))
            accuracy.append(round(float((logits.argmax(1) == cache.labels).mean()), DIGITS))
        models[path.stem.removesuffix("-test")] = accuracy
        held = {"modalities": list(cache.modalities), "patterns": [mask_name(mask, cache.modalities) for mask in masks]}
    return {"schema": "missing_modal.patterns", "schema_version": 1, **held, "models": models}


def write_patterns(path: Path, found: dict[str, Any]) -> None:
    """One line a model."""
    models = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in found["models"].items())
    head = json.dumps({key: value for key, value in found.items() if key != "models"}, indent=2)
    write_text(path, f'{head[:-2]},\n  "models": {{\n{models}\n  }}\n}}\n')


def columns(found: dict[str, Any]) -> dict[str, list[int]]:
    """Heading -> places of its patterns."""
    names, count = found["patterns"], len(found["modalities"])
    if count == 2:
        return {name if name == "complete" else f"only {name}": [place] for place, name in enumerate(names)}
    sizes = [count if name == "complete" else name.count("+") + 1 for name in names]
    by_size = {f"{size} there": [p for p, held in enumerate(sizes) if held == size] for size in range(count, 0, -1)}
    return by_size | {f"only {name}": [names.index(name)] for name in found["modalities"]}


def scores(found: dict[str, Any]) -> dict[tuple[str, str], Scores]:
    """(Training pattern, method) -> accuracies; models of one seed each are brought together."""
    result: dict[tuple[str, str], Scores] = {}
    for name, row in found["models"].items():
        parts = re.fullmatch(r"(\w+)-(.+)-[\d.]+-seed(\d+)", name)
        assert parts is not None
        method, kind, seed = parts[1], parts[2].replace("only_", "only:", 1), int(parts[3])
        for heading, places in columns(found).items():
            by_seed = result.setdefault((kind, method), {}).setdefault(heading, {})
            by_seed[seed] = 100 * float(np.mean([row[place] for place in places]))
    return result


def over_kinds(table: dict[tuple[str, str], Scores]) -> dict[tuple[str, str], Scores]:
    """Means over the training patterns, which all methods share, seed by seed."""
    found: dict[tuple[str, str], Scores] = {}
    for method in dict.fromkeys(method for _, method in table):
        held = [row for (_, name), row in table.items() if name == method]
        found["mean over all", method] = {
            heading: {seed: float(np.mean([row[heading][seed] for row in held])) for seed in by_seed}
            for heading, by_seed in held[0].items()
        }
    return found


def whole(folder: Path) -> Scores:
    """Method -> seed -> mean accuracy over all cells: training patterns, test patterns, rates and tables alike."""
    found: dict[str, dict[int, list[float]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        by_seed = found.setdefault(record["method"], {})
        by_seed.setdefault(record["train"]["seed"], []).extend(record["cells"]["test/accuracy"])
    return {m: {seed: 100 * float(np.mean(v)) for seed, v in by_seed.items()} for m, by_seed in found.items()}


def _said(cell: dict[int, float]) -> str:
    found = summarise(list(cell.values()))
    return f"{found.mean:.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")


def _difference(ours: dict[int, float], base: dict[int, float]) -> str:
    found = paired_difference(ours, base)
    if found is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.mean:+.1f}{interval}"


def to_table(found: dict[str, Any], cells: Scores, against: str) -> str:
    """All tables as Markdown; ``cells`` of ``whole``."""
    table, headings = dict(sorted(scores(found).items())), list(columns(found))
    if len({kind for kind, _ in table}) > 1:
        table |= over_kinds(table)
    rows = [[f"{method}: {kind}", *(_said(held[h]) for h in headings)] for (kind, method), held in table.items()]
    others = [
        [f"{method}: {kind}", *(_difference(held[h], table[kind, against][h]) for h in headings)]
        for (kind, method), held in table.items()
        if method != against and (kind, against) in table
    ]
    means = [
        [method, _said(held), "" if method == against else _difference(held, cells[against])]
        for method, held in cells.items()
    ]
    label = "method: missing in training"
    return (
        "Accuracy in percent over all test rows, by what is there; mean ± sample deviation over training seeds.\n\n"
        f"{markdown([label, *headings], rows)}\n\n"
        f"Difference to {against} with the same training pattern, seed by seed [95 %].\n\n"
        f"{markdown([label, *headings], others)}\n\n"
        "Mean over all cells of the matrix: training patterns, test patterns, rates and test tables alike.\n\n"
        f"{markdown(['method', 'accuracy', f'difference to {against} [95 %]'], means)}\n"
    )


def slim(folder: Path) -> None:
    """Cells with accuracy over all rows only."""
    for path in sorted((folder / "cells").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        cells = {name: values for name, values in record["cells"].items() if name in KEPT}
        if cells != record["cells"]:
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in cells.items())
            head = json.dumps({key: value for key, value in record.items() if key != "cells"}, indent=2)
            write_text(path, f'{head[:-2]},\n  "cells": {{\n{lines}\n  }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder that mm-matrix wrote")
    parser.add_argument("--against", default="dcp", help="method that the paired differences are to")
    options = parser.parse_args()
    try:
        path = options.results / "patterns.json"
        if (options.results / "logits").is_dir() or not path.is_file():
            write_patterns(path, measure(options.results))
        found = json.loads(path.read_text(encoding="utf-8"))
        if len(found["modalities"]) > 2:
            slim(options.results)
        text = to_table(found, whole(options.results), options.against)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    write_text(options.results / "patterns.md", text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
