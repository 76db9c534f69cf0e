"""Readers by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from polymodal.errors import UserError, did_you_mean

from missing_modal.data.base import SPLITS, MissingConfig, MMData, Sample

__all__ = ["READERS", "SPLITS", "MMData", "MissingConfig", "Sample", "reader_class", "spell_manifest"]

READERS: dict[str, str] = {
    "world": "missing_modal.world.World",
    "mmimdb": "missing_modal.data.mmimdb.MMIMDb",
    "food101": "missing_modal.data.food101.Food101",
    "hatememes": "missing_modal.data.hatememes.HatefulMemes",
    "manifest": "missing_modal.data.manifest.Manifest",
}


def reader_class(name: str) -> type[MMData]:
    """The reader class called ``name``.

    Raises:
        UserError: unknown name; the message has the nearest names and the list.
    """
    if name not in READERS:
        raise UserError(f"unknown data {name!r}; {did_you_mean(name, READERS)}known: {', '.join(READERS)}")
    module, _, attribute = READERS[name].rpartition(".")
    loaded: type[MMData] = getattr(importlib.import_module(module), attribute)
    return loaded


def spell_manifest(arguments: Sequence[str]) -> list[str]:
    """Arguments in which ``--data FILE.jsonl`` became ``--data manifest --data.root FILE.jsonl``."""
    spelled: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name != "--data":
            spelled.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if value.endswith(".jsonl"):
            spelled += ["--data", "manifest", "--data.root", value]
        else:
            spelled += ["--data", value] if value else ["--data"]
    return spelled
