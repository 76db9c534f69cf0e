"""A temperature for each pattern of present modalities, fitted on validation data: softmax(z / T), sigmoid(z / T)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError

from missing_modal.metrics import as_array, score_samples
from missing_modal.patterns import IMAGE_TEXT, all_masks, mask_name, to_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from missing_modal.data.base import Task

__all__ = ["HIGHEST", "LOWEST", "MIN_ROWS", "Temperatures", "fit_temperature", "fit_temperatures"]

MIN_ROWS = 50
"""a pattern with fewer validation rows takes the pooled temperature"""
LOWEST, HIGHEST = 0.01, 100.0
"""bounds of T: without them, validation rows that are all right (all wrong) send T to 0 (to infinity)"""


@dataclass(frozen=True)
class Temperatures:
    """Temperatures by pattern.

    Args:
        by_mask: T > 0 of each pattern (bit mask).
        pooled: T of all validation rows together, for patterns that ``by_mask`` lacks.
        modalities: in the order of the model.
        rows: validation rows of each pattern.
    """

    by_mask: Mapping[int, float]
    pooled: float = 1.0
    modalities: tuple[str, ...] = IMAGE_TEXT
    rows: Mapping[int, int] | None = None

    def of(self, masks: Any) -> NDArray[np.float64]:
        """(N,) patterns as bit masks -> (N,) temperatures."""
        return np.array([self.by_mask.get(int(mask), self.pooled) for mask in as_array(masks)], dtype=np.float64)

    def scale(self, logits: Any, masks: Any) -> NDArray[np.float64]:
        """(N, C) logits of samples with patterns (N,), divided by their temperatures."""
        scaled: NDArray[np.float64] = as_array(logits).astype(np.float64) / self.of(masks)[:, None]
        return scaled

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``{"pooled": T, "patterns": {"complete": T, ...}}``, for exports and manifests."""
        return {
            "pooled": self.pooled,
            "patterns": {mask_name(mask, self.modalities): value for mask, value in self.by_mask.items()},
        }

    @classmethod
    def from_json(cls, value: Any, modalities: Sequence[str] = IMAGE_TEXT) -> Temperatures:
        """What ``to_json`` gave.

        Raises:
            UserError: other fields, an unknown pattern, or a temperature that is not a positive number.
        """
        try:
            pooled = float(value["pooled"])
            found = {to_mask(str(name), modalities): float(t) for name, t in value["patterns"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"temperatures {value!r} cannot be read; export the model again") from error
        for one in (pooled, *found.values()):
            if not (one > 0 and math.isfinite(one)):
                raise UserError(f"temperature {one}; expected a number above 0, export the model again")
        return cls(found, pooled, tuple(modalities))


def fit_temperature(logits: Any, labels: Any, task: Task) -> float:
    """The T > 0 with the smallest NLL (mean BCE for several labels), by L-BFGS over log T in float64.

    The NLL is convex in 1 / T, so it has one valley in log T, and cutting the found T to the bounds gives the best T
    within them.

    Args:
        logits: (N, C), finite.
        labels: (N,) class numbers, or (N, C) of 0/1.
        task: multiclass, multilabel, binary.

    Returns:
        T in [0.01, 100]; 1 for no rows, or where T changes nothing (all logits equal).

    Raises:
        ValueError: shapes or labels that do not fit.
        UserError: logits that are not finite.

    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 4.2; DCP (arXiv 2410.06558), our specification 9.
    """
    import torch
    from torch.nn import functional as F

    scores = score_samples(logits, labels, task)
    if not len(scores):
        return 1.0
    z = torch.from_numpy(as_array(logits).astype(np.float64))
    truth = torch.from_numpy(scores.truth)

    def nll(log_t: torch.Tensor) -> torch.Tensor:
        scaled = z * torch.exp(-log_t)
        if task == "multilabel":
            return F.binary_cross_entropy_with_logits(scaled, truth.double())
        return F.cross_entropy(scaled, truth)

    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [log_t], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = nll(log_t)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        search.step(closure)  # type: ignore[no-untyped-call]
    found = float(torch.exp(log_t.detach()))
    return min(max(found, LOWEST), HIGHEST) if not math.isnan(found) else 1.0


def fit_temperatures(
    logits: Any, labels: Any, masks: Any, task: Task, modalities: Sequence[str] = IMAGE_TEXT, min_rows: int = MIN_ROWS
) -> Temperatures:
    """A temperature for each pattern, the pooled one where its validation rows are too few, or all of them right.

    Where every decision is right the likelihood rises without end as T falls: the temperature would only say how far
    the search went, and one wrong test row would cost as much as all others together.

    Args:
        logits: (N, C) of validation samples under the patterns ``masks``.
        labels: (N,) class numbers, or (N, C) of 0/1.
        masks: (N,) patterns as bit masks.
        task: multiclass, multilabel, binary.
        modalities: in the order of the model.
        min_rows: patterns with fewer rows take the temperature of all rows together (1 where there is no row at all, or
            where all are right).

    Raises:
        ValueError: shapes or labels that do not fit.
        UserError: logits that are not finite.

    Source:
        DCP (arXiv 2410.06558), our specification 9.
    """
    z, y, held = as_array(logits), as_array(labels), as_array(masks)
    pooled = 1.0 if _all_right(z, y, task) else fit_temperature(z, y, task)
    by_mask: dict[int, float] = {}
    rows: dict[int, int] = {}
    for mask in all_masks(modalities):
        chosen = held == mask
        rows[mask] = int(chosen.sum())
        enough = rows[mask] >= max(min_rows, 1)
        own = enough and not _all_right(z[chosen], y[chosen], task)
        by_mask[mask] = fit_temperature(z[chosen], y[chosen], task) if own else pooled
    return Temperatures(by_mask, pooled, tuple(modalities), rows)


def _all_right(logits: np.ndarray, labels: np.ndarray, task: Task) -> bool:
    """Whether no decision is wrong, so that no temperature is best."""
    if task == "multilabel":
        return bool(((logits > 0) == (labels > 0)).all())
    return bool((logits.argmax(1) == labels).all())
