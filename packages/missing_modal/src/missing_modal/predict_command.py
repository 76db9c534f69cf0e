"""``mm-predict``: classes of one sample or of the rows of a JSONL file, with or without any of their modalities.

Exit codes: 0 all predicted; 1 some samples could not be read, each named in a line of its own, the others are
predicted; 2 nothing was predicted, and nothing written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError, did_you_mean

from missing_modal.data.base import SPLITS, Sample
from missing_modal.eval_settings import PredictConfig, existing, gather, run_config_of

if TYPE_CHECKING:
    from torch import Tensor

    from missing_modal.checkpoint import Trained
    from missing_modal.predictions import Prediction

__all__ = ["main", "predict", "predict_samples", "samples_of_file", "samples_of_run"]

EXAMPLE = """
mm-predict runs/missing_modal/RUN --image poster.jpg --text "A heist goes wrong."
mm-predict runs/missing_modal/RUN --text "A heist goes wrong."              # the image is missing
mm-predict RUN/export/baked.safetensors --jsonl rows.jsonl --out found.jsonl
mm-predict runs/missing_modal/RUN --sample world-test-00000 --without text  # a sample of the run's data
"""
_FIELDS = ("id", "label", "split", "row")
"""keys of a row that are no modality"""
_ONE = "sample"
"""id of a sample that was given on the command line"""
_NAMED = 20
"""samples that cannot be predicted, of which each gets a line"""


def main() -> int:
    """Entry point of ``mm-predict``; returns the exit code."""
    failed: list[str] = []
    code = command(
        lambda config: failed.extend(predict(config)),
        PredictConfig,
        prog="mm-predict",
        example=EXAMPLE,
        aliases={"backbone": "backbone.name"},
        argv=gather(sys.argv[1:]),
    )
    return code or int(bool(failed))


def predict(config: PredictConfig) -> list[str]:
    """Predict and say what was found.

    Returns:
        Ids of samples that could not be read; each was told in one line.

    Raises:
        UserError: bad options, checkpoint or encoders, nothing to predict, no sample that can be read, or results that
            are there already.
    """
    from polymodal.files import write_text
    from polymodal.seeding import set_threads

    path = existing(config.checkpoint, 'mm-predict CHECKPOINT --image FILE --text "..."')
    _check(config)
    set_threads(config.threads)
    from polymodal.devices import pick_device

    from missing_modal.checkpoint import load_trained

    device = pick_device(config.device)
    trained = load_trained(path, config.backbone)
    samples = _samples(config, trained, path)
    unknown = next((name for name in config.without if name not in trained.modalities), None)
    if unknown is not None:
        raise UserError(
            f"--without {unknown}: no such modality; {did_you_mean(unknown, trained.modalities)}the model has "
            f"{', '.join(trained.modalities)}"
        )
    if set(config.without) >= set(trained.modalities):
        raise UserError(f"--without {' '.join(config.without)} leaves nothing to predict from; keep one of them")
    failed: list[str] = []
    found: list[str] = []
    for number, result in enumerate(predict_samples(trained, samples, config, device)):
        if isinstance(result, UserError):
            if len(samples) == 1:
                raise result
            failed.append(samples[number].id)
            if len(failed) <= _NAMED:
                sys.stderr.write(f"mm-predict: error: {' '.join(str(result).split())}\n")
        elif config.out is not None:
            found.append(json.dumps(result.to_json(), ensure_ascii=False))
        else:
            sys.stdout.write(result.line(config.top) + "\n")
    if len(failed) > _NAMED:
        sys.stderr.write(f"mm-predict: error: {len(failed) - _NAMED} more samples cannot be predicted\n")
    if len(failed) == len(samples):
        raise UserError(f"none of the {len(samples)} samples can be predicted; correct what the lines above name")
    if config.out is not None:
        out = config.out.expanduser()
        write_text(out, "".join(line + "\n" for line in found))
        rest = f", {len(failed)} could not be read" if failed else ""
        sys.stdout.write(f"{out}: {len(found)} of {len(samples)} samples predicted{rest}\n")
    elif config.calibrated and trained.temperatures is None:
        sys.stderr.write("mm-predict: the model was not calibrated; probabilities are as trained\n")
    return failed


def _check(config: PredictConfig) -> None:
    """Options before torch is imported.

    Raises:
        UserError: none or several sources of samples, files that are not there or would be replaced.
    """
    given = [bool(config.inputs), config.jsonl is not None, bool(config.sample)]
    if sum(given) != 1:
        what = "nothing to predict" if not any(given) else "samples from several places"
        raise UserError(f'{what}; give one of: --image FILE --text "..." (or one), --jsonl FILE, --sample ID')
    if config.jsonl is not None and not config.jsonl.expanduser().is_file():
        raise UserError(f"--jsonl {config.jsonl}: no such file; check the path")
    if config.out is not None:
        out = config.out.expanduser()
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out {out}: its folder does not exist; make it first")
        if out.exists() and not config.overwrite:
            raise UserError(f"--out {out} is there already; choose another file, or add --overwrite true")


# ------------------------------------------------------------------ samples


def _samples(config: PredictConfig, trained: Trained, path: Path) -> list[Sample]:
    kinds = _kinds(trained)
    if config.jsonl is not None:
        return samples_of_file(config.jsonl.expanduser(), kinds)
    if config.sample:
        return samples_of_run(config.sample, trained, path)
    for name in config.inputs:
        if name not in kinds:
            raise UserError(f"--{name}: {did_you_mean(name, kinds)}the model has {', '.join(kinds)}")
    return [Sample(_ONE, {name: _given(kind, config.inputs.get(name), name) for name, kind in kinds.items()}, None)]


def _kinds(trained: Trained) -> dict[str, str]:
    """Modality -> how it is decoded."""
    stored: Mapping[str, str] = trained.meta.get("kinds") or {}
    return {name: stored.get(name, name) for name in trained.modalities}


def _given(kind: str, value: str | None, name: str) -> Any:
    """A value of the command line."""
    if value is None or kind == "text":
        return value
    if kind == "tabular" and Path(value).suffix != ".npy":
        try:
            return [float(part) for part in value.split(",")]
        except ValueError as error:
            raise UserError(f"--{name} {value}: expected numbers with commas between, or a .npy file") from error
    path = Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"--{name} {value}: no such file; check the path")
    return path


def samples_of_file(path: Path, kinds: Mapping[str, str]) -> list[Sample]:
    """Samples of a JSONL file, as ``data.manifest`` has them; labels are not looked at, and an id may lack.

    Args:
        path: the file; paths in it start from its folder.
        kinds: modality -> image, text, audio or tabular.

    Raises:
        UserError: a line that is no object, an unknown key, two rows of one id, or no row at all.
    """
    from missing_modal.data.files import jsonl_rows

    found: list[Sample] = []
    seen: dict[str, int] = {}
    allowed = (*_FIELDS, *kinds)
    for number, row in jsonl_rows(path, "rows", "give a file with one object a line"):
        if "schema" in row and not found:
            continue
        for key in row:
            if key not in allowed:
                raise UserError(
                    f"{path}:{number}: unknown key {key!r}; {did_you_mean(key, allowed)}allowed: {', '.join(allowed)}"
                )
        name = str(row.get("id", f"line-{number}"))
        if name in seen:
            raise UserError(f"{path}:{number}: id {name!r} is also that of line {seen[name]}; ids must differ")
        seen[name] = number
        inputs = {key: _value(kind, row.get(key), path, f"{path}:{number}: {key}") for key, kind in kinds.items()}
        found.append(Sample(name, inputs, None))
    if not found:
        raise UserError(f"--jsonl {path}: no rows; write one object a line")
    return found


def _value(kind: str, value: Any, path: Path, where: str) -> Any:
    """A value of a row: a path from the file's folder, a text, numbers."""
    if value is None:
        return None
    if isinstance(value, list):
        if kind == "tabular":
            return value
        import numpy as np

        try:
            array = np.asarray(value)
            return array.astype(np.int64 if kind == "text" else np.float32)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: expected numbers of one shape, found {str(value)[:60]}") from error
    if not isinstance(value, str):
        raise UserError(
            f"{where}: expected {'a text' if kind == 'text' else 'a path'} or null, found {str(value)[:60]}"
        )
    return value if kind == "text" else path.parent / value


def samples_of_run(ids: Sequence[str], trained: Trained, path: Path) -> list[Sample]:
    """Samples of the data that a model was trained and tested on, by their ids.

    Raises:
        UserError: no configuration of the run around the file, or an unknown id.
    """
    config = run_config_of(path)
    if config is None:
        raise UserError(
            f"--sample: no config.yaml of its run around {trained.path} says where the data are; use --jsonl"
        )
    by_id = {sample.id: sample for split in SPLITS for sample in config.data.samples(split)}
    unknown = next((name for name in ids if name not in by_id), None)
    if unknown is not None:
        near = did_you_mean(unknown, by_id)
        raise UserError(
            f"--sample {unknown}: no such sample in {config.data.name}; {near}mm-eval lists those of a split in its "
            "predictions.jsonl"
        )
    return [by_id[name] for name in ids]


# ------------------------------------------------------------------ prediction


def predict_samples(
    trained: Trained, samples: Sequence[Sample], config: PredictConfig, device: str = "cpu"
) -> Iterator[Prediction | UserError]:
    """Predict samples in batches.

    Args:
        trained: the model.
        samples: with what they have; ``config.without`` is taken out.
        config: batch size, calibration.
        device: where to compute.

    Yields:
        In the order of the samples a prediction, or why there is none: a broken file, nothing present.
    """
    from missing_modal.inputs import input_transforms

    transforms = input_transforms(trained.model.towers, _kinds(trained))
    trained.model.to(device)
    for tower in trained.model.towers:
        tower.to(device)
    for start in range(0, len(samples), config.batch_size):
        read = [
            _read(sample, trained, transforms, config.without) for sample in samples[start : start + config.batch_size]
        ]
        rows = [row for row in read if not isinstance(row, UserError)]
        found = iter(_run(trained, rows, config, device))
        for row in read:
            yield row if isinstance(row, UserError) else next(found)


def _read(
    sample: Sample, trained: Trained, transforms: Mapping[str, Any], without: Sequence[str]
) -> tuple[str, int, dict[str, Tensor]] | UserError:
    """Id, pattern and decoded inputs of a sample, or why they cannot be had."""
    inputs: dict[str, Tensor] = {}
    mask = 0
    for bit, name in enumerate(trained.modalities):
        value = None if name in without else sample.inputs.get(name)
        if value is None:
            continue
        try:
            inputs[name] = transforms[name](value)
        except UserError as error:
            return UserError(f"{sample.id}, {name}: {error}")
        mask |= 1 << bit
    if not mask:
        return UserError(f"{sample.id}: no modality is there; give at least one of {', '.join(trained.modalities)}")
    return sample.id, mask, inputs


def _run(
    trained: Trained, rows: Sequence[tuple[str, int, dict[str, Tensor]]], config: PredictConfig, device: str
) -> list[Prediction]:
    """Predictions of decoded samples."""
    import torch

    from missing_modal.datamodule import Row, collate
    from missing_modal.predictions import predictions

    if not rows:
        return []
    batch = collate([Row(name, mask, inputs, None) for name, mask, inputs in rows], trained.modalities, "multiclass")
    with torch.inference_mode():
        logits = trained.model(batch.to(device)).cpu().numpy()
    temperatures = trained.temperatures if config.calibrated else None
    return predictions(batch.ids, logits, batch.masks, trained.meta, temperatures)
