"""Partitions of flwr-datasets: its partitioners are taken as they are, by what they offer, not by their class."""

from __future__ import annotations

from typing import Any

import numpy as np
from polymodal.errors import UserError

from fedcore.partition_base import Partition

__all__ = ["from_flwr"]


def from_flwr(partitioner: Any, index: str | None = None) -> Partition:
    """The partition that a partitioner of flwr-datasets makes, or anything with its face.

    ``load_partition(i)`` gives rows selected from ``partitioner.dataset``. Which rows is read from the indices that a
    ``datasets.Dataset`` keeps of its selection, or from a column with row numbers.

    Args:
        partitioner: has ``num_partitions``, ``load_partition(i)`` and, assigned before, ``dataset``.
        index: column that holds each row's place in the training set; None: the indices that the rows keep.

    Raises:
        UserError: not a partitioner, no data set assigned, or rows that do not say which they are.
    """
    for name in ("num_partitions", "load_partition"):
        if not hasattr(partitioner, name):
            raise UserError(
                f"{type(partitioner).__name__} has no {name}; expected a partitioner of flwr-datasets (num_partitions,"
                " load_partition)"
            )
    try:
        size = len(partitioner.dataset)
        count = int(partitioner.num_partitions)
    except AttributeError as error:  # flwr raises it where no data set was assigned
        raise UserError(
            f"{type(partitioner).__name__} has no data set; assign one before: partitioner.dataset = ..."
        ) from error
    clients = [_rows(partitioner.load_partition(number), index, number, size) for number in range(count)]
    how = {"scheme": "flwr", "partitioner": type(partitioner).__name__, "clients": count}
    return Partition.of(clients, size, how)


def _rows(rows: Any, index: str | None, number: int, size: int) -> np.ndarray:
    if index is not None:
        if index not in getattr(rows, "column_names", [index]):
            raise UserError(f"partition {number} has no column {index!r}; columns: {', '.join(rows.column_names)}")
        return np.asarray(rows[index], dtype=np.int64)
    table = getattr(rows, "_indices", None)  # datasets keeps a selection there and has no public way to ask for it
    if table is not None:
        return np.asarray(table.column(0).to_pylist(), dtype=np.int64)
    if len(rows) == size:
        return np.arange(size)  # the whole data set: nothing was selected
    raise UserError(
        f"partition {number} does not say which rows it has; add a column with row numbers to the data set and name it:"
        ' from_flwr(partitioner, index="row")'
    )
