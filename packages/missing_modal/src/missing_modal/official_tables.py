"""The official missing tables: ``.pt`` files of 0, 1, 2 over the rows of a split, and their way of drawing."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from pathlib import Path

from polymodal.errors import UserError
from polymodal.paths import require_files

from missing_modal.patterns import IMAGE_TEXT, to_mask
from missing_modal.tables import MissingTable, canonical_kind

__all__ = ["read_official", "redraw_official"]

_BYTES_A_ROW = 16
_BYTES_AROUND = 1 << 20


def read_official(
    path: Path, rows: Sequence[str], dataset: str, split: str, modalities: Sequence[str] = IMAGE_TEXT
) -> MissingTable:
    """Read an official table, e.g. ``mmimdb_train_missing_both_07.pt``.

    Such a file knows neither ids nor seed: only its number of rows can be held against the data.

    Args:
        path: a tensor (N,) of 0 complete, 1 text missing, 2 image missing, saved by ``torch.save``.
        rows: N row ids in the order of the data set's table (Arrow file).
        dataset: name of the data set.
        split: train, val or test.
        modalities: image and text.

    Raises:
        UserError: missing, unreadable, too large, of another number of rows, or with other values.

    Source:
        DCP (arXiv 2410.06558), official code; our specification 4.3.
    """
    import numpy as np
    import torch

    if tuple(modalities) != IMAGE_TEXT:
        raise UserError(f"missing table {path}: .pt tables speak of image and text, not of {', '.join(modalities)}")
    require_files(path.parent, [path.name], "missing table")
    size, allowed = path.stat().st_size, _BYTES_AROUND + _BYTES_A_ROW * len(rows)
    if size > allowed:
        raise UserError(f"missing table {path} has {size} bytes; a table of {len(rows)} rows has at most {allowed}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"missing table {path} cannot be read ({reason}); it must be a tensor of 0, 1, 2") from error
    plain = isinstance(loaded, torch.Tensor) and loaded.layout == torch.strided and not loaded.is_quantized
    if not plain or loaded.ndim != 1 or loaded.is_complex():
        raise UserError(f"missing table {path} holds no tensor of one axis; it must be a tensor of 0, 1, 2")
    if len(loaded) != len(rows):
        raise UserError(
            f"missing table {path} has {len(loaded)} rows, {dataset} {split} has {len(rows)};"
            " give the table of this split"
        )
    values = loaded.double().numpy()
    if not np.isin(values, (0, 1, 2)).all():
        raise UserError(f"missing table {path} has values other than 0, 1, 2; is it a missing table?")
    masks = {row: to_mask(int(value), IMAGE_TEXT) for row, value in zip(rows, values, strict=True)}
    share = float((values != 0).mean()) if len(values) else 0.0
    return MissingTable(masks, dataset, split, IMAGE_TEXT, ratio=share)


def redraw_official(count: int, kind: str, ratio: float, seed: int, both_ratio: float = 0.5) -> list[int]:
    """Codes as the official code draws them, from a generator of its own in place of the global one.

    The released tables came from the global generator of a running training and cannot be had again; this is the same
    drawing with a seed. It is not nested in the ratio, and follows the order of the rows.

    Args:
        count: N rows.
        kind: text, image, both, none.
        ratio: share of the rows that lack something, 0..1.
        seed: of ``random.Random``.
        both_ratio: kind both: share of the incomplete rows that lacks the image, 0..1.

    Returns:
        N codes in the order of the data set's rows.

    Raises:
        UserError: another kind, or a share outside 0..1.

    Source:
        DCP (arXiv 2410.06558), official code; our specification 4.3.
    """
    kind = canonical_kind(kind, IMAGE_TEXT)
    if kind == "any":
        raise UserError("the official code draws text, image or both; kind any is ours: use missing_table")
    for name, share in (("ratio", ratio), ("both_ratio", both_ratio)):
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share}; expected a share from 0 to 1")
    codes = [0] * count
    if kind == "none" or ratio == 0:
        return codes
    draw = random.Random(seed)
    taken = draw.sample(range(count), int(count * ratio))
    for row in taken:
        codes[row] = 2 if kind == "image" else 1
    if kind == "both":
        for row in draw.sample(taken, int(len(taken) * both_ratio)):
            codes[row] = 2
    return codes
