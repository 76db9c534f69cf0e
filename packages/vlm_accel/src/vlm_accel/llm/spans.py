"""Which rows of a prompt are image tokens, in which spans, and how many stay at each step: all known beforehand.

One look at the image and padding masks brings them to the host, once a prefill; from then on every count is a Python
int and every index table stands on the device before the first layer runs. Nothing here looks at hidden states.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from polymodal.errors import UserError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from vlm_accel.methods.base import TokenMethod
    from vlm_accel.schedule import Step

__all__ = ["Group", "Prompt", "StepPlan", "plan_steps", "read_prompt"]


@dataclass
class Prompt:
    """A prefill's new rows, on the host.

    Args:
        span: (B, T) int64 number of the span of each row, in the order of the features (images, then videos); -1: text.
        valid: (B, T) bool, False for padding.
        alive: (B, T) bool, False for placeholder rows without a surviving feature.
        samples: sample of each span.
        repeats: copies of each sample that beam search or sampling made, side by side.
        segmented: whether spans are segments that an encoder adapter named (else unbroken runs of image tokens).
    """

    span: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    alive: npt.NDArray[np.bool_]
    samples: list[int]
    repeats: int = 1
    segmented: bool = False

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.span.shape[0]

    @property
    def length(self) -> int:
        """T, padding included."""
        return self.span.shape[1]

    def counts(self) -> list[int]:
        """Surviving rows of each span."""
        inside = (self.span >= 0) & self.alive
        return np.bincount(self.span[inside], minlength=len(self.samples)).tolist()  # type: ignore[no-any-return]

    def text(self) -> list[int]:
        """Valid rows of each sample that are no image tokens."""
        return ((self.span < 0) & self.valid).sum(1).tolist()  # type: ignore[no-any-return]

    def tail(self) -> list[int]:
        """Valid text rows of each sample after its last image token (all where it has none)."""
        image: npt.NDArray[np.bool_] = np.greater_equal(self.span, 0)
        last = np.where(image.any(1), self.length - image[:, ::-1].argmax(1), 0)
        after = np.arange(self.length)[None] >= last[:, None]
        return (after & self.valid).sum(1).tolist()  # type: ignore[no-any-return]

    def plain(self) -> int:
        """Last columns that are valid text in every sample."""
        dirty = np.flatnonzero(((self.span >= 0) | ~self.valid).any(0))
        return self.length - 1 - int(dirty[-1]) if len(dirty) else self.length


@dataclass
class Group:
    """Spans of one length that a step shortens to one length, in one call of the method.

    Args:
        before, after: rows of each.
        sample, offset: (S,) int64 on the device: sample, and place of the first row when a sample's rows are ordered
            text first, then span by span.
        number: (S,) int64 of the span within the prefill (of the sample with ``budget="global"``), for seeded draws.
    """

    before: int
    after: int
    sample: Tensor
    offset: Tensor
    number: Tensor


@dataclass
class StepPlan:
    """One step that changes something.

    Args:
        step: what was asked; None: leaving out before layer 0.
        groups: what is shortened, and what is left whole (``before == after``).
        rows: t' after the step, the same in all samples.
        holes: whether shorter samples are padded.
        survivors: image tokens left, of the sample that has most.
    """

    step: Step | None
    groups: list[Group]
    rows: int
    holes: bool
    survivors: int


def read_prompt(
    masks: dict[str, Tensor],
    valid: Tensor | None,
    image_rows: dict[str, Tensor],
    segments: dict[str, list[int]],
    shape: tuple[int, int],
) -> Prompt:
    """Look at the masks, once.

    Args:
        masks: {"image": (B, T) bool, "video": (B, T) bool} placeholder rows.
        valid: (B, T) bool; None: no padding.
        image_rows: as in ``Session``, of the samples before beam expansion.
        segments: likewise.
        shape: (B, T).

    Raises:
        UserError: placeholder rows and features of the encoder do not fit.
    """
    kinds = list(masks)
    stacked = [masks[kind] for kind in kinds] + ([] if valid is None else [valid])
    seen: npt.NDArray[np.bool_] = torch.stack(stacked).cpu().numpy() if stacked else np.zeros((0, *shape), np.bool_)
    prompt = Prompt(
        span=np.full(shape, -1, np.int64),
        valid=seen[-1] if valid is not None else np.ones(shape, bool),
        alive=np.ones(shape, bool),
        samples=[],
        segmented=any(segments.get(kind) for kind in kinds),
    )
    for kind, mask in zip(kinds, seen, strict=False):
        rows = image_rows.get(kind)
        _fill(prompt, mask, None if rows is None else rows.cpu().numpy(), segments.get(kind))
    _check_yield(prompt)
    return prompt


def _fill(
    prompt: Prompt, mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.bool_] | None, segments: Sequence[int] | None
) -> None:
    """Number the spans of one kind, and mark the rows without a surviving feature."""
    counts = mask.sum(1)
    total = int(counts.sum())
    if total == 0:
        return
    made = len(rows) if rows is not None else sum(segments) if segments else total
    repeats = total // made if made else 0
    own = counts[:: max(1, repeats)]
    if repeats < 1 or repeats * made != total or not np.array_equal(np.repeat(own, repeats), counts):
        raise UserError(
            f"the prompt has {total} image placeholder rows, the encoder made {made}; give the images of this prompt "
            "with it, in one piece (no prefill_chunk_size)"
        )
    prompt.repeats = max(prompt.repeats, repeats)
    bounds = np.concatenate([[0], np.cumsum(own)])
    where = np.argwhere(mask)
    if rows is not None:
        parts = [rows[a:b] for a, b in itertools.pairwise(bounds) for _ in range(repeats)]
        prompt.alive[where[:, 0], where[:, 1]] = np.concatenate(parts)
    numbers = _segment_numbers(segments, bounds, repeats) if segments else _run_numbers(where)
    first = len(prompt.samples)
    prompt.span[where[:, 0], where[:, 1]] = first + numbers
    _, opening = np.unique(numbers, return_index=True)
    prompt.samples += where[opening, 0].tolist()


def _segment_numbers(segments: Sequence[int], bounds: npt.NDArray[np.int64], repeats: int) -> npt.NDArray[np.int64]:
    """Number of the segment of each placeholder row, samples repeated side by side."""
    ends = np.cumsum(segments)
    if not set(bounds.tolist()) <= {0, *ends.tolist()}:
        raise UserError(f"image segments of {list(segments)} rows do not end where the samples do ({bounds.tolist()})")
    own = np.repeat(np.arange(len(segments)), segments)
    parts, shift = [], 0
    for a, b in itertools.pairwise(bounds):
        piece = own[a:b]
        count = 0 if a == b else int(piece[-1] - piece[0]) + 1
        for _ in range(repeats):
            if count:
                parts.append(piece - piece[0] + shift)
            shift += count
    return np.concatenate(parts)


def _run_numbers(where: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number of the unbroken run of each (sample, column)."""
    new = (np.diff(where[:, 0]) != 0) | (np.diff(where[:, 1]) != 1)
    return np.concatenate([[0], np.cumsum(new)])


def _check_yield(prompt: Prompt) -> None:
    for number, count in enumerate(prompt.counts()):
        if count == 0:
            raise UserError(
                f"image {number} of the prompt keeps no token at all; raise the ratio or leave the image out"
            )


def plan_steps(
    prompt: Prompt,
    steps: Sequence[Step],
    method: TokenMethod | None,
    scope: str,
    ragged: str,
    device: torch.device,
) -> tuple[StepPlan | None, dict[int, StepPlan], list[int]]:
    """What each step does to this prompt.

    Args:
        prompt: from ``read_prompt``.
        steps: LLM steps, ascending.
        method: of the steps; says how many it leaves.
        scope: ``"span"``, or ``"global"``: all image tokens of a sample are one group.
        ragged: ``"pad"`` or ``"error"`` where samples keep different counts.
        device: of the tables.

    Returns:
        leaving out before layer 0 (None: nothing to leave out), steps that change something by layer, and the image
        tokens left at first, of each sample.

    Raises:
        UserError: samples keep different counts and ``ragged="error"``.
    """
    text, samples, counts = prompt.text(), list(prompt.samples), prompt.counts()
    first = None
    left = _per_sample(prompt, samples, counts)
    if not prompt.alive.all():
        first = StepPlan(None, [], *_size(text, left, ragged), max(left))
    numbers = list(range(len(samples)))
    if scope == "global":
        numbers = [sample for sample in range(prompt.batch) if left[sample]]
        samples, counts = list(numbers), [left[sample] for sample in numbers]
    plans = {}
    rows = first.rows if first else prompt.length
    for step in steps:
        after = [step.count(count) if method is None else method.left(step, count) for count in counts]
        if after == counts:
            continue
        groups = _groups(samples, counts, after, numbers, rows, device)
        counts = after
        left = _per_sample(prompt, samples, counts)
        plans[step.layer] = StepPlan(step, groups, *_size(text, left, ragged), max(left))
        rows = plans[step.layer].rows
    return first, plans, _per_sample(prompt, prompt.samples, prompt.counts())


def _per_sample(prompt: Prompt, samples: Sequence[int], counts: Sequence[int]) -> list[int]:
    left = [0] * prompt.batch
    for sample, count in zip(samples, counts, strict=True):
        left[sample] += count
    return left


def _size(text: Sequence[int], left: Sequence[int], ragged: str) -> tuple[int, bool]:
    """(t', whether samples differ)."""
    if ragged == "error" and len(set(left)) > 1:
        raise UserError(f"samples of the batch keep {sorted(set(left))} image tokens; use ragged='pad' or equal images")
    rows = [a + b for a, b in zip(text, left, strict=True)]
    return max(rows), len(set(rows)) > 1


def _groups(
    samples: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    numbers: Sequence[int],
    rows: int,
    device: torch.device,
) -> list[Group]:
    """Spans of equal lengths together; offsets within rows ordered text (and padding) first, then span by span."""
    image = {sample: 0 for sample in samples}
    for sample, count in zip(samples, before, strict=True):
        image[sample] += count
    place = {sample: rows - count for sample, count in image.items()}
    kinds: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for sample, old, new, number in zip(samples, before, after, numbers, strict=True):
        kinds.setdefault((old, new), []).append((sample, place[sample], number))
        place[sample] += old
    return [
        Group(old, new, *torch.tensor(members, device=device).T.contiguous().unbind(0))
        for (old, new), members in kinds.items()
    ]
