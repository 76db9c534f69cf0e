"""One federated run: from its configuration to the closing table."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from fedcore.algorithms import ALGORITHMS
from fedcore.settings import FedConfig

if TYPE_CHECKING:
    from polymodal.run import Run

    from fedcore.algorithm import Algorithm
    from fedcore.module import FederatedModule
    from fedcore.prepare import Prepared
    from fedcore.privacy.report import PrivacyReport
    from fedcore.simulation import Simulation

__all__ = ["Job"]

log = logging.getLogger(__name__)


class Job:
    """Everything of a run that its folder is not needed for.

    Args:
        config: the configuration.

    Attributes:
        exported: what ``finish`` wrote for other programs, and where; empty where there are no adapters.
        privacy: the mechanism, of use to private algorithms only.
        report: of privacy, after ``finish``; None where the algorithm is not private.

    Raises:
        UserError: an unknown algorithm or option, or a value out of range.
    """

    def __init__(self, config: FedConfig) -> None:
        self.config = config
        self.info = ALGORITHMS.info(config.algorithm)
        self.algorithm: Algorithm = ALGORITHMS.create(config.algorithm, **config.options_of_algorithm())
        self.exported = ""
        self.privacy = config.privacy_of_algorithm()
        self.report: PrivacyReport | None = None

    @cached_property
    def prepared(self) -> Prepared:
        """Data, clients, model."""
        from fedcore.prepare import prepare

        return prepare(self.config)

    @cached_property
    def simulation(self) -> Simulation:
        """The federation; building it proves that the model takes the data."""
        from fedcore.prepare import make_simulation

        return make_simulation(self.config, self.prepared, self.algorithm)

    @property
    def name(self) -> str:
        """Default name of the run."""
        return f"{self.prepared.facts['name']}-{self.config.algorithm}"

    @property
    def monitor(self) -> str | None:
        """Metric that picks the best model."""
        return self.prepared.monitor or None

    def check(self) -> None:
        """Look at data, model and trainer before a run folder is made.

        Raises:
            UserError: what does not fit first.
        """
        from fedcore.module import rounds_trainer
        from fedcore.private_run import say_doubts

        rounds_trainer(self.config.trainer, self.config.federation.rounds)
        for option, given in (
            (f"trainer.patience={self.config.trainer.patience}", self.config.trainer.patience),
            ("federation.test_with=best", self.config.federation.test_with == "best"),
        ):
            if given and self.monitor is None:
                raise UserError(
                    f"{option} needs a metric of a validation split, and there is none here; raise federation.val_share"
                )
        self.algorithm.rate(0, self.config.federation.rounds)
        self.algorithm.rate(self.config.federation.rounds - 1, self.config.federation.rounds)
        if not self.simulation.private:
            self.simulation.cohort()
        say_doubts(self.config, self.privacy, self.simulation)

    # ------------------------------------------------------------------ what would be done

    def plan(self) -> str:
        """What would be trained, for ``--dry-run``."""
        from fedcore.private_run import planned

        config, found, simulation = self.config, self.prepared, self.simulation
        federation, sizes = config.federation, [len(data) for data in simulation.federation.data]
        steps = [simulation.federation.plan.steps(size) for size in sizes]
        splits = ", ".join(f"{len(data)} {name}" for name, data in found.splits.items() if data is not None)
        cohort, rounds = simulation.cohort_size, federation.rounds
        lines = [
            f"data        {found.facts['name']}: {sum(sizes)} training samples on clients, {splits}",
            f"clients     {len(sizes)} with {min(sizes)} to {max(sizes)} samples, {self._how()}",
            f"model       {config.module or config.model.name}, {found.parameters:,} parameters",
            f"algorithm   {config.algorithm} {config.options_of_algorithm() or ''}".rstrip(),
            f"rounds      {rounds}, {cohort} clients a round, {min(steps)} to {max(steps)} local steps",
            *self._adapters(),
            *planned(simulation, rounds),
            f"rate        {self.algorithm.rate(0, rounds):.4g} in the first round, "
            f"{self.algorithm.rate(rounds - 1, rounds):.4g} in the last",
        ]
        return "\n".join([*lines, "nothing was trained (dry run)"])

    def _adapters(self) -> list[str]:
        if not self.config.lora.on:
            return []
        from fedcore.lora.job import describe

        return [f"adapters    {describe(self.simulation)}"]

    def _how(self) -> str:
        how = {k: v for k, v in self.prepared.facts.get("partition", {}).items() if k not in ("sha256", "clients")}
        return ", ".join(f"{key} {value}" for key, value in how.items()) or "as the function gave them"

    def facts(self) -> dict[str, Any]:
        """What the manifest says of data and clients; a resumed run must agree."""
        facts = {**self.prepared.facts, "model": self.config.module or self.config.model.name}
        if not self.config.lora.on:
            return facts
        from fedcore.lora.job import facts_of

        return {**facts, "lora": facts_of(self.simulation, self.config.lora, self.prepared.model)}

    # ------------------------------------------------------------------ training

    def run(self, run: Run) -> FederatedModule:
        """Train, test; returns the module as it was tested. Worker processes are ended in any case."""
        from polymodal.trainer import evaluate_fitted, fit, load_best

        from fedcore.module import FederatedModule, RoundsData, rounds_trainer
        from fedcore.private_run import begin, write_report
        from fedcore.progress import NoteEngine, RoundProgress
        from fedcore.simulation import RoundError

        config, federation = self.config, self.config.federation
        if config.lora.pretrains:
            from fedcore.lora.job import keep_base

            keep_base(run.folder, self.prepared.model)
        module = FederatedModule(
            self.simulation,
            self.prepared.splits,
            rounds=federation.rounds,
            eval_every=federation.eval_every,
            test_curve=federation.test_curve,
            checkpoints=run.folder / "checkpoints",
            seed=config.seed,
        )
        begin(run, self.simulation)
        trainer_config = rounds_trainer(config.trainer, federation.rounds)
        if self.simulation.private:  # a round that is lost and run again spends privacy twice
            trainer_config.checkpoint_every_epochs = 1
        progress = RoundProgress(federation.rounds, trainer_config.progress)
        trainer_config.progress = "none"
        options: dict[str, Any] = {"monitor": self.monitor, "mode": "min" if self.monitor == "val/loss" else "max"}
        try:
            trainer = fit(module, RoundsData(), trainer_config, run, [progress, NoteEngine(run)], **options)
        except RoundError as error:
            raise RoundError(f"{error}; the last checkpoint stands: --resume {run.folder}") from error
        finally:
            progress.close()
            self.simulation.close()
            self.report = write_report(run, self.simulation)
        if federation.test_with == "best":
            load_best(module, run)
        if "test" in module.splits:
            evaluate_fitted(module, RoundsData(), trainer)
        else:
            module.last_metrics = {}
        return module

    def finish(self, run: Run, module: FederatedModule) -> dict[str, float]:
        """Measure what is left, draw the pictures; the final metrics, with how they were measured."""
        from fedcore.outcome import Outcome

        outcome = Outcome(self.config, self.prepared, module, run)
        final = outcome.finish(self.report)
        if self.config.lora.on:
            from fedcore.lora.job import export

            module.export()
            library, _, base = self.config.model.name.partition(":")
            known = base if library == "hf" and not self.config.lora.pretrains and not self.config.module else None
            self.exported = export(run.folder, module.net, self.prepared.model, known)
        return final
