"""``vlm-generate``: pictures or a video and a question in, the answer of an accelerated model and its report out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.cli import command
from polymodal.errors import UserError

__all__ = ["GenerateConfig", "Settings", "accelerated", "gather_images", "inputs_of", "list_methods", "main"]

EXAMPLE = """
vlm-generate                                              # the built-in model, a picture of its own
vlm-generate --model DIR --images cat.jpg --question "What is it?" --method lightvlm --ratio 0.35
vlm-generate --model DIR --video clip.mp4 --question "What happens?" --method recycle+lightvlm+snapkv --kv ratio:0.5
"""


@dataclass
class Settings:
    """What vlm-generate and vlm-show have in common."""

    model: Path | None = None
    """folder of a checkpoint (save_pretrained); without it the small built-in model is used"""
    images: list[str] = field(default_factory=list)
    """picture files, in the order of the prompt"""
    video: Path | None = None
    """video file (extra `video`), or a folder of frames"""
    frames: int = 32
    """frames taken of the video"""
    question: str = ""
    """what is asked"""
    method: str = "lightvlm"
    """method, or several joined by + (see --list-methods); none: the unmodified model"""
    ratio: float | None = None
    """share of the image tokens left; not together with --schedule"""
    schedule: str | None = None
    """preset of a published schedule: keep35, keep3, ov_image, …; default: the method's own, or keep35"""
    kv: str | None = None
    """cache budget, e.g. ratio:0.5 or uniform:512,scope=image"""
    layout: Literal["auto", "scatter", "pseudo_grid"] = "auto"
    """what consumers of the encoder's grid get"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """numbers of the weights; auto: as stored"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention back end"""
    seed: int = 0
    """of sampling and of random controls"""
    threads: int | None = None
    """intra-op CPU threads (default 1)"""


@dataclass
class GenerateConfig(Settings):
    """Answer a question about pictures or a video with an accelerated model."""

    max_new_tokens: int = 128
    """longest answer, tokens"""
    num_beams: int = 1
    """beams; 1: no beam search"""
    temperature: float = 0.0
    """above 0: sample at this temperature"""
    top_p: float = 1.0
    """sample from the smallest set of tokens with this probability"""
    compare: bool = True
    """answer with the unmodified model, too, and report both"""
    out: Path | None = None
    """JSON file that receives answers and figures"""


def main() -> int:
    """Entry point of ``vlm-generate``; returns the exit code."""
    return command(
        generate, GenerateConfig, prog="vlm-generate", example=EXAMPLE, argv=gather_images(sys.argv[1:]),
        list_methods=list_methods,
    )  # fmt: skip


def generate(config: GenerateConfig) -> None:
    """Answer and report (UserError for what cannot be done)."""
    from polymodal.files import write_json
    from polymodal.seeding import set_threads

    _check(config)
    set_threads(config.threads)
    import torch

    vlm, question, images, video = inputs_of(config)
    inputs = vlm.prompt(question, images, video)
    result: dict[str, Any] = {"question": question, "method": config.method}
    if config.compare and config.method != "none":
        torch.manual_seed(config.seed)
        result["plain"] = _answer(vlm, inputs, config, None)
        sys.stdout.write(f"unmodified: {result['plain']['answer']}\n")
    torch.manual_seed(config.seed)
    result["answer"] = _answer(vlm, inputs, config, config.method)
    sys.stdout.write(f"{config.method}: {result['answer']['answer']}\n\n")
    sys.stdout.write(_report(result) + "\n")
    if config.out is not None:
        write_json(config.out.expanduser(), result)
        sys.stdout.write(f"written: {config.out}\n")


def list_methods() -> str:
    """Table of the methods: name, stages, paper, fidelity."""
    from vlm_accel.methods import METHODS

    return "\n".join(
        f"{info.name:14} {'/'.join(info.tags):28} {info.fidelity:15} {info.summary} ({info.paper})" for info in METHODS
    )


def accelerated(config: Settings, model: Any, trace: bool = False) -> Any:
    """The context of ``accelerate`` that the settings describe."""
    from vlm_accel.accelerate import accelerate

    return accelerate(
        model, config.method, schedule=config.schedule, ratio=config.ratio, kv=config.kv, layout=config.layout,
        trace=trace, seed=config.seed,
    )  # fmt: skip


def inputs_of(config: Settings) -> Any:
    """(model with processor, question, pictures, video) that the settings name.

    Raises:
        UserError: pictures without a model of the user's, or the other way round.
    """
    from vlm_accel.loading import load_model
    from vlm_accel.media import read_image, read_video

    if config.model is None:
        from vlm_accel.bench.built_in import built_in_model, example

        if config.images or config.video:
            raise UserError("the built-in model knows its own small pictures only; name a checkpoint with --model DIR")
        question, image = example(config.seed, config.question)
        return built_in_model(), question, [image], None
    if not config.images and config.video is None:
        raise UserError("no picture given; add --images FILE ... or --video FILE")
    images = [read_image(path) for path in config.images]
    video = read_video(config.video, config.frames) if config.video is not None else None
    vlm = load_model(config.model, config.dtype, config.device, config.attn)
    return vlm, config.question or "Describe the picture.", images, video


def _check(config: GenerateConfig) -> None:
    if config.max_new_tokens < 1 or config.num_beams < 1 or config.frames < 1:
        raise UserError("--max_new_tokens, --num_beams and --frames start at 1")
    if config.temperature < 0 or not 0 < config.top_p <= 1:
        raise UserError(f"--temperature {config.temperature}, --top_p {config.top_p}; expected >= 0 and in (0, 1]")
    if config.method == "none" and (config.ratio is not None or config.schedule or config.kv):
        raise UserError("--method none with --ratio, --schedule or --kv; name a method")
    if config.ratio is None and config.schedule is None and config.method == "lightvlm":
        config.schedule = "keep35"


def _answer(vlm: Any, inputs: dict[str, Any], config: GenerateConfig, method: str | None) -> dict[str, Any]:
    import torch

    from vlm_accel.handle import Watch

    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
    options["do_sample"] = config.temperature > 0
    if options["do_sample"]:
        options |= {"temperature": config.temperature, "top_p": config.top_p}
    plain = method in (None, "none")
    context: Any = Watch(vlm.model) if plain else accelerated(config, vlm.model)
    with context as handle, torch.inference_mode():
        ids = vlm.model.generate(**inputs, **options)
        stats = handle.stats
        report = "" if plain else handle.report()
    return {
        "answer": vlm.text(ids, inputs["input_ids"])[0],
        "tokens": int(ids.shape[1] - inputs["input_ids"].shape[1]),
        "stats": stats,
        "report": report,
    }


def _report(result: dict[str, Any]) -> str:
    """The accelerated run's report, and its measured times beside those of the unmodified run."""
    lines = [result["answer"]["report"]] if result["answer"]["report"] else []
    plain = result.get("plain", {}).get("stats", {})
    for key, label in (("vision", "vision"), ("prefill", "prefill"), ("token", "per token")):
        now, before = result["answer"]["stats"].get(f"time/{key}_ms"), plain.get(f"time/{key}_ms")
        if now is not None and before is not None:
            lines.append(
                f"{label:12}{now:10.2f} ms, unmodified {before:10.2f} ms, measured speed-up {before / now:.2f}"
            )
    if plain:
        lines.append("One run each, the unmodified one first: for figures to quote use vlm-bench.")
    return "\n".join(lines)


def gather_images(arguments: list[str]) -> list[str]:
    """``--images A B`` becomes one JSON list, which the parser reads."""
    import json

    rest: list[str] = []
    values: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        option, eq, value = word.partition("=")
        if option != "--images":
            rest.append(word)
            continue
        values += [value] if eq else []
        while not eq and waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
    return rest + ([f"--images={json.dumps(values, ensure_ascii=False)}"] if values else [])
