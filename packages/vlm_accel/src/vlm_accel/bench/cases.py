"""Rows of a bench: which method with which ratio, schedule and cache budget; schedules as text. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from polymodal.errors import UserError

from vlm_accel.bench.settings import BenchConfig
from vlm_accel.budget import KVBudget
from vlm_accel.methods import METHODS, create
from vlm_accel.presets import PRESETS
from vlm_accel.schedule import Pyramid, Schedule, Step, Taper, pyramid

__all__ = ["Case", "all_cases", "fits", "parse_schedule", "stage_of"]

_KEYS = {"method", "ratio", "schedule", "kv", "options", "layout", "group"}


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        label: name of the row, and of its file.
        method: name, NAME@vision, or several joined by ``+``.
        ratio, schedule, kv, layout: as for ``accelerate``; the schedule as text.
        options: of the method (one method only).
        group: where it acts: vision, features, llm, cache, or several; for the figure.
    """

    label: str
    method: str
    ratio: float | None = None
    schedule: str | None = None
    kv: str | None = None
    layout: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    group: str = ""

    def settings(self) -> dict[str, Any]:
        """What the row depends on, without its name."""
        return {key: value for key, value in asdict(self).items() if key not in ("label", "group")}

    def arguments(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of ``accelerate``."""
        methods: Any = [
            create(name, **(self.options if "+" not in self.method else {})) for name in names_of(self.method)
        ]
        schedule: Any = self.schedule  # a preset by its name: it brings its cache budget, too
        if self.schedule is not None and self.schedule not in PRESETS:
            schedule = parse_schedule(self.schedule)
        ratio = self.ratio
        if ratio is not None and "@vision" in self.method:
            schedule, ratio = [Taper(ratio)], None
        return {
            "method": methods, "schedule": schedule, "ratio": ratio, "kv": self.kv, "layout": self.layout, "seed": seed
        }  # fmt: skip


def names_of(method: str) -> list[str]:
    """Registered names in ``A+B`` or ``A@vision`` (UserError for an unknown one)."""
    names = [part.partition("@")[0].strip() for part in method.split("+")]
    for part, name in zip(method.split("+"), names, strict=True):
        info = METHODS.info(name)
        where = part.partition("@")[2]
        if where not in ("", "vision") or (where and "vision" not in info.tags):
            raise UserError(f"method {part!r}: {name} works in {', '.join(stages_of(info.tags))}; use {name}")
    return names


def stages_of(tags: tuple[str, ...]) -> list[str]:
    """Where a method with these tags acts."""
    return [tag for tag in ("vision", "features", "llm", "cache") if tag in tags]


def stage_of(method: str) -> str:
    """Where the rows of ``method`` act, for the figure."""
    found = []
    for part in method.split("+"):
        name, _, where = part.partition("@")
        stages = stages_of(METHODS.info(name.strip()).tags)
        found.append(where or ("llm" if "llm" in stages else stages[0]))
    return "+".join(dict.fromkeys(found))


def all_cases(config: BenchConfig) -> list[Case]:
    """Rows in table order.

    Raises:
        UserError: an unknown method, an unknown key, a label twice or none that is a file name.
    """
    for name, options in config.method_options.items():
        create(name, **_mapping(name, options))
    rows = [row for method in _methods(config) for row in _rows(config, method)]
    rows += [_given(label, options) for label, options in config.cases.items()]
    seen: set[str] = set()
    for row in rows:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+@-]*", row.label):
            raise UserError(f"row {row.label!r} becomes a file's name; use letters, digits and _ . + @ -")
        if row.label in seen:
            raise UserError(f"row {row.label!r} stands there twice; give it another label")
        seen.add(row.label)
        if row.schedule is not None:
            parse_schedule(row.schedule)
        if row.kv is not None:
            KVBudget.parse(row.kv)
    return rows


def _methods(config: BenchConfig) -> list[str]:
    found: list[str] = []
    for name in config.methods:
        if name != "all":
            names_of(name)
            found.append(name)
            continue
        for info in METHODS:
            found.append(info.name)
            if "vision" in info.tags and "llm" in info.tags:
                found.append(f"{info.name}@vision")
    return list(dict.fromkeys(found))


def _rows(config: BenchConfig, method: str) -> Iterator[Case]:
    """Rows of one method: one a ratio, or one with the given schedule."""
    names, group = names_of(method), stage_of(method)
    stages = [stage for name in names for stage in stages_of(METHODS.info(name).tags)]
    options = dict(config.method_options.get(names[0]) or {}) if len(names) == 1 else {}
    if config.schedule is not None:
        yield Case(method, method, schedule=config.schedule, kv=config.kv, options=options, group=group)
    elif names == ["text_only"] or (set(stages) == {"cache"} and config.kv is not None):
        yield Case(method, method, kv=config.kv, options=options, group=group)
    elif set(stages) == {"cache"}:
        more = f",{config.kv_options}" if config.kv_options else ""
        for ratio in config.ratios:
            yield Case(f"{method}-{ratio:g}", method, kv=f"ratio:{ratio:g}{more}", options=options, group=group)
    else:
        for ratio in config.ratios:
            yield Case(f"{method}-{ratio:g}", method, ratio=ratio, kv=config.kv, options=options, group=group)


def _mapping(name: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise UserError(f"method_options.{name}={options!r}; expected options by name, e.g. {{window: 4}}")
    return options


def _given(label: str, options: Any) -> Case:
    if not isinstance(options, dict) or set(options) - _KEYS or "method" not in options:
        raise UserError(
            f"cases.{label}={options!r}; expected method and any of {', '.join(sorted(_KEYS - {'method'}))}"
        )
    names_of(str(options["method"]))
    return Case(label, **{"group": stage_of(str(options["method"])), **options})


def fits(case: Case) -> bool:
    """Whether the row acts on the prefill; the others act on the cache only."""
    return case.group != "cache"


# ---- schedules as text


def parse_schedule(text: str) -> Schedule:
    """A schedule from its text form: the name of a preset, or parts joined by commas.

    ``vision:5-8=drop92`` (blocks 5 to 8), ``llm:8=0.7`` (share kept), ``llm:2+4=keep16``, ``vision:3=drop0.16``
    (share removed), ``pyramid=0.35``, ``pyramid=0.35@2+9+18``, ``taper=0.5``.

    Raises:
        UserError: anything else.
    """
    if text in PRESETS:
        return PRESETS[text].schedule
    steps: list[Step | Pyramid | Taper] = []
    for part in text.split(","):
        where, eq, amount = part.strip().partition("=")
        try:
            steps += _part(where.strip(), amount.strip()) if eq else _unknown(part)
        except ValueError:
            _unknown(part)
    return steps


def _part(where: str, amount: str) -> Schedule:
    if where == "taper":
        return [Taper(float(amount))]
    if where == "pyramid":
        target, _, layers = amount.partition("@")
        return pyramid(float(target), _layers(layers) if layers else None)
    stage, _, layers = where.partition(":")
    match = re.fullmatch(r"(keep|drop)?([0-9.]+)", amount)
    if stage not in ("vision", "llm") or match is None:
        raise ValueError
    kind, number = match[1], match[2]
    share = "." in number or (kind is None)
    name = {None: "ratio", "keep": "keep", "drop": "drop_ratio" if share else "drop"}[kind]
    value = float(number) if share else int(number)
    return [Step(stage, layer, **{name: value}) for layer in _layers(layers)]  # type: ignore[arg-type]


def _layers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def _unknown(part: str) -> Schedule:
    raise UserError(
        f"schedule {part.strip()!r}; expected a preset ({', '.join(PRESETS)}) or parts such as vision:5-8=drop92, "
        "llm:8=0.7, pyramid=0.35@2+9+18, taper=0.5"
    )
