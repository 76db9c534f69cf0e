"""Pictures and frames of videos from paths the user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FRAMES", "Video", "frame_numbers", "read_image", "read_video"]

FRAMES = 32
"""Frames taken of a video (iLLaVA 4.1)."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MOST_PIXELS = 100_000_000


@dataclass(frozen=True)
class Video:
    """Frames chosen of a video.

    Args:
        frames: RGB pictures.
        numbers: their numbers in the video. total: frames of the video.
        fps: frames a second of the video (models that tell times of frames want it).
    """

    frames: list[Image]
    numbers: list[int]
    total: int
    fps: float


def read_image(path: Path | str) -> Image:
    """The picture at ``path``, RGB.

    Raises:
        UserError: no such file, no picture, or more than 100 megapixels.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"image {path}: no such file; check the path")
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(f"image {path}: {image.width} x {image.height} pixels are too many; scale it down")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"image {path}: cannot be read as a picture ({error}); convert it to PNG or JPEG") from error


def frame_numbers(total: int, frames: int = FRAMES) -> list[int]:
    """``frames`` numbers spread over ``total``: int(linspace(0, total - 1, frames)); all where there are fewer."""
    if total <= frames:
        return list(range(total))
    return [i * (total - 1) // max(1, frames - 1) for i in range(frames)]


def read_video(path: Path | str, frames: int = FRAMES) -> Video:
    """Frames of a video file (extra ``video``), or of a folder of pictures in the order of their names.

    Args:
        path: file or folder; the pictures of a folder are taken to be one second apart.
        frames: how many, spread evenly.

    Raises:
        UserError: nothing there, no frames, or no decoder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
        if not files:
            raise UserError(f"video {path}: the folder has no pictures ({', '.join(_PICTURES)})")
        numbers = frame_numbers(len(files), frames)
        return Video([read_image(files[number]) for number in numbers], numbers, len(files), 1.0)
    if not path.is_file():
        raise UserError(f"video {path}: no such file or folder of frames; check the path")
    return _decode(path, frames)


def _decode(path: Path, frames: int) -> Video:
    try:
        import av
    except ImportError:
        raise UserError(
            f"video {path}: video files need the extra: pip install 'polymodal-vlm-accel[video]'; or give a folder of "
            "frames"
        ) from None
    try:
        # Counted by decoding: containers often lie about their length.
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate or 1)
            total = sum(1 for _ in container.decode(video=0))
        numbers = frame_numbers(total, frames)
        wanted = set(numbers)
        with av.open(str(path)) as container:
            pictures = [
                frame.to_image().convert("RGB")
                for number, frame in enumerate(container.decode(video=0))
                if number in wanted
            ]
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"video {path}: cannot be decoded ({error}); convert it, or give a folder of frames") from error
    if not pictures:
        raise UserError(f"video {path}: it has no frames")
    return Video(pictures, numbers, total, fps)
