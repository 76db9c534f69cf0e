"""A DataLoader that starts drawing batches with the first one that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from polymodal.errors import UserError

__all__ = ["LazyLoader"]


class LazyLoader(DataLoader[Any]):
    """``DataLoader`` whose workers start at the first ``next``, not at ``iter``.

    Lightning makes the iterator before its ``on_train_start``, and worker processes begin to load at once. A batch
    sampler that is pointed at the place of a resumed run in that hook would be too late: the workers would have been
    given the first batches of epoch 0. Arguments are those of ``torch.utils.data.DataLoader``.

    A ``UserError`` of a worker process arrives as the one line that it was, without the worker's traceback.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of one epoch."""
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(_own_words(str(error))) from error


def _own_words(message: str) -> str:
    """What the worker's error said; torch wraps it as "Caught UserError in DataLoader worker ...: traceback"."""
    if not message.startswith("Caught "):
        return message
    return message.strip().splitlines()[-1].partition(f"{UserError.__name__}: ")[2]
