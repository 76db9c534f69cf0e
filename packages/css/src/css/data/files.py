"""Pictures and index masks as files: reading, writing, colours. No torch."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from polymodal.files import write_bytes

from css.data.base import Item

if TYPE_CHECKING:
    import numpy as np

__all__ = ["check_sizes", "mask_ids", "palette", "read_image", "read_mask", "write_mask"]

_INDEX_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_PNG_DEPTH = slice(24, 26)
"""place of bit depth and colour type in a PNG"""
_GREY_STEP = {2: 85, 4: 17}
"""factor by which PNGs of 2 and 4 bits are spread over 0..255 when decoded as grey"""


def read_image(path: Path) -> np.ndarray:
    """Decode a picture as it is stored; an EXIF rotation is not applied, since masks are drawn on stored pixels.

    Returns:
        (H, W, 3) uint8 RGB; transparency is dropped, grey is repeated.

    Raises:
        UserError: a missing or broken file, by name.
    """
    import numpy as np

    array, mode, _ = _decode(path, "image", rgb=True)
    if mode.startswith("I"):  # 16-bit grey: the library would clip instead of scaling
        array = np.repeat((array >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return array


def read_mask(path: Path, num_classes: int | None = None) -> np.ndarray:
    """Decode an index mask; palette files give their indices, grey files their values, at any bit depth.

    Args:
        path: lossless picture of one channel: 0 background, 1..K classes, 255 ignored.
        num_classes: K; None: any value passes.

    Returns:
        (H, W) uint8 raw ids.

    Raises:
        UserError: a missing or broken file, one in colours or with lossy compression, or an id that is neither 0..K
            nor 255, by name.
    """
    import numpy as np

    array, mode, kind = _decode(path, "mask")
    if kind in _LOSSY:
        raise UserError(f"mask {path}: {kind} is lossy and mixes ids at borders; save index masks as PNG")
    if mode not in _INDEX_MODES:
        raise UserError(f"mask {path}: colour picture (mode {mode}); expected one channel of class ids, as PNG")
    if num_classes is not None or array.dtype != np.uint8:
        top = 255 if num_classes is None else num_classes
        wrong = (array > top) & (array != 255)
        if array.dtype.kind == "i":
            wrong |= array < 0
        if wrong.any():
            ids = np.unique(array[wrong])
            shown = ", ".join(map(str, ids[:5].tolist())) + (", ..." if len(ids) > 5 else "")
            raise UserError(
                f"mask {path}: unknown id {shown} in {int(wrong.sum())} pixels; expected 0 (background), 1..{top} or"
                " 255 (ignored): mend the mask or the list of classes"
            )
    return array.astype(np.uint8, copy=False)


def mask_ids(mask: np.ndarray) -> tuple[int, ...]:
    """Class ids of a mask (H, W) uint8, sorted; without background and ignored pixels."""
    import numpy as np

    present = np.bincount(mask.ravel(), minlength=256)
    return tuple((np.flatnonzero(present[1:255]) + 1).tolist())


def check_sizes(item: Item, image: np.ndarray, mask: np.ndarray) -> None:
    """Whether a picture and its mask cover the same pixels.

    Args:
        item: the pair, for the message.
        image: (H, W, 3).
        mask: (H, W).

    Raises:
        UserError: different heights or widths; names both files.
    """
    if image.shape[:2] == mask.shape[:2]:
        return
    (high, wide), (mask_high, mask_wide) = image.shape[:2], mask.shape[:2]
    turned = (high, wide) == (mask_wide, mask_high)
    hint = "apply the rotation of the image's EXIF data to its pixels" if turned else "export one of them again"
    raise UserError(
        f"{item.id}: image {item.image} is {wide} x {high} pixels, mask {item.mask} {mask_wide} x {mask_high}; {hint}"
    )


def palette(colors: int = 256) -> np.ndarray:
    """The colours of PASCAL VOC: the bits of an id, dealt out to red, green and blue, highest bit first.

    Args:
        colors: number of ids, 1..256.

    Returns:
        (colors, 3) uint8; id 0 is black, 255 is (224, 224, 192).

    Source: the colour map of the VOC development kit (``VOCcolormap``).
    """
    import numpy as np

    ids = np.arange(colors)
    table = np.zeros((colors, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            table[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return table


_palette = palette


def write_mask(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Write an index mask as palette PNG, whole or not at all.

    Args:
        path: the file; its folder must exist.
        array: (H, W) ids 0..255.
        palette: (n, 3) uint8 colours, n <= 256; ids from n on, and all by default, get VOC's.

    Raises:
        ValueError: an array of another form or range.
        UserError: the file cannot be written.
    """
    import numpy as np
    from PIL import Image

    if array.ndim != 2 or (array.size and not 0 <= int(array.min()) <= int(array.max()) <= 255):
        raise ValueError(f"mask of shape {array.shape}; expected (H, W) with ids 0..255")
    image = Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))
    colors = _palette()  # always all 256: files with a short palette are written with few bits, which cut the ids
    if palette is not None:
        colors[: len(palette)] = palette
    image.putpalette(colors.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def _decode(path: Path, what: str, rgb: bool = False) -> tuple[np.ndarray, str, str]:
    """Pixels, mode and file format."""
    import numpy as np
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            mode, kind = image.mode, image.format or ""
            if rgb and not mode.startswith("I"):
                image = _to_rgb(image)
            array = np.array(image)
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} is missing; copy it again from the data set or take it off the list") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        reason = str(error).split("\n")[0].split("<")[0].strip() or type(error).__name__
        raise UserError(f"{what} {path} cannot be read ({reason}); copy it again from the data set") from error
    if not rgb and kind == "PNG" and data[_PNG_DEPTH][1] == 0:
        array = array // np.uint8(_GREY_STEP.get(data[_PNG_DEPTH][0], 1)) if array.dtype == np.uint8 else array
    return (array.astype(np.uint8) if array.dtype == np.bool_ else array), mode, kind


def _to_rgb(image: Any) -> Any:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
