"""One continual run: its steps one after the other, each with its network, its memory and its folder."""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
from functools import cached_property
from typing import TYPE_CHECKING, Any

from css.methods import METHODS
from css.settings import CSSConfig
from css.steps import reopen_steps, step_done, step_folder
from css.task import Task

if TYPE_CHECKING:
    from polymodal.run import Run

    from css.methods.base import Method, StepContext
    from css.module import CSSModule
    from css.report import StepReport

__all__ = ["Job", "build_context"]

log = logging.getLogger(__name__)


class Job:
    """Everything that the steps of a run have in common.

    Args:
        config: the configuration.

    Attributes:
        method: the method with its options.
        named_task: the task that was asked for; scores are reported by its steps.
        task: the task that is trained: the same, or all classes in one step (joint training).

    Raises:
        UserError: an unknown method or option, or a task or order that does not fit the classes.
    """

    def __init__(self, config: CSSConfig) -> None:
        self.config = config
        self.method: Method = METHODS.create(config.method, **config.options_of_method())
        classes, order = config.data.num_classes, tuple(config.order or ())
        self.named_task = Task(config.task, classes, order)
        self.task = Task("offline", classes, order) if self.method.offline else self.named_task
        self.base = len(self.named_task.steps[0])
        self.parameters = 0

    @cached_property
    def fingerprint(self) -> str:
        """Of the data set."""
        return self.config.data.fingerprint()

    def check(self) -> None:
        """Look at every step and at the network before a run folder is made.

        Raises:
            UserError: a step without pictures, a split file that does not fit, or a network that cannot be built.
        """
        for step in range(self.task.num_steps):
            for split in ("train", "test"):
                self.pictures(step, split)
        if self.config.dry_run or not self.config.resume:
            self.parameters = sum(p.numel() for p in build_context(self, 0, None).net.parameters())

    def pictures(self, step: int, split: str) -> list[int]:
        """Numbers of a step's pictures in a split."""
        from css.data.split_files import step_indices

        return step_indices(self.config.data, self.task, self.config.setting, step, split, seed=self.config.seed)

    def meta(self, step: int) -> dict[str, Any]:
        """What a weight file says about itself."""
        from polymodal.config import to_dict

        config = self.config
        return {
            "task": self.task.name,
            "report_task": self.named_task.name,
            "num_classes": self.task.num_classes,
            "order": list(self.task.order),
            "setting": config.setting,
            "step": step,
            "channels": [len(ids) for ids in self.task.steps[: step + 1]],
            "method": config.method,
            "method_options": to_dict(config.options_of_method()),
            "network": to_dict(config.network),
            "class_names": config.data.class_names(),
            "crop": config.loader.crop,
            "data": config.data.name,
            "fingerprint": self.fingerprint,
        }

    def plan(self) -> str:
        """What would be trained, for ``--dry-run``."""
        reader, config = self.config.data, self.config
        sizes = [len(reader.items(split)) for split in ("train", "test")]
        lines = [f"data     {reader.name}: {sizes[0]} training, {sizes[1]} test pictures, setting {config.setting}"]
        lines += [
            f"method   {config.method} {config.options_of_method() or ''}".rstrip(),
            f"network  {config.network.name}, {self.parameters:,} parameters in step 0",
        ]
        names = reader.class_names()
        for step, classes in enumerate(self.task.steps):
            chosen = [len(self.pictures(step, split)) for split in ("train", "test")]
            shown = ", ".join(names[raw - 1] for raw in classes[:4]) + (", …" if len(classes) > 4 else "")
            what = f"{len(classes)} class{'es' * (len(classes) > 1)}"
            lines += [f"step {step:<3} {chosen[0]} training, {chosen[1]} test pictures; {what}: {shown}"]
        return "\n".join([*lines, "nothing was trained (dry run)"])

    def run_steps(self, run: Run) -> list[StepReport]:
        """Train the steps that are not finished; returns the reports of all."""
        from css.report import read_report

        reports: list[StepReport] = []
        offset = 0
        for step in range(self.task.num_steps):
            done = step_done(run.folder, step)
            if done is None:
                again = reopen_steps(run.folder, step) if run.is_writer else []
                if again:
                    log.warning("steps %s grew from step %d and are trained again with it", again, step)
                done = self.run_step(run, step, offset, reports)
                gc.collect()  # module and trainer hold each other, and with them networks and loader processes
            reports.append(read_report(step_folder(run.folder, step)))
            offset = int(done["optimizer_steps"])
        return reports

    def run_step(self, run: Run, step: int, offset: int, earlier: list[StepReport]) -> dict[str, Any]:
        """Train and test one step, write its folder; returns what ``done.json`` says."""
        from polymodal.trainer import fit_and_test

        from css.data.datamodule import CSSDataModule

        config = self.config
        memory = self.memory_of(run, step) if step and self.method.uses_memory() else None
        module = self.build_module(run, step, memory, earlier)
        data = CSSDataModule(
            config.data,
            self.task,
            config.setting,
            step,
            config.loader,
            seed=config.seed,
            replay=list(memory.entries) if memory is not None and self.method.replays() else [],
            mix=self.method.mix,
            keep_old=config.setting == "sequential",
        )
        log.info("step %d of %d: %s", step + 1, self.task.num_steps, ", ".join(self.names(step)))
        epochs = config.later_epochs if step and config.later_epochs else config.trainer.max_epochs
        trainer = dataclasses.replace(config.trainer, max_epochs=epochs)
        fit_and_test(module, data, trainer, run, stage=step, step_offset=offset)
        if run.is_writer:
            self.write_step(run, step, offset, module, data)
        _barrier()
        done = step_done(run.folder, step)
        assert done is not None  # the writer has just written it
        return done

    def names(self, step: int) -> list[str]:
        """Names of the classes of a step."""
        names = self.config.data.class_names()
        return [names[raw - 1] for raw in self.task.steps[step]]

    def build_module(self, run: Run, step: int, memory: Any, earlier: list[StepReport]) -> CSSModule:
        """The module of a step, its network started from the step before."""
        from css.module import CSSModule
        from css.report import over_steps

        ctx = build_context(self, step, run)
        if memory is not None and self.method.uses_bank():
            from css.memory.bank import InstanceBank

            ctx.bank = InstanceBank(memory)
        return CSSModule(
            ctx,
            self.method,
            self.config.optim,
            base=self.base,
            seed=self.config.seed,
            meta=self.meta(step),
            after_test=lambda module: over_steps([*earlier, self.report(module)]),
        )

    def report(self, module: CSSModule) -> StepReport:
        """Scores of the test that has just ended."""
        from css.report import StepReport

        assert module.confusion is not None  # the test has counted
        names, step = self.config.data.class_names(), module.ctx.step
        return StepReport.of(module.confusion, self.named_task, names, step, images=len(module.records))

    def memory_of(self, run: Run, step: int) -> Any:
        """The memory that ``step`` replays: read where it is complete, else built from the step before."""
        from polymodal.seeding import derive

        from css.memory import load_memory, make_memory

        config, kind = self.config, self.method.memory
        assert kind != "none"  # the caller has asked
        folder = step_folder(run.folder, step) / "memory"
        facts: dict[str, Any] = {"task": self.task, "fingerprint": self.fingerprint}
        if run.is_writer and not (folder / "index.json").is_file():
            previous_folder = step_folder(run.folder, step - 1) / "memory"
            previous = load_memory(kind, previous_folder, reader=config.data, **facts) if step > 1 else None
            make_memory(
                kind,
                folder,
                reader=config.data,
                step=step,
                setting=config.setting,
                previous=previous,
                budget=config.memory.budget,
                seed=derive(config.seed, "memory", step),
                split_seed=config.seed,
                connectivity=config.memory.connectivity,
                **facts,
            )
        _barrier()
        memory = load_memory(kind, folder, reader=config.data, **facts)
        log.info("%s", memory.summary())
        return memory

    def write_step(self, run: Run, step: int, offset: int, module: CSSModule, data: Any) -> None:
        """Weights, report and pictures of a finished step; ``done.json`` last."""
        from css.pictures import predictions_grid
        from css.report import write_report
        from css.samples import log_picture
        from css.steps import save_weights, write_done

        folder, names = step_folder(run.folder, step), self.config.data.class_names()
        save_weights(folder / "weights.safetensors", module.net.state_dict(), self.meta(step))
        write_report(folder, self.report(module))
        predictions_grid(folder / "predictions.png", module, data, names, self.task)
        log_picture(run, "test/predictions", folder / "predictions.png", step)
        write_done(run.folder, step, {"optimizer_steps": offset + module.fitted_steps, "val": module.val_metrics})

    def finish(self, run: Run, reports: list[StepReport]) -> dict[str, float]:
        """Pictures over all steps; the final metrics, with how they were measured."""
        from css.evaluate import signature
        from css.pictures import iou_matrix
        from css.report import over_steps

        path = run.folder / "figures" / "iou.png"
        iou_matrix(path, reports, f"{self.config.method}, {self.config.data.name} {self.config.task}")
        last = step_folder(run.folder, len(reports) - 1) / "predictions.png"
        shutil.copyfile(last, path.with_name("predictions.png"))
        done = step_done(run.folder, len(reports) - 1) or {}
        tested = reports[-1].metrics() | over_steps(reports)
        final: dict[str, float] = {f"test/{name}": value for name, value in tested.items()} | done.get("val", {})
        loader = self.config.loader
        how = signature(loader.eval_size, loader.crop, loader.unseen_as)
        run.note(metric_signatures=dict.fromkeys(final, how))
        return final


def build_context(job: Job, step: int, run: Run | None) -> StepContext:
    """Networks of a step: the new one with one head more, the old one frozen.

    Raises:
        UserError: a network that is not known or cannot be loaded.
    """
    import torch
    from polymodal.seeding import derive

    from css.checkpoint import load_network
    from css.methods.base import StepContext
    from css.models.build import build_network

    task, method = job.task, job.method
    torch.manual_seed(derive(job.config.seed, "init", step))
    config = job.config.network if step == 0 else dataclasses.replace(job.config.network, weights=None)
    net = build_network(config, [len(ids) for ids in task.steps[: step + 1]], method=method)
    ctx = StepContext(step, net, task.num_old(step), len(task.steps[step]))
    if step == 0:
        return ctx
    assert run is not None  # later steps need the folder of the step before
    loaded = load_network(step_folder(run.folder, step - 1))
    ctx.old = loaded.net.requires_grad_(False)
    net.load_earlier(ctx.old.state_dict())
    method.init_new_head(ctx)
    if method.freeze_norm:
        net.freeze_norm()
    return ctx


def _barrier() -> None:
    """In a data-parallel run, wait for the process that writes."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
