"""``fed-landscape``: how flat the minima are that ``fed-train`` found."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command, parse_config
from polymodal.errors import UserError
from polymodal.tables import markdown

from fedcore.data import READERS
from fedcore.landscape_settings import LandscapeConfig, gather_runs
from fedcore.settings import FedConfig

if TYPE_CHECKING:
    from torch import nn

    from fedcore.landscape import DatasetLoss

__all__ = ["Trained", "landscape", "load_trained", "main"]

EXAMPLE = """
fed-landscape runs/fedcore/RUN                        # eigenvalue, sharpness, surface
fed-landscape runs/fedcore/RUN1 runs/fedcore/RUN2     # a row a run, on the same samples and directions
fed-landscape runs/fedcore/RUN --checkpoint best --split test --points 41
"""
SCHEMA_VERSION = 1
log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``fed-landscape``; returns the exit code."""
    return command(landscape, LandscapeConfig, prog="fed-landscape", example=EXAMPLE, argv=gather_runs(sys.argv[1:]))


@dataclass(frozen=True)
class Trained:
    """A trained model with what its loss is measured on.

    Args:
        folder: run folder.
        config: of the run.
        model: with the weights of the checkpoint.
        data: samples of the chosen split, unaugmented.
        loss: mean loss of ``(outputs, targets)`` for plain models.
        round: rounds that the model was trained for; -1 where the checkpoint does not say.
    """

    folder: Path
    config: FedConfig
    model: nn.Module
    data: Any
    loss: Callable[..., Any]
    round: int


def landscape(config: LandscapeConfig) -> list[dict[str, Any]]:
    """Measure every run, write files, print the table.

    Returns:
        What was measured, a dictionary a run.

    Raises:
        UserError: no run, a folder that is none, a checkpoint of something else, or no such split.
    """
    from polymodal.files import check_writable, write_bytes, write_json
    from polymodal.seeding import set_threads

    if not config.runs:
        raise UserError("no run given; fed-landscape runs/fedcore/RUN")
    set_threads(config.threads)
    found = []
    for path in config.runs:
        trained = load_trained(path, config)
        log.info("%s: %s, round %d", trained.folder.name, trained.config.algorithm, trained.round)
        measured, picture = _measure(trained, config)
        folder = config.out or trained.folder / "figures"
        check_writable(folder)
        prefix = f"{trained.folder.name}-" if config.out else ""
        write_json(folder / f"{prefix}landscape.json", measured)
        if picture is not None:
            write_bytes(folder / f"{prefix}surface.png", picture)
        found.append(measured)
    sys.stdout.write(f"{_table(found)}\n\nfiles: {config.out or 'figures/ of each run'}\n")
    return found


# ------------------------------------------------------------------ reading a run


def load_trained(path: Path, config: LandscapeConfig) -> Trained:
    """The model of a run folder or checkpoint file, and the samples to measure it on.

    Raises:
        UserError: nothing there, a checkpoint of something else, or a run without that split.
    """
    from polymodal.callbacks import load_checkpoint

    from fedcore.prepare import prepare, trained_module

    path = path.expanduser()
    folder = path.parent.parent if path.is_file() else path
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{path}: no run folder of fed-train (no config.yaml there)")
    run = _run_config(folder, config)
    file = path if path.is_file() else folder / "checkpoints" / f"{config.checkpoint}.ckpt"
    checkpoint = load_checkpoint(file)
    prepared = prepare(run, pretrain=False)
    model = trained_module(run, prepared)
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:160]
        raise UserError(f"{file}: its weights do not fit the model of {folder / 'config.yaml'} ({what})") from error
    data = _samples(prepared, config)
    return Trained(folder, run, model, data, prepared.loss, checkpoint.get("fedcore", {}).get("round", -1))


def _run_config(folder: Path, config: LandscapeConfig) -> FedConfig:
    """Configuration of the run, with the folder of the data and the device of this command."""
    run: FedConfig = parse_config(FedConfig, ["--config", str(folder)], prog="fed-landscape", choices={"data": READERS})
    trainer = dataclasses.replace(run.trainer, accelerator=config.device)
    data = dataclasses.replace(run.data, root=config.data_root) if config.data_root else run.data
    return dataclasses.replace(run, trainer=trainer, data=data)


def _samples(prepared: Any, config: LandscapeConfig) -> Any:
    """Samples of the split, at most ``config.samples``, chosen by a fixed draw."""
    from polymodal.seeding import numpy_rng
    from torch.utils.data import ConcatDataset, Subset

    data = prepared.train if config.split == "train" else prepared.splits.get(config.split)
    if data is None and config.split == "train":
        data = ConcatDataset(list(prepared.clients))
    if data is None:
        raise UserError(f"the run has no {config.split} split; choose another --split")
    if not config.samples or config.samples >= len(data):
        return data
    chosen = sorted(numpy_rng(0, "landscape").permutation(len(data))[: config.samples].tolist())
    return data.subset(chosen) if hasattr(data, "subset") else Subset(data, chosen)


# ------------------------------------------------------------------ measuring


def _measure(trained: Trained, config: LandscapeConfig) -> tuple[dict[str, Any], bytes | None]:
    """Numbers of one run, and the picture of its surface."""
    from fedcore.landscape import DatasetLoss, hessian_eigenvalue, sharpness

    loss = DatasetLoss(trained.model, trained.data, trained.loss, config.batch_size)
    value = float(loss(loss.flat).detach())
    rise = sharpness(loss, loss.flat, loss.spec, radius=config.radius, directions=config.directions, seed=config.seed)
    top = hessian_eigenvalue(
        loss, loss.flat, iterations=config.iterations, tolerance=config.tolerance, seed=config.seed
    )
    if not top.converged:
        log.warning(
            "%s: the power iteration stopped after %d products at a residual of %.2g; raise --iterations",
            trained.folder.name,
            top.iterations,
            top.residual,
        )
    measured: dict[str, Any] = {
        "schema": "fedcore.landscape",
        "schema_version": SCHEMA_VERSION,
        "run": trained.folder.name,
        "algorithm": trained.config.algorithm,
        "seed": trained.config.seed,
        "round": trained.round,
        "split": config.split,
        "samples": len(trained.data),
        "loss": value,
        "hessian": {
            "eigenvalue": top.value,
            "residual": top.residual,
            "products": top.iterations,
            "converged": top.converged,
        },
        "sharpness": {"mean": rise.mean, "sd": rise.sd, "radius": rise.radius, "directions": config.directions},
    }
    if not config.points:
        return measured, None
    surface, picture = _surface(loss, trained, config)
    return {**measured, "surface": surface}, picture


def _surface(loss: DatasetLoss, trained: Trained, config: LandscapeConfig) -> tuple[dict[str, Any], bytes]:
    from polymodal.seeding import generator

    from fedcore.figures import surface
    from fedcore.landscape import filter_normalised, loss_surface

    draw = generator(config.seed, "surface")
    first, second = (filter_normalised(loss.spec, loss.flat, draw) for _ in range(2))
    found = loss_surface(loss, loss.flat, first, second, radius=config.surface_radius, points=config.points)
    title = f"{trained.config.algorithm}, round {trained.round}: loss on {len(trained.data)} {config.split} samples"
    return dataclasses.asdict(found), surface(found, title=title)


def _table(found: list[dict[str, Any]]) -> str:
    """A row a run."""
    rows = []
    for one in found:
        top, rise = one["hessian"], one["sharpness"]
        mark = "" if top["converged"] else " (not converged)"
        rows.append(
            [
                one["run"],
                one["algorithm"],
                str(one["round"]),
                f"{one['loss']:.4f}",
                f"{top['eigenvalue']:.4g} ± {top['residual']:.1g}{mark}",
                f"{rise['mean']:.4g} ± {rise['sd']:.2g}",
            ]
        )
    split, samples = found[0]["split"], found[0]["samples"]
    radius = found[0]["sharpness"]["radius"]
    head = ["run", "algorithm", "round", f"loss ({samples} {split} samples)", "largest Hessian eigenvalue ± residual"]
    return markdown([*head, f"sharpness at radius {radius:g} ± sd"], rows)
