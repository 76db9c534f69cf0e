"""Configuration of ``vlm-bench``: what ``--help`` lists and YAML presets set. No torch.

The parser runs a module's ``if TYPE_CHECKING`` imports to understand its annotations, hence a module without any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.config import RunConfig, TrainerConfig
from polymodal.errors import UserError

from vlm_accel.bench.world import WorldOptions

__all__ = ["BenchConfig", "BuiltInConfig"]


def _trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=2, log_every_steps=25)


@dataclass
class BuiltInConfig:
    """The small model that is used without --model: LLaVA's classes, handwritten digits, trained once and cached."""

    batch_size: int = 24
    """canvases of a training step, four questions each"""
    lr: float = 3e-3
    """highest rate of the cycle"""
    test: int = 160
    """test samples, a quarter of them for each question"""
    world: WorldOptions = field(default_factory=WorldOptions)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.test < 4:
            raise UserError(
                f"built_in.batch_size={self.batch_size}, built_in.test={self.test}; expected from 1, from 4"
            )
        if self.lr <= 0:
            raise UserError(f"built_in.lr={self.lr}; expected more than 0")


@dataclass
class BenchConfig(RunConfig):
    """Quality, cost and speed of many methods on one model, beside the unmodified model."""

    model: Path | None = None
    """folder of a checkpoint (save_pretrained); default: the built-in model, trained at first use"""
    data: Path | None = None
    """DIR with <task>/<split>.jsonl and <task>/media, or one JSONL file; only with --model"""
    tasks: list[str] = field(default_factory=list)
    """tasks of DIR (default: all that are there)"""
    split: str | None = None
    """split of the tasks (default: the only one that is there)"""
    metric: str | None = None
    """how answers are scored (default: by the task's name; exact for unknown ones)"""
    limit: int = 0
    """samples of each task, the first ones (0: all)"""
    methods: list[str] = field(default_factory=lambda: ["all"])
    """names (see --list-methods), NAME@vision for the encoder, A+B for several together, or all"""
    ratios: list[float] = field(default_factory=lambda: [0.5, 0.25])
    """shares left: of the image tokens, or of the cache for cache methods"""
    schedule: str | None = None
    """instead of --ratios: a preset (keep35, ov_image), or e.g. vision:5-8=drop92,llm:8=0.7 or pyramid=0.35@2+9"""
    kv: str | None = None
    """cache budget of every row, e.g. ratio:0.5 or uniform:512,scope=image"""
    kv_options: str = ""
    """options of the budgets that --ratios gives cache methods, e.g. recent=1,window=2"""
    method_options: dict[str, Any] = field(default_factory=dict)
    """options of methods by name, e.g. {snapkv: {window: 4}}"""
    cases: dict[str, Any] = field(default_factory=dict)
    """further rows by label: {method: NAME, ratio: …, schedule: …, kv: …, options: {…}, layout: …}"""
    batch: int = 0
    """samples at a time (0: 80 for the built-in model, else 1)"""
    max_new_tokens: int = 0
    """longest answer, tokens (0: 5 for the built-in model, else 32)"""
    fidelity: int = 0
    """samples on which the next-token distributions are compared (0: all of the built-in model's, else 32)"""
    warmup: int = 1
    """untimed turns before the timed ones"""
    repeats: int = 3
    """timed turns, the unmodified model and the method in turn; medians (0: no times)"""
    time_batch: int = 0
    """samples of a timed turn (0: 8 for the built-in model, else batch)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """numbers of the weights; auto: as stored"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; the built-in model runs on the CPU"""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention back end"""
    frames: int = 32
    """frames of a video"""
    results: Path | None = None
    """folder of the cells, one JSON each, shared by runs (default: in the run folder)"""
    built_in: BuiltInConfig = field(default_factory=BuiltInConfig)
    trainer: TrainerConfig = field(default_factory=_trainer)

    def __post_init__(self) -> None:
        for name in ("limit", "batch", "max_new_tokens", "fidelity", "warmup", "repeats", "time_batch"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}; expected 0 or more")
        if self.frames < 1:
            raise UserError(f"frames={self.frames}; expected at least 1")
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"--ratios {ratio}; expected shares left in (0, 1], e.g. 0.5 0.25")
        if len(set(self.ratios)) < len(self.ratios):
            raise UserError(f"--ratios {self.ratios}; one stands there twice")

    def check(self) -> None:
        """Refuse options that do not fit together, before anything is loaded.

        Raises:
            UserError: data without a model, a model without data, nothing to measure.
        """
        if self.model is None and self.data is not None:
            raise UserError("--data without --model; the built-in model knows its own canvases only: add --model DIR")
        if self.model is not None and self.data is None:
            raise UserError(
                f"--model {self.model} without --data; give a JSONL file or a folder with <task>/<split>.jsonl"
            )
        if self.data is not None and not self.data.expanduser().exists():
            raise UserError(f"--data {self.data}: no such file or folder")
        if not self.methods and not self.cases:
            raise UserError("no method; give --methods or cases")

    def size(self, name: str) -> int:
        """``batch``, ``max_new_tokens`` or ``time_batch`` with its default."""
        given: int = getattr(self, name)
        small = self.model is None
        default = {"batch": 80 if small else 1, "max_new_tokens": 5 if small else 32, "time_batch": 8 if small else 0}
        return given or default[name] or self.size("batch")
