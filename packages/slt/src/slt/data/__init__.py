"""Readers by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import difflib
import importlib

from polymodal.errors import UserError

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
        close = difflib.get_close_matches(name, READERS, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown data {name!r}; {hint}known: {', '.join(READERS)}")
    module, _, attribute = READERS[name].rpartition(".")
    loaded: type[SLTData] = getattr(importlib.import_module(module), attribute)
    return loaded
