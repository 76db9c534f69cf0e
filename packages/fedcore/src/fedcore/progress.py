"""Progress by round: a bar on a terminal, a line every second or more elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import lightning as L

if TYPE_CHECKING:
    from polymodal.run import Run

__all__ = ["NoteEngine", "RoundProgress"]

PAUSE = 1.0
"""seconds between lines"""


class NoteEngine(L.Callback):
    """Writes the engine that computes the clients into the manifest, as soon as it is chosen.

    Args:
        run: whose manifest.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """After a round of another engine than the one noted."""
        engine = pl_module.simulation.engine
        if self.run.manifest.get("engine") != engine:
            self.run.note(engine=engine)


class RoundProgress(L.Callback):
    """Round, loss, metrics of the last evaluation, rate, time left.

    Args:
        rounds: of the whole run.
        kind: ``rich`` (a bar), ``plain`` (lines), ``auto`` (a bar on a terminal) or ``none``.
    """

    def __init__(self, rounds: int, kind: str = "auto") -> None:
        self.rounds = rounds
        self.kind = ("rich" if sys.stderr.isatty() else "plain") if kind == "auto" else kind
        self._bar: Any = None
        self._metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._first, self._began, self._shown = trainer.global_step, time.monotonic(), 0.0
        if self.kind == "rich":
            self._bar = _bar(self.rounds, self._first)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep what was measured; some rounds are not evaluated."""
        self._metrics = dict(pl_module.last_metrics) or self._metrics

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Show a round."""
        done, now = trainer.global_step, time.monotonic()
        loss = pl_module.train_logs.get("loss")
        parts = [] if loss is None else [f"loss {float(loss):.3f}"]
        spent = pl_module.train_logs.get("privacy/epsilon")
        parts += [] if spent is None else [f"epsilon {float(spent):.2f}"]
        parts += [f"{name} {value:.3f}" for name, value in self._metrics.items() if name.endswith("accuracy")]
        if self._bar is not None:
            self._bar.update(0, completed=done, text="  ".join(parts))
        elif self.kind == "plain" and (now - self._shown >= PAUSE or done == self.rounds or trainer.should_stop):
            self._shown = now
            spent, rate = now - self._began, (done - self._first) / max(now - self._began, 1e-9)
            left = (self.rounds - done) / max(rate, 1e-9)
            parts = [f"round {done}/{self.rounds}", *parts, f"{rate:.1f} rounds/s", f"{spent:.0f} s, {left:.0f} s left"]
            sys.stderr.write(" · ".join(parts) + "\n")
            sys.stderr.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave the terminal as it was."""
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(rounds: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("round"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("rounds", total=rounds, completed=done, text="")
    bar.start()
    return bar
