"""From the records of a matrix to its tables and pictures. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError, did_you_mean
from polymodal.stats import Summary, paired_difference, summarise
from polymodal.tables import markdown

if TYPE_CHECKING:
    from missing_modal.matrix_settings import MatrixConfig

__all__ = ["BySeed", "draw", "label_of", "metric_of", "scores", "to_tables"]

Record = Mapping[str, Any]
BySeed = dict[int, float]
"""training seed -> score, in percent where it is a share"""
_SHARES = ("accuracy", "auroc", "f1_macro", "f1_micro", "f1_samples", "f1_weighted", "ece")
_DASH = "–"


def metric_of(config: MatrixConfig, records: Sequence[Record]) -> str:
    """Full name of the score of tables and pictures.

    Raises:
        UserError: a score that these data do not have.
    """
    name = f"{config.split}/{config.metric or config.data.metric}"
    known = [key for key in records[0]["cells"] if key.startswith(f"{config.split}/")]
    if name not in known:
        short = [key.removeprefix(f"{config.split}/") for key in known]
        near = did_you_mean(str(config.metric), short)
        whole = ", ".join(key for key in short if "/" not in key)
        raise UserError(f"metric={config.metric}: these data have none; {near}known: {whole}")
    return name


def label_of(record: Record, records: Sequence[Record]) -> str:
    """Name of a model in tables and pictures: what distinguishes it from the others, the seed apart."""
    methods = {other["method"] for other in records}
    ratios = {other["train"]["ratio"] for other in records if other["train"]["kind"] != "none"}
    kind, ratio = record["train"]["kind"], record["train"]["ratio"]
    parts = [record["method"]] if len(methods) > 1 else []
    parts.append(f"{kind} {100 * ratio:g} %" if len(ratios) > 1 and kind != "none" else kind)
    return ": ".join(parts)


def scores(records: Sequence[Record], metric: str) -> dict[tuple[str, str, float], BySeed]:
    """(model, test kind, test rate) -> training seed -> score, averaged over the test tables.

    A cell where the score is not defined for some table (one class only) is left out.
    """
    factor = 100.0 if metric.partition("/")[2].partition("/")[0] in _SHARES else 1.0
    found: dict[tuple[str, str, float], dict[int, list[float | None]]] = {}
    for record in records:
        label, cells = label_of(record, records), record["cells"]
        for kind, ratio, value in zip(cells["kind"], cells["ratio"], cells[metric], strict=True):
            by_seed = found.setdefault((label, kind, ratio), {})
            by_seed.setdefault(record["train"]["seed"], []).append(value)
    result: dict[tuple[str, str, float], BySeed] = {}
    for key, by_seed in found.items():
        held = {seed: [v for v in values if v is not None] for seed, values in by_seed.items()}
        whole = {s: values for s, values in held.items() if values and len(values) == len(by_seed[s])}
        result[key] = {seed: factor * sum(values) / len(values) for seed, values in whole.items()}
    return result


# ------------------------------------------------------------------ tables


def to_tables(config: MatrixConfig, records: Sequence[Record]) -> str:
    """Heading, tables and notes as Markdown."""
    metric = metric_of(config, records)
    found = scores(records, metric)
    labels = list(dict.fromkeys(label_of(record, records) for record in records))
    kinds, at = config.kinds("test"), config.shown_at
    parts = [f"### {config.name or 'matrix'}: {metric} on {config.data.name}"]
    parts.append(f"Rows: missing in training; columns: missing in the test, {100 * at:g} % of the rows.")
    parts.append(_at_table(found, labels, kinds, at))
    for kind in kinds:
        parts.append(f"Missing in the test: {kind}, by the share of the rows that lack it.")
        parts.append(_rate_table(found, labels, kind, config.tested()))
    if len({record["method"] for record in records}) > 1:
        baseline = config.against or records[0]["method"]
        parts.append(f"Difference to {baseline} with the same training pattern, {100 * at:g} % [95 %].")
        parts.append(_difference_table(records, found, kinds, at, baseline))
    parts.append("\n".join(f"- {note}" for note in _notes(config, records, found, labels)))
    return "\n\n".join(parts) + "\n"


def _at_table(
    found: Mapping[tuple[str, str, float], BySeed], labels: Sequence[str], kinds: Sequence[str], at: float
) -> str:
    """Training pattern x test pattern at one rate, with the mean over the test patterns."""
    rows = []
    for label in labels:
        cells = [found[label, kind, at] for kind in kinds]
        rows.append([label, *(_said(cell) for cell in cells), _said(_mean(cells))])
    return markdown(["missing in training", *kinds, "mean"], rows)


def _rate_table(
    found: Mapping[tuple[str, str, float], BySeed], labels: Sequence[str], kind: str, ratios: Sequence[float]
) -> str:
    rows = [[label, *(_said(found[label, kind, ratio]) for ratio in ratios)] for label in labels]
    return markdown(["missing in training", *(f"{100 * ratio:g} %" for ratio in ratios)], rows)


def _difference_table(
    records: Sequence[Record],
    found: Mapping[tuple[str, str, float], BySeed],
    kinds: Sequence[str],
    at: float,
    baseline: str,
) -> str:
    """Other methods against one, model by model and seed by seed."""
    base = {(r["train"]["kind"], r["train"]["ratio"]): label_of(r, records) for r in records if r["method"] == baseline}
    rows: dict[str, list[str]] = {}
    for record in records:
        twin = base.get((record["train"]["kind"], record["train"]["ratio"]))
        label = label_of(record, records)
        if record["method"] == baseline or twin is None or label in rows:
            continue
        rows[label] = [_difference(found[label, kind, at], found[twin, kind, at]) for kind in kinds]
    return markdown(["missing in training", *kinds], [[label, *cells] for label, cells in rows.items()])


def _mean(cells: Sequence[BySeed]) -> BySeed:
    """Mean of several cells by seed, where all have it."""
    seeds = set.intersection(*(set(cell) for cell in cells)) if cells else set()
    return {seed: sum(cell[seed] for cell in cells) / len(cells) for seed in sorted(seeds)}


def _summary(cell: BySeed) -> Summary | None:
    return summarise(list(cell.values())) if cell else None


def _said(cell: BySeed) -> str:
    found = _summary(cell)
    if found is None:
        return _DASH
    return f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}")


def _difference(ours: BySeed, baseline: BySeed) -> str:
    found = paired_difference(ours, baseline)
    if found is None:
        return _DASH
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{interval}"


def _notes(
    config: MatrixConfig,
    records: Sequence[Record],
    found: Mapping[tuple[str, str, float], BySeed],
    labels: Sequence[str],
) -> list[str]:
    """What was measured on what; which training pattern leads where; what it cost."""
    seeds = sorted({record["train"]["seed"] for record in records})
    tables = ", ".join(map(str, config.test_seeds))
    over = f"mean ± sample deviation over training seeds {', '.join(map(str, seeds))}"
    if len(seeds) == 1:
        over = f"one training seed ({seeds[0]}), hence no deviations (--seeds 0 1 2 gives them)"
    samples = records[0]["samples"]
    notes = [
        f"{config.split} split, {samples:,} samples; {over}; each score is averaged over the test tables of seeds "
        f"{tables}, which are nested in the rate and the same for all models"
    ]
    if not config.runs:
        notes.append("the best weights were picked on validation samples that lack what the training samples lack")
    means = {key: summary.mean for key, cell in found.items() if (summary := _summary(cell)) is not None}
    best = []
    for kind in config.kinds("test"):
        here = {
            label: means[label, kind, config.shown_at] for label in labels if (label, kind, config.shown_at) in means
        }
        if len(here) > 1:
            best.append(f"{kind}: {max(here, key=lambda label: here[label])}")
    if best:
        notes.append(f"the highest mean at {100 * config.shown_at:g} %, by what lacks in the test: {'; '.join(best)}")
    passes = sum(record["seconds"]["passes"] for record in records)
    lookups = sum(record["seconds"]["lookups"] for record in records)
    cells = sum(len(record["cells"]["kind"]) for record in records)
    notes.append(f"{cells:,} cells looked up in {lookups:.1f} s; the passes they are looked up in took {passes:.1f} s")
    return notes


# ------------------------------------------------------------------ pictures


def draw(config: MatrixConfig, records: Sequence[Record], folder: Path) -> list[Path]:
    """Heat map at one rate and curves over the rate, as PNG files.

    Returns:
        The files.
    """
    from missing_modal.figures import heat_map, rate_curves, save

    metric = metric_of(config, records)
    found = scores(records, metric)
    labels = list(dict.fromkeys(label_of(record, records) for record in records))
    kinds, at = config.kinds("test"), config.shown_at
    cells = {(label, kind): _summary(found[label, kind, at]) for label in labels for kind in kinds}
    means = {key: cell.mean for key, cell in cells.items() if cell is not None}
    deviations = {key: cell.sd for key, cell in cells.items() if cell is not None}
    name = metric + (" (%)" if metric.partition("/")[2].partition("/")[0] in _SHARES else "")
    title = f"{name} on {config.data.name}, {100 * at:g} % of the test rows"
    panels = _panels(config, records, found)
    of = f"{config.data.name}, mean over training seeds and test tables"
    pictures = {
        "heat_map.png": heat_map(means, deviations, title=title),
        "curves.png": rate_curves(panels, y_label=name, title=of),
    }
    for file, content in pictures.items():
        save(folder / file, content)
    return [folder / file for file in pictures]


def _panels(
    config: MatrixConfig, records: Sequence[Record], found: Mapping[tuple[str, str, float], BySeed]
) -> dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]]:
    """Curves by panel: with several methods a row a training pattern and a line a method, else one row."""
    several = len({record["method"] for record in records}) > 1
    panels: dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]] = {}
    for record in records:
        label = label_of(record, records)
        row = label.removeprefix(f"{record['method']}: ") if several else ""
        for kind in config.kinds("test"):
            cells = {ratio: _summary(found[label, kind, ratio]) for ratio in config.tested()}
            points = [(100 * ratio, cell.mean, cell.sd or 0.0) for ratio, cell in cells.items() if cell is not None]
            if points:
                panels.setdefault((row, kind), {})[record["method"] if several else label] = points
    return panels
