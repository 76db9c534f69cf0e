"""The folder of a finished step: weights with what they belong to, confusion, report; its presence means done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.errors import UserError
from polymodal.files import write_bytes, write_json

__all__ = ["META_VERSION", "load_weights", "reopen_steps", "save_weights", "step_done", "step_folder", "write_done"]

META_VERSION = 1
"""Schema of the metadata in weight files and step folders; a newer one is refused."""

_AGAIN = "css-train --resume then trains the step again"


def step_folder(run_folder: Path, step: int) -> Path:
    """Folder of a step, ``steps/00`` and on."""
    return run_folder / "steps" / f"{step:02d}"


def step_done(run_folder: Path, step: int) -> dict[str, Any] | None:
    """What ``done.json`` of a step says, or None where the step is not finished."""
    path = step_folder(run_folder, step) / "done.json"
    if not path.is_file():
        return None
    try:
        done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, {_AGAIN}") from error
    return done


def reopen_steps(run_folder: Path, first: int) -> list[int]:
    """Mark ``first`` and all later steps as not finished, because ``first`` is trained again and they grew from it.

    Returns:
        The steps that were finished.
    """
    names = [path.parent.name for path in run_folder.glob("steps/*/done.json")]
    finished = sorted(int(name) for name in names if name.isdigit() and int(name) >= first)
    for step in finished:
        (step_folder(run_folder, step) / "done.json").unlink()
    return finished


def write_done(run_folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Mark a step as finished; written after everything else of the step."""
    write_json(step_folder(run_folder, step) / "done.json", {"schema_version": META_VERSION, "step": step, **facts})


def save_weights(path: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write weights and metadata as one safetensors file.

    Args:
        path: the file; its folder is made.
        state: name -> tensor.
        meta: plain data, stored as JSON under the key ``css``.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes(path, save(tensors, {"css": json.dumps({"schema_version": META_VERSION, **meta})}))


def load_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a file of ``save_weights``.

    Raises:
        UserError: a missing, damaged or foreign file, or one of a newer schema.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; give a run folder of css-train, a step folder, or weights.safetensors")
    try:
        with safe_open(path, "pt") as handle:
            text = (handle.metadata() or {}).get("css")
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({what}); delete the done.json beside it, {_AGAIN}") from error
    if text is None:
        raise UserError(f"{path} holds no network of css-train; give a file that css-train wrote")
    return state, checked_meta(json.loads(text), path)


def checked_meta(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """``meta`` itself.

    Raises:
        UserError: written by a newer version.
    """
    if meta.get("schema_version", 1) > META_VERSION:
        raise UserError(f"{path}: schema version {meta['schema_version']} is newer than this css reads; update it")
    return meta
