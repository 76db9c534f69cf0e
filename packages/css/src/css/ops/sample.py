"""Which entries a bounded memory keeps: the classes take turns until the budget is spent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

__all__ = ["balanced_sample"]

Key = TypeVar("Key", bound=Hashable)


def balanced_sample(
    candidates: Sequence[tuple[Key, Collection[int]]],
    budget: int,
    class_order: Sequence[int],
    accept: Callable[[Key], bool] | None = None,
) -> list[tuple[Key, int]]:
    """Take candidates class by class, in turns: each takes the first one left that contains it.

    Nothing is drawn here: shuffle ``candidates`` and ``class_order`` before. The shares of the classes differ by at
    most one while candidates last; a class without any left drops out and the others go on.

    Args:
        candidates: (identifier, classes in it), identifiers unique, first come first served.
        budget: most entries to take over all classes, >= 0.
        class_order: classes in the order of their turns.
        accept: asked once for a candidate whose turn has come; one that it refuses is dropped for all classes. The
            result is the same as filtering the candidates before, without looking at all of them. None: all are good.

    Returns:
        (identifier, class whose turn it was), in the order taken; at most ``budget``, each identifier at most once.

    Raises:
        ValueError: a negative budget, or an identifier that occurs twice.

    Source: Yin et al. 2025 (arXiv 2503.22136), instance memory. The released code turns for ever where no candidate is
    left; here a full round that adds nothing ends it.
    """
    if budget < 0:
        raise ValueError(f"budget={budget}; expected 0 or more entries")
    if len({key for key, _ in candidates}) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates; expected identifiers that occur once each")
    queues: dict[int, deque[Key]] = {label: deque() for label in class_order}
    for key, classes in candidates:
        for label in set(classes):
            if label in queues:
                queues[label].append(key)
    gone: set[Key] = set()
    taken: list[tuple[Key, int]] = []
    added = True
    while added:
        added = False
        for label, queue in queues.items():
            if len(taken) == budget:
                return taken
            found = _next(queue, gone, accept)
            if found is not None:
                taken.append((found[0], label))
                added = True
    return taken


def _next(queue: deque[Key], gone: set[Key], accept: Callable[[Key], bool] | None) -> tuple[Key] | None:
    """First good candidate of a class, in a tuple because identifiers may be anything; it is gone for every class."""
    while queue:
        key = queue.popleft()
        if key in gone:
            continue
        gone.add(key)
        if accept is None or accept(key):
            return (key,)
    return None
