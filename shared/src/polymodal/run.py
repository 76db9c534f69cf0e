"""The run folder: configuration, manifest, loggers, seed. Written at the start, completed at the end or on failure."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from polymodal.cli import Interrupted
from polymodal.config import JobConfig, RunConfig, config_hash, to_dict, to_yaml
from polymodal.errors import UserError
from polymodal.files import check_writable, remove_unfinished, write_json, write_text
from polymodal.run_reader import SCHEMA_VERSION, read_run
from polymodal.seeding import set_threads

__all__ = ["SCHEMA_VERSION", "Run", "find_resume", "read_manifest"]

_SHARED_RUN = "POLYMODAL_SHARED_RUN"
_VERSIONS = ("polymodal", "torch", "torchvision", "transformers", "lightning", "numpy", "sacrebleu", "timm", "wandb")
log = logging.getLogger(__name__)


class Run:
    """One run folder ``<out>/<task>/<name>-<YYYYmmdd-HHMMSS>/`` and what is open in it.

    Use as a context manager: an exception or Ctrl-C is written into the manifest before it goes on.

    Attributes:
        folder: the run folder.
        config: the configuration.
        seed: root seed.
        loggers: Lightning loggers (CSV first).
        manifest: content of manifest.json.
        checkpoint: checkpoint to continue from, or None.
        checkpoint_marks: its task, stage and step, once it was read.
        step_name: what a training step is called on x-axes: ``step`` or ``round``.
        is_writer: false in the further processes of a data-parallel run, which share the folder and write nothing.
    """

    def __init__(self, folder: Path, config: JobConfig, manifest: dict[str, Any], checkpoint: Path | None) -> None:
        self.folder, self.config, self.manifest, self.checkpoint = folder, config, manifest, checkpoint
        self.checkpoint_marks: dict[str, Any] | None = None
        self.seed = config.seed
        self._started = time.monotonic()
        self.loggers: list[Any] = []
        self.sync_command: str | None = None
        self.is_writer = _rank() == 0
        self.step_name = "step"

    @classmethod
    def start(
        cls,
        task: str,
        config: JobConfig,
        *,
        name: str = "run",
        method: str = "",
        fidelity: str = "",
        data: dict[str, Any] | None = None,
        job_type: str = "train",
        axes: Mapping[str, str] | None = None,
        step_name: str = "step",
    ) -> Run:
        """Make (or, with ``config.resume``, reopen) the run folder, write manifest and config, open the loggers.

        Args:
            task: package's name, the folder under ``config.out``.
            config: complete configuration.
            name: default of ``config.name``.
            method: registered name of the method, for reports.
            fidelity: the method's fidelity.
            data: at least ``name`` and ``fingerprint`` of the data.
            job_type: ``train`` or ``eval``.
            axes: metric pattern -> name of its x-axis, where it is another than in ``logs.X_AXES``.
            step_name: what a training step is called on x-axes, e.g. ``round`` where each is a round of a federation.

        Raises:
            UserError: folder not writable, nothing to resume, or a run of another task or other data.
        """
        threads = set_threads(config.threads)
        if _rank() > 0:
            return cls._join(config, step_name)
        checkpoint = None
        if isinstance(config, RunConfig) and config.resume:
            folder, checkpoint = find_resume(config.resume, task, config)
            manifest = read_manifest(folder)
            if manifest["task"] != task:
                raise UserError(
                    f"--resume {folder}: a run of task {manifest['task']!r}, not {task!r}; use its own command"
                )
            _refuse_other_data(manifest, data, folder)
            remove_unfinished(folder)
            manifest["resumed"].append(_now())
            manifest.update(status="running", ended=None, error=None, threads=threads)
        else:
            folder = _new_folder(config.out / task, config.name or name)
            manifest = {
                "schema": "polymodal.run",
                "schema_version": SCHEMA_VERSION,
                "task": task,
                "name": config.name or name,
                "run_id": secrets.token_hex(4),
                "method": method,
                "fidelity": fidelity,
                "job_type": job_type,
                "status": "running",
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "started": _now(),
                "ended": None,
                "wall_s": 0.0,
                "seed": config.seed,
                "threads": threads,
                "device": "cpu",
                "precision": config.trainer.precision if isinstance(config, RunConfig) else "32-true",
                "versions": _versions(),
                "git": _git(),
                "config_hash": config_hash(config),
                "data": data or {},
                "metric_signatures": {},
                "metrics": {},
                "peak_mib": None,
                "error": None,
                "resumed": [],
            }
            write_text(folder / "config.yaml", to_yaml(config))
        run = cls(folder, config, manifest, checkpoint)
        run.step_name = step_name
        run._write()
        run._open_loggers(axes or {})
        # Lightning starts the further processes of a data-parallel run later, with this environment.
        os.environ[_SHARED_RUN] = json.dumps([str(folder), str(checkpoint) if checkpoint else None])
        return run

    @classmethod
    def _join(cls, config: JobConfig, step_name: str) -> Run:
        """The run of rank 0, for the other ranks."""
        shared = os.environ.get(_SHARED_RUN)
        if shared is None:
            raise UserError(
                "this process has a rank above 0 but no run of rank 0 to join; start one process and let "
                "--trainer.devices N start the others"
            )
        folder, checkpoint = json.loads(shared)
        run = cls(Path(folder), config, read_manifest(Path(folder)), Path(checkpoint) if checkpoint else None)
        run.step_name = step_name
        return run

    def _open_loggers(self, axes: Mapping[str, str]) -> None:
        from polymodal.logs import make_loggers

        settings = {
            "run_id": self.manifest["run_id"],
            "name": self.folder.name,
            "project": self.config.log.project or f"polymodal-{self.manifest['task']}",
            "entity": self.config.log.entity,
            "group": self.manifest["config_hash"],
            "tags": self.config.log.tags,
            "job_type": self.manifest["job_type"],
        }
        full = {**to_dict(self.config), "method": self.manifest["method"], "data_info": self.manifest["data"]}
        self.loggers = make_loggers(self.folder, self.config.log, full, settings, axes, self.step_name)

    def note(self, **values: Any) -> None:
        """Add facts to the manifest, e.g. ``device``, ``metric_signatures``."""
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(self.manifest.get(key), dict):
                self.manifest[key].update(value)
            else:
                self.manifest[key] = value
        self._write()

    def log(self, metrics: dict[str, float], step: int, epoch: int | None = None) -> None:
        """Write metrics to every logger under their full names."""
        values = dict(metrics) if epoch is None else {**metrics, "epoch": epoch}
        for logger in self.loggers:
            logger.log_metrics(values, step)

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Write a table of samples to ``samples/<key>.jsonl`` and to W&B."""
        if not self.is_writer:
            return
        path = self.folder / "samples" / f"{key.replace('/', '-')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        write_text(path, "\n".join(lines) + "\n")
        for logger in self.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(key, columns, rows)

    def finish(self, metrics: dict[str, float] | None = None, status: str = "finished") -> None:
        """Complete the manifest, close the loggers, remember the W&B sync command."""
        self.manifest["metrics"].update({k: float(v) for k, v in (metrics or {}).items()})
        self._close(status, None)

    def _close(self, status: str, error: str | None) -> None:
        if self.manifest["status"] != "running":
            return
        wall = self.manifest["wall_s"] + time.monotonic() - self._started
        self.manifest.update(
            status=status, error=error, ended=_now(), wall_s=round(wall, 3), peak_mib=round(peak_mib(), 1)
        )
        try:
            self._write()
        except UserError as problem:
            if error is None:
                raise
            log.warning("%s", problem)  # the error that ended the run is the one to report
        for logger in self.loggers:
            if hasattr(logger, "close"):
                self.sync_command = logger.close(0 if status == "finished" else 1) or self.sync_command
            else:
                logger.finalize("success" if status == "finished" else status)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("finished", None)
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            self._close("interrupted", str(error) or "interrupted")
            if isinstance(error, KeyboardInterrupt) and isinstance(self.config, RunConfig):
                raise Interrupted(f"interrupted; continue with --resume {self.folder}") from error
        else:
            self._close("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _write(self) -> None:
        if self.is_writer:
            write_json(self.folder / "manifest.json", self.manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a run folder, migrated to this version; errors as ``run_reader.read_run``."""
    return dict(read_run(folder).manifest)


def find_resume(resume: str, task: str, config: RunConfig) -> tuple[Path, Path | None]:
    """Folder and checkpoint that ``--resume`` means: a run folder, a checkpoint file, or ``auto``.

    ``auto`` takes the newest run of the same configuration and seed that did not finish.

    Raises:
        UserError: nothing there.
    """
    if resume == "auto":
        wanted = config_hash(config)
        for folder in sorted((config.out / task).glob("*/"), key=_started_at, reverse=True):
            try:
                manifest = read_manifest(folder)
            except UserError:
                continue
            same = manifest.get("config_hash") == wanted and manifest.get("seed") == config.seed
            if same and manifest["status"] != "finished":
                return folder, newest_checkpoint(folder)
        raise UserError(f"--resume auto: no unfinished run of this configuration and seed under {config.out / task}")
    path = Path(resume)
    if path.is_file():
        folder = path.parent.parent
        read_manifest(folder)
        return folder, path
    if not path.is_dir():
        raise UserError(f"--resume {resume}: no such run folder or checkpoint; runs are under {config.out / task}")
    read_manifest(path)
    return path, newest_checkpoint(path)


def _started_at(folder: Path) -> tuple[str, int]:
    """Time in a run folder's name, and the number that runs of the same second have."""
    found = re.search(r"(\d{8}-\d{6})(?:-(\d+))?$", folder.name)
    return (found[1], int(found[2] or 0)) if found else ("", 0)


def newest_checkpoint(folder: Path) -> Path | None:
    """Path of the newest usable checkpoint name in a run folder (``last`` then ``previous``), or None."""
    for name in ("last", "previous"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        if path.is_file():
            return path
    return None


def peak_mib() -> float:
    """Peak resident memory of this process in MiB, or of the GPU where one was used."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    try:
        import resource
    except ImportError:  # Windows has no resource module
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def _new_folder(parent: Path, name: str) -> Path:
    check_writable(parent)
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    for attempt in range(100):
        stamp = dt.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = parent / (f"{clean}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        (folder / "checkpoints").mkdir()
        return folder
    raise UserError(f"cannot make a new run folder under {parent}: 100 runs started in this second")


def _refuse_other_data(manifest: dict[str, Any], data: dict[str, Any] | None, folder: Path) -> None:
    before, now = manifest["data"].get("fingerprint"), (data or {}).get("fingerprint")
    if before and now and before != now:
        raise UserError(f"--resume {folder}: the data changed since that run started; start a new run without --resume")


def _rank() -> int:
    """Rank of this process, from what launchers set before torch is up."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the folder the command runs in; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
