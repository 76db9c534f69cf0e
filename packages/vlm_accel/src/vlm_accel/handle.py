"""What the user holds inside the ``with`` block: statistics, report, merge maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_accel.encoders.base import EncoderAdapter
    from vlm_accel.families import Family
    from vlm_accel.merge_map import MergeMap
    from vlm_accel.session import Session

__all__ = ["Handle", "time_calls"]


class Handle:
    """Statistics, report and merge maps of one acceleration."""

    def __init__(self, session: Session, family: Family, encoder: EncoderAdapter | None) -> None:
        self._session = session
        self._family = family
        self._encoder = encoder

    @property
    def maps(self) -> list[MergeMap]:
        """One map per segment (image, tile, temporal slice) seen so far, in order; needs ``trace=True``."""
        return self._session.maps


def time_calls(session: Session, family: Family, encoder: EncoderAdapter | None) -> None:
    """Time the vision, prefill and decode calls."""


def _unused() -> Any:
    return None
