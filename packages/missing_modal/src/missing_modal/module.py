"""Prompts on frozen encoders as a task of the shared training layer: loss, evaluation, optimizer, checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from polymodal.task import TaskModule
from torch import Tensor
from torch.nn import functional

from missing_modal import metrics as scores
from missing_modal.records import pack
from missing_modal.settings import OptimConfig

if TYPE_CHECKING:
    from missing_modal.batch import Batch
    from missing_modal.calibration import Temperatures
    from missing_modal.classifier import Classifier
    from missing_modal.data.base import Task
    from missing_modal.fused import FusedClassifier

__all__ = ["META_VERSION", "MMModule", "check_meta", "decays", "loss_of"]

META_VERSION = 1
"""Schema of what a checkpoint says under ``missing_modal``; a newer one is refused."""
_NO_DECAY = re.compile(r"bias|norm\d*\.weight")


def loss_of(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Mean BCE over all outputs for several labels, else mean cross-entropy (DCP 3.6).

    Args:
        logits: (B, C).
        labels: (B, C) of 0/1 for several labels, else (B,) class numbers.
        task: multiclass, multilabel, binary (two outputs).
    """
    if task == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)


def decays(name: str) -> bool:
    """Whether a parameter has weight decay: by its name, as in the official code (DCP 3.6).

    Biases have none, nor would weights called ``norm.weight``; no norm here is called so, as in CLIP (``ln_post``), so
    that the weights of norms do decay.
    """
    return not _NO_DECAY.search(name)


class MMModule(TaskModule):
    """A classifier with prompts in training.

    The encoders are no part of it: ``state_dict`` has what is trained, with the copies of norms and projections.

    Args:
        model: encoders, prompts, head.
        optim: optimizer and schedule.
        task: multiclass, multilabel, binary.
        seed: root seed.
        total_steps: length of the schedule where something other than Lightning's trainer drives the module.
        meta: plain data stored in checkpoints under ``missing_modal``, with the hashes of the encoders.
        rows: sample id -> row, where the probabilities of a row's samples are averaged before they are scored.
        dtype: number format that the frozen encoders are kept in; None leaves them.

    Attributes:
        records: of the last evaluated split.
        temperatures: fitted on the validation split, once training is over; the test then says what they change.
    """

    def __init__(
        self,
        model: Classifier | FusedClassifier,
        optim: OptimConfig,
        *,
        task: Task,
        seed: int = 0,
        total_steps: int | None = None,
        meta: dict[str, Any] | None = None,
        rows: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(seed)
        self.model = model
        self.optim, self.task, self.total_steps = optim, task, total_steps
        self.meta, self.rows, self.dtype_of_towers = meta or {}, rows, dtype
        self.records: dict[str, Any] = {}
        self.temperatures: Temperatures | None = None
        self._prepared = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the bits of a pattern."""
        return self.model.context.modalities

    @property
    def num_prefix_tokens(self) -> dict[str, int]:
        """Prompt rows in front of each encoder's own tokens (CLS is the row after them)."""
        return self.model.num_prefix_tokens

    # ------------------------------------------------------------------ what the shared layer asks for

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the task and the method's own terms."""
        if batch.labels is None:
            raise UserError(f"no label in training: {', '.join(batch.ids[:3])}; give labels or leave them out")
        batch = self.model.prompter.thin(batch, generator)
        logits, tables = self.model.with_tables(batch)
        assert batch.labels is not None  # thinning takes modalities, no labels
        loss = loss_of(logits, batch.labels, self.task)
        terms = {"bce" if self.task == "multilabel" else "ce": loss.detach()}
        for name, term in self.model.prompter.penalty(tables).items():
            loss = loss + term
            terms[name] = term.detach()
        return loss, terms

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Any]:
        """Sample id -> logits (C,), pattern, label, and row where rows are averaged."""
        logits = self.model(batch).cpu().numpy()
        labels: list[Any] = [None] * len(batch) if batch.labels is None else batch.labels.cpu().tolist()
        if self.task == "multilabel":
            labels = [None if label is None else [int(value) for value in label] for label in labels]
        found = {}
        for name, row, mask, label in zip(batch.ids, logits, batch.masks, labels, strict=True):
            found[name] = {"logits": row, "mask": mask, "label": label}
            if self.rows is not None:
                found[name]["row"] = self.rows[name]
        return found

    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """Scores over all samples; those by pattern are added to ``last_metrics`` under ``val/`` or ``test/``."""
        packed = pack(records, self.task)
        return scores.summarise(scores.score_samples(packed.logits, packed.labels, self.task))

    # ------------------------------------------------------------------ Lightning

    def place(self, device: torch.device | str) -> None:
        """Move the frozen encoders, which are no submodules."""
        for tower in self.model.towers:
            tower.to(device, self.dtype_of_towers)

    def on_fit_start(self) -> None:
        """Bring the encoders to the device; let the method look at the training set once, unless the run goes on."""
        self.place(self.device)
        if not self._prepared:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's data connector
            self.model.prepare(batch.to(self.device) for batch in data.plain_batches())
            self._prepared = True

    def on_test_start(self) -> None:
        """Bring the encoders to the device."""
        self.place(self.device)

    def on_validation_epoch_end(self) -> None:
        """Metrics over all samples and by pattern."""
        super().on_validation_epoch_end()
        self._add_patterns("val")

    def on_test_epoch_end(self) -> None:
        """Metrics over all samples and by pattern."""
        super().on_test_epoch_end()
        self._add_patterns("test")

    def _add_patterns(self, split: str) -> None:
        packed = pack(self.records, self.task)
        found = scores.report(packed.logits, packed.labels, packed.masks, self.task, self.modalities, f"{split}/")
        self.last_metrics |= {name: value for name, value in found.items() if name.count("/") > 1}
        if self.temperatures is not None:
            scaled = self.temperatures.scale(packed.logits, packed.masks)
            after = scores.summarise(scores.score_samples(scaled, packed.labels, self.task))
            self.last_metrics |= {f"{split}/{name}_calibrated": after[name] for name in ("nll", "ece")}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer: the copies of norms and projections and fine-tuned encoders have their own rates.

        Frozen parameters are left out.
        """
        optim = self.optim
        rates = {"model.prompter.outputs.": ("out", optim.lr_out), "model.tuned.": ("towers", optim.lr_towers)}
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            kind, lr = next((value for start, value in rates.items() if name.startswith(start)), ("prompts", optim.lr))
            decay = optim.weight_decay if decays(name) else 0.0
            settings = {"params": [], "lr": lr, "weight_decay": decay, "name": kind}
            groups.setdefault((kind, decay > 0), settings)["params"].append(parameter)
        # train/lr is the rate of the first group: that of the head, which every method has.
        return sorted(groups.values(), key=lambda group: group["name"] != "prompts")

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then linear to 0, per optimizer step."""
        optim = self.optim
        betas = (optim.betas[0], optim.betas[1])
        optimizer = torch.optim.AdamW(self.parameter_groups(), optim.lr, betas=betas, eps=optim.eps, fused=True)
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int, total: int) -> float:
        """Share of the peak rate at an optimizer step, from 0; as in the official code, the first step has rate 0."""
        warm = int(self.optim.warmup * total)
        if step < warm:
            return step / warm
        return max(0.0, (total - step) / max(1, total - warm))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the weights belong to."""
        checkpoint["missing_modal"] = {"schema_version": META_VERSION, **self.meta}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other encoders or another method; what ``prepare`` found is in its weights."""
        check_meta(checkpoint.get("missing_modal"), self.meta)
        self._prepared = True


def check_meta(found: Mapping[str, Any] | None, wanted: Mapping[str, Any], where: str = "the checkpoint") -> None:
    """Whether weights belong to this model.

    Args:
        found: what a checkpoint says under ``missing_modal``.
        wanted: ``MMModule.meta``; keys that it lacks are not compared.
        where: name of the file, for messages.

    Raises:
        UserError: no checkpoint of this package, a newer schema, another method, modalities, classes or encoders.
    """
    if not found:
        raise UserError(f"{where} is no checkpoint of mm-train; give a run folder or a file of checkpoints/")
    if found.get("schema_version", 1) > META_VERSION:
        raise UserError(f"{where}: schema version {found['schema_version']} is newer than this package's; update it")
    for key in ("method", "method_options", "modalities", "class_names"):
        if key in wanted and found.get(key) != wanted[key]:
            raise UserError(f"{where} was trained with {key} {found.get(key)}, not {wanted[key]}; use its settings")
    before: Mapping[str, Any] = found.get("backbone") or {}
    for name, now in (wanted.get("backbone") or {}).items():
        then = before.get(name) or {}
        if then.get("sha256") != now["sha256"]:
            raise UserError(
                f"{where}: its prompts belong to other {name} weights ({then.get('identity')}, sha256 "
                f"{str(then.get('sha256'))[:12]}) than those given ({now['identity']}, {now['sha256'][:12]}); give the "
                "weights it was trained with (--backbone, --backbone.weights)"
            )
