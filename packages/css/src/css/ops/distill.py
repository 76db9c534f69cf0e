"""Distillation of the old network that knows what its "background" means in which region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from css.task import IGNORE

__all__ = ["VARIANTS", "region_distillation"]

VARIANTS = ("two_region", "new_only", "mib")
_CHUNK_ELEMENTS = 2**18
"""1 MiB in float32: what a CPU's cache holds; below that, calls cost more than they save."""
_CHUNKS = 16
"""On an accelerator, where every call costs: chunks of a large batch."""


def region_distillation(
    new_logits: Tensor,
    old_logits: Tensor,
    labels: Tensor,
    variant: str = "two_region",
    chunk: int | None = None,
) -> Tensor:
    r"""Cross-entropy between old and new softmax, where the old background mass goes to what it stands for.

    With p = softmax(old_logits), q = softmax(new_logits) and a set of channels A, a pixel's loss is
    l_A = -1/T [ sum_{c=1}^{T-1} p_c log q_c + p_0 log sum_{k in A} q_k ]. R are the pixels of a class of this step.

    - ``two_region``: A = the new classes inside R (the old network calls them background), A = {0} elsewhere.
    - ``new_only``: A = the new classes inside R; pixels elsewhere add nothing.
    - ``mib``: A = {0} and the new classes everywhere (MiB's unbiased distillation; the labels are not used).

    The mean is over all pixels, ignored ones included. It is worked out in float32 or float64 whatever the type of
    the logits, a chunk of pixels at a time, and the gradient along with it: from the loss to the backward pass one
    tensor of the size of the new logits is kept. The old logits get no gradient, and there is no second derivative.

    Args:
        new_logits: (B, S, H, W), S > T.
        old_logits: (B, T, H, W) of the frozen network on the same pictures.
        labels: (B, H, W) annotated channels *before* pasting and pseudo-labels: T.. are the new classes, 255 ignored.
        variant: ``two_region``, ``new_only`` or ``mib``.
        chunk: pixels worked on at a time (at least one row of a picture); default what a CPU's cache
            holds, or a sixteenth of all on an accelerator.

    Returns:
        Scalar in float32 or float64.

    Raises:
        ValueError: unknown variant, shapes that do not fit, no new channel, or a chunk below 1.

    Source:
        EIR (arXiv 2503.22136), our reading, section 3.7, L_RSKD; MiB (arXiv 2002.00718) for ``mib``. The released
        code of EIR leaves out the first new class, which is not followed.
    """
    _check(new_logits, old_logits, labels, variant)
    pixels = labels.numel()
    if chunk is None:
        chunk = max(1, _CHUNK_ELEMENTS // new_logits.shape[1])
        if new_logits.device.type != "cpu":
            chunk = max(chunk, pixels // _CHUNKS)
    elif chunk < 1:
        raise ValueError(f"chunk={chunk}; expected at least 1 pixel")
    region = (labels >= old_logits.shape[1]) & (labels != IGNORE)
    old_logits = old_logits.detach()
    with torch.autocast(device_type=new_logits.device.type, enabled=False):
        if torch.is_grad_enabled() and new_logits.requires_grad:
            loss: Tensor = _RegionDistillation.apply(new_logits, old_logits, region, variant, chunk)
            return loss
        total = _sum_by_chunk(new_logits, old_logits, region, variant, chunk, None)
    return total * (1.0 / (old_logits.shape[1] * pixels))


def _check(new_logits: Tensor, old_logits: Tensor, labels: Tensor, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of region distillation; known: {', '.join(VARIANTS)}")
    shapes = {(x.shape[0], *x.shape[2:]) for x in (new_logits, old_logits) if x.ndim == 4}
    if new_logits.ndim != 4 or old_logits.ndim != 4 or shapes != {tuple(labels.shape)}:
        raise ValueError(
            f"new_logits {tuple(new_logits.shape)}, old_logits {tuple(old_logits.shape)}, labels "
            f"{tuple(labels.shape)}; expected (B, S, H, W), (B, T, H, W) and (B, H, W)"
        )
    if new_logits.shape[1] <= old_logits.shape[1]:
        raise ValueError(
            f"new_logits have {new_logits.shape[1]} channels and old_logits {old_logits.shape[1]}; expected more new "
            "ones (a step brings at least one class)"
        )


class _RegionDistillation(torch.autograd.Function):
    """The loss; the forward pass works out the gradient of each pixel's T l_A, the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, old: Tensor, region: Tensor, variant: str, chunk: int) -> Tensor:
        grad = torch.empty_like(new)
        total = _sum_by_chunk(new, old, region, variant, chunk, grad)
        ctx.save_for_backward(grad)
        ctx.chunk, ctx.scale = chunk, 1.0 / (old.shape[1] * region.numel())
        loss: Tensor = total * ctx.scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pixel_grad,) = ctx.saved_tensors
        scale = grads[0] * ctx.scale
        result = torch.empty_like(pixel_grad)
        if pixel_grad.dtype == scale.dtype:
            torch.mul(pixel_grad, scale, out=result)
        else:  # The scale may be too small for the narrow type of the logits: only the product is rounded to it.
            for part in _chunks(pixel_grad, ctx.chunk):
                result[part] = pixel_grad[part].to(scale.dtype) * scale
        return result, None, None, None, None


def _chunks(logits: Tensor, pixels: int) -> Iterator[tuple[slice, slice, slice]]:
    """Index tuples of whole pictures, or of rows of one picture, with about ``pixels`` pixels each."""
    batch, _, height, width = logits.shape
    rows = min(height, max(1, pixels // max(1, width)))
    images = max(1, pixels // max(1, height * width))
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(image, image + images), slice(None), slice(row, row + rows)


def _sum_by_chunk(new: Tensor, old: Tensor, region: Tensor, variant: str, chunk: int, grad: Tensor | None) -> Tensor:
    """Sum over the pixels of T l_A; its gradient is written into ``grad``."""
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    total = torch.zeros((), dtype=dtype, device=new.device)
    for part in _chunks(new, chunk):
        images, _, rows = part
        loss, pixel_grad = _pixel_loss(
            new[part], old[part], region[images, None, rows], variant, dtype, grad is not None
        )
        total += loss.sum()
        if grad is not None:
            grad[part] = pixel_grad
    return total


def _pixel_loss(
    new: Tensor, old: Tensor, region: Tensor, variant: str, dtype: torch.dtype, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """T l_A of each pixel (b, 1, h, w), and its gradient (b, S, h, w), which is undefined unless asked for."""
    channels = old.shape[1]
    log_q = torch.log_softmax(new, dim=1, dtype=dtype)
    p = torch.softmax(old, dim=1, dtype=dtype)
    members = log_q[:, channels:]
    if variant == "mib":
        members = torch.cat([log_q[:, :1], members], dim=1)
    log_a = members.logsumexp(dim=1, keepdim=True)
    if variant == "two_region":
        log_a = torch.where(region, log_a, log_q[:, :1])
    loss = -(p[:, 1:] * log_q[:, 1:channels]).sum(dim=1, keepdim=True) - p[:, :1] * log_a
    if variant == "new_only":
        loss = loss.masked_fill(~region, 0.0)
    if not with_grad:
        return loss, log_q
    share = p[:, :1] * members.softmax(dim=1)
    grad = log_q.exp_()
    grad[:, 1:channels] -= p[:, 1:]
    if variant == "mib":
        grad[:, :1] -= share[:, :1]
        grad[:, channels:] -= share[:, 1:]
        return loss, grad
    grad[:, channels:] -= share.masked_fill_(~region, 0.0)
    if variant == "new_only":
        return loss, grad.masked_fill_(~region, 0.0)
    grad[:, :1] -= p[:, :1].masked_fill(region, 0.0)
    return loss, grad
