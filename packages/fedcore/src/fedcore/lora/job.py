"""Adapters in a run: from options to models of each rank, the base under them, what a resumed run must agree with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from polymodal.files import write_bytes
from safetensors.torch import save
from torch import Tensor, nn

from fedcore.lora.adapter import (
    AdapterFolder,
    export_plain,
    inner_prefix,
    load_adapter,
    merged_state,
    read_adapter,
    save_adapter,
    trained_whole,
)
from fedcore.lora.injection import head_parameters, inject
from fedcore.lora.pretrain import pretrain
from fedcore.lora_settings import LoraConfig
from fedcore.tasks import as_task

if TYPE_CHECKING:
    from fedcore.algorithm import Algorithm
    from fedcore.simulation import Simulation

__all__ = [
    "BASE",
    "adapted",
    "describe",
    "export",
    "facts_of",
    "keep_base",
    "prepare_base",
    "refuse_other_adapters",
]

BASE = "base.safetensors"
"""file of a run folder with the weights of a base that the run trained itself"""
log = logging.getLogger(__name__)


# ------------------------------------------------------------------ models of each rank


def adapted(
    model: nn.Module, lora: LoraConfig, algorithm: Algorithm, num_clients: int, seed: int = 0
) -> tuple[Callable[[int], nn.Module], list[int]]:
    """Models with adapters by rank, and the rank of each client.

    Args:
        model: the base; stays as it is. What is frozen in all ranks alike shares its memory.
        lora: ranks, targets, start.
        algorithm: chooses the start where ``init`` is ``auto`` (``default_init``, else ``kaiming``).
        num_clients: N; ranks are repeated in turn.
        seed: root seed of the run, for random starts.

    Returns:
        ``rank -> module``, and N ranks.

    Raises:
        UserError: unequal ranks with a method that averages models of one shape; an adapter to start from that is of
            another base; later, from the function, what ``inject`` refuses.
    """
    start = _start(model, lora)
    given = lora.ranks or ([start.common_rank()] if start is not None else [])
    ranks = [given[i % len(given)] for i in range(num_clients)]
    if len(set(ranks)) > 1 and not algorithm.adapters:
        raise UserError(
            f"{type(algorithm).__name__} averages models of one shape, not of ranks {_list(sorted(set(ranks)))}; give "
            "one rank, or a method for unequal ranks, e.g. --algorithm ilora (all: --list-methods)"
        )
    init: Any = getattr(algorithm, "default_init", "kaiming") if lora.init == "auto" else lora.init
    targets: Sequence[str] = lora.targets
    head: Sequence[str] = lora.head
    if start is not None:
        prefix = inner_prefix(model)
        init, targets = "kaiming", [prefix + layer for layer in start.layers]
        head = head or list(dict.fromkeys(prefix + name.rpartition(".")[0] for name in start.whole))

    def made(rank: int) -> nn.Module:
        module = inject(
            model,
            rank,
            targets=targets,
            head=head,
            scaling=lora.scaling_of(rank),
            dropout=lora.dropout,
            init=init,
            init_rms=lora.init_rms,
            seed=seed,
        )
        _share(module, model)
        if start is not None:
            load_adapter(module, start)
        return module

    return made, ranks


def _start(model: nn.Module, lora: LoraConfig) -> AdapterFolder | None:
    """The adapter to start from.

    Raises:
        UserError: not to be read, of another base, or at odds with the options.
    """
    if lora.adapter is None:
        return None
    if lora.init not in ("auto", "kaiming"):
        raise UserError(f"lora.init={lora.init} would replace the factors of lora.adapter; leave one of them out")
    start = read_adapter(lora.adapter)
    start.check(model)
    for target in lora.targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in start.layers):
            raise UserError(
                f"lora.targets {target}: the adapter {start.path} has {next(iter(start.layers))} and the like, no such "
                "layer; leave the targets out to take its own"
            )
    other = [n for n in start.layers if lora.targets and not any(f".{n}".endswith(f".{t}") for t in lora.targets)]
    if other:
        raise UserError(
            f"the adapter {start.path} also adapts {other[0]}, which is none of lora.targets; leave the targets out"
        )
    return start


def _share(module: nn.Module, model: nn.Module) -> None:
    """Let frozen parameters that no method moves use the memory of the base: one copy for all ranks."""
    own = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        plain = own.get(name.replace(".base_layer.", "."))
        if not parameter.requires_grad and plain is not None and not name.endswith("base_layer.weight"):
            parameter.data = plain.data


# ------------------------------------------------------------------ the base


def prepare_base(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    samples: Any,
    lora: LoraConfig,
    *,
    seed: int,
    stored: Path | None = None,
) -> None:
    """Train the base on samples of its own, where the options ask for that; its head becomes new again.

    Args:
        model: changed in place.
        loss: of plain models.
        samples: see ``ClientData``; None: nothing is trained.
        lora: options.
        seed: root seed of the run.
        stored: weights that a run kept; where the file is there, they are taken instead of trained again.

    Raises:
        UserError: stored weights of another model, or a loss that is not finite.
    """
    if samples is None or not lora.pretrains:
        return
    if stored is not None and stored.is_file():
        _load_base(model, stored)
        return
    pretrain(as_task(model, loss), samples, lora, head_parameters(model, lora.head), seed=seed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def keep_base(folder: Path, model: nn.Module) -> None:
    """Write the weights of a base into the run folder, unless they are there: a resumed run takes them as they are."""
    if not (folder / BASE).is_file():
        content = {name: value.detach().cpu().contiguous() for name, value in _tensors(model).items()}
        write_bytes(folder / BASE, save(content, {"format": "pt"}))


@torch.no_grad()
def _load_base(model: nn.Module, path: Path) -> None:
    from polymodal.weights import load_tensors

    stored, own = load_tensors(path, strip=""), _tensors(model)
    if stored.keys() != own.keys() or any(stored[name].shape != value.shape for name, value in own.items()):
        raise UserError(f"{path} holds the base of another model; leave the options of model out, or start a new run")
    for name, value in own.items():
        value.copy_(stored[name])


# ------------------------------------------------------------------ what is known of it


def facts_of(simulation: Simulation, lora: LoraConfig, model: nn.Module) -> dict[str, Any]:
    """What the manifest says of the adapters; a resumed run must agree.

    Args:
        simulation: with adapters.
        lora: options.
        model: the base.
    """
    kinds = sorted(set(simulation.ranks))
    return {
        "ranks": lora.ranks or kinds,
        "layers": [info.layer for info in simulation.learner.spec.adapters],
        "head": trained_whole(simulation.learner.task.module),
        "scaling": [lora.scaling_of(rank) for rank in kinds],
        "init": lora.init if lora.adapter is None else "adapter",
        "dropout": lora.dropout,
        "base": _hash(model),
    }


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in _tensors(model).items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


OPTION = {
    "ranks": "lora.ranks",
    "layers": "lora.targets",
    "head": "lora.head",
    "scaling": "lora.scaling",
    "init": "lora.init",
    "dropout": "lora.dropout",
}


def refuse_other_adapters(folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """UserError where a run goes on with other adapters than it has.

    Args:
        folder: the run.
        before: ``facts_of`` in its manifest; None: it has no adapters.
        now: of this command.
    """
    if (before is None) != (now is None):
        there = "without adapters" if before is None else f"with adapters of ranks {_list(before['ranks'])}"
        raise UserError(f"--resume {folder}: a run {there}; leave the options of lora out to continue it")
    if before is None or now is None:
        return
    for key, option in OPTION.items():
        old, new = _list(before.get(key)), _list(now.get(key))
        if old != new:
            raise UserError(
                f"--resume {folder}: a run with {option} {old}, not {new}; leave that option out to continue it, or "
                "--resume to start a new run"
            )
    if before.get("base") != now.get("base"):
        raise UserError(
            f"--resume {folder}: the base under its adapters has other weights now; give the model it was started with"
        )


def _list(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def describe(simulation: Simulation) -> str:
    """Ranks, adapted layers and trained parameters, for ``--dry-run``."""
    spec, module = simulation.learner.spec, simulation.learner.task.module
    kinds = sorted(set(simulation.ranks))
    layers = [info.layer for info in spec.adapters]
    shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return (
        f"{'rank' if len(kinds) == 1 else 'ranks'} {_list(kinds)} on {len(layers)} layers ({shown}); trained whole: "
        f"{', '.join(trained_whole(module)) or 'nothing'}; {spec.numel:,} parameters are trained at rank {kinds[-1]}"
    )


# ------------------------------------------------------------------ what a run leaves


def export(folder: Path, module: nn.Module, original: nn.Module, base: str | None) -> str:
    """Write what was trained for use outside of this package.

    ``adapter/`` in PEFT's layout where the adapters, with all that the run added to the base, are exactly a plain LoRA
    of the original model; ``merged/`` with the weights of the plain model where they are not.

    Args:
        folder: of the run.
        module: the largest model, with the weights that were tested.
        original: the base.
        base: where others have it, if they do; a base that the run trained lies in its folder.

    Returns:
        What was written where, in one line.

    Raises:
        UserError: disk full or folder not writable.
    """
    plain = export_plain(module, original)
    if plain is not None:
        save_adapter(folder / "adapter", module, plain, base)
        ranks = sorted({item.rank for item in plain.values()})
        on = f", on {folder / BASE}" if (folder / BASE).is_file() else ""
        return f"{folder / 'adapter'} (PEFT, plain LoRA of rank {_list(ranks)}{on})"
    where = folder / "merged"
    where.mkdir(exist_ok=True)
    write_bytes(where / "model.safetensors", save(merged_state(module), {"format": "pt"}))
    config = getattr(getattr(module, "model", None), "config", None)
    if inner_prefix(module) and config is not None:
        config.save_pretrained(where)
    return f"{where} (merged weights: the base moved too far for adapters of low rank)"
