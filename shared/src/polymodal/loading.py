"""A DataLoader that starts drawing batches with the first one asked for, and whose workers never stay behind."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from polymodal.errors import UserError

__all__ = ["LazyLoader", "end_with_parent"]


class LazyLoader(DataLoader[Any]):
    """``DataLoader`` whose workers start at the first ``next``, not at ``iter``.

    Lightning makes the iterator before its ``on_train_start``, and worker processes begin to load at once. A batch
    sampler that is pointed at the place of a resumed run in that hook would be too late: the workers would have been
    given the first batches of epoch 0. Arguments are those of ``torch.utils.data.DataLoader``.

    A ``UserError`` of a worker process arrives as the one line that it was, without the worker's traceback. Workers end
    with the process that reads from them, also when that is killed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("worker_init_fn", end_with_parent)
        super().__init__(*arguments, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of one epoch."""
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(_own_words(str(error))) from error


def end_with_parent(worker: int = 0) -> None:
    """In a worker process: end when the process that started it is gone, however it went.

    torch's own watch looks at the id of the parent process. A fork server is the parent of its workers, and it in turn
    stays as long as they do: after a kill of the training, both would keep their memory for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _own_words(message: str) -> str:
    """What the worker's error said; torch wraps it as "Caught UserError in DataLoader worker ...: traceback"."""
    if not message.startswith("Caught "):
        return message
    return message.strip().splitlines()[-1].partition(f"{UserError.__name__}: ")[2]
