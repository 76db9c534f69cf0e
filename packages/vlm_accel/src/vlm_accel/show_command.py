"""``vlm-show``: which patch of a picture ended in which token, step by step, as pictures and JSON."""

from __future__ import annotations

import datetime as dt
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from vlm_accel.generate_command import Settings, accelerated, gather_images, inputs_of, list_methods

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ShowConfig", "main", "pictures_of", "show_maps"]

EXAMPLE = """
vlm-show                                                  # the built-in model, a picture of its own
vlm-show --model DIR --images cat.jpg --method recycle+lightvlm --schedule ov_image --out shown
vlm-show --model DIR --images cat.jpg --method visionzip --ratio 0.1
"""


@dataclass
class ShowConfig(Settings):
    """Draw survivors, owners and scores of every step for one prompt."""

    out: Path | None = None
    """folder that receives the figures (default: runs/vlm_show/METHOD-TIME)"""


def main() -> int:
    """Entry point of ``vlm-show``; returns the exit code."""
    return command(
        show_maps, ShowConfig, prog="vlm-show", example=EXAMPLE, argv=gather_images(sys.argv[1:]),
        list_methods=list_methods,
    )  # fmt: skip


def show_maps(config: ShowConfig) -> None:
    """Run one prefill with a trace, write the figures of each segment, say what is in them."""
    from polymodal.files import check_writable
    from polymodal.seeding import set_threads

    if config.method == "none":
        raise UserError("--method none shortens nothing, so there is nothing to show; name a method")
    if config.ratio is None and config.schedule is None and config.method == "lightvlm":
        config.schedule = "keep35"
    set_threads(config.threads)
    import torch

    from vlm_accel.show import save_pictures

    vlm, question, images, video = inputs_of(config)
    inputs = vlm.prompt(question, images, video)
    with accelerated(config, vlm.model, trace=True) as handle, torch.inference_mode():
        vlm.model(**inputs)
        maps = handle.maps
        report = handle.report()
    if not any(one.steps for one in maps):
        raise UserError(f"{config.method} shortened no image tokens here; give --ratio or --schedule")
    stamp = dt.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = (config.out or Path("runs") / "vlm_show" / f"{config.method.replace('+', '_')}-{stamp}").expanduser()
    check_writable(out)
    frames = [] if video is None else video.frames
    for number, (one, pictures) in enumerate(zip(maps, pictures_of(vlm, inputs, maps, images, frames), strict=True)):
        for path in save_pictures(out, f"segment{number}", pictures, one):
            sys.stdout.write(f"{path}\n")
        sys.stdout.write(f"segment {number}: {_summary(one)}\n")
    sys.stdout.write(f"\n{report}\n")


def pictures_of(
    vlm: Any, inputs: dict[str, Any], maps: list[Any], images: list[Image], frames: list[Image]
) -> list[list[Any]]:
    """The pictures that the encoder saw, one list (tiles, frames) per map.

    Where the processor hands over tiles, they are taken back from its pixels, so that padding and cuts are exact. Where
    it hands over loose patches (Qwen), each map has its whole picture, or the first frame of its temporal slice.
    """
    tiles: list[Any] = [
        *_tiles(vlm.processor, inputs.get("pixel_values")),
        *_tiles(vlm.processor, inputs.get("pixel_values_videos")),
    ]
    if sum(one.grid[0] for one in maps) == len(tiles):
        taken = iter(tiles)
        return [[next(taken) for _ in range(one.grid[0])] for one in maps]
    loose = [*images, *frames[:: max(1, len(frames) // max(1, len(maps) - len(images)))]]
    if len(loose) < len(maps):
        raise UserError(f"{len(maps)} segments, but {len(loose)} pictures; this processor's tiles are not known")
    return [[picture] for picture in loose[: len(maps)]]


def _tiles(processor: Any, pixels: Any) -> list[Any]:
    """Pictures of pixel values (..., 3, H, W), padding tiles (all equal) left out; loose patches give none."""
    if pixels is None or pixels.dim() < 4:
        return []
    from vlm_accel.show import tile_pictures

    settings = getattr(processor, "image_processor", None)
    flat = pixels.flatten(0, -4).float().cpu()
    real = [tile for tile in flat if bool((tile != tile.flatten()[0]).any())]
    mean, std = getattr(settings, "image_mean", [0.5] * 3), getattr(settings, "image_std", [0.5] * 3)
    import torch

    return tile_pictures(torch.stack(real), mean, std) if real else []


def _summary(one: Any) -> str:
    parts = [f"{step.stage} {step.layer}: {step.n_in} -> {step.n_out}" for step in one.steps]
    tiles, height, width = one.grid
    return f"{tiles} x {height} x {width} patches; " + ", ".join(parts)
