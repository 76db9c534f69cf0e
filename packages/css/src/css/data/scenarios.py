"""Which pictures belong to which step. Pure functions of class sets; no files, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.errors import UserError
from polymodal.seeding import derive

if TYPE_CHECKING:
    from css.task import Task

__all__ = ["SETTINGS", "held_out", "partition_class", "select_test", "select_train"]

SETTINGS = ("overlap", "disjoint", "sequential", "partitioned")


def select_train(
    task: Task,
    class_sets: Sequence[Sequence[int]],
    setting: str,
    step: int,
    *,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    allow_empty: bool = False,
    names: Sequence[str] = (),
) -> list[int]:
    """Pictures of a training step.

    - ``overlap``: at least one pixel of a class of the step; a picture may be in several steps.
    - ``disjoint``: that, and no class of a later step; a picture is in the step of its last class only.
    - ``sequential``: the pictures of ``disjoint``; their labels keep old classes (``Task.train_lut(keep_old=True)``).
    - ``partitioned``: each picture belongs to exactly one of its classes, drawn with equal probability by
      (seed, picture id), and so to that class's step. Neither the other pictures nor the task matter, so that all
      tasks of a seed share one partition.

    A task of one step (``offline``) takes every picture with any class, in each setting.

    Args:
        task: classes by step.
        class_sets: raw ids (1..K) in each picture.
        setting: one of ``SETTINGS``.
        step: continual step, from 0.
        ids: names of the pictures; ``partitioned`` draws by them.
        seed: of ``partitioned``.
        allow_empty: an empty step is no error.
        names: class names by raw id - 1, for the message.

    Returns:
        Indices into ``class_sets``, ascending.

    Raises:
        UserError: unknown setting or step, or a step without pictures.

    Source: the settings of Cermelli et al. 2020 (MiB), ``partitioned`` after arXiv 2405.09858.
    """
    if setting not in SETTINGS:
        raise UserError(f"setting {setting!r}; expected one of {', '.join(SETTINGS)}")
    current = set(_classes(task, step))
    if setting == "overlap":
        chosen = [i for i, found in enumerate(class_sets) if not current.isdisjoint(found)]
    elif setting == "partitioned":
        chosen = _partitioned(current, class_sets, ids, seed)
    else:
        seen = set(task.seen(step))
        chosen = [i for i, found in enumerate(class_sets) if not current.isdisjoint(found) and seen.issuperset(found)]
    if not chosen and not allow_empty:
        raise _empty(task, step, f"setting {setting}: no training picture", names)
    return chosen


def select_test(
    task: Task,
    class_sets: Sequence[Sequence[int]],
    step: int,
    *,
    allow_empty: bool = False,
    names: Sequence[str] = (),
) -> list[int]:
    """Test pictures after a step: those with at least one class seen so far.

    Args:
        task: classes by step.
        class_sets: raw ids (1..K) in each picture.
        step: continual step, from 0.
        allow_empty: no picture is no error.
        names: class names by raw id - 1, for the message.

    Returns:
        Indices into ``class_sets``, ascending.

    Raises:
        UserError: unknown step, or no picture.
    """
    _classes(task, step)
    seen = set(task.seen(step))
    chosen = [i for i, found in enumerate(class_sets) if not seen.isdisjoint(found)]
    if not chosen and not allow_empty:
        raise _empty(task, step, "no test picture", names)
    return chosen


def partition_class(found: Sequence[int], identifier: str, seed: int = 0) -> int | None:
    """Class that a picture belongs to in the setting ``partitioned``; None where it has none.

    Args:
        found: raw ids in the picture, in any order.
        identifier: the picture's id; the draw depends on nothing else but the seed and the picture's classes.
        seed: root seed.
    """
    classes = sorted(set(found))
    return classes[derive(seed, "partition", identifier) % len(classes)] if classes else None


def held_out(identifier: str, share: float) -> bool:
    """Whether a training picture is held out for validation: by its id alone, about ``share`` of all.

    Args:
        identifier: the picture's id.
        share: 0..1; a larger share holds out the same pictures and more.
    """
    return derive(0, "val", identifier) < share * 2**63


def _partitioned(
    current: set[int], class_sets: Sequence[Sequence[int]], ids: Sequence[str] | None, seed: int
) -> list[int]:
    if ids is None:
        raise ValueError("setting partitioned draws by picture id; give ids")
    pairs = enumerate(zip(class_sets, ids, strict=True))
    return [i for i, (found, name) in pairs if partition_class(found, name, seed) in current]


def _classes(task: Task, step: int) -> tuple[int, ...]:
    if not 0 <= step < task.num_steps:
        raise UserError(f"step {step}; task {task.name} has the steps 0..{task.num_steps - 1}")
    return task.steps[step]


def _empty(task: Task, step: int, what: str, names: Sequence[str]) -> UserError:
    classes = [f"{raw} ({names[raw - 1]})" if names else str(raw) for raw in task.steps[step]]
    shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    return UserError(
        f"task {task.name}, step {step}, {what} for the classes {shown}; give another task, order, setting or data set"
    )
