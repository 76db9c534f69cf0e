"""SSUL-M: SSUL with stored pictures in half of each batch."""

from __future__ import annotations

from css.methods.ssul import SSUL

__all__ = ["SSULM"]


class SSULM(SSUL):
    """SSUL in which half of each batch of a later step is replaced by stored pictures; with an empty memory it is SSUL.

    Args:
        threshold: see ``SSUL``.
        background_factor: see ``SSUL``.

    Source: our reading of Cha et al. 2021, arXiv 2106.11562, as ``SSUL``; the memory as in the released code: 100
    pictures for VOC, 300 for ADE20K, balanced over classes, with the labels of their own step.
    """

    memory = "images"
    mix = "half"
