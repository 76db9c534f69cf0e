"""Run folders as the training commands leave them, made without training."""

import json
from pathlib import Path

import yaml

SIGNATURE = "bleu|lang:de|tok:none|v:1"


def manifest(**changes):
    base = {
        "schema": "polymodal.run",
        "schema_version": 1,
        "task": "slt",
        "name": "synthetic-ssaw",
        "run_id": "0a1b2c3d",
        "method": "ssaw",
        "fidelity": "reconstruction",
        "job_type": "train",
        "status": "finished",
        "command": ["slt-train"],
        "started": "2025-01-01T10:00:00+00:00",
        "ended": "2025-01-01T10:01:00+00:00",
        "wall_s": 61.5,
        "seed": 0,
        "threads": 1,
        "device": "cpu",
        "precision": "32-true",
        "versions": {"python": "3.11.7", "torch": "2.9.0"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "config_hash": "aaaa",
        "data": {"name": "synthetic", "fingerprint": "f00d" * 8},
        "metric_signatures": {"test/bleu4": SIGNATURE},
        "metrics": {"test/bleu4": 90.0},
        "peak_mib": 512.0,
        "error": None,
        "resumed": [],
    }
    return {**base, **changes}


def write_run(folder: Path, *, config=None, curves=None, samples=None, **changes) -> Path:
    """A run folder; ``curves`` maps a metric name to (step, epoch, value) rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest(**changes)))
    default = {"seed": changes.get("seed", 0), "out": str(folder), "fusion": {"name": changes.get("method", "ssaw")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(default if config is None else config))
    rows = [f"{step},{epoch},{name},{value!r}" for name, line in (curves or {}).items() for step, epoch, value in line]
    (folder / "metrics.csv").write_text("\n".join(["step,epoch,name,value", *rows]) + "\n")
    if samples:
        (folder / "samples").mkdir(exist_ok=True)
        for name, lines in samples.items():
            (folder / "samples" / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder
