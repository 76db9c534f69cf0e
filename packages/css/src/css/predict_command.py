"""``css-predict``: from picture files to index masks with a palette, overlays, and a list of the classes.

Masks hold raw ids, as the data set's own masks do, at the picture's own size and on its stored pixels (a rotation in
the EXIF data is not applied, as in training). Exit codes: 0 all written; 1 some pictures could not be read, each named
in a line of its own, the others are written; 2 nothing was begun.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.devices import pick_device
from polymodal.errors import UserError

from css.eval_settings import PredictConfig, gather
from css.evaluate import existing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from css.checkpoint import Loaded

__all__ = ["Target", "main", "plan", "predict", "segment_image", "upsampled_labels"]

EXAMPLE = """
css-predict runs/css/RUN --images street.jpg --out segmented
css-predict runs/css/RUN/steps/01 --images DIR more/*.png --out segmented --short_side 0
"""
SCHEMA_VERSION = 1
_BAND_VALUES = 2**25
"""Logits that are upsampled at a time: 128 MiB of them."""


@dataclass(frozen=True)
class Target:
    """One picture and what is made of it.

    Args:
        image: the picture.
        mask: index mask to be written.
        overlay: picture with coloured classes to be written.
    """

    image: Path
    mask: Path
    overlay: Path


def main() -> int:
    """Entry point of ``css-predict``; returns the exit code."""
    failed: list[Path] = []
    code = command(
        lambda config: failed.extend(predict(config)),
        PredictConfig,
        prog="css-predict",
        example=EXAMPLE,
        argv=gather(sys.argv[1:], "checkpoint", "images"),
    )
    return code or int(bool(failed))


def predict(config: PredictConfig) -> list[Path]:
    """Segment the pictures and say what was written.

    Returns:
        Pictures that could not be read; each was told in one line.

    Raises:
        UserError: bad options or checkpoint, no pictures, or masks that are there already.
    """
    from polymodal.files import check_writable, write_json
    from polymodal.seeding import set_threads

    path = existing(config.checkpoint, "css-predict CHECKPOINT --images FILE|FOLDER --out DIR")
    if not config.images or config.out is None:
        raise UserError(f"{'--out' if config.images else '--images'} is missing; {EXAMPLE.strip().splitlines()[0]}")
    if config.short_side is not None and config.short_side < 0:
        raise UserError(f"--short_side {config.short_side}; expected pixels, or 0 for the picture's own size")
    out = config.out.expanduser()
    targets = plan(config.images, out, config.overwrite)
    set_threads(config.threads)
    from css.checkpoint import load_network

    device = pick_device(config.device)
    loaded = load_network(path)
    loaded.net.to(device)
    for folder in ("masks", "overlays"):
        check_writable(out / folder)
    write_json(out / "classes.json", describe_classes(loaded))
    size = int(loaded.meta["crop"]) if config.short_side is None else config.short_side
    failed = []
    for target in targets:
        try:
            sys.stdout.write(_segment_file(loaded, target, size, device) + "\n")
        except UserError as error:  # a broken picture: the others are not lost
            sys.stderr.write(f"css-predict: error: {' '.join(str(error).split())}\n")
            failed.append(target.image)
    rest = f", {len(failed)} could not be read" if failed else ""
    sys.stdout.write(f"{out}: {len(targets) - len(failed)} of {len(targets)} pictures segmented{rest}\n")
    return failed


def plan(images: Sequence[str], out: Path, overwrite: bool = False) -> list[Target]:
    """The pictures that files and folders mean, and where their masks go.

    Args:
        images: files, or folders whose pictures are taken (not those of folders below).
        out: folder of ``masks`` and ``overlays``.
        overwrite: masks may be there.

    Raises:
        UserError: nothing there, a folder without pictures, two pictures of one name, or files that would be replaced.
    """
    from polymodal.paths import natural_key

    from css.data.listing import IMAGE_SUFFIXES

    files: list[Path] = []
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            if not found:
                raise UserError(f"--images {path}: the folder has no pictures ({', '.join(IMAGE_SUFFIXES)})")
            files += sorted(found, key=lambda file: natural_key(file.name))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder; check the path")
    targets: dict[Path, Target] = {}
    for file in files:
        mask = out / "masks" / f"{file.stem}.png"
        if mask in targets and not targets[mask].image.samefile(file):
            raise UserError(
                f"--images: {targets[mask].image} and {file} would both become {mask}; use two --out folders"
            )
        targets[mask] = Target(file, mask, out / "overlays" / mask.name)
    sources = {file.resolve() for file in files}
    for target in targets.values():
        written = [path for path in (target.mask, target.overlay) if path.exists()]
        if any(path.resolve() in sources for path in written):
            raise UserError(f"--out {out}: {target.image.name} would be replaced by its own mask; choose another --out")
        if written and not overwrite:
            raise UserError(f"{written[0]} is there already; choose another --out, or add --overwrite true")
    return list(targets.values())


def describe_classes(loaded: Loaded) -> dict[str, Any]:
    """Content of ``classes.json``: what the values and colours of the masks mean."""
    from css.data.files import palette

    task, names, colours = loaded.task, loaded.meta["class_names"], palette().tolist()
    step = int(loaded.meta["step"])
    classes = [
        {"id": raw, "name": names[raw - 1], "colour": colours[raw], "learnt_in": origin}
        for origin in range(step + 1)
        for raw in task.steps[origin]
    ]
    head = {"schema_version": SCHEMA_VERSION, "checkpoint": str(loaded.path), "task": task.name, "step": step}
    return {**head, "background": {"id": 0, "colour": colours[0]}, "classes": classes}


def segment_image(loaded: Loaded, image: np.ndarray, short_side: int, device: str = "cpu") -> np.ndarray:
    """Segment one picture.

    Args:
        loaded: network and prediction rule.
        image: (H, W, 3) uint8.
        short_side: the picture is resized to this shorter side, pixels, as test pictures are, but not cropped; 0: it is
            taken as it is.
        device: where to compute.

    Returns:
        (H, W) uint8 raw ids.
    """
    import torch
    from torchvision.transforms.v2 import functional as F

    from css.data.transforms import normalise, to_tensors
    from css.samples import raw_lut

    pixels, _ = to_tensors(image, [image[:, :, 0]])
    if short_side:
        pixels = F.resize(pixels, [short_side], antialias=True)
    with torch.inference_mode():
        logits = loaded.net(normalise(pixels.as_subclass(torch.Tensor))[None].to(device)).logits
        seen = upsampled_labels(loaded, logits, image.shape[:2])
    table: np.ndarray = raw_lut(loaded.task)
    return table[seen]


def upsampled_labels(loaded: Loaded, logits: Tensor, size: Sequence[int]) -> np.ndarray:
    """Labels at a picture's size of logits at feature size.

    As ``predict(net.upsample(logits, size))``, in bands of rows: all logits of a large picture with many classes would
    not fit into memory.

    Args:
        loaded: network and prediction rule.
        logits: (1, S, h, w).
        size: height and width of the picture.

    Returns:
        (H, W) uint8 channels.
    """
    import numpy as np

    height, width = size
    rows = max(1, _BAND_VALUES // (logits.shape[1] * width))
    found = np.empty((height, width), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        band = _rows(logits, top, bottom, height)
        band = loaded.net.upsample(band, (bottom - top, width))
        found[top:bottom] = loaded.method.predict(band)[0].cpu().numpy()
    return found


def _rows(maps: Tensor, top: int, bottom: int, height: int) -> Tensor:
    """Rows top..bottom of ``maps`` (1, S, h, w) resized bilinearly to ``height`` rows."""
    import torch

    if maps.shape[-2] == height:
        return maps[:, :, top:bottom]
    places = (torch.arange(top, bottom, device=maps.device) + 0.5) * (maps.shape[-2] / height) - 0.5
    places = places.clamp(0, maps.shape[-2] - 1)
    upper = places.floor().long()
    lower = (upper + 1).clamp(max=maps.shape[-2] - 1)
    share = (places - upper).to(maps.dtype)[:, None]
    return maps[:, :, upper] * (1 - share) + maps[:, :, lower] * share


def _segment_file(loaded: Loaded, target: Target, short_side: int, device: str) -> str:
    """Write mask and overlay of a picture; returns the line that says what is in it."""
    import numpy as np
    from PIL import Image
    from polymodal.files import write_bytes

    from css.data.files import read_image, write_mask
    from css.pictures import overlay

    image = read_image(target.image)
    labels = segment_image(loaded, image, short_side, device)
    write_mask(target.mask, labels)
    buffer = io.BytesIO()
    Image.fromarray(overlay(image, labels)).save(buffer, format="PNG")
    write_bytes(target.overlay, buffer.getvalue())
    ids, counts = np.unique(labels, return_counts=True)
    names = loaded.meta["class_names"]
    shares = sorted(
        ((n / labels.size, names[raw - 1]) for raw, n in zip(ids, counts, strict=True) if raw), reverse=True
    )
    return f"{target.mask}: " + (", ".join(f"{name} {100 * share:.1f} %" for share, name in shares) or "background")
