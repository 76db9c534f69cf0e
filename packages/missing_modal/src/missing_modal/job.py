"""One training run: data under its missing tables, frozen encoders, a method; train, calibrate, test, report."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sized
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from missing_modal.data.base import SPLITS
from missing_modal.methods import METHODS
from missing_modal.settings import MMConfig
from missing_modal.tables import MissingTable, combine, natural_mask, row_ids, save_table, table_for

if TYPE_CHECKING:
    import torch
    from polymodal.run import Run

    from missing_modal.backbones.base import Tower
    from missing_modal.calibration import Temperatures
    from missing_modal.classifier import Classifier
    from missing_modal.datamodule import MMDataModule
    from missing_modal.fused import FusedClassifier
    from missing_modal.methods.base import Method
    from missing_modal.module import MMModule
    from missing_modal.report import Report

__all__ = ["CALIBRATION_FILE", "CALIBRATION_VERSION", "TOWERS_FILE", "Job", "predict_records"]

log = logging.getLogger(__name__)
CALIBRATION_FILE = "calibration.json"
CALIBRATION_VERSION = 1
TOWERS_FILE = "towers.safetensors"
_COMPARED = 8
"""test samples on which exported files are compared with the model"""


class Job:
    """What a run is made of; each part is made when it is first asked for.

    Args:
        config: the configuration.

    Attributes:
        method: the method with its options.

    Raises:
        UserError: an unknown method or option.
    """

    def __init__(self, config: MMConfig) -> None:
        self.config = config
        self.reader = config.data
        self.method: Method = METHODS.create(config.method, **config.options_of_method())

    # ------------------------------------------------------------------ data

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the bits of a pattern."""
        return tuple(self.reader.modalities)

    @cached_property
    def tables(self) -> dict[str, MissingTable]:
        """The missing table of each split that has samples.

        Raises:
            UserError: an unknown kind, or a table of other data.
        """
        config, found = self.config.missing, {}
        for split in SPLITS:
            samples = self.reader.samples(split)
            if samples:
                found[split] = table_for(config, row_ids(samples), self.reader.name, split, self.modalities)
        return found

    @cached_property
    def masks(self) -> dict[str, list[int]]:
        """Pattern of each sample by split: what it really has, less what the table takes."""
        return {
            split: [
                combine(natural_mask(sample.inputs, self.modalities), table.masks[sample.table_id])
                for sample in self.reader.samples(split)
            ]
            for split, table in self.tables.items()
        }

    def counts(self, split: str) -> dict[str, int]:
        """Samples of each pattern in a split, those that occur, the complete one first."""
        from missing_modal.patterns import all_masks, mask_name

        held = self.masks.get(split, [])
        found = {mask_name(mask, self.modalities): held.count(mask) for mask in all_masks(self.modalities)}
        return {name: count for name, count in found.items() if count}

    def missing_text(self, split: str) -> str:
        """What a split lacks, for captions and signatures (without the seed, over which runs are averaged)."""
        table = self.tables[split]
        return table.kind if table.kind in ("none", "custom") else f"{table.kind}, {100 * table.ratio:g} % of the rows"

    def facts(self) -> dict[str, Any]:
        """What the manifest says about the data."""
        tables = {split: self.missing_text(split) for split in self.tables}
        patterns = {split: self.counts(split) for split in self.tables}
        drawn = {
            split: hashlib.sha256(json.dumps(sorted(table.masks.items())).encode()).hexdigest()[:16]
            for split, table in self.tables.items()
        }
        return {**self.reader.describe(), "missing": tables, "patterns": patterns, "tables": drawn}

    def check(self) -> None:
        """Look at everything before a run folder is made.

        Raises:
            UserError: no training or test samples, samples without labels, tables, encoders or options that do not fit.
        """
        for split in SPLITS:
            samples = self.reader.samples(split)
            if not samples and split != "val":
                raise UserError(f"{self.reader.name}: the {split} split is empty; {self.reader.remedy}")
            blank = next((sample.id for sample in samples if sample.label is None), None)
            if blank is not None:
                raise UserError(
                    f"{self.reader.name} {split}: sample {blank} has no label; training and testing need labels "
                    "(mm-predict takes samples without)"
                )
        if not self.masks.get("val") and self.config.calibration.enabled:
            log.info("no validation samples: the last weights are tested, probabilities are not calibrated")
        self.build_model()

    # ------------------------------------------------------------------ model

    @cached_property
    def towers(self) -> tuple[Tower, ...]:
        """The frozen encoders, on the CPU; in a dry run small ones keep their random weights.

        Raises:
            UserError: see ``encoders.build_towers``.
        """
        from missing_modal.encoders import build_towers

        return build_towers(self.config.backbone, self.reader, train=not self.config.dry_run)

    @cached_property
    def backbone(self) -> dict[str, dict[str, str]]:
        """Modality -> identity and sha256 of its encoder, as it was loaded."""
        from missing_modal.backbones.base import state_hash

        return {t.spec.name: {"identity": t.identity, "sha256": state_hash(t)} for t in self.towers}

    def build_model(self) -> Classifier | FusedClassifier:
        """Encoders, prompts and head with their initial values.

        Raises:
            UserError: a method or options that do not fit the encoders.
        """
        from missing_modal.fused import build_classifier

        return build_classifier(self.towers, self.method, len(self.reader.class_names()), self.config.seed)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about itself, under ``missing_modal``."""
        from polymodal.config import to_dict

        return {
            "method": self.config.method,
            "method_options": to_dict(self.config.options_of_method()),
            "modalities": list(self.modalities),
            "task": self.reader.task,
            "class_names": list(self.reader.class_names()),
            "kinds": dict(self.reader.kinds),
            "average_rows": bool(self.reader.average_rows),
            "data": self.reader.name,
            "fingerprint": self.reader.describe().get("fingerprint"),
            "backbone": self.backbone,
            "backbone_config": to_dict(self.config.backbone),
        }

    def dtype(self) -> torch.dtype | None:
        """Number format that frozen weights are kept in; None: float32, as they are."""
        import torch

        config, precision = self.config.backbone, self.config.trainer.precision
        if precision == "64-true":
            return torch.float64
        on_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        auto = config.dtype == "auto" and precision == "bf16-mixed" and on_gpu
        return torch.bfloat16 if auto or config.dtype == "bfloat16" else None

    def build_module(self) -> MMModule:
        """The model as a task of the shared trainer."""
        from missing_modal.module import MMModule

        rows = None
        if self.reader.average_rows:
            rows = {sample.id: sample.table_id for split in SPLITS for sample in self.reader.samples(split)}
        return MMModule(
            self.build_model(),
            self.config.optim,
            task=self.reader.task,
            seed=self.config.seed,
            meta=self.meta(),
            rows=rows,
            dtype=self.dtype(),
        )

    def build_data(self) -> MMDataModule:
        """The loaders."""
        from missing_modal.datamodule import MMDataModule
        from missing_modal.inputs import input_transforms

        return MMDataModule(
            self.reader,
            self.masks,
            input_transforms(self.towers, self.reader.kinds),
            self.config.loader,
            towers=self.towers,
            seed=self.config.seed,
            simulate=self.config.missing.simulate,
        )

    def plan(self) -> str:
        """What would be trained, for ``--dry-run``."""
        reader, model = self.reader, self.build_model()
        sizes = ", ".join(f"{len(held)} {split}" for split, held in self.masks.items())
        lines = [f"data      {reader.name}: {sizes} samples; {reader.task}, {len(reader.class_names())} classes"]
        for split in self.masks:
            shown = ", ".join(f"{name} {count}" for name, count in self.counts(split).items())
            lines.append(f"missing   {split}: {self.missing_text(split)} ({shown})")
        for tower in self.towers:
            spec = tower.spec
            lines.append(f"encoder   {spec.name}: {tower.identity}, width {spec.width}, {spec.depth} blocks, frozen")
        backbone = self.config.backbone
        if backbone.name == "small" and backbone.weights is None and backbone.steps and len(self.towers) > 1:
            lines.append(f"encoders  trained for {backbone.steps} steps first, unless the cache has them")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = sum(p.numel() for p in model.head.parameters())
        lines.append(f"method    {self.config.method} {self.config.options_of_method() or ''}".rstrip())
        lines.append(f"trained   {trained:,} parameters, {head:,} of them in the head")
        return "\n".join([*lines, "nothing was trained (dry run)"])

    # ------------------------------------------------------------------ the run

    def run(self, run: Run) -> tuple[dict[str, float], Report]:
        """Train, take the best weights, fit temperatures, test; write tables, calibration and report.

        Returns:
            Final metrics by their full names, and the report.
        """
        from polymodal.trainer import evaluate_fitted, fit, load_best

        from missing_modal.records import pack
        from missing_modal.report import make_report, write_report

        module, data = self.build_module(), self.build_data()
        if run.is_writer:
            (run.folder / "tables").mkdir(exist_ok=True)
            for split, table in self.tables.items():
                save_table(run.folder / "tables" / f"{split}.json", table)
            self._write_towers(run)
        run.note(backbone=self.backbone, method_options=self.meta()["method_options"])
        validated = bool(self.masks.get("val"))
        monitor = f"val/{self.reader.metric}" if validated else None
        trainer = fit(module, data, self.config.trainer, run, monitor=monitor)
        load_best(module, run)
        rows = 0
        if validated and self.config.calibration.enabled:
            module.temperatures, rows = self.calibrate(module, data, trainer.strategy.root_device)
        found = evaluate_fitted(module, data, trainer)
        metrics = {name: value for name, value in found.items() if not math.isnan(value)}
        packed = pack(module.records, module.task)
        report = make_report(
            packed,
            module.temperatures,
            task=module.task,
            modalities=self.modalities,
            method=self.config.method,
            data=self.reader.name,
            split="test",
            missing=self.missing_text("test"),
            fitted_on=rows,
        )
        self._refuse_changed_towers()
        if run.is_writer:
            write_report(run.folder, report)
            self._write_extras(run, module, packed, rows)
            self._write_exports(run, module, data, rows)
        run.note(metric_signatures=dict.fromkeys(metrics, self.missing_text("test")))
        return metrics, report

    def calibrate(self, module: MMModule, data: MMDataModule, device: torch.device) -> tuple[Temperatures, int]:
        """Temperatures of the module's patterns on the validation split, and on how many samples they were fitted."""
        from missing_modal.calibration import fit_temperatures
        from missing_modal.records import pack

        records = predict_records(module, data.loader("val", shard=False), device, self.config.trainer.precision)
        packed = pack(records, module.task)
        least = self.config.calibration.least
        found = fit_temperatures(packed.logits, packed.labels, packed.masks, module.task, self.modalities, least)
        return found, len(packed)

    def _refuse_changed_towers(self) -> None:
        """The encoders are frozen: whatever changed them is a fault of ours, and the prompts would fit nothing."""
        from missing_modal.backbones.base import state_hash

        if self.dtype() is not None:
            return  # their hash is that of another number format
        for tower in self.towers:
            if state_hash(tower) != self.backbone[tower.spec.name]["sha256"]:
                raise RuntimeError(f"the frozen encoder of {tower.spec.name} changed in training; please report this")

    def _write_extras(self, run: Run, module: MMModule, packed: Any, rows: int) -> None:
        """Temperatures, and a few predictions of each pattern."""
        from polymodal.files import write_json

        from missing_modal.report import sample_rows

        found = module.temperatures
        if found is not None:
            stored = {"schema_version": CALIBRATION_VERSION, "rows": rows, "temperatures": found.to_json()}
            write_json(run.folder / CALIBRATION_FILE, stored)
        names = self.reader.class_names()
        table = sample_rows(packed, found, task=module.task, modalities=self.modalities, names=names)
        run.log_table("test/predictions", *table)

    def _write_towers(self, run: Run) -> None:
        """Small encoders beside the run: they exist nowhere else, and prediction needs no training data then."""
        from missing_modal.backbones.transformer import TransformerTower
        from missing_modal.backbones.weights import save_towers

        small = [t for t in self.towers if isinstance(t, TransformerTower) and t.identity.startswith("small:")]
        if small:
            save_towers(run.folder / TOWERS_FILE, small, {"data": self.reader.name})

    def _write_exports(self, run: Run, module: MMModule, data: MMDataModule, rows: int) -> None:
        """The small files of the trained prompts; a line about each on the terminal."""
        from missing_modal.export import write_exports

        module.to("cpu").eval()
        module.place("cpu")
        about = {**module.meta, "calibrated_on": rows}
        # A few samples tell what rounding changes; encoders in another number format would tell of that, instead.
        batches = [data.first("test", _COMPARED)] if self.dtype() is None else []
        for line in write_exports(run.folder / "export", module.model, about, module.temperatures, batches=batches):
            log.info("%s", line)


def predict_records(
    module: MMModule, batches: Iterable[Any], device: torch.device | str = "cpu", precision: str = "32-true"
) -> dict[str, Any]:
    """Records of all batches, outside a trainer.

    Args:
        module: is left on the device, in evaluation mode.
        batches: of a loader of the data module.
        device: where to compute.
        precision: the trainer's; the mixed ones are kept here.

    Returns:
        Sample id -> record of ``MMModule.evaluate``.
    """
    import torch
    from polymodal.progress import counted

    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    device = torch.device(device)
    module.to(device).eval()
    module.place(device)
    records: dict[str, Any] = {}
    total = len(batches) if isinstance(batches, Sized) else 0
    with torch.no_grad(), torch.autocast(device.type, kinds.get(precision), enabled=precision in kinds):
        for batch in counted(batches, "batches evaluated", total):
            records.update(module.evaluate(batch.to(device)))
    return records
