"""A continual task: which classes are learnt in which step, in which order, and what a label looks like there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from polymodal.errors import UserError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BACKGROUND", "IGNORE", "MAX_CLASSES", "Task"]

BACKGROUND = 0
"""Label of everything that is no class of the step."""
IGNORE = 255
"""Label of pixels that count nowhere."""
MAX_CLASSES = 254
"""Labels are 8-bit: 0 is background, 255 is ignored."""
_NAME = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Task:
    """Classes in learning order, cut into steps.

    Two numberings: a *raw id* (1..K) is what the masks on disk hold; a *channel* (1..K) is a class's place in learning
    order, and the place of its logit. Channel 0 and raw id 0 are the background. Everything in training is in channels.

    Args:
        name: ``"B-I"``: base step with the first B classes, then steps of I; ``"offline"`` (or ``"joint"``): one step.
        num_classes: K, without background.
        order: raw ids in learning order; default 1..K.

    Raises:
        UserError: a name of another form, classes that do not fit it, or an order that is no permutation of 1..K.

    Source: Yin et al. 2025, arXiv 2503.22136; the task strings are the field's.
    """

    name: str
    num_classes: int
    order: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = field(init=False)
    """raw ids by step"""

    def __post_init__(self) -> None:
        total = self.num_classes
        if not 1 <= total <= MAX_CLASSES:
            raise UserError(f"num_classes={total}; expected 1..{MAX_CLASSES}")
        order = tuple(self.order) or tuple(range(1, total + 1))
        if sorted(order) != list(range(1, total + 1)):
            raise UserError(f"class order has {len(order)} entries; expected each of 1..{total} once")
        sizes = _sizes(self.name, total)
        ends = list(accumulate(sizes))
        steps = tuple(order[end - size : end] for size, end in zip(sizes, ends, strict=True))
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "steps", steps)

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def channels(self, step: int) -> range:
        """Channels of the classes that ``step`` brings."""
        start = 1 + sum(len(ids) for ids in self.steps[:step])
        return range(start, start + len(self.steps[step]))

    def num_old(self, step: int) -> int:
        """Classes of the steps before."""
        return self.channels(step).start - 1

    def num_channels(self, step: int) -> int:
        """Background and all classes seen up to ``step``."""
        return self.channels(step).stop

    def seen(self, step: int) -> tuple[int, ...]:
        """Raw ids seen up to ``step``, in learning order."""
        return self.order[: self.num_channels(step) - 1]

    def raw(self, channel: int) -> int:
        """Raw id of a channel (0 stays 0)."""
        return self.order[channel - 1] if channel else BACKGROUND

    def channel(self, raw: int) -> int:
        """Channel of a raw id (0 stays 0)."""
        return self.order.index(raw) + 1 if raw else BACKGROUND

    def train_lut(self, step: int, keep_old: bool = False) -> np.ndarray:
        """Table raw id -> training label of ``step``: its own classes by channel, 0 and 255 as they are, the rest 0.

        Args:
            step: the step.
            keep_old: keep labels of earlier steps too (setting ``sequential``, and joint training).

        Returns:
            (256,) uint8, to be indexed by a mask.
        """
        first = 1 if keep_old else self.channels(step).start
        return self._lut(range(first, self.channels(step).stop), BACKGROUND)

    def test_lut(self, step: int, unseen_as: int = BACKGROUND) -> np.ndarray:
        """Table raw id -> test label after ``step``: every seen class by channel, unseen ones ``unseen_as`` (0 or 255).

        Returns:
            (256,) uint8, to be indexed by a mask.
        """
        return self._lut(range(1, self.num_channels(step)), unseen_as)

    def _lut(self, keep: range, rest: int) -> np.ndarray:
        import numpy as np

        table = np.full(256, BACKGROUND, np.uint8)
        table[1 : self.num_classes + 1] = rest
        table[IGNORE] = IGNORE
        for channel in keep:
            table[self.raw(channel)] = channel
        return table


def _sizes(name: str, total: int) -> list[int]:
    """Classes of each step."""
    if name in ("offline", "joint"):
        return [total]
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"task {name!r}; expected 'B-I' such as 15-1 (base classes, classes a later step), or offline")
    base, more = int(match[1]), int(match[2])
    later = total - base
    if base < 1 or more < 1 or later < 0 or later % more:
        fitting = [i for i in range(1, total) if later > 0 and later % i == 0] if 0 < base < total else []
        hint = f"after {base} base classes, steps of {', '.join(map(str, fitting[:6]))} fit" if fitting else ""
        raise UserError(
            f"task {name!r} does not fit {total} classes" + (f"; {hint}" if hint else f"; base must be 1..{total}")
        )
    return [base] + [more] * (later // more)
