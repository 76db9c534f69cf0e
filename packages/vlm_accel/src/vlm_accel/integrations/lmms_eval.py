"""lmms-eval with accelerated models: ``lmms-eval --model accel_qwen2_5_vl --model_args pretrained=DIR,accel=keep3``.

The harness finds the models through the entry point ``lmms_eval.models`` (LightVLM 7.3); nothing of it is imported
before it asks. It is no dependency of ours: ``pip install lmms-eval`` beside this package.

Each class is the harness's own chat class with ``generate_until`` inside ``accelerate``. Extra model_args:

* ``accel``: name of a preset (keep35, keep3, ov_image, ...) or a method (lightvlm, recycle+snapkv, ...);
* ``accel_ratio``, ``accel_schedule``, ``kv`` (``ratio:0.5``; further options after ``;``: ``uniform:512;scope=image``),
  ``accel_seed``.

Batches of any size are padded on the left, which is what ``accelerate`` wants. ``loglikelihood`` is refused: the
harness's classes compute it from ``labels``, and with fewer rows than labels no loss can be trusted.
"""

from __future__ import annotations

import importlib
from typing import Any

from polymodal.errors import UserError

__all__ = ["BASES", "accelerated_class", "manifests"]

#: model id of ours -> the harness's chat class
BASES = {
    "accel_qwen2_5_vl": "lmms_eval.models.chat.qwen2_5_vl:Qwen2_5_VL",
    "accel_qwen3_vl": "lmms_eval.models.chat.qwen3_vl:Qwen3_VL",
    "accel_internvl_hf": "lmms_eval.models.chat.internvl_hf:InternVLHf",
    "accel_llava_hf": "lmms_eval.models.chat.llava_hf:LlavaHf",
    "accel_huggingface": "lmms_eval.models.chat.huggingface:Huggingface",
}


def manifests() -> list[Any]:
    """What the entry point hands to the harness: one ModelManifest a model."""
    from lmms_eval.models import ModelManifest

    return [ModelManifest(model_id=name, chat_class_path=f"{__name__}.{name}") for name in BASES]


def accelerated_class(base: type[Any]) -> type[Any]:
    """A subclass of a harness class whose ``generate_until`` runs accelerated.

    Args:
        base: has ``generate_until(requests)`` and keeps its transformers model in ``_model`` (or ``model``).
    """

    class Accelerated(base):
        """The harness's class inside ``accelerate``."""

        is_simple = False

        def __init__(
            self,
            *args: Any,
            accel: str = "keep35",
            accel_ratio: float | None = None,
            accel_schedule: str | None = None,
            kv: str | None = None,
            accel_seed: int = 0,
            **options: Any,
        ) -> None:
            # Checked before weights are loaded.
            self.accel_settings = _settings(accel, accel_ratio, accel_schedule, kv, accel_seed)
            super().__init__(*args, **options)
            self.accel_stats: dict[str, float] = {}

        def generate_until(self, requests: Any, *args: Any, **options: Any) -> Any:
            """The base class's answers, accelerated; ``accel_stats`` holds the figures of the last batch."""
            from vlm_accel.accelerate import accelerate

            method, settings = self.accel_settings
            with accelerate(_unwrapped(self), method, **settings) as handle:
                answers = super().generate_until(requests, *args, **options)
                self.accel_stats = handle.stats
            return answers

        def loglikelihood(self, requests: Any, *args: Any, **options: Any) -> Any:
            """Refused, see the module."""
            raise UserError(
                "loglikelihood needs labels for every row of the prompt, and accelerated models have fewer rows; "
                "use a generate_until task"
            )

    Accelerated.__name__ = Accelerated.__qualname__ = f"Accelerated{base.__name__}"
    return Accelerated


def __getattr__(name: str) -> Any:
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, cls = BASES[name].partition(":")
    made = accelerated_class(getattr(importlib.import_module(module), cls))
    globals()[name] = made
    return made


def _settings(
    accel: str, ratio: float | None, schedule: str | None, kv: str | None, seed: int
) -> tuple[str, dict[str, Any]]:
    """(method, options of ``accelerate``) from what model_args give; UserError for what does not exist."""
    from vlm_accel import methods
    from vlm_accel.budget import KVBudget
    from vlm_accel.presets import PRESETS, find_preset

    settings: dict[str, Any] = {"seed": int(seed)}
    if accel in PRESETS:
        method = find_preset(accel).method
        settings["schedule"] = accel
    else:
        method = accel
        for name in accel.split("+"):
            methods.METHODS.info(name.strip())
        settings |= {"schedule": schedule, "ratio": None if ratio is None else float(ratio)}
    if kv is not None:
        settings["kv"] = KVBudget.parse(str(kv).replace(";", ","))
    return method, settings


def _unwrapped(harness: Any) -> Any:
    """The transformers model of a harness class, without a distributed wrapper."""
    model = getattr(harness, "_model", None)
    model = model if model is not None else harness.model
    return getattr(model, "module", model)
