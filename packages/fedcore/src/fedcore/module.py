"""A federation on the shared trainer: a round is an epoch of one step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from polymodal.config import TrainerConfig
from polymodal.errors import UserError
from polymodal.task import TaskModule
from torch import Tensor
from torch.utils.data import DataLoader

from fedcore.batches import ClientData
from fedcore.private_run import spent
from fedcore.simulation import Simulation
from fedcore.state_shards import StateShards

__all__ = ["FederatedModule", "RoundOptimizer", "RoundsData", "rounds_trainer"]

log = logging.getLogger(__name__)
KEY = "fedcore"
"""entry of a checkpoint"""
SCHEMA_VERSION = 1
NOT_LOGGED = ("round", "lr", "seconds")
"""of the row of a round: logged otherwise"""


class RoundOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is a round of the simulation.

    Args:
        simulation: what is stepped.

    Attributes:
        row: what the last round measured.
    """

    def __init__(self, simulation: Simulation) -> None:
        parameters = [p for p in simulation.learner.task.module.parameters() if p.requires_grad]
        super().__init__(parameters, {"lr": simulation.algorithm.lr})
        self.simulation = simulation
        self.row: dict[str, Any] = {}

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]  # as Lightning calls it
        """Run a round; ``closure`` is called first, as by torch's own optimizers."""
        result = None if closure is None else closure()
        self.row = self.simulation.round()
        self.param_groups[0]["lr"] = self.row["lr"]
        return result


class RoundsData(L.LightningDataModule):
    """Tells the trainer to train once an epoch, and to validate and test once: the simulation has the data."""

    def train_dataloader(self) -> Any:
        """One item."""
        return _once("train")

    def val_dataloader(self) -> Any:
        """One item."""
        return _once("val")

    def test_dataloader(self) -> Any:
        """One item."""
        return _once("test")


def _once(split: str) -> DataLoader[str]:
    return DataLoader([split], batch_size=None)  # type: ignore[arg-type]  # a list is a map-style dataset


def rounds_trainer(config: TrainerConfig, rounds: int) -> TrainerConfig:
    """The trainer that runs ``rounds`` epochs of one step.

    Evaluation runs without gradient but not in inference mode, whose tensors could not be trained on afterwards.

    Raises:
        UserError: mixed precision, clipping, accumulation or several devices around a round, which has its own.
    """
    for name, neutral in (("precision", "32-true"), ("clip_grad", 0), ("accumulate", 1), ("devices", 1)):
        if getattr(config, name) != neutral:
            raise UserError(
                f"trainer.{name}={getattr(config, name)}: a round is one step of many clients, to which the trainer's "
                f"{name} does not apply; set it to {neutral}"
            )
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(TrainerConfig)}
    extra = {"inference_mode": False, **config.extra}
    return TrainerConfig(**{**values, "max_epochs": rounds, "val_every_epochs": 1, "extra": extra})


class FederatedModule(TaskModule):
    """Drives a simulation from the shared trainer.

    ``global_step`` is the number of rounds. Checkpoints hold the simulation, the states of clients in files beside
    them, and the weights that are evaluated as ``net.*``.

    Args:
        simulation: the federation; its model must be on the trainer's device.
        splits: ``val`` and ``test`` data sets, where there are such; others are there to be measured.
        rounds: of the whole run.
        eval_every: rounds between evaluations; the last round is always evaluated.
        test_curve: measure the test split at each evaluation too, not only at the end.
        checkpoints: folder of the run's checkpoints, for the states of clients; None keeps them in the checkpoint.
        seed: root seed.

    Attributes:
        totals: bytes up and down, local steps, clients and dropped clients, over all rounds.
    """

    def __init__(
        self,
        simulation: Simulation,
        splits: Mapping[str, Any],
        *,
        rounds: int,
        eval_every: int = 1,
        test_curve: bool = True,
        checkpoints: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.automatic_optimization = False
        self.simulation = simulation
        self.net = simulation.learner.task.module
        self.splits = {name: ClientData(data) for name, data in splits.items() if data is not None}
        self.rounds, self.eval_every = rounds, eval_every
        self._curves = [name for name in ("val", "test") if name in self.splits and (name == "val" or test_curve)]
        self.tested_step = -1 if "test" in self._curves else None
        self._shards = None if checkpoints is None else StateShards(checkpoints, KEY)
        self._loaded: tuple[Tensor, dict[str, Tensor]] | None = None
        self._samples = 0
        self.totals = {"up_bytes": 0, "down_bytes": 0, "local_steps": 0, "clients": 0, "dropped": 0}

    # ------------------------------------------------------------------ what the shared layer asks for

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a client's batch, at the weights that the module has at the moment."""
        return self.simulation.learner.task.loss(batch, generator.initial_seed()), {}

    def evaluate(self, batch: str) -> dict[str, Any]:
        """Split -> its metrics: the simulation has the data, ``batch`` is the split's name."""
        return {batch: self.measure(self.splits[batch])} if batch in self.splits else {}

    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """Metrics of the split."""
        return {name: value for record in records.values() for name, value in record.items()}

    def batch_size(self, batch: Any) -> int:
        """Samples that the clients of the last round trained on."""
        return self._samples

    def describe_batch(self, batch: Any) -> str:
        """The round."""
        return f"round {self.simulation.done + 1}"

    def measure(self, data: Any) -> dict[str, float]:
        """Metrics on a data set of the global model, or of the weights that were loaded since."""
        if self._loaded is None:
            return self.simulation.evaluate(data)
        flat, buffers = self._loaded
        learner = self.simulation.learner
        learner.load_buffers(buffers)
        return learner.evaluate(flat, data if isinstance(data, ClientData) else ClientData(data))

    def export(self) -> None:
        """Give ``net`` its own copy of the weights that ``measure`` uses."""
        if self._loaded is None:
            _ = self.simulation.model
            return
        flat, buffers = self._loaded
        self.simulation.learner.export(flat)
        self.simulation.learner.load_buffers(buffers)

    # ------------------------------------------------------------------ Lightning

    def configure_optimizers(self) -> RoundOptimizer:
        """The optimizer whose step is a round."""
        return RoundOptimizer(self.simulation)

    def on_train_start(self) -> None:
        """Training goes on from the simulation's own weights."""
        self._loaded = None

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # no loss for the trainer
        """Run a round."""
        optimizer: Any = self.optimizers()
        federation = self.simulation.federation
        # Who takes part in a private round is a secret, which nothing outside the mechanism asks for.
        cohort = [] if self.simulation.private else self.simulation.cohort()
        self._samples = sum(federation.plan.samples(len(federation.data[client])) for client in cohort)
        optimizer.step()
        row = optimizer.optimizer.row
        self._count(row, len(cohort))
        logs = {name: value for name, value in row.items() if name not in NOT_LOGGED} | spent(self.simulation)
        self.train_logs = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in logs.items()}

    def _count(self, row: Mapping[str, Any], sampled: int) -> None:
        """Add up what the row tells: a private one keeps to itself what clients' data made."""
        for name in ("up_bytes", "down_bytes"):
            self.totals[name] += int(row.get(f"comm/{name}", 0))
        clients = int(row.get("clients", 0))
        self.totals["local_steps"] += int(row.get("local_steps", 0))
        self.totals["clients"] += clients
        self.totals["dropped"] += max(0, sampled - clients)

    @property
    def _due(self) -> bool:
        done = self.simulation.done
        return done % self.eval_every == 0 or done >= self.rounds

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure every split that has a curve, where an evaluation is due."""
        if self._due:
            for split in self._curves:
                self._records.update(self.evaluate(split))

    def on_validation_epoch_end(self) -> None:
        """``val/`` and ``test/`` metrics; none where no evaluation was due."""
        self.records, self._records = self._records, {}
        measured = self.records.items()
        self.last_metrics = {f"{split}/{k}": float(v) for split, found in measured for k, v in found.items()}
        if "test" in self.records:
            self.tested_step = self.trainer.global_step

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]  # has overloads
        """The weights that are evaluated."""
        _ = self.simulation.model  # gives the module its own copy of them
        return super().state_dict(*arguments, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take weights to evaluate; what is trained on is the simulation's state."""
        _ = self.simulation.model  # its own copy: the simulation's vectors are not written to
        result = super().load_state_dict(state_dict, strict=strict)
        learner = self.simulation.learner
        named = {item.name: self.net.get_parameter(item.name).detach() for item in learner.spec}
        self._loaded = (learner.spec.flatten(named), learner.buffers)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The simulation's state; with weights alone, only the round."""
        entry: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "round": self.simulation.done}
        if "optimizer_states" in checkpoint:
            simulation = self.simulation
            entry |= {
                "simulation": simulation.state_dict(clients=self._shards is None),
                "threads": torch.get_num_threads(),
                "totals": dict(self.totals),
                "tested_step": self.tested_step,
            }
            if self._shards is not None:
                entry["client_states"] = self._shards.save(simulation.store, simulation.done)
        checkpoint[KEY] = entry

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the simulation was.

        Raises:
            UserError: a checkpoint of something else, of weights alone, or by another engine whose sums differ.
        """
        entry = checkpoint.get(KEY)
        if entry is None or "simulation" not in entry:
            raise UserError("this checkpoint has weights alone, or is not of a federation; resume from last.ckpt")
        if entry["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"checkpoint of schema version {entry['schema_version']}; update polymodal-fedcore")
        simulation, saved = self.simulation, entry["simulation"]
        _refuse_other_engine(simulation.engine, saved["engine"])
        if entry["threads"] != torch.get_num_threads():
            log.warning("begun with --threads %d; sums of large models may differ in their last bits", entry["threads"])
        simulation.load_state_dict(saved)
        self.totals, self.tested_step = dict(entry["totals"]), entry["tested_step"]
        if self._shards is not None:
            self._shards.load(entry["client_states"], simulation.store, simulation.flat.device)


def _refuse_other_engine(now: str, before: str) -> None:
    """Engines that give other bits must not share a run."""
    if now != "auto" and before != "auto" and now != before and "batched" in (now, before):
        raise UserError(f"federation.engine={now}: the run was begun with {before}, whose sums differ; leave it out")
