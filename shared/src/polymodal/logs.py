"""Loggers: metrics.csv always, W&B (offline without an account, never a prompt), TensorBoard on request.

Metric names are the same everywhere: ``train/loss``, ``val/bleu4``, ``test/miou_all``, ``perf/step_ms``. Their x-axis
is defined once, in ``X_AXES``.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers.logger import Logger

from polymodal.errors import UserError
from polymodal.files import append_text, write_text
from polymodal.wandb_mode import wandb_mode

if TYPE_CHECKING:
    from polymodal.config import LoggingConfig

__all__ = ["X_AXES", "CsvLog", "WandbLog", "make_loggers", "wandb_mode"]

log = logging.getLogger(__name__)

X_AXES = {
    "train/*": "step",
    "val/*": "step",
    "test/*": "step",
    "perf/*": "step",
    "comm/*": "round",
    "client/*": "round",
    "landscape/*": "round",
    "privacy/*": "round",
}
"""Metric name pattern -> name of its x-axis; ``step`` is replaced by what a run calls its steps."""

HEADER = ["step", "epoch", "name", "value"]


class CsvLog(Logger):
    """``metrics.csv``: one row a value (step, epoch, name, value), appended and flushed, so a kill loses nothing.

    Args:
        path: the file; an existing one is continued.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if not path.exists():
            write_text(path, ",".join(HEADER) + "\n")

    @property
    def name(self) -> str:
        """Name for Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """Version for Lightning."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row a metric; ``epoch`` is a column, not a metric."""
        values = dict(metrics)
        epoch = values.pop("epoch", "")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for name, value in values.items():
            writer.writerow([step, "" if epoch == "" else int(epoch), name, repr(float(value))])
        append_text(self.path, text.getvalue())

    def rewind(self, step: int, tested: int = 0, keep_tests: bool = False) -> None:
        """Before a resume, drop what will be logged again, and a half-written last line.

        Args:
            step: rows after this step go.
            tested: step at which the present stage began: later ``test/``, ``client/`` and ``landscape/`` rows are of
                this stage and go too, with the values of their own axis (names without a slash, such as ``task``).
            keep_tests: ``test/`` rows were written by validations, so that those up to ``step`` stay.
        """
        kept = [HEADER]
        for row in _rows(self.path):
            at, name = int(row[0]), row[2]
            at_the_end = "/" not in name or name.startswith(("client/", "landscape/"))
            at_the_end = at_the_end or (name.startswith("test/") and not keep_tests)
            if at <= (min(step, tested) if at_the_end else step):
                kept.append(row)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(kept)
        write_text(self.path, text.getvalue())


def _rows(path: Path) -> list[list[str]]:
    """Complete rows of a metrics file; a half-written last line is left out."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [r for r in csv.reader(io.StringIO(complete)) if len(r) == len(HEADER) and r != HEADER]


class WandbLog(Logger):
    """A real W&B run. The whole configuration is sent at init, x-axes are defined, offline needs no account.

    Args:
        folder: run folder; files go to ``folder/wandb``.
        config: complete configuration as plain data.
        mode: ``online`` or ``offline``.
        settings: run_id, name, project, entity, group, tags, job_type of the run.
        axes: metric pattern -> x-axis (default ``X_AXES``).
        step_name: what steps are called.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        mode: Literal["online", "offline"],
        settings: Mapping[str, Any],
        axes: Mapping[str, str] | None = None,
        step_name: str = "step",
    ) -> None:
        super().__init__()
        import wandb

        self.step_name = step_name

        os.environ.setdefault("WANDB_SILENT", "true")
        arguments = dict(
            dir=str(folder),
            id=settings["run_id"],
            name=settings["name"],
            project=settings["project"],
            entity=settings.get("entity"),
            group=settings.get("group"),
            tags=list(settings.get("tags", ())),
            job_type=settings.get("job_type", "train"),
            config=config,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, disable_git=True, quiet=True),
        )
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            if mode == "offline":
                raise
            log.warning("W&B cannot be reached (%s); this run is logged offline", " ".join(str(error).split()))
            mode = "offline"
            self.run = wandb.init(mode=mode, **{**arguments, "resume": None})
        self.mode = mode
        for axis in sorted(set((axes or X_AXES).values())):
            self.run.define_metric(axis, hidden=True)
        for pattern, axis in (axes or X_AXES).items():
            self.run.define_metric(pattern, step_metric=axis)

    @property
    def name(self) -> str:
        """Name for Lightning."""
        return "wandb"

    @property
    def version(self) -> str:
        """Run id."""
        return str(self.run.id)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the configuration was complete at init."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values; ``step`` becomes the x-axis value unless the metrics bring their own (round, task)."""
        self.run.log({**metrics, **({} if step is None else {self.step_name: step})})

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of samples."""
        import wandb

        self.run.log({key: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

    def close(self, exit_code: int = 0) -> str | None:
        """Finish the run; returns the command that uploads an offline run."""
        folder = Path(self.run.dir).parent
        self.run.finish(exit_code=exit_code)
        return f"wandb sync {folder}" if self.mode == "offline" else None


def make_loggers(
    folder: Path,
    logging_config: LoggingConfig,
    config: dict[str, Any],
    settings: Mapping[str, Any],
    axes: Mapping[str, str] | None = None,
    step_name: str = "step",
) -> list[Logger]:
    """CSV always, then what the configuration asks for; ``axes`` replaces rows of ``X_AXES``, ``step_name`` its steps.

    Raises:
        UserError: TensorBoard asked for but not installed.
    """
    loggers: list[Logger] = [CsvLog(folder / "metrics.csv")]
    mode = wandb_mode(logging_config)
    if mode != "off":
        default = {pattern: step_name if axis == "step" else axis for pattern, axis in X_AXES.items()}
        loggers.append(WandbLog(folder, config, mode, settings, {**default, **(axes or {})}, step_name))
    if logging_config.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        try:
            loggers.append(TensorBoardLogger(save_dir=folder, name="tensorboard", version=""))
        except ModuleNotFoundError as error:
            raise UserError("TensorBoard is not installed: pip install 'polymodal[tensorboard]'") from error
    return loggers
