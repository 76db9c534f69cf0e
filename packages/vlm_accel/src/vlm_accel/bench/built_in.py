"""The built-in model, ready to use: trained at first use, then read from the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError
from polymodal.paths import cache_dir
from polymodal.seeding import derive

from vlm_accel.bench import world
from vlm_accel.bench.settings import BenchConfig

if TYPE_CHECKING:
    from PIL.Image import Image
    from polymodal.run import Run

    from vlm_accel.loading import VisionLanguageModel

__all__ = ["ANSWER", "built_in_model", "cached_folder", "example", "example_answer", "train_built_in"]

_log = logging.getLogger(__name__)
_VERSION = 1
"""of the training: another one trains anew"""
ANSWER = world.ANSWER
_DEFAULT = "describe"


def cached_folder(config: BenchConfig) -> Path:
    """Where the model of this seed, world and training is, or will be."""
    trainer = config.trainer
    facts = {
        "version": _VERSION, "seed": config.seed, "world": asdict(config.built_in.world), "lr": config.built_in.lr,
        "batch_size": config.built_in.batch_size, "epochs": trainer.max_epochs, "steps": trainer.max_steps,
        "clip": trainer.clip_grad, "fingerprint": world.fingerprint(config.built_in.world),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir("vlm_accel", "models") / f"digits-{key}"


def is_cached(config: BenchConfig) -> bool:
    """Whether the model is there."""
    return (cached_folder(config) / "config.json").is_file()


def train_built_in(config: BenchConfig, run: Run) -> None:
    """Train the model in ``run`` and put it into the cache; another process doing the same does no harm.

    Raises:
        UserError: the cache cannot be written.
    """
    from polymodal.trainer import fit, load_best

    from vlm_accel.bench.module import CanvasData, DigitReader

    began = time.monotonic()
    module = DigitReader(config.built_in, config.seed)
    data = CanvasData(config.built_in, config.seed)
    fit(module, data, config.trainer, run, monitor="val/accuracy")
    load_best(module, run)
    _store(module.vlm.eval(), cached_folder(config))
    _log.info("the built-in model was trained in %.0f s", time.monotonic() - began)


def _store(model: Any, folder: Path) -> None:
    from vlm_accel.bench.model import save_vlm

    _no_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(
            f"the built-in model cannot be kept in {folder.parent} ({error.strerror}); choose another folder with the "
            "environment variable POLYMODAL_CACHE"
        ) from error
    try:
        save_vlm(model, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, with the same model
                raise
    except OSError as error:
        raise UserError(f"the built-in model cannot be written to {temporary} ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _no_bars() -> None:
    """No progress bars of transformers for a file of 1.3 MB."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def built_in_model(config: BenchConfig | None = None, attn: str = "sdpa") -> VisionLanguageModel:
    """The model with its processor; trained first (a run folder under ``runs``), where it is not in the cache.

    Args:
        config: of the bench; default: the bench's own defaults.
        attn: attention implementation.
    """
    config = config or BenchConfig()
    if not is_cached(config):
        from polymodal.run import Run

        _log.info("training the built-in model, about two minutes, once (kept in %s)", cached_folder(config).parent)
        with Run.start("vlm_accel", config, name="built-in", data=describe(config)) as run:
            train_built_in(config, run)
            run.finish({})
    return load_built_in(config, attn)


def load_built_in(config: BenchConfig, attn: str = "sdpa") -> VisionLanguageModel:
    """The model from the cache."""
    from vlm_accel.loading import load_model

    _no_bars()
    return load_model(cached_folder(config), "float32", "cpu", attn)


def describe(config: BenchConfig) -> dict[str, Any]:
    """Name and fingerprint of the built-in world."""
    return {"name": "digits", "fingerprint": world.fingerprint(config.built_in.world)}


def example(seed: int = 0, question: str = "") -> tuple[str, Image]:
    """A question, and a test canvas.

    Args:
        seed: chooses the canvas.
        question: left, right, both or describe (with or without the question mark); default: describe.

    Raises:
        UserError: a question that the model has not learnt.
    """
    from PIL import Image

    kind = question.rstrip("? ").strip().lower() or _DEFAULT
    if kind not in world.KINDS:
        raise UserError(f"the built-in model has not learnt {question!r}; it knows: {', '.join(world.KINDS)}")
    drawn = _drawn(seed, kind)
    return f"{kind} ?", Image.fromarray(np.repeat(drawn.canvas[0][..., None], 3, axis=2))


def example_answer(seed: int = 0, kind: str = _DEFAULT) -> str:
    """The right answer about the canvas of ``example``."""
    ids = _drawn(seed, kind).answer[0]
    return " ".join(world.VOCABULARY[i] for i in ids.tolist() if i not in (world.EOS, world.PAD))


def _drawn(seed: int, kind: str) -> world.Samples:
    number = derive(seed, "example") % 10_000
    return world.draw_samples(world.WorldOptions(), "test", np.array([number]), np.array([world.KINDS.index(kind)]))
