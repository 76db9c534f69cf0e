"""The experiment on the built-in model: three seeds through ``vlm-bench``, one table, the differences that are claimed.

    python packages/vlm_accel/experiments/built_in.py              # from the repository's root; resumes by row
    python packages/vlm_accel/experiments/built_in.py --table      # only the table of what is there

Rows are in ``built_in.yaml``, results in ``results/built_in``: one JSON a row and seed, ``table.md``.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from polymodal.files import write_text
from polymodal.stats import paired_difference
from polymodal.tables import markdown

HERE = Path(__file__).parent
CONFIG = HERE / "built_in.yaml"
RESULTS = HERE / "results" / "built_in"
SEEDS = (0, 1, 2)
DIGITS = "digits %"
COLUMNS = {
    DIGITS: ("test/accuracy_left", "test/accuracy_right", "test/accuracy_both"),
    "one digit %": ("test/accuracy_left", "test/accuracy_right"),
    "both %": ("test/accuracy_both",),
    "sentence %": ("test/accuracy_describe",),
    "all %": ("test/accuracy",),
}
Values = Mapping[int, float]


def rows() -> list[str]:
    """Labels in table order, the unmodified model first."""
    return ["full", *yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["cases"]]


def read(folder: Path = RESULTS) -> dict[str, dict[int, dict]]:
    """Label -> seed -> record, of what is there."""
    found: dict[str, dict[int, dict]] = {}
    for label in rows():
        for seed in SEEDS:
            path = folder / f"{label}-seed{seed}.json"
            if path.is_file():
                found.setdefault(label, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def values(records: Mapping[int, Mapping], *names: str, factor: float = 100.0) -> dict[int, float]:
    """Seed -> mean of some metrics."""
    return {
        seed: factor * statistics.fmean(record["metrics"][name] for name in names)
        for seed, record in records.items()
        if record["status"] == "finished"
    }


def said(by_seed: Values, digits: int = 1) -> str:
    """Mean and deviation over seeds."""
    if not by_seed:
        return "–"
    spread = f" ± {statistics.stdev(by_seed.values()):.{digits}f}" if len(by_seed) > 1 else ""
    return f"{statistics.fmean(by_seed.values()):.{digits}f}{spread}"


def table(found: Mapping[str, Mapping[int, Mapping]]) -> str:
    """All rows as Markdown."""
    head = ["row", "seeds", *COLUMNS, "KL", "MACs %", "KV entries %"]
    lines = []
    for label, records in found.items():
        cells = [said(values(records, *names)) for names in COLUMNS.values()]
        cells.append(said(values(records, "fidelity/kl", factor=1.0), 3))
        full = next(iter(found["full"].values()))["metrics"]
        for name in ("macs/total", "kv/entries"):
            by_seed = values(records, name)
            cells.append(f"{statistics.fmean(by_seed.values()) / full[name]:.0f}" if by_seed else "–")
        lines.append([label, str(len(records)), *cells])
    return markdown(head, lines)


def claims(found: Mapping[str, Mapping[int, Mapping]]) -> list[tuple[str, str, str, str]]:
    """Differences that are claimed: (what, row, minus row, metric)."""
    kinds = {
        "score against random, 15 % at 1, 2, 3": ("llm15_123_drop", "llm15_123_random", DIGITS),
        "score against random, 15 % at 2, 3, 4": ("llm15_234_drop", "llm15_234_random", DIGITS),
        "score against random, 35 % at 1, 2, 3": ("llm35_123_drop", "llm35_123_random", DIGITS),
        "the same for sentences, 15 % at 1, 2, 3": ("llm15_123_drop", "llm15_123_random", "sentence %"),
        "merging against dropping, 15 % at 1, 2, 3": ("llm15_123_lightvlm", "llm15_123_drop", DIGITS),
        "merging against dropping, 15 % at 2, 3, 4": ("llm15_234_lightvlm", "llm15_234_drop", DIGITS),
        "later against earlier layers, 15 %": ("llm15_234_lightvlm", "llm15_123_lightvlm", DIGITS),
        "encoder, score against random, 50 %": ("vision50_drop", "vision50_random", "all %"),
        "encoder, score against random, 30 %": ("vision30_drop", "vision30_random", "all %"),
        "encoder, recycling against dropping, 30 %": ("vision30_recycle", "vision30_drop", "all %"),
        "cache of 36, window against random": ("kv36_window_kv", "kv36_random_kv", "both %"),
        "cache of 24, window against random": ("kv24_window_kv", "kv24_random_kv", "both %"),
        "cache of 24, window against random, sentences": ("kv24_window_kv", "kv24_random_kv", "sentence %"),
        "cache of 24, window against first and last": ("kv24_window_kv", "kv24_streaming_llm", "both %"),
    }
    return [(what, *parts) for what, parts in kinds.items() if parts[0] in found and parts[1] in found]


def differences(found: Mapping[str, Mapping[int, Mapping]]) -> str:
    """Paired differences of the claims as Markdown."""
    lines = []
    for what, ours, other, column in claims(found):
        names = COLUMNS[column]
        a, b = values(found[ours], *names), values(found[other], *names)
        difference = paired_difference(a, b)
        assert difference is not None
        each = ", ".join(f"{a[seed] - b[seed]:+.1f}" for seed in sorted(a.keys() & b.keys()))
        interval = "" if difference.low is None else f" [{difference.low:.1f}, {difference.high:.1f}]"
        lines.append([what, column, f"{difference.mean:+.1f}{interval}", each])
    return markdown(["difference", "of", "mean, points [95 %]", "by seed"], lines)


def report() -> str:
    """The whole page."""
    found = read()
    return f"### built_in\n\n{table(found)}\n\n{differences(found)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    program = str(Path(sys.executable).parent / "vlm-bench")
    for seed in [] if given.table else given.seeds:
        options = ["--config", str(CONFIG), "--seed", str(seed), "--log.wandb", "off"]
        subprocess.run([program, *options], check=True, stdout=subprocess.DEVNULL)
    text = report()
    write_text(RESULTS / "table.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
