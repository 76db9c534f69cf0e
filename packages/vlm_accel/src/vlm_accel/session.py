"""State of one active acceleration: what was asked, what was hooked, what was seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.budget import KVBudget
    from vlm_accel.merge_map import MergeMap
    from vlm_accel.methods.base import CacheMethod, FeatureMethod, TokenMethod
    from vlm_accel.schedule import Step

__all__ = ["Plan", "PrefillRecord", "Session", "VisionRecord"]


@dataclass(frozen=True)
class Plan:
    """What is done where. A part that is None is left alone.

    Args:
        vision: method of the encoder steps. llm: method of the decoder steps. features: method after the encoder.
        cache: method of the cache (with ``kv``).
        vision_steps, llm_steps: concrete steps, ascending.
        kv: cache budget; None: the cache is not compressed.
        options: ``layout`` (auto | scatter | pseudo_grid), ``budget`` (span | global), ``ragged`` (pad | error),
            ``log_size``, ``allow_grad``, ``size_weighted_pool``: engine options by name.
    """

    vision: TokenMethod | None = None
    features: FeatureMethod | None = None
    llm: TokenMethod | None = None
    cache: CacheMethod | None = None
    vision_steps: tuple[Step, ...] = ()
    llm_steps: tuple[Step, ...] = ()
    kv: KVBudget | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class VisionRecord:
    """What one encoder call did.

    Args:
        images: spans (images, tiles, frames) in the call.
        tokens: per block, rows that entered its attention, prefix included, summed over the images.
        mlp_tokens: per block, rows that entered its MLP, likewise.
        full: rows per block without acceleration, likewise.
        lengths: per block, rows of each image (attention is quadratic in these); fixed-size encoders: one number each.
        full_lengths: the same without acceleration, where it differs between blocks (windows); empty: as in block 0.
        left: patches left at the end, per image.
    """

    images: int
    tokens: list[int] = field(default_factory=list)
    mlp_tokens: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    full_lengths: list[list[int]] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


@dataclass
class PrefillRecord:
    """What one prefill did.

    Args:
        batch: sequences (after beam expansion).
        prompt: T, tokens of the prompt as the model counts them (padding included).
        text: tokens of the prompt that are not image tokens (of the longest sequence).
        image: image tokens of the prompt (of the sequence that has most).
        rows: per layer, rows t_l that entered it (with padding).
        survivors: per layer, image tokens left, of the sequence that has most.
    """

    batch: int
    prompt: int
    text: int
    image: int
    rows: list[int] = field(default_factory=list)
    survivors: list[int] = field(default_factory=list)


class Session:
    """Lives from ``accelerate`` to the end of its ``with`` block. Each accelerated model has its own: no globals.

    Engines register what undoes them with ``on_exit`` (called in reverse order, also after an exception).

    Attributes:
        image_rows: {"image": (P,) bool, "video": (P,) bool} which of the P placeholder rows of the next prefill carry a
            feature that survived the encoder, in the order of the features; written by an encoder adapter, taken by the
            decoder engine, which leaves the other rows out before layer 0. Empty: all survive.
        segments: {"image": [n, ...], "video": [n, ...]} placeholder rows (before anything is left out) of each
            segment, in the order of the features. A segment is what is ranked on its own: an image with its tiles, one
            temporal slice of a video, one tile where text stands between tiles. Written with ``image_rows``; empty: the
            decoder takes each unbroken run of image tokens for a segment.
        pending: MergeMaps of the segments of the next prefill, in the same order (trace only); the last step of each
            leads to its surviving placeholder rows. The decoder engine adds its own steps and moves them to ``maps``.
            Without a decoder the adapter writes to ``maps`` itself.
        vision: one record per encoder call. prefills: one per prefill. maps: one MergeMap per image (trace only).
        cache: the cache of the last prefill (its layers are TrackedLayers).
        times: {"vision": [...], "prefill": [...], "decode": [...]} seconds per call.
    """

    def __init__(self, model: nn.Module, plan: Plan, trace: bool = False, seed: int = 0) -> None:
        self.model = model
        self.plan = plan
        self.trace = trace
        self.seed = seed
        self.image_rows: dict[str, Tensor] = {}
        self.segments: dict[str, list[int]] = {}
        self.pending: list[MergeMap] = []
        self.vision: list[VisionRecord] = []
        self.prefills: list[PrefillRecord] = []
        self.maps: list[MergeMap] = []
        self.cache: Any = None
        self.times: dict[str, list[Any]] = {"vision": [], "prefill": [], "decode": []}
        self.notes: list[str] = []
        self._undo = ExitStack()

    def on_exit(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` when the acceleration ends."""
        self._undo.callback(function, *args)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute (such as ``forward``) until the end, then restore what was there, or delete it."""
        before = owner.__dict__.get(name, _MISSING)
        setattr(owner, name, value)
        self.on_exit(_restore, owner, name, before)

    def hook(self, handle: Any) -> None:
        """Remove a torch hook handle at the end."""
        self.on_exit(handle.remove)

    def close(self) -> None:
        """Undo everything, last first."""
        self._undo.close()


_MISSING = object()


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is _MISSING:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, before)
