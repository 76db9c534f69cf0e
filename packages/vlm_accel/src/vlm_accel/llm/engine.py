"""The decoder engine: hooks that shorten the prefill and the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.session import Session

__all__ = ["install_decoder"]


def install_decoder(session: Session, model: nn.Module) -> None:
    """Hook the decoder of ``model`` for ``session.plan``."""
    raise NotImplementedError
