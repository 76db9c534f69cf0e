"""Readers by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import importlib

from polymodal.errors import UserError, did_you_mean

from css.data.base import SPLITS, Item, SegData

__all__ = ["READERS", "SPLITS", "Item", "SegData", "reader_class"]

READERS: dict[str, str] = {
    "shapes": "css.data.shapes.Shapes",
    "voc": "css.data.voc.VOC",
    "ade20k": "css.data.ade.ADE20K",
    "pairs": "css.data.pairs.Pairs",
}


def reader_class(name: str) -> type[SegData]:
    """The reader class called ``name``.

    Raises:
        UserError: unknown name; the message has the nearest names and the list.
    """
    if name not in READERS:
        raise UserError(f"unknown data {name!r}; {did_you_mean(name, READERS)}known: {', '.join(READERS)}")
    module, _, attribute = READERS[name].rpartition(".")
    loaded: type[SegData] = getattr(importlib.import_module(module), attribute)
    return loaded
