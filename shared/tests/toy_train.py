"""A small task on the shared trainer, run as a command by the tests: a noisy two-layer classifier with dropout."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field

from polymodal.cli import command
from polymodal.config import RunConfig, TrainerConfig


@dataclass
class ToyConfig(RunConfig):
    """Toy run."""

    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            max_epochs=3, log_every_steps=1, checkpoint_every_steps=2, progress="none"
        )
    )
    workers: int = 0
    """loader workers"""
    samples: int = 48
    """training samples"""
    kill_at: int = -1
    """SIGKILL oneself after this optimizer step"""
    kill_in_write: int = -1
    """SIGKILL oneself in the middle of this checkpoint write"""
    interrupt_at: int = -1
    """send oneself SIGINT after this optimizer step"""
    bad_at: int = -1
    """make the loss NaN at this step"""
    manual: bool = False
    """manual optimisation with an optimizer of our own"""


def build(config: ToyConfig):
    import lightning as L
    import torch
    from polymodal.data import LengthBucketBatchSampler
    from polymodal.task import TaskModule
    from torch.utils.data import DataLoader, TensorDataset

    class RoundOptimizer(torch.optim.Optimizer):
        """Plain gradient descent, standing for optimizers that no library knows."""

        def step(self, closure=None):
            loss = closure() if closure is not None else None
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.sub_(group["lr"] * p.grad)
            return loss

    class Indexed(TensorDataset):
        def __getitem__(self, key):
            index, _ = key if isinstance(key, tuple) else (key, 0)
            return (torch.tensor(index), *super().__getitem__(index))

    class Data(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(5)
            x = torch.randn(config.samples + 16, 6, generator=g)
            y = (x[:, 0] * x[:, 1] > 0).long()
            self.train, self.val = Indexed(x[: config.samples], y[: config.samples]), Indexed(x[-16:], y[-16:])

        def setup(self, stage):
            lengths = [1 + i % 5 for i in range(config.samples)]
            self.train_sampler = LengthBucketBatchSampler(lengths, batch_size=8, seed=config.seed, shuffle=True)

        def train_dataloader(self):
            return DataLoader(self.train, batch_sampler=self.train_sampler, num_workers=config.workers)

        def val_dataloader(self):
            return DataLoader(self.val, batch_size=8)

        test_dataloader = val_dataloader

    class Toy(TaskModule):
        def __init__(self):
            super().__init__(config.seed)
            torch.manual_seed(config.seed)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(6, 16),
                torch.nn.BatchNorm1d(16),
                torch.nn.ReLU(),
                torch.nn.Dropout(0.3),
                torch.nn.Linear(16, 2),
            )
            self.automatic_optimization = not config.manual

        def loss(self, batch, generator):
            noise = 0.1 * torch.randn(batch[1].shape, generator=generator)
            value = torch.nn.functional.cross_entropy(self.net(batch[1] + noise), batch[2])
            if self.global_step == config.bad_at:
                value = value * float("nan")
            return value, {}

        def training_step(self, batch, batch_idx):
            value = super().training_step(batch, batch_idx)
            if config.manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(value)
                optimizer.step()
            return value

        def evaluate(self, batch):
            right = (self.net(batch[1]).argmax(-1) == batch[2]).float()
            return {int(i): float(r) for i, r in zip(batch[0], right, strict=True)}

        def metrics(self, records):
            return {"accuracy": sum(records.values()) / len(records)}

        def configure_optimizers(self):
            if config.manual:
                return RoundOptimizer(self.parameters(), {"lr": 0.05})
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18),
                    "interval": "step",
                },
            }

    return Toy(), Data()


def main(config: ToyConfig) -> None:
    import lightning as L
    from polymodal.run import Run
    from polymodal.trainer import fit_and_test

    module, data = build(config)

    class Accident(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == config.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if trainer.global_step == config.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)

    if config.kill_in_write >= 0:
        import torch

        original, count = torch.save, [0]

        def save(value, handle, *rest, **options):
            if count[0] == config.kill_in_write:
                handle.write(b"PK half a checkpoint")
                handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return original(value, handle, *rest, **options)

        torch.save = save
    with Run.start(
        "toy", config, name="toy", method="mlp", data={"name": "toy", "fingerprint": str(config.samples)}
    ) as run:
        metrics = fit_and_test(module, data, config.trainer, run, [Accident()], monitor="val/accuracy")
        run.finish(metrics)
        sys.stdout.write(f"{run.folder}\n")


if __name__ == "__main__":
    sys.exit(command(main, ToyConfig, prog="toy-train", example="toy-train --samples 16"))
