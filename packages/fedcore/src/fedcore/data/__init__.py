"""Readers of data sets by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import importlib

from polymodal.errors import UserError, did_you_mean

from fedcore.data.base import SPLITS, FedData

__all__ = ["READERS", "SPLITS", "FedData", "reader_class"]

READERS: dict[str, str] = {
    "digits": "fedcore.data.digits.Digits",
    "fashion_mnist": "fedcore.data.fashion.FashionMNIST",
    "cifar10": "fedcore.data.cifar.CIFAR10",
    "cifar100": "fedcore.data.cifar.CIFAR100",
}


def reader_class(name: str) -> type[FedData]:
    """The reader class called ``name``.

    Raises:
        UserError: unknown name; the message has the nearest names and the list.
    """
    if name not in READERS:
        raise UserError(f"unknown data {name!r}; {did_you_mean(name, READERS)}known: {', '.join(READERS)}")
    module, _, attribute = READERS[name].rpartition(".")
    loaded: type[FedData] = getattr(importlib.import_module(module), attribute)
    return loaded
