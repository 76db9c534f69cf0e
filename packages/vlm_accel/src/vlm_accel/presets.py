"""Published and own settings by name (iLLaVA 3.9, LightVLM 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from polymodal.errors import UserError, did_you_mean

from vlm_accel.budget import KVBudget
from vlm_accel.schedule import Schedule, Step, pyramid

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True)
class Preset:
    """A named setting.

    Args:
        method: the method it was published with.
        schedule: its steps.
        kv: its cache budget; None: the cache is left alone.
        source: where it stands.
    """

    method: str
    schedule: Schedule
    kv: KVBudget | None = None
    source: str = ""


PRESETS: dict[str, Preset] = {
    "keep35": Preset("lightvlm", pyramid(0.35), None, "LightVLM, 35 % (layers, ratios: reconstruction)"),
    "keep3": Preset("lightvlm", pyramid(0.03), KVBudget.ratio(0.5), "LightVLM, 3 % (layers, ratios: reconstruction)"),
    "ov_image": Preset(
        "rank1",
        [*(Step("vision", layer, drop=92) for layer in (5, 6, 7, 8)), Step("llm", 8, ratio=0.70)],
        None,
        "iLLaVA code 2025, LLaVA-OneVision, images",
    ),
}


def find_preset(name: str) -> Preset:
    """The preset called ``name`` (UserError with the list otherwise)."""
    if name in PRESETS:
        return PRESETS[name]
    raise UserError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}known: {', '.join(PRESETS)}")
