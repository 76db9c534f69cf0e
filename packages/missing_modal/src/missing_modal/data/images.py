"""Images as CLIP wants them: decoded, resized by bicubic interpolation, cropped, normalised (DCP 3.6)."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["CLIP_MEAN", "CLIP_STD", "image_tensor", "read_bytes", "read_image", "resize_crop"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_bytes(source: Any, what: str = "image") -> bytes:
    """Contents of a path, of bytes, or of anything with ``read`` (an Arrow cell).

    Args:
        source: where they are.
        what: for messages.

    Raises:
        UserError: a file that is missing or cannot be read, by name.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise UserError(
                f"{what} {source} cannot be read ({error.strerror}); copy it again, or take the row out of the list"
            ) from error
    return bytes(source.read())


def read_image(source: Any) -> Any:
    """Decode an image.

    Args:
        source: a path, encoded bytes, an Arrow cell.

    Returns:
        ``PIL.Image`` in RGB; transparency is dropped, 16-bit grey is scaled, an EXIF rotation is not applied (as in
        the official code).

    Raises:
        UserError: a missing or broken image, by name.
    """
    import numpy as np
    from PIL import Image

    data = read_bytes(source)
    bad = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):  # the library would clip 16 bits instead of scaling them
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except bad as error:
        reason = str(error).split("\n")[0].split("<")[0].strip() or type(error).__name__
        name = f"of {len(data)} bytes" if isinstance(source, bytes) else source
        raise UserError(
            f"image {name} is broken ({reason}); copy it again, or make the image null in a manifest"
        ) from error


def resize_crop(image: Any, size: int) -> np.ndarray:
    """Shorter side to ``size`` by bicubic interpolation, then the central square.

    Args:
        image: ``PIL.Image`` in RGB.
        size: side, pixels.

    Returns:
        (size, size, 3) uint8.
    """
    import numpy as np
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    # int() truncates the longer side, as CLIP's own transform does
    new = (size, int(size * height / width)) if width == short else (int(size * width / height), size)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]


def image_tensor(
    source: Any,
    size: int = 224,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Tensor:
    """The input of an image tower.

    Args:
        source: a path, encoded bytes, an Arrow cell; a float array (C, H, W) passes as it is.
        size: side, pixels.
        mean: of each channel, for pixels 0..1.
        std: of each channel.

    Returns:
        (3, size, size) float32, normalised. The placeholder of a missing image is a tensor of ones (DCP 4.2), which is
        the towers' affair.

    Raises:
        UserError: a missing or broken image, by name.
    """
    import numpy as np
    import torch

    if isinstance(source, np.ndarray) and source.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(source, dtype=np.float32))
    image = source if hasattr(source, "resize") and not isinstance(source, np.ndarray) else None
    if isinstance(source, np.ndarray):
        from PIL import Image

        image = Image.fromarray(source).convert("RGB")
    pixels = torch.from_numpy(resize_crop(image or read_image(source), size).copy()).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(_channel(mean)).div_(_channel(std)).contiguous()


@functools.lru_cache(maxsize=16)
def _channel(values: tuple[float, float, float]) -> Tensor:
    import torch

    return torch.tensor(values).view(3, 1, 1)
