"""Published and own settings by name (iLLaVA 3.9, LightVLM 3.2, 3.6), and the flags of the released iLLaVA code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polymodal.errors import UserError, did_you_mean

from vlm_accel.budget import KVBudget
from vlm_accel.schedule import Schedule, Step, pyramid

__all__ = ["FLAVOURS", "PRESETS", "Preset", "find_preset", "from_official"]


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


def _vision(layers: range, **amount: Any) -> list[Step]:
    return [Step("vision", layer, **amount) for layer in layers]


def _llm(*layers: int, ratio: float) -> list[Step]:
    return [Step("llm", layer, ratio=ratio) for layer in layers]


_CODE_2025 = "iLLaVA code 2025"
#: what is not in the paper that could be read
_OURS = "layers, equal ratios, rule and cache: our reading"

PRESETS: dict[str, Preset] = {
    "ov_image": Preset(
        "rank1",
        [*_vision(range(5, 9), drop=92), *_llm(8, ratio=0.70)],
        source=f"{_CODE_2025}, LLaVA-OneVision, images: 729 patches to 361, then 253",
    ),
    "ov_video": Preset(
        "rank1",
        [*_vision(range(3, 7), drop=92), *_llm(2, ratio=0.70)],
        source=f"{_CODE_2025}, LLaVA-OneVision, 32 frames",
    ),
    "ov_vis": Preset(
        "rank1",
        [*_vision(range(2, 9), drop=80), *_llm(8, ratio=0.50)],
        source=f"{_CODE_2025}, LLaVA-OneVision, the setting of its pictures: 729 patches to 169",
    ),
    "ov_vis_video": Preset(
        "rank1",
        [*_vision(range(2, 9), drop=80), *_llm(2, ratio=0.50)],
        source=f"{_CODE_2025}, the same for videos (the code also pools with stride 1: the model's own setting)",
    ),
    "qwen2vl_7b": Preset(
        "rank1",
        [*_vision(range(12, 16), drop_ratio=0.16), *_llm(6, 7, 8, ratio=0.90)],
        source=f"{_CODE_2025}, Qwen2-VL 7B (scores: attention received in place of the code's log-sum-exp)",
    ),
    "qwen2vl_2b": Preset(
        "rank1",
        _vision(range(12, 16), drop_ratio=0.16),
        source=f"{_CODE_2025}, Qwen2-VL 2B: encoder only",
    ),
    "qwen3vl_8b": Preset(
        "recycle",
        [*_vision(range(5, 9), ratio=0.85), *_llm(19, 21, 23, 25, ratio=0.90)],
        source="iLLaVA code 2026, Qwen3-VL 8B: 34 % left",
    ),
    "keep35": Preset("lightvlm", pyramid(0.35), source=f"LightVLM, 35 % of the image tokens; {_OURS}"),
    "keep3": Preset("lightvlm", pyramid(0.03), KVBudget.ratio(0.5), f"LightVLM, 3 % of the image tokens; {_OURS}"),
    # A long answer spends its time in decoding, which the budget bounds: the milder pyramid costs it little.
    "long": Preset(
        "lightvlm", pyramid(0.35), KVBudget.uniform(512), f"LightVLM, answers of thousands of tokens; {_OURS}"
    ),
}


def find_preset(name: str) -> Preset:
    """The preset called ``name`` (UserError with the list otherwise)."""
    if name in PRESETS:
        return PRESETS[name]
    raise UserError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}known: {', '.join(PRESETS)}")


#: flavour of the released code -> what ``illava_vit_r`` counts: ``Step``'s name of it
FLAVOURS = {"onevision_2025": "drop", "qwen2vl_2025": "drop_ratio", "qwen3vl_2026": "ratio"}
_FLAGS = (
    "enable_illava_vit", "illava_vit_k", "illava_vit_r", "enable_illava_llm", "illava_llm_k", "illava_llm_r",
)  # fmt: skip


def from_official(flags: Mapping[str, Any] | str, flavour: str) -> list[Step]:
    """Steps of flags of the released iLLaVA code.

    Args:
        flags: a mapping, or text as on its command lines: ``"illava_vit_k=5-6-7-8,illava_vit_r=92,illava_llm_k=8,"
            "illava_llm_r=0.70"``. ``_k``: layers joined by ``-``; ``_r``: one amount for all of them, or one a layer
            joined by ``-``; ``enable_illava_vit`` / ``_llm`` = False leaves a part out.
        flavour: which code: ``onevision_2025`` (``illava_vit_r`` = tokens removed a layer), ``qwen2vl_2025`` (share
            removed), ``qwen3vl_2026`` (share kept). ``illava_llm_r`` is a share kept within (0, 1), else tokens
            removed.

    Returns:
        vision steps, then LLM steps. Counts are those of the code except at ties of rounding, where the code of 2026
        rounds N * ratio in place of N * (1 - ratio).

    Raises:
        UserError: unknown flavour or flag, amounts without layers, numbers that are none.

    Source: iLLaVA 3.9, flag map.
    """
    if flavour not in FLAVOURS:
        raise UserError(f"flavour {flavour!r}; {did_you_mean(flavour, FLAVOURS)}known: {', '.join(FLAVOURS)}")
    given = _parse(flags) if isinstance(flags, str) else {name: str(value) for name, value in flags.items()}
    for name in given:
        if name not in _FLAGS:
            raise UserError(f"iLLaVA flag {name!r}; {did_you_mean(name, _FLAGS)}known: {', '.join(_FLAGS)}")
    vision = [_step("vision", layer, FLAVOURS[flavour], amount) for layer, amount in _pairs(given, "vit")]
    llm = [_step("llm", layer, "ratio" if 0 < amount < 1 else "drop", amount) for layer, amount in _pairs(given, "llm")]
    return [*vision, *llm]


def _step(stage: Any, layer: int, kind: str, amount: float) -> Step:
    if kind == "drop":
        return Step(stage, layer, drop=_whole("of tokens removed", amount))
    return Step(stage, layer, ratio=amount) if kind == "ratio" else Step(stage, layer, drop_ratio=amount)


def _parse(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    bare = [name for name, equals, _ in pairs if not equals]
    if bare:
        raise UserError(f"iLLaVA flags {text!r}: {bare[0]!r} has no value; expected name=value,name=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _pairs(given: dict[str, str], part: str) -> list[tuple[int, float]]:
    """(layer, amount) of each step of ``part``."""
    switch, k, r = f"enable_illava_{part}", f"illava_{part}_k", f"illava_{part}_r"
    if given.get(switch, "true").lower() in ("false", "0", "no") or not {k, r} & given.keys():
        return []
    if k not in given or r not in given:
        raise UserError(f"iLLaVA flags: {k} and {r} belong together; give both")
    layers = [_whole(k, value) for value in _numbers(k, given[k])]
    amounts = _numbers(r, given[r])
    if len(amounts) == 1:
        amounts *= len(layers)
    if len(amounts) != len(layers):
        raise UserError(f"iLLaVA flags: {k} has {len(layers)} layers, {r} {len(amounts)} amounts; give one or as many")
    return list(zip(layers, amounts, strict=True))


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split("-")]
    except ValueError:
        raise UserError(f"iLLaVA flag {name}={text!r}; expected numbers joined by -, such as 5-6-7-8") from None


def _whole(name: str, value: float) -> int:
    if not value.is_integer():
        raise UserError(f"iLLaVA flag {name}: {value} is no whole number")
    return int(value)
