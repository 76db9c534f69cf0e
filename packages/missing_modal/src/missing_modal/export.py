"""A trained model as a small file: ``trainable`` to go on with, ``baked`` for use (DCP 9).

Both are safetensors files without the encoders, which are named by their hashes. What a file holds, the exporting
object has too, bit for bit: ``export`` returns the model as it will be read back, rounded to the stored format.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from polymodal.errors import UserError
from polymodal.files import write_bytes
from torch import Tensor

from missing_modal.backbones.base import Tower, state_hash
from missing_modal.calibration import Temperatures
from missing_modal.classifier import Classifier
from missing_modal.fused import FusedClassifier, build_classifier
from missing_modal.methods import METHODS
from missing_modal.methods.dcp import DCPPrompter
from missing_modal.prompts import BakedPrompts, PromptTables

if TYPE_CHECKING:
    from missing_modal.batch import Batch

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "Exported",
    "Model",
    "check_towers",
    "export",
    "largest_difference",
    "load",
    "read",
    "write_exports",
]

Model: TypeAlias = Classifier | FusedClassifier
FORMAT_VERSION = 1
"""Of the files; a newer one is refused."""
KINDS = {
    "trainable": "everything that is trained, to go on with",
    "baked": "prompts as tables, for use",
}
_KEY = "missing_modal"
_PROMPTS = "prompter.prompts."
_FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_NEEDED = ("method", "method_options", "modalities", "task", "class_names", "backbone")
_AGAIN = "export the model again"


@dataclass(frozen=True)
class Exported:
    """A model read from a file.

    Args:
        model: in eval mode, on the CPU; of a ``baked`` file nothing is trainable.
        about: what the file says of itself: kind, method and options, modalities, task, class names, encoders.
        temperatures: by pattern, as fitted on the validation split (1 where there was no calibration).
    """

    model: Model
    about: dict[str, Any]
    temperatures: Temperatures


# ------------------------------------------------------------------ writing


def export(
    path: Path,
    model: Model,
    about: Mapping[str, Any],
    *,
    kind: str,
    dtype: str = "float32",
    temperatures: Temperatures | None = None,
) -> Model:
    """Write a model.

    Frozen copies of norms and projections are left out: they come with the encoders.

    Args:
        path: the file; its folder is made.
        model: trained; on any device. It is not changed.
        about: method, method_options, modalities, task, class_names and backbone (modality -> identity and sha256, as
            in a checkpoint's ``missing_modal``); further plain data is kept.
        kind: ``trainable`` or ``baked``. A method without generators of its own is baked as it is.
        dtype: number format of the file: float32, float16, bfloat16, or float64.
        temperatures: by pattern; None: the model was not calibrated.

    Returns:
        The model as ``load`` will give it, bit for bit: on the CPU, rounded to ``dtype``, computing as ``model`` does.

    Raises:
        UserError: an unknown kind or format, a value that the format cannot hold, or ``trainable`` of a baked model.
    """
    if kind not in KINDS:
        raise UserError(f"export kind {kind!r}; expected one of {', '.join(KINDS)}")
    if dtype not in _FORMATS:
        raise UserError(f"export format {dtype!r}; expected one of {', '.join(_FORMATS)}")
    lacking = [key for key in _NEEDED if key not in about]
    if lacking:
        raise ValueError(f"about lacks {', '.join(lacking)}")
    from safetensors.torch import save

    shown, tensors = _stored(model, kind)
    tensors = {name: _rounded(name, value, _FORMATS[dtype]) for name, value in tensors.items()}
    header = {
        **about,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "stored": dtype,
        "computed": str(_computes_in(shown)).removeprefix("torch."),
        "temperatures": None if temperatures is None else temperatures.to_json(),
    }
    if temperatures is not None and temperatures.rows:
        header["calibrated_on"] = sum(temperatures.rows.values())
    prompts = getattr(shown.prompter, "prompts", None)
    if isinstance(prompts, BakedPrompts):
        header["baked"] = {"counts": prompts.counts, "masks": prompts.masks}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, {_KEY: json.dumps(header)}))
    _fill(shown, tensors, path)
    return shown


def _computes_in(model: Model) -> torch.dtype:
    """Number format of the trained parts."""
    return next(model.head.parameters()).dtype


def _stored(model: Model, kind: str) -> tuple[Model, dict[str, Tensor]]:
    """A copy of the model as the file will have it, on the CPU, and the tensors that go into the file."""
    shown = _copied(model)
    frozen = _of_the_towers(shown)
    if kind == "trainable":
        if isinstance(getattr(model.prompter, "prompts", None), BakedPrompts):
            raise UserError("baked prompts cannot be trained; export trainable from the run folder or its checkpoint")
    elif isinstance(shown.prompter, DCPPrompter):
        dtype = _computes_in(shown)
        # Products of weights in float64: the tables of float32 weights are then right to their last bit but one.
        shown.prompter = shown.prompter.double().bake().to(dtype)
    if kind == "baked":
        shown.requires_grad_(False)
    tensors = {name: value.detach() for name, value in shown.state_dict().items() if name not in frozen}
    return shown.eval(), tensors


def _of_the_towers(model: Model) -> set[str]:
    """Names of norms and projections that are frozen and just as in the encoders."""
    found = set()
    for place, spec in enumerate(model.context.towers):
        for part, value in model.prompter.outputs[place].named_parameters():
            original: Tensor = getattr(spec, part).to("cpu", value.dtype)
            if not value.requires_grad and torch.equal(value, original):
                found.add(f"prompter.outputs.{place}.{part}")
    return found


def _copied(model: Model) -> Model:
    """A copy on the CPU that shares the encoders, which are no submodules and are never changed."""
    memo = {id(tower): tower for tower in model.towers}
    return copy.deepcopy(model, memo).cpu()


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as it is stored; what is no number with a point stays as it is."""
    value = value.cpu().contiguous().clone()
    if not value.is_floating_point():
        return value
    stored = value.to(dtype)
    if not torch.isfinite(stored).all():
        reason = "is not finite" if not torch.isfinite(value).all() else f"is too large for {dtype}"
        raise UserError(f"{name} {reason}; export as float32, or train with a lower rate")
    return stored


def _fill(model: Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put the stored tensors in, in the number format that the model computes in."""
    try:
        result = model.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[-1].split())[:200]
        raise UserError(f"{path} does not fit the method that it names ({reason}); {_AGAIN}") from error
    frozen = {name for name, value in model.named_parameters() if name.startswith("prompter.outputs.")}
    lacking = [name for name in result.missing_keys if name not in frozen]
    if lacking or result.unexpected_keys:
        name = (lacking or result.unexpected_keys)[0]
        what = "lacks" if lacking else "has an unknown tensor"
        raise UserError(f"{path} {what} {name}; {_AGAIN}")


# ------------------------------------------------------------------ reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its tensors as stored.

    Raises:
        UserError: a missing, damaged or foreign file, or one of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; give an exported model (trainable.safetensors, baked.safetensors)")
    try:
        with safe_open(path, "pt") as handle:
            text = (handle.metadata() or {}).get(_KEY)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}); {_AGAIN}") from error
    if text is None:
        raise UserError(
            f"{path} is no exported model of missing_modal; give trainable.safetensors or baked.safetensors"
        )
    try:
        about = json.loads(text)
        version, lacking = about["format_version"], [key for key in (*_NEEDED, "kind", "stored") if key not in about]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its header cannot be read; {_AGAIN}") from error
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: format version {version} is newer than {FORMAT_VERSION}; update missing_modal")
    if lacking:
        raise UserError(f"{path}: its header lacks {', '.join(lacking)}; {_AGAIN}")
    return about, tensors


def check_towers(about: Mapping[str, Any], towers: Sequence[Tower], where: Path | str) -> None:
    """Whether these are the encoders that prompts were trained on.

    Args:
        about: header of a file, or ``missing_modal`` of a checkpoint.
        towers: on the CPU in the number format they were read in, in the order of the modalities.
        where: the file, for messages.

    Raises:
        UserError: other modalities, or other weights.
    """
    names = [tower.spec.name for tower in towers]
    if names != list(about["modalities"]):
        raise UserError(
            f"{where} was trained on {', '.join(about['modalities'])}, the encoders are {', '.join(names)}; give the "
            "encoders of the training"
        )
    for tower in towers:
        before, now = about["backbone"].get(tower.spec.name) or {}, state_hash(tower)
        if before.get("sha256") != now:
            raise UserError(
                f"{where} belongs to other {tower.spec.name} weights ({before.get('identity')}, sha256 "
                f"{str(before.get('sha256'))[:12]}) than those given ({tower.identity}, {now[:12]}); give the weights "
                "it was trained with (--backbone, --backbone.weights)"
            )


def load(path: Path, towers: Sequence[Tower]) -> Exported:
    """Read a model.

    Args:
        path: file of ``export``.
        towers: the encoders that it was trained with, as they are read from their own file. For a model that computes
            in float64 they are brought to it.

    Returns:
        The model that ``export`` returned, bit for bit.

    Raises:
        UserError: a file that cannot be read or does not fit, or other encoders.
    """
    about, tensors = read(path)
    check_towers(about, towers, path)
    method = METHODS.create(about["method"], **about["method_options"])
    model = build_classifier(towers, method, len(about["class_names"]))
    computed = _FORMATS.get(about.get("computed", "float32"), torch.float32)
    if "baked" in about:
        # The prompter that the method builds gives the outer shell; its generators are not needed.
        model.prompter = _baked(model, about["baked"], tensors, path)
    model.to(computed)
    _fill(model, tensors, path)
    if about["kind"] == "baked":
        model.requires_grad_(False)
    if computed is torch.float64:
        for tower in towers:
            tower.to("cpu", computed)
    names, stored = model.context.modalities, about.get("temperatures")
    temperatures = Temperatures({}, 1.0, names) if stored is None else Temperatures.from_json(stored, names)
    return Exported(model.eval(), about, temperatures)


def _baked(model: Model, layout: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> DCPPrompter:
    """A prompter with the tables of a file, in the number format of the file."""
    shell = model.prompter
    if not isinstance(shell, DCPPrompter):
        raise UserError(f"{path}: tables of prompts, but its method has none; {_AGAIN}")
    every = range(len(model.towers))

    def stored(name: str, place: int) -> Tensor | None:
        return tensors.get(f"{_PROMPTS}{name}_{place}")

    maps = []
    for place in every:
        matrix, shift = stored("matrix", place), stored("shift", place)
        maps.append(None if matrix is None or shift is None else (matrix, shift))
    deep = [stored("deep", place) for place in every]
    tables = PromptTables(
        [[] if rows is None else list(rows) for rows in deep],
        [stored("common", place) for place in every],
        [stored("probe", place) for place in every],
    )
    try:
        prompts = BakedPrompts([int(n) for n in layout["counts"]], [int(m) for m in layout["masks"]], tables, maps)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its header cannot be read; {_AGAIN}") from error
    baked = DCPPrompter(model.context, prompts, blind=shell.blind)
    baked.outputs = shell.outputs
    return baked


# ------------------------------------------------------------------ both, at the end of a training


def largest_difference(one: Model, other: Model, batches: Iterable[Batch]) -> float:
    """Largest difference of two models' logits over some batches."""
    found = 0.0
    with torch.inference_mode():
        for batch in batches:
            difference = (one(batch).double() - other(batch).double()).abs().max()
            found = max(found, float(difference))
    return found


def write_exports(
    folder: Path,
    model: Model,
    about: Mapping[str, Any],
    temperatures: Temperatures | None = None,
    *,
    trainable: str = "float32",
    baked: str = "float16",
    batches: Sequence[Batch] = (),
) -> list[str]:
    """Write both files, ``trainable.safetensors`` and ``baked.safetensors``.

    Args:
        folder: of the files.
        model: trained, with its encoders on the CPU where ``batches`` are given.
        about: see ``export``.
        temperatures: by pattern.
        trainable: number format of the one.
        baked: number format of the other.
        batches: on the CPU; what rounding and baking change in their logits is told.

    Returns:
        A line for each file: path, size and, with batches, the largest difference of a logit.
    """
    lines = []
    for kind, dtype in (("trainable", trainable), ("baked", baked)):
        path = folder / f"{kind}.safetensors"
        shown = export(path, model, about, kind=kind, dtype=dtype, temperatures=temperatures)
        told = f"{path}: {dtype}, {path.stat().st_size / 1e6:.2f} MB"
        if batches:
            told += f", logits differ by at most {largest_difference(model.eval(), shown, batches):.1e}"
        lines.append(told)
    return lines
