"""Importance of an encoder's rows beside its attention, whose output is not touched (iLLaVA 3.2, 7.1).

Two levels. ``importance`` is a pure function of queries and keys, for encoders that hand them out themselves (timm,
open_clip). ``watch`` is for encoders of transformers: the attention module gets a view of its config in which the
attention function has another name; the function under that name runs the model's own kernel and then shows queries and
keys to the watches of the module. Nothing else of the model reads that name, so masks are made as before.

The scores are computed from queries and keys for 128 queries at a time: an attention map never lies in memory as a
whole, whatever kernel the model uses. SDPA and eager are tested; FlashAttention takes the same path, untested (it
cannot be installed here): its kernels get queries and keys in the same layout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.session import Session

__all__ = ["CHUNK", "Seen", "Watch", "attention_map", "importance", "logits", "watch"]

CHUNK = 128
#: logits that are held at once on a CPU where the scores are many: one MiB of float32
_CACHED = 1 << 18
_PREFIX = "vlm_accel_"
_HOLDER = "_vlm_accel_watched"


def logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Attention logits in float32 (float64 for float64 inputs).

    Args:
        query: (S, H, q, d).
        key: (S, K, n, d); H is a multiple of K.
        scaling: factor of the product.
        bias: (S, 1 | H, 1 | q, n) additive, or bool (True = visible).

    Returns:
        (S, H, q, n). On CUDA, half precision inputs are multiplied as they are and summed in float32, which is exact
        for the products: no slower than the model's own kernel, as precise as a float32 copy.
    """
    s, heads, rows, dim = query.shape
    groups = key.shape[1]
    query = query.reshape(s * groups, heads // groups * rows, dim)
    key = key.reshape(s * groups, -1, dim).transpose(1, 2)
    if query.dtype not in (torch.float16, torch.bfloat16):
        out = torch.bmm(query, key)
    elif query.is_cuda and torch.__version__ >= "2.8":  # compares as a version; older ones lack out_dtype
        out = torch.bmm(query, key, out_dtype=torch.float32)
    else:
        out = torch.bmm(query.float(), key.float())
    out = out.mul_(scaling).view(s, heads, rows, -1)
    if bias is None:
        return out
    return out.masked_fill_(~bias, float("-inf")) if bias.dtype == torch.bool else out.add_(bias)


@torch.no_grad()
def attention_map(
    query: Tensor,
    key: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Attention that each row gets, head by head: mean over all queries of the softmax over all keys.

    Args:
        query: as in ``logits``.
        key: likewise.
        scaling: likewise.
        bias: likewise.
        rows: (S, q) bool, queries that count; None: all.
        chunk: queries at once.

    Returns:
        (S, H, n) float32; sums to 1 over n.
    """
    if bias is None and query.device.type == "cpu":
        return _map_in_cache(query, key, scaling, rows, chunk)
    q = query.shape[2]
    total: Tensor | None = None
    for start in range(0, q, chunk):
        part = slice(start, start + chunk)
        seen = logits(query[:, :, part], key, scaling, _rows(bias, part)).softmax(-1)
        if rows is not None:
            seen = seen * rows[:, None, part, None]
        summed = seen.sum(2)
        total = summed if total is None else total.add_(summed)
    assert total is not None
    count: Any = q if rows is None else rows.sum(1)[:, None, None].clamp(min=1)
    return (total / count).float()


def _map_in_cache(query: Tensor, key: Tensor, scaling: float, rows: Tensor | None, chunk: int) -> Tensor:
    """``attention_map`` on a CPU without a mask: few heads at a time, so that their logits stay in the cache.

    With weights w_q = 1 / (sum over keys of e_qj) the column sums of the softmax are w e, one product instead of two
    more passes over e. Half the time of the plain form at 1,000 rows.
    """
    s, heads, q, dim = query.shape
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], 1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaled = query.reshape(s * heads, q, dim).to(wide) * scaling
    other = key.reshape(s * heads, -1, dim).to(wide).transpose(1, 2)
    n = other.shape[2]
    counted = None if rows is None else rows.to(wide).repeat_interleave(heads, 0)[..., None]
    total = scaled.new_zeros(s * heads, 1, n)
    together = max(1, _CACHED // (min(chunk, q) * n))
    for first in range(0, s * heads, together):
        group = slice(first, first + together)
        for start in range(0, q, chunk):
            part = slice(start, start + chunk)
            powers = torch.bmm(scaled[group, part], other[group])
            powers.sub_(powers.amax(-1, keepdim=True)).exp_()
            weights = powers.sum(-1, keepdim=True).reciprocal_()
            if counted is not None:
                weights.mul_(counted[group, part])
            total[group] += torch.matmul(weights.transpose(1, 2), powers)
    count: Any = q if counted is None else counted.sum(1, keepdim=True).clamp(min=1)
    return (total / count).view(s, heads, n).float()


@torch.no_grad()
def importance(
    query: Tensor,
    key: Tensor,
    scaling: float,
    kind: str,
    key_bias: Tensor | None = None,
    prefix: int = 0,
    cls_row: int | None = 0,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Importance of the patches, higher = keep (iLLaVA 3.2).

    Args:
        query: (S, H, n, d), of all rows, the prefix first, as they go into the kernel (normed and rotated).
        key: (S, K, n, d) likewise.
        scaling: of the logits.
        kind: ``received``: mean over heads and queries (prefix included) of the attention a row gets; ``cls``: mean
            over heads of the attention of the class row, ``received`` where there is none (iLLaVA 5); ``lse``: mean
            over heads of the log-sum-exp of a row's own logits, a property of the row as a query (parity runs only).
        key_bias: (S, n - prefix) added to the logits of the patches' keys (ToMe).
        prefix: rows in front of the patches: they count as queries and keys, and get no score.
        cls_row: row of the class token; None: there is none.
        bias: (S, 1 | H, 1 | n, n) the model's own mask, additive or bool.
        rows: (S, n) bool, rows that count as queries (padding does not); None: all.
        chunk: queries at once.

    Returns:
        (S, n - prefix) float32.

    Raises:
        UserError: another kind.
    """
    bias = joined(bias, key_bias, prefix)
    if kind == "cls" and cls_row is not None and prefix > cls_row:
        own = query[:, :, cls_row : cls_row + 1]
        scores = logits(own, key, scaling, _rows(bias, slice(cls_row, cls_row + 1))).softmax(-1).mean((1, 2))
    elif kind == "lse":
        parts = [slice(start, start + chunk) for start in range(0, query.shape[2], chunk)]
        scores = torch.cat(
            [logits(query[:, :, part], key, scaling, _rows(bias, part)).logsumexp(-1).mean(1) for part in parts], 1
        )
    elif kind in ("received", "cls"):
        scores = attention_map(query, key, scaling, bias, rows, chunk).mean(1)
    else:
        raise UserError(f"score {kind!r} does not exist inside an encoder; use received, cls, lse or none")
    return scores[:, prefix:].float()


def joined(bias: Tensor | None, key_bias: Tensor | None, prefix: int) -> Tensor | None:
    """The model's mask and a bias per patch key (S, n - prefix) as one additive (S, 1 | H, 1 | n, n)."""
    if key_bias is None:
        return bias
    mine = torch.nn.functional.pad(key_bias, (prefix, 0))[:, None, None]
    if bias is None:
        return mine
    if bias.dtype == torch.bool:
        return mine.masked_fill(~bias, float("-inf"))
    return bias + mine


def _rows(bias: Tensor | None, part: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., part, :]


@dataclass
class Seen:
    """What one call of the attention kernel showed; S images of n patches, the prefix taken off.

    Args:
        scores: (S, n) float32, or None for kind ``none``.
        keys, queries: (S, n, H, d) where they were asked for.
        query, key: (S, H, rows, d), all rows, where ``raw`` was asked for; scaling, bias: of the same call.
    """

    scores: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


@dataclass
class Watch:
    """What is wanted of an attention module at its next calls.

    Args:
        kind: score, as in ``importance``, or ``none``.
        prefix: rows in front of the patches. cls_row: row of the class token among them, None: there is none.
        keys, queries: whether they are wanted. raw: whether query and key as a whole are.
        key_bias: gives the (S, n - prefix) bias of the patches' keys for the next call, or None; called once a call of
            the kernel, so that encoders which call it once an image can give one after the other.
        lengths: rows of each image where a FlashAttention kernel gets several images in one row (Qwen); set by the
            adapter before the block runs, so that nothing has to be read back from the device.
        rows: (S, n) bool rows that count as queries; set by the adapter where there is padding.
        when: asked before each look: False where the step would change nothing, so that the identity costs nothing.
        seen: one entry per kernel call (or per length); the adapter takes and clears it.
    """

    kind: str = "none"
    prefix: int = 0
    cls_row: int | None = 0
    keys: bool = False
    queries: bool = False
    raw: bool = False
    key_bias: Callable[[], Tensor | None] | None = None
    lengths: Sequence[int] | None = None
    rows: Tensor | None = None
    when: Callable[[], bool] | None = None
    seen: list[Seen] = field(default_factory=list)

    @property
    def scores_wanted(self) -> bool:
        """Whether queries and keys are looked at."""
        return self.kind != "none" or self.keys or self.queries or self.raw

    def take(self) -> list[Seen]:
        """What was seen since the last ``take``."""
        seen, self.seen = self.seen, []
        return seen

    def see(self, query: Tensor, key: Tensor, scaling: float, bias: Tensor | None, key_bias: Tensor | None) -> None:
        """Note one kernel call; called by the wrapper, after the kernel."""
        if not self.scores_wanted or (self.when is not None and not self.when()):
            return
        if self.lengths is None or len(self.lengths) == 1:
            self.seen.append(self._look(query, key, scaling, bias, key_bias))
            return
        for q, k in zip(query.split(list(self.lengths), 2), key.split(list(self.lengths), 2), strict=True):
            self.seen.append(self._look(q, k, scaling, None, None))

    def _look(self, query: Tensor, key: Tensor, scaling: float, bias: Tensor | None, key_bias: Tensor | None) -> Seen:
        seen = Seen(scaling=scaling)
        if self.kind != "none":
            seen.scores = importance(
                query, key, scaling, self.kind, key_bias, self.prefix, self.cls_row, bias, self.rows
            )
        if self.keys:
            seen.keys = key[:, :, self.prefix :].transpose(1, 2)
        if self.queries:
            seen.queries = query[:, :, self.prefix :].transpose(1, 2)
        if self.raw:
            seen.query, seen.key, seen.bias = query, key, joined(bias, key_bias, self.prefix)
        return seen


def watch(session: Session, attention: Any, wanted: Watch) -> None:
    """Show queries and keys of ``attention`` to ``wanted`` at each of its calls, until the acceleration ends.

    Args:
        session: whose exit undoes it.
        attention: module that reads ``self.config._attn_implementation`` and calls that kernel; several watches of one
            module are allowed.
        wanted: filled at each call.

    Raises:
        UserError: an attention backend that cannot be watched.
    """
    holder = attention.__dict__.get(_HOLDER)
    if holder is None:
        name = attention.config._attn_implementation or "eager"
        if name not in ("eager", "sdpa") and "flash" not in name:
            raise UserError(
                f"attention backend {name!r} of the encoder cannot be scored; load the model with "
                "attn_implementation='sdpa' (or 'eager', 'flash_attention_2')"
            )
        _register(name)
        holder = _Holder(attention.config, name)
        session.replace(attention, _HOLDER, holder)
        session.replace(attention, "config", holder.view)
    holder.watches.append(wanted)


class _View:
    """An attention module's config in which the attention function has another name."""

    def __init__(self, config: Any, name: str) -> None:
        self._base = config
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class _Holder:
    """The watches of one attention module."""

    def __init__(self, config: Any, name: str) -> None:
        self.name = name
        self.config = config
        self.view = _View(config, _PREFIX + name)
        self.watches: list[Watch] = []


def _register(name: str) -> None:
    """Make ``vlm_accel_<name>`` known to transformers; it stays known and does nothing unless a module asks for it."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_PREFIX + name, _watched_attention)


def _kernel(module: nn.Module, name: str) -> Any:
    """The function that the module would have called."""
    if name == "eager":
        for cls in type(module).__mro__:
            kernel = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
            if kernel is not None:
                return kernel
        raise UserError(f"{type(module).__name__} has no eager kernel; load with attn_implementation='sdpa'")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def _watched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's kernel, then a look at queries and keys."""
    holder: _Holder = module.__dict__[_HOLDER]
    key_bias, prefix = None, 0
    for wanted in holder.watches:
        if wanted.key_bias is not None and (found := wanted.key_bias()) is not None:
            key_bias, prefix = found, wanted.prefix
    mask = attention_mask
    if key_bias is not None:
        if "flash" in holder.name:
            raise UserError("key biases (ToMe) do not work with FlashAttention; load with attn_implementation='sdpa'")
        mask = joined(attention_mask, key_bias.to(query.dtype), prefix)
    module.config = holder.config  # FlashAttention reads the name of its kernel there
    try:
        out: tuple[Tensor, Tensor | None] = _kernel(module, holder.name)(module, query, key, value, mask, **kwargs)
    finally:
        module.config = holder.view
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = attention_mask if attention_mask is None or attention_mask.ndim == 4 else None
    for wanted in holder.watches:
        wanted.see(query, key, scaling, bias, key_bias)
    return out
