"""What the shared training layer costs over a bare PyTorch loop on the same model, optimizer and data.

One ``trainer.fit`` with everything on (CSV rows, checkpoint at each epoch's end, guard, progress off) runs epoch after
epoch; between two epochs a callback runs the bare loop for one epoch over the same number of batches. Ours is all the
time from one call of that callback to the next, so the shared layer's and Lightning's work between epochs counts too.

    python benchmarks/shared.py                 # all rows, about six minutes
    python benchmarks/shared.py small --runs 20
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: make the folder above importable in place of this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, Samples, overhead, parse, run_sections

WIDTH, CLASSES, DEPTH = 128, 10, 4


def build(batch: int, steps: int) -> tuple[Any, Any]:
    """A small classifier as a TaskModule and its data: ``steps`` ready batches of ``batch`` samples."""
    import lightning as L
    import torch
    from polymodal.task import TaskModule
    from torch import nn
    from torch.utils.data import DataLoader

    class Classifier(TaskModule):
        def __init__(self) -> None:
            super().__init__(seed=0)
            layers: list[nn.Module] = []
            for _ in range(DEPTH):
                layers += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Dropout(0.1)]
            self.net = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))

        def loss(self, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1]), {}

        def evaluate(self, batch: Any) -> dict[str, Any]:
            return {}

        def metrics(self, records: dict[str, Any]) -> dict[str, float]:
            return {}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    class Data(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            draws = torch.Generator().manual_seed(0)
            self.batches = [
                (torch.randn(batch, WIDTH, generator=draws), torch.randint(CLASSES, (batch,), generator=draws))
                for _ in range(steps)
            ]

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.batches, batch_size=None, shuffle=True)  # type: ignore[arg-type]

    torch.manual_seed(0)
    return Classifier(), Data()


def bare_loop(net: Any, loader: Any, device: str) -> Callable[[], None]:
    """One epoch as anybody would write it: forward, backward, clipping, step. It logs and saves nothing."""
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def epoch() -> None:
        for inputs, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(inputs.to(device)), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    return epoch


def measure(
    batch: int,
    steps: int,
    epochs: int,
    options: Options,
    *,
    wandb: Literal["off", "offline"] = "off",
    plain: bool = False,
) -> tuple[Samples, Samples]:
    """Interleaved epochs: (the shared layer, or Lightning alone with ``plain``), and the bare loop."""
    import lightning as L
    from polymodal.config import LoggingConfig, RunConfig, TrainerConfig
    from polymodal.run import Run
    from polymodal.trainer import fit, quiet_lightning

    module, data = build(batch, steps)
    twin, _ = build(batch, 1)
    epoch = bare_loop(twin.net.to(options.device), data.train_dataloader(), options.device)
    ours, baseline = Samples(), Samples()

    class Turns(L.Callback):
        began: tuple[float, float] | None = None

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if self.began is not None:  # the first epoch, with all set-up, is the warm-up
                options.sync()
                ours.wall.append(time.perf_counter() - self.began[0])
                ours.cpu.append(time.process_time() - self.began[1])
            else:
                epoch()
            start = time.perf_counter(), time.process_time()
            epoch()
            options.sync()
            baseline.wall.append(time.perf_counter() - start[0])
            baseline.cpu.append(time.process_time() - start[1])
            self.began = time.perf_counter(), time.process_time()

    accelerator = "cpu" if options.device == "cpu" else "gpu"
    settings = TrainerConfig(max_epochs=epochs + 1, accelerator=accelerator, progress="none")
    with tempfile.TemporaryDirectory() as folder:
        if plain:
            trainer = L.Trainer(
                max_epochs=epochs + 1,
                accelerator=accelerator,
                devices=1,
                gradient_clip_val=1.0,
                callbacks=[Turns()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            with quiet_lightning(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.fit(module, datamodule=data)
        else:
            config = RunConfig(
                out=Path(folder), threads=options.threads, trainer=settings, log=LoggingConfig(wandb=wandb)
            )
            with Run.start("benchmark", config) as run, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
                fit(module, data, settings, run, [Turns()])
    baseline.wall.pop(), baseline.cpu.pop()  # the bare epoch after the last of ours has no partner
    return ours, baseline


def at_length(
    target_ms: float, batch: int, steps: int, epochs: int, options: Options, *, tries: int, **keywords: Any
) -> tuple[int, Samples, Samples]:
    """Measure with batches for which a step of the bare loop takes ``target_ms``, within 5 %.

    On one CPU thread that is CPU time, else time on the wall.
    The length is that of the measured epochs themselves, whatever the ratio is: a loop timed beforehand, on its own,
    runs while Lightning lets Adam search for NVIDIA's library at each step (``build_trainer`` stops that), and the
    same work takes longer or shorter as the machine's other cores are busy or not.

    Args:
        target_ms: length of a step.
        batch: samples a batch to begin with.
        steps: batches an epoch.
        epochs: measured epochs.
        options: of the command.
        tries: measurements at most; the last one stands, at the length that its row shows.
        keywords: of ``measure``.

    Returns:
        Samples a batch, and what ``measure`` returns.
    """
    while True:
        ours, baseline = measure(batch, steps, epochs, options, **keywords)
        own = options.device == "cpu" and options.threads == 1  # CPU time is that of the step, whoever else computes
        taken = 1000 * statistics.median(baseline.cpu if own else baseline.wall) / steps
        tries -= 1
        if abs(taken / target_ms - 1) <= 0.05 or tries < 1:
            return batch, ours, baseline
        batch = max(8, round(batch * min(8.0, target_ms / taken)))


def section(target_ms: float, steps: int, at_most: float) -> Callable[[Options], list[Row]]:
    """Rows of one step length."""

    def run(options: Options) -> list[Row]:
        count, epochs = (4, 2) if options.quick else (steps, options.times(20))
        batch = 16 if options.quick else at_length(target_ms, 64, count, 2, options, tries=8)[0]
        rows = []
        for what, keywords, limit in (
            ("metrics.csv and checkpoints, W&B off", {}, at_most),
            ("metrics.csv and checkpoints, W&B offline", {"wandb": "offline"}, at_most),
            ("Lightning's trainer alone, nothing logged or saved", {"plain": True}, None),
        ):
            tries = 1 if options.quick else 4
            batch, ours, baseline = at_length(target_ms, batch, count, epochs, options, tries=tries, **keywords)
            step, cpu = (1000 * statistics.median(x) / count for x in (baseline.wall, baseline.cpu))
            added = 1000 * statistics.median(a - b for a, b in zip(ours.wall, baseline.wall, strict=True)) / count
            label = f"{what}: epoch of {count} steps of {step:.1f} ms, {added:+.2f} ms a step"
            detail = {"batch": batch, "steps": count, "step_ms": step, "step_cpu_ms": cpu, "added_ms_per_step": added}
            rows.append(overhead(label, ours, baseline, at_most=limit, **detail))
        return rows

    return run


SECTIONS = {
    "small": ("Overhead of the shared layer at 5 ms a step", section(5.0, 200, 1.15)),
    "large": ("Overhead of the shared layer at 100 ms a step", section(100.0, 20, 1.02)),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("shared", options, SECTIONS)


if __name__ == "__main__":
    main()
