"""Readers of data sets by name; nothing heavy is imported until a reader is asked for."""

from __future__ import annotations

import importlib

from polymodal.errors import UserError, did_you_mean

from fedcore.data.base import SPLITS, FedData

__all__ = ["READERS", "SPLITS", "FedData", "reader_class"]

READERS: dict[str, str] = {
    "digits": "fedcore.data.digits.Digits",
    "fashion_mnist": "fedcore.data.fashion.FashionMNIST",
    "mnist": "fedcore.data.mnist.MNIST",
    "svhn": "fedcore.data.svhn.SVHN",
    "stl10": "fedcore.data.stl10.STL10",
    "cifar10": "fedcore.data.cifar.CIFAR10",
    "cifar100": "fedcore.data.cifar.CIFAR100",
    "tiny_imagenet": "fedcore.data.tiny_imagenet.TinyImageNet",
    "domainnet": "fedcore.data.domainnet.DomainNet",
    "text_domains": "fedcore.data.text_domains.TextDomains",
    "glue": "fedcore.data.glue.Glue",
    "glue:sst2": "fedcore.data.glue.SST2",
    "glue:cola": "fedcore.data.glue.CoLA",
    "glue:mrpc": "fedcore.data.glue.MRPC",
    "glue:qqp": "fedcore.data.glue.QQP",
    "glue:qnli": "fedcore.data.glue.QNLI",
    "glue:rte": "fedcore.data.glue.RTE",
    "glue:wnli": "fedcore.data.glue.WNLI",
    "glue:mnli": "fedcore.data.glue.MNLI",
    "glue:stsb": "fedcore.data.glue.STSB",
    "imdb": "fedcore.data.text_sets.IMDB",
    "ag_news": "fedcore.data.text_sets.AGNews",
    "dbpedia": "fedcore.data.text_sets.DBPedia",
    "yahoo_answers": "fedcore.data.text_sets.YahooAnswers",
    "yelp": "fedcore.data.text_sets.Yelp",
    "hatexplain": "fedcore.data.text_sets.HateXplain",
    "newsgroups20": "fedcore.data.text_sets.Newsgroups20",
    "emotion": "fedcore.data.text_sets.Emotion",
    "sst5": "fedcore.data.text_sets.SST5",
    "mr": "fedcore.data.text_sets.MR",
    "npz": "fedcore.data.npz.Npz",
    "csv": "fedcore.data.table.Table",
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
