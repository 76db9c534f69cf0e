"""Comparison of nested values (batches, records, states): where they differ first, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["difference"]


def difference(left: Any, right: Any, tolerance: float = 0.0, where: str = "value") -> str:
    """The first difference of two nested values, in words; empty where there is none.

    Args:
        left: tensors, arrays, numbers, texts, dataclasses, mappings and sequences, nested in any way.
        right: the same structure; the order of keys does not matter, types do.
        tolerance: largest absolute difference of floating-point numbers; 0 asks for equal values (NaN equals NaN).
        where: name of the value, for the message.

    Returns:
        For example ``"value.frames[3]: 0.5 against 0.25"``.
    """
    if type(left) is not type(right):
        return f"{where}: {type(left).__name__} against {type(right).__name__}"
    if isinstance(left, np.ndarray):
        left, right = torch.from_numpy(left), torch.from_numpy(right)
    if isinstance(left, Tensor):
        return _in_tensors(left, right, tolerance, where)
    if dataclasses.is_dataclass(left) and not isinstance(left, type):
        left, right = ({f.name: getattr(v, f.name) for f in dataclasses.fields(v)} for v in (left, right))
    if isinstance(left, Mapping):
        if left.keys() != right.keys():
            return f"{where}: only one has {', '.join(sorted(map(str, left.keys() ^ right.keys()))[:6])}"
        return _first(difference(left[key], right[key], tolerance, f"{where}.{key}") for key in left)
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{where}: {len(left)} entries against {len(right)}"
        pairs = enumerate(zip(left, right, strict=True))
        return _first(difference(a, b, tolerance, f"{where}[{i}]") for i, (a, b) in pairs)
    if isinstance(left, float):
        same = left == right or (math.isnan(left) and math.isnan(right)) or abs(left - right) <= tolerance
    else:
        same = bool(left == right)
    return "" if same else f"{where}: {left!r} against {right!r}"


def _in_tensors(left: Tensor, right: Tensor, tolerance: float, where: str) -> str:
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{where}: {tuple(left.shape)} {left.dtype} against {tuple(right.shape)} {right.dtype}"
    if left.is_floating_point() or left.is_complex():
        same = torch.isclose(left, right, rtol=0.0, atol=tolerance, equal_nan=True)
    else:
        same = left == right
    if bool(same.all()):
        return ""
    place = tuple((~same).nonzero()[0].tolist())
    return f"{where}{list(place)}: {left[place].item()} against {right[place].item()}"


def _first(found: Iterable[str]) -> str:
    return next(filter(None, found), "")
