"""Frames of video files: torchcodec (extra ``video``), PyAV where torchcodec or its FFmpeg is missing.

torchcodec decodes exactly the asked frames in one call, but needs FFmpeg's libraries on the machine. PyAV's wheels
bring their own, so it is the fallback: it decodes from the start up to the last asked frame, which is as exact and
slower on sparse requests. Neither is imported before the first video is opened.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["VIDEO_SUFFIXES", "backend", "count_video_frames", "is_video", "load_video"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_ISO_SUFFIXES = (".mp4", ".m4v", ".mov")
_log = logging.getLogger(__name__)


def is_video(path: Path | str) -> bool:
    """Whether the name ends like a video file."""
    return str(path).lower().endswith(VIDEO_SUFFIXES)


@functools.cache
def backend() -> str:
    """``torchcodec`` or ``av``, whichever can be used, in that order.

    Raises:
        UserError: neither works; names the extra and why torchcodec failed.
    """
    problem = _torchcodec_problem()
    if problem is None:
        return "torchcodec"
    if importlib.util.find_spec("av") is not None:
        _log.info("videos are decoded by PyAV (%s)", problem)
        return "av"
    raise UserError(
        f"reading video files needs the extra `video` ({problem}): pip install 'polymodal-slt[video]', "
        f"or extract the frames into one folder a clip"
    )


def _torchcodec_problem() -> str | None:
    """Why torchcodec cannot be used; None if it can. Its libraries load at the first decoder, so one is tried."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        return "torchcodec is not installed"
    except (RuntimeError, OSError):  # versions that load FFmpeg at import
        return "torchcodec found no FFmpeg libraries; install FFmpeg or PyAV"
    try:
        VideoDecoder(b"no video")
    except (RuntimeError, ValueError, OSError) as error:
        if "libtorchcodec" in str(error):
            return "torchcodec found no FFmpeg libraries; install FFmpeg or PyAV"
    return None


def count_video_frames(path: Path | str) -> int:
    """Number of frames that :func:`load_video` can give, counted by reading all packets (no decoding).

    Raises:
        UserError: missing, truncated or unreadable file, no video stream, no decoder installed.
    """
    path = _checked(path)
    count = _torchcodec_count(path) if backend() == "torchcodec" else _av_count(path)
    if count < 1:
        raise UserError(f"{path}: no frame could be read; is it a video? check or replace the file")
    return count


def load_video(path: Path | str, indices: Sequence[int]) -> np.ndarray:
    """Decode some frames.

    Args:
        path: the file.
        indices: frame numbers from 0, sorted; repeats allowed.

    Returns:
        ``(len(indices), H, W, 3)`` uint8, RGB.

    Raises:
        UserError: missing, truncated or unreadable file, an index beyond the last frame, no decoder installed.
    """
    path = _checked(path)
    if len(indices) == 0:
        raise UserError(f"clip {path}: no frame was asked for; a clip needs at least one")
    if min(indices) < 0:
        raise UserError(f"clip {path}: frame {min(indices)} was asked for; the first one is 0")
    return _torchcodec_load(path, indices) if backend() == "torchcodec" else _av_load(path, indices)


def _checked(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"video {path} is missing; copy it again or remove its row from the annotation")
    if path.suffix.lower() in _ISO_SUFFIXES:
        _check_boxes(path)
    return path


def _check_boxes(path: Path) -> None:
    """Walk the top-level boxes of an ISO file: a download cut short ends inside one, whatever a decoder makes of it."""
    size, position, kinds = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            head = file.read(16)
            if len(head) < 8:
                break
            length, kind = struct.unpack(">I4s", head[:8])
            if length == 1 and len(head) == 16:
                (length,) = struct.unpack(">Q", head[8:])
            elif length == 0:  # up to the end of the file
                length = size - position
            kinds.add(kind)
            if length < 8:
                break
            position += length
    if position != size or not kinds & {b"moov", b"moof"}:
        raise UserError(
            f"video {path} is truncated or broken ({size} bytes of at least {position}); copy it again"
            if position > size
            else f"video {path} is truncated or no MP4 ({size} bytes); copy it again"
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    text = str(error).strip().splitlines()
    return UserError(
        f"video {path} cannot be decoded ({text[0][:120] if text else type(error).__name__}); copy it again"
    )


def _short(path: Path, have: int, want: int) -> UserError:
    return UserError(f"video {path} has {have} frames, number {want} was asked for; the file changed or is truncated")


def _torchcodec_open(path: Path) -> Any:
    from torchcodec.decoders import VideoDecoder

    try:
        return VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1)
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


def _torchcodec_count(path: Path) -> int:
    return len(_torchcodec_open(path))


def _torchcodec_load(path: Path, indices: Sequence[int]) -> np.ndarray:
    decoder = _torchcodec_open(path)
    if max(indices) >= len(decoder):
        raise _short(path, len(decoder), max(indices))
    try:
        frames: np.ndarray = decoder.get_frames_at(indices=[int(i) for i in indices]).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error
    return frames


def _av_count(path: Path) -> int:
    import av

    try:
        with av.open(str(path)) as container:
            return sum(p.size > 0 and not p.is_discard for p in container.demux(container.streams.video[0]))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _unreadable(path, error) from error


def _av_load(path: Path, indices: Sequence[int]) -> np.ndarray:
    import av
    import numpy as np

    wanted, kept, number = set(map(int, indices)), {}, -1
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number in wanted:
                    kept[number] = frame.to_ndarray(format="rgb24")
                if len(kept) == len(wanted):
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _unreadable(path, error) from error
    if len(kept) < len(wanted):
        raise _short(path, number + 1, max(wanted))
    return np.stack([kept[int(i)] for i in indices])
