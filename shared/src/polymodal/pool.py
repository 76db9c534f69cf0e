"""Long pieces of work in processes of their own: the cells of a comparison, the models of a matrix."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

__all__ = ["in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    items: Sequence[Item], make: Callable[[], Callable[[Item], Result]], jobs: int, what: str
) -> Iterator[tuple[Item, Result]]:
    """Work on items in worker processes of one thread each; what is done comes at once.

    Ctrl-C, an error of an item and a caller that stops looping end the workers. The caller keeps what it was given.

    Args:
        items: to be pickled.
        make: called once in every worker, gives the function of one item; to be pickled, e.g. a ``partial`` of a
            function at the top of a module.
        jobs: workers, at most.
        what: name of the items for the error, e.g. ``"cells"``.

    Yields:
        (item, its result) in the order in which they are done.

    Raises:
        RuntimeError: a worker died.
    """
    # Fresh processes: a fork of one that has used torch may wait for threads that are not there.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    workers = min(jobs, len(items))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        waiting = {pool.submit(_work, item): item for item in items}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker process died (out of memory?); finished {what} are kept: run again, with fewer --jobs"
            ) from error
        except BaseException:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise


_function: list[Callable[[Any], Any]] = []
"""What a worker process does with an item."""


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    if "torch" in sys.modules:
        from polymodal.seeding import set_threads

        set_threads(1)
    _function[:] = [make()]


def _work(item: Any) -> Any:
    return _function[0](item)
