"""A network from whatever css-train left behind: run folder, step folder, weight file or Lightning checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.errors import UserError

from css.methods import METHODS
from css.methods.base import Method
from css.models.build import build_network
from css.models.network import CSSNet
from css.settings import NetworkConfig
from css.steps import META_VERSION, checked_meta, load_weights
from css.task import Task

__all__ = ["Loaded", "load_network", "network_of"]


@dataclass
class Loaded:
    """A trained network with its history.

    Args:
        net: network in eval mode.
        meta: metadata of the file: task, order, step, class names, method, network, crop, data.
        method: the method that trained it; its ``predict`` is the prediction rule.
        path: the file it came from.
    """

    net: CSSNet
    meta: dict[str, Any]
    method: Method
    path: Path

    @property
    def task(self) -> Task:
        """The continual task."""
        return Task(self.meta["task"], self.meta["num_classes"], tuple(self.meta["order"]))


def load_network(path: Path) -> Loaded:
    """Read a network.

    Args:
        path: run folder (its last finished step), step folder, ``weights.safetensors`` or a ``.ckpt`` file.

    Raises:
        UserError: nothing there, a damaged or foreign file, or one of a newer version.
    """
    file = _file_of(Path(path).expanduser())
    if file.suffix == ".ckpt":
        state, meta = _from_checkpoint(file)
    else:
        state, meta = load_weights(file)
    method = METHODS.create(meta["method"], **meta["method_options"])
    net = network_of(meta, method)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        what = what if len(what) < 200 else f"{what[:200]} …"  # it lists every tensor
        raise UserError(f"{file}: weights do not fit the network they name; take another file ({what})") from error
    return Loaded(net.eval(), meta, method, file)


def network_of(meta: dict[str, Any], method: Method) -> CSSNet:
    """The network that metadata describe, with random weights."""
    known = {field.name for field in dataclasses.fields(NetworkConfig)}
    settings = {key: value for key, value in meta["network"].items() if key in known}
    config = NetworkConfig(**{**settings, "weights": None})  # the file has all weights
    return build_network(config, meta["channels"], method=method)


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "weights.safetensors").is_file():
        return path / "weights.safetensors"
    finished = sorted(path.glob("steps/*/done.json"))
    if finished:
        return finished[-1].with_name("weights.safetensors")
    if (path / "checkpoints" / "last.ckpt").is_file():
        return path / "checkpoints" / "last.ckpt"
    raise UserError(f"{path}: no finished step and no checkpoint there; give a run folder or file of css-train")


def _from_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from polymodal.callbacks import load_checkpoint

    checkpoint = load_checkpoint(file)
    meta = checkpoint.get("css")
    if not meta:
        raise UserError(f"{file} is no checkpoint of css-train")
    state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    return state, checked_meta({"schema_version": META_VERSION, **meta}, file)
