"""Numbers and sounds: rows of a table, arrays in .npy files, waveforms in .wav files."""

from __future__ import annotations

import io
import wave
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from missing_modal.data.images import read_bytes

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RATE", "load_npy", "numbers", "read_wav", "waveform"]

RATE = 16_000
"""samples a second"""


def load_npy(source: Any) -> np.ndarray:
    """An array of numbers from a ``.npy`` file; nothing pickled is read.

    Raises:
        UserError: a missing or broken file, or objects instead of numbers, by name.
    """
    import numpy as np

    try:
        array = np.load(io.BytesIO(read_bytes(source, "array")), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"array {source} cannot be read ({' '.join(str(error).split()) or 'cut short'}); save it with np.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise UserError(f"array {source} holds no numbers; save one array of numbers with np.save")
    return array


def numbers(source: Any, length: int | None = None) -> np.ndarray:
    """Features of a tabular sample.

    Args:
        source: a list of numbers, an array, or a ``.npy`` file.
        length: how many there must be; None: any.

    Returns:
        (n,) float32.

    Raises:
        UserError: not a row of finite numbers, or another length.
    """
    import numpy as np

    array = np.asarray(source if isinstance(source, list | tuple | np.ndarray) else load_npy(source))
    if array.ndim != 1 or array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise UserError(
            f"tabular {str(source)[:60]}: expected a row of finite numbers; fill gaps in, or make the whole row null"
        )
    if length is not None and len(array) != length:
        raise UserError(f"tabular {str(source)[:60]}: {len(array)} numbers, other rows have {length}; make them alike")
    return array.astype(np.float32)


def read_wav(source: Any) -> tuple[np.ndarray, int]:
    """Decode a PCM ``.wav`` file.

    Returns:
        (n,) float32 in -1..1, the mean of the channels, and samples a second.

    Raises:
        UserError: a missing file, or no PCM of 8, 16, 24 or 32 bits, by name.
    """
    import numpy as np

    try:
        with wave.open(io.BytesIO(read_bytes(source, "sound"))) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            raw = np.frombuffer(sound.readframes(sound.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        raise UserError(
            f"sound {source} cannot be read ({str(error) or 'cut short'}); "
            "save it as PCM: ffmpeg -i FILE -c:a pcm_s16le new.wav"
        ) from error
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:
        values = (raw[:, 0].astype(np.float32) - 128) / 128
    else:
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 4 - width :] = raw  # little-endian: the high bytes stay high
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(1), rate


def waveform(source: Any, seconds: float, rate: int = RATE) -> np.ndarray:
    """A sound of a fixed length.

    Args:
        source: a ``.wav`` file, a ``.npy`` file with samples, or an array (n,).
        seconds: longer sounds are cut, shorter ones get zeros at their end.
        rate: samples a second that a ``.wav`` file must have.

    Returns:
        (seconds * rate,) float32.

    Raises:
        UserError: another rate, or a file that cannot be read.
    """
    import numpy as np

    if isinstance(source, np.ndarray | list | tuple):
        samples = np.asarray(source, np.float32)
    elif str(source).lower().endswith(".npy"):
        samples = load_npy(source).astype(np.float32)
    else:
        samples, found = read_wav(source)
        if found != rate:
            raise UserError(
                f"sound {source} has {found} samples a second, expected {rate}; ffmpeg -i FILE -ar {rate} new.wav"
            )
    if samples.ndim != 1:
        raise UserError(f"sound {source}: an array of shape {samples.shape}; expected samples in a row (n,)")
    out = np.zeros(round(seconds * rate), np.float32)
    out[: len(samples)] = samples[: len(out)]
    return out
