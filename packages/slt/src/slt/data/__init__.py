"""Readers by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import importlib

from polymodal.errors import UserError, did_you_mean

from slt.data.base import SPLITS, Item, SLTData

__all__ = ["READERS", "SPLITS", "Item", "SLTData", "reader_class"]

READERS: dict[str, str] = {
    "synthetic": "slt.data.synthetic.Synthetic",
    "phoenix2014t": "slt.data.phoenix.Phoenix2014T",
    "csl_daily": "slt.data.csl_daily.CSLDaily",
    "how2sign": "slt.data.how2sign.How2Sign",
    "manifest": "slt.data.manifest.Manifest",
    "poses": "slt.data.poses.Poses",
}


def reader_class(name: str) -> type[SLTData]:
    """The reader class called ``name``.

    Raises:
        UserError: unknown name; the message has the nearest names and the list.
    """
    if name not in READERS:
        raise UserError(f"unknown data {name!r}; {did_you_mean(name, READERS)}known: {', '.join(READERS)}")
    module, _, attribute = READERS[name].rpartition(".")
    loaded: type[SLTData] = getattr(importlib.import_module(module), attribute)
    return loaded
