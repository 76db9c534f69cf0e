"""Configuration of ``fed-train``: what ``--help`` lists and YAML presets set. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from polymodal.config import RunConfig, TrainerConfig
from polymodal.errors import UserError

from fedcore.data.base import FedData
from fedcore.data.digits import Digits
from fedcore.lora_settings import LoraConfig
from fedcore.privacy_settings import PrivacyConfig
from fedcore.world_settings import ModelConfig, PartitionConfig

__all__ = ["FedConfig", "FederationConfig", "RoundsTrainer"]

PRIVACY = "privacy."
"""options of an algorithm in a preset that begin so are the mechanism's"""


@dataclass
class RoundsTrainer(TrainerConfig):
    """How to train; an epoch is a round."""

    max_epochs: int = 0
    """not used here: federation.rounds"""
    max_steps: int = -1
    """not used here: federation.rounds"""
    devices: int = 1
    """not used here: federation.engine"""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """not used here: clients train in 32 bit"""
    clip_grad: float = 0.0
    """not used here: the algorithm's clip_grad"""
    accumulate: int = 1
    """not used here: federation.batch_size"""
    val_every_epochs: int = 1
    """not used here: federation.eval_every"""
    patience: int = 0
    """evaluations without a better validation before the run stops (0: off)"""
    log_every_steps: int = 1
    """rounds between rows of train/, comm/ and perf/ metrics"""
    checkpoint_every_epochs: int = 1
    """rounds between checkpoints (0: only by time)"""
    checkpoint_every_steps: int = 0
    """not used here: checkpoint_every_epochs"""

    def __post_init__(self) -> None:
        TrainerConfig.__post_init__(self)
        instead = "a round is one step of many clients; "
        for name, neutral, remedy in (
            ("max_epochs", 0, "set federation.rounds"),
            ("max_steps", -1, "set federation.rounds, or federation.max_steps for the steps of a client"),
            ("val_every_epochs", 1, "set federation.eval_every"),
            ("clip_grad", 0.0, "set algorithm_options.clip_grad, which clips each client's gradient"),
            ("accumulate", 1, "set federation.batch_size"),
            ("devices", 1, "clients share one device; set federation.engine=pool for several CPU cores"),
            ("checkpoint_every_steps", 0, "set trainer.checkpoint_every_epochs"),
            ("precision", "32-true", "leave it out: clients train in 32 bit"),
        ):
            if getattr(self, name) != neutral:
                raise UserError(f"trainer.{name}={getattr(self, name)}: {instead}{remedy}")


@dataclass
class FederationConfig:
    """Rounds, and what a client does in one."""

    rounds: int = 100
    """communication rounds (T)"""
    fraction: float = 0.1
    """share of clients a round, 0..1"""
    batch_size: int = 50
    """samples of a local step"""
    local_epochs: int = 5
    """passes of a client over its data in a round (E)"""
    max_steps: int = 0
    """cap of local steps a round (0: none)"""
    lr: float | None = None
    """base local rate (default: the preset's or the algorithm's)"""
    round_lr: Literal["constant", "exp", "cosine"] | None = None
    """decay of the rate over rounds (default: the preset's or the algorithm's)"""
    lr_decay: float | None = None
    """factor a round of round_lr=exp (default: the preset's or the algorithm's)"""
    exact_steps: bool = False
    """every client takes exactly max_steps steps, so that their number tells nothing about its data (privacy)"""
    weighting: Literal["uniform", "samples"] = "uniform"
    """how clients are averaged"""
    engine: Literal["auto", "serial", "pool", "batched", "flower"] = "auto"
    """how clients are computed; auto: serial or pool, on a GPU batched; flower: Flower's simulation, slower"""
    workers: int | None = None
    """processes of pool and flower (default: cores)"""
    state_memory_mib: float | None = None
    """memory for client states in MiB; the rest lies in mapped files (default: no limit)"""
    val_share: float = 0.1
    """share of the training split that no client gets, for validation, 0..1"""
    eval_every: int = 1
    """rounds between evaluations"""
    test_curve: bool = True
    """also measure the test split at each evaluation; never pick anything by it"""
    test_with: Literal["last", "best"] = "last"
    """final test of the last model, or of the one that was best on validation"""
    target: float = 0.0
    """accuracy, 0..1, whose rounds are counted (0: none)"""
    client_samples: int = 200
    """own samples of each client on which it is measured at the end (0: not measured)"""
    flatness: int = 1000
    """training samples for Hessian eigenvalue and sharpness at the end (0: not measured)"""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("rounds", "batch_size", "local_epochs", "eval_every"), 1)
        for name, bound in {**least, "client_samples": 0, "flatness": 0}.items():
            if getattr(self, name) < bound:
                raise UserError(f"federation.{name}={getattr(self, name)}; expected at least {bound}")
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"federation.fraction={self.fraction} leaves no client in a round; expected 0 < fraction <= 1"
            )
        if not 0 <= self.val_share < 1:
            raise UserError(f"federation.val_share={self.val_share}; expected 0 <= val_share < 1")
        if not 0 <= self.target <= 1:
            raise UserError(f"federation.target={self.target}; expected 0..1, an accuracy")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"federation.workers={self.workers}; expected at least 1")
        if self.state_memory_mib is not None and self.state_memory_mib < 0:
            raise UserError(f"federation.state_memory_mib={self.state_memory_mib}; expected 0 or more")
        if self.test_with == "best" and not self.val_share:
            raise UserError("federation.test_with=best needs a validation split; set federation.val_share above 0")


@dataclass
class FedConfig(RunConfig):
    """Federated training on one machine."""

    algorithm: str = "fedmoswa"
    """see --list-methods"""
    algorithm_options: dict[str, Any] = field(default_factory=dict)
    """options of the algorithm, e.g. {rho: 0.5}"""
    defaults_by_algorithm: dict[str, Any] = field(default_factory=dict)
    """options of algorithms by their names, from a preset, also privacy.clip …; options given by their own names win"""
    module: str = ""
    """PATH.TO:Class or FILE.py:Class of a polymodal.TaskModule to train instead of the model"""
    module_options: dict[str, Any] = field(default_factory=dict)
    """arguments of that class"""
    datasets: str = ""
    """PATH.TO:function or FILE.py:function that returns {clients: [...], val: ..., test: ...} instead of data"""
    datasets_options: dict[str, Any] = field(default_factory=dict)
    """arguments of that function"""
    data: FedData = field(default_factory=Digits, metadata={"class_typed": True})
    """reader of the data set"""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    trainer: RoundsTrainer = field(default_factory=RoundsTrainer)

    def options_of_algorithm(self) -> dict[str, Any]:
        """Options of the chosen algorithm: the preset's for it, then the rates given, then those given by name.

        Raises:
            UserError: the preset's are no mapping.
        """
        found = {k: v for k, v in self._defaults().items() if not k.startswith(PRIVACY)}
        names = ("lr", "round_lr", "lr_decay")
        rates = {name: getattr(self.federation, name) for name in names}
        return {**found, **{k: v for k, v in rates.items() if v is not None}, **self.algorithm_options}

    def privacy_of_algorithm(self) -> PrivacyConfig:
        """The mechanism for the chosen algorithm: what was given, then ``privacy.…`` of the preset's options for it.

        Raises:
            UserError: the preset's are no mapping, no such option, or out of range.
        """
        preset = {k.removeprefix(PRIVACY): v for k, v in self._defaults().items() if k.startswith(PRIVACY)}
        neutral = {item.name: item.default for item in dataclasses.fields(PrivacyConfig)}
        for name in preset:
            if name not in neutral:
                raise UserError(f"defaults_by_algorithm.{self.algorithm}: no option {PRIVACY}{name}")
        noise = {"noise_multiplier", "target_epsilon"}  # one that is given wins over both of the preset
        said = {name for name, value in neutral.items() if getattr(self.privacy, name) != value}
        said |= noise if said & noise else set()
        free = {name: value for name, value in preset.items() if name not in said}
        return dataclasses.replace(self.privacy, **free)

    def _defaults(self) -> dict[str, Any]:
        """Options of the chosen algorithm by a preset."""
        found = self.defaults_by_algorithm.get(self.algorithm) or {}
        if not isinstance(found, dict):
            raise UserError(f"defaults_by_algorithm.{self.algorithm}={found!r}; expected a mapping of options")
        return found
