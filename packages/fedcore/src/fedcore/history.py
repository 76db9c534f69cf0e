"""What a run measured, a row a round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["History"]


class History:
    """Rows of rounds: ``round`` (rounds done), losses, bytes, metrics of the rounds that were evaluated."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows: list[dict[str, Any]] = rows or []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(rounds done, value) of the rounds that have the metric."""
        return [(row["round"], row[metric]) for row in self.rows if metric in row]

    def last(self, metric: str) -> float:
        """Latest value; KeyError where the metric was never measured."""
        curve = self.curve(metric)
        if not curve:
            raise KeyError(metric)
        return curve[-1][1]

    def best(self, metric: str) -> float:
        """Largest value; KeyError where the metric was never measured."""
        curve = self.curve(metric)
        if not curve:
            raise KeyError(metric)
        return max(value for _, value in curve)

    def mean_last(self, metric: str, count: int = 10) -> float:
        """Mean of the last ``count`` values, the specifications' figure at small scale."""
        values = [value for _, value in self.curve(metric)][-count:]
        if not values:
            raise KeyError(metric)
        return sum(values) / len(values)

    def rounds_to(self, metric: str, target: float) -> int | None:
        """Rounds until the first evaluation that reached ``target``; None where none did."""
        return next((round for round, value in self.curve(metric) if value >= target), None)
