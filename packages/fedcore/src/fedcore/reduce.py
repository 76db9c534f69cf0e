"""Reduction of uploads, streamed in client-id order so that every engine gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from fedcore.algorithm import Context, Tree
    from fedcore.engines.base import ClientResult

__all__ = ["Reducer"]


class Reducer:
    """Adds up uploads and counts of one round.

    Args:
        kind: ``mean``, ``sum`` or ``list``.
        weighting: weights of the mean, of buffers and of the loss: ``uniform``, or by ``samples``.
    """

    needs_reports: ClassVar[bool] = True
    """whether a round in which no client reported is an error"""
    tells: bool = True
    """whether the clients that were dropped may be named in the log"""

    def __init__(self, kind: str, weighting: Literal["uniform", "samples"]) -> None:
        self.kind, self.by_samples = kind, weighting == "samples"
        self._total: Tree = {}
        self._list: list[tuple[int, float, Tree]] = []
        self._buffers: Tree = {}
        self._weight, self._loss = 0.0, 0.0
        self.reported, self._steps, self._up, self._down = 0, 0, 0, 0
        self.first_error = ""

    def add(self, result: ClientResult) -> None:
        """Take the upload of a client; its tensors may be reused afterwards, unless all are kept (``list``)."""
        weight = float(result.client.samples) if self.by_samples else 1.0
        self._weight += weight
        self.reported += 1
        self._steps += result.client.steps
        self._loss += weight * result.loss
        if self.kind == "list":
            self._list.append((result.client.id, weight, result.upload))
        else:
            _accumulate(self._total, result.upload, weight if self.kind == "mean" else 1.0)
        for name, value in result.buffers.items():
            if not value.is_floating_point():  # counters: the largest
                self._buffers[name] = value.maximum(self._buffers[name]) if name in self._buffers else value.clone()
        _accumulate(self._buffers, {n: v for n, v in result.buffers.items() if v.is_floating_point()}, weight)

    def count(self, result: ClientResult) -> None:
        """Count the bytes of a client, dropped or not, and remember the first error."""
        self._up += result.up_bytes
        self._down += result.down_bytes
        self.first_error = self.first_error or result.error

    def context(self, ctx: Context) -> Context:
        """The round as ``server_step`` sees it: how many clients reported, and their mean K."""
        return replace(ctx, steps=self.mean_steps, cohort=self.reported)

    @property
    def mean_steps(self) -> float:
        """Mean K of the clients that reported; an int where it is whole."""
        mean = self._steps / self.reported
        return int(mean) if mean == int(mean) else mean

    def result(self) -> Any:
        """What ``server_step`` gets: mean or sum by name, or the list with weights that add up to one."""
        if self.kind == "list":
            return [(client, weight / self._weight, upload) for client, weight, upload in self._list]
        if self.kind == "mean":
            return {name: value.div_(self._weight) for name, value in self._total.items()}
        return self._total

    def buffers(self) -> dict[str, Tensor]:
        """Mean of floating buffers, maximum of counters."""
        return {n: v.div_(self._weight) if v.is_floating_point() else v for n, v in self._buffers.items()}

    def row(self) -> dict[str, Any]:
        """Loss, clients, local steps and bytes of the round."""
        return {
            "loss": self._loss / self._weight,
            "clients": self.reported,
            "local_steps": self._steps,
            "comm/up_bytes": self._up,
            "comm/down_bytes": self._down,
        }


def _accumulate(total: Tree, upload: Tree, weight: float) -> None:
    for name, value in upload.items():
        if name in total:
            total[name].add_(value, alpha=weight)
        else:
            total[name] = value.mul(weight) if weight != 1.0 else value.clone()
