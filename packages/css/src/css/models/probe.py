"""Try a network of another library on a small picture before anything is trained with it."""

from __future__ import annotations

import torch
from polymodal.errors import UserError

from css.models.base import FeatureExtractor

__all__ = ["probe"]

_SIDES = (128, 448, 512)
"""Pixels. Some heads pool over windows of a fixed size, some transformers take multiples of 14 only."""


def probe(extractor: FeatureExtractor, what: str) -> int:
    """Run an extractor forward and backward in evaluation mode; freeze what its features do not need.

    Frozen, because data-parallel training waits for the gradient of every parameter that is not.

    Args:
        extractor: network on the CPU; its mode stays as it was.
        what: its name, for the message.

    Returns:
        Pixels of the image a pixel of the features.

    Raises:
        UserError: it runs on no small picture, or its features are no map of ``out_channels`` channels.
    """
    training = extractor.training
    feature, side = _try(extractor.eval(), what)
    extractor.train(training)
    if feature.dim() != 4 or feature.shape[1] != extractor.out_channels:
        raise UserError(
            f"{what}: features of shape {tuple(feature.shape)}; expected (1, {extractor.out_channels}, h, w)"
        )
    parameters = [one for one in extractor.parameters() if one.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
    for one, gradient in zip(parameters, gradients, strict=True):
        one.requires_grad_(gradient is not None)
    return max(1, round(side / feature.shape[-1]))


def _try(extractor: FeatureExtractor, what: str) -> tuple[torch.Tensor, int]:
    """Features of the first picture size that works, and that size."""
    reason = ""
    for side in _SIDES:
        try:
            with torch.enable_grad():
                return extractor(torch.zeros(1, 3, side, side)).feature, side
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            reason = reason or (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    raise UserError(f"{what} does not run on pictures of {_SIDES[0]} pixels: {reason}; take a network for any size")
