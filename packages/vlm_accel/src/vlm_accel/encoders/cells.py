"""What the encoders share whose patches are joined in cells after the blocks: methods after the encoder, maps, rows.

Decisions where the specification is silent:

* methods after the encoder choose **cells**, as the decoder sees them: ``Features.x`` are the merged (projected) cells.
  A cell's attention is the mean over its patches (head by head), its keys and queries are those of its patches side by
  side, as iLLaVA 3.6 ranks and recycles cells. Encoders without a class row give the mean attention received and the
  mean query;
* rows that do not survive are zero in the full grid of features and False in ``session.image_rows``: the decoder leaves
  them out, so no model code sees another count. The merger or projector itself runs on the survivors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlm_accel.encoders.records import joined_step, one_image
from vlm_accel.encoders.scores import Seen, attention_map, logits
from vlm_accel.merge_map import MergeMap, MergeStep
from vlm_accel.methods.base import Features

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.encoders.base import VisionState
    from vlm_accel.methods.base import FeatureMethod, Reduced
    from vlm_accel.session import Session

__all__ = [
    "CellAttention",
    "asked_blocks",
    "cell_order",
    "chosen",
    "features_of",
    "merge_map",
    "pend",
    "spread",
    "write_rows",
]


def cell_order(height: int, width: int, side: int, device: torch.device | None = None) -> Tensor:
    """(height * width,) int64: raster index of each patch when the patches of a cell are put side by side.

    Args:
        height: of the patch grid, a multiple of ``side``.
        width: likewise.
        side: a cell is side x side patches.
        device: of the result.
    """
    raster = torch.arange(height * width, device=device)
    return raster.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1)


def asked_blocks(method: FeatureMethod | None, depth: int, used: int) -> set[int]:
    """Blocks whose attention a method after the encoder wants, of ``depth``; the model reads block ``used`` - 1."""
    return set() if method is None else {min(max(block, 0), depth - 1) for block in method.blocks(depth, used - 1)}


def spread(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """(S, m, D) at ``index`` (S, m) of S x ``rows`` rows, zero elsewhere: (S, rows, D)."""
    full = x.new_zeros(x.shape[0], rows, x.shape[-1])
    return full.scatter_(1, index[..., None].expand_as(x), x)


class CellAttention:
    """Attention of one block as cells, for images of one size.

    Args:
        attention: (I, H, n) attention that each patch gets (of the class row, or the mean).
        key, query: (I, H, n, d) of the patches, or None.
        cls_query, cls_key: (I, H, d) of the class row, or None.
    """

    def __init__(
        self,
        attention: Tensor,
        key: Tensor | None = None,
        query: Tensor | None = None,
        cls_query: Tensor | None = None,
        cls_key: Tensor | None = None,
    ) -> None:
        self.attention = attention
        self.key = key
        self.query = query
        self.cls_query = cls_query
        self.cls_key = cls_key

    @classmethod
    def of(cls, seen: Seen, prefix: int) -> CellAttention:
        """From a look at queries and keys; row 0 is the class row where there is a prefix."""
        assert seen.query is not None
        assert seen.key is not None
        query, key = seen.query.detach(), seen.key.detach()
        if not prefix:
            return cls(attention_map(query, key, seen.scaling, seen.bias), key, query)
        own = seen.bias if seen.bias is None or seen.bias.shape[-2] == 1 else seen.bias[..., :1, :]
        attention = logits(query[:, :, :1], key, seen.scaling, own).softmax(-1)[:, :, 0, prefix:].float()
        return cls(attention, key[:, :, prefix:], query[:, :, prefix:], query[:, :, 0], key[:, :, 0])

    def pick(self, rows: Tensor) -> CellAttention:
        """Only the patches ``rows`` (I, m), in that order."""
        heads = self.attention.shape[1]
        along = rows[:, None].expand(-1, heads, -1)
        key, query = (
            None if t is None else t.gather(2, along[..., None].expand(-1, -1, -1, t.shape[-1]))
            for t in (self.key, self.query)
        )
        return CellAttention(self.attention.gather(2, along), key, query, self.cls_query, self.cls_key)


def features_of(
    session: Session, x: Tensor, found: dict[int, CellAttention], grid: tuple[int, int] | None, group: int
) -> Features:
    """``Features`` of I images of N cells each.

    Args:
        session: the acceleration.
        x: (I, N, D) merged cells, raster order.
        found: per block, its attention; patches in cell order.
        grid: (height, width) in cells, or None.
        group: patches per cell.
    """
    method = session.plan.features
    features = Features(x=x, grid=grid, seed=session.seed, trace=session.trace)
    for block, seen in found.items():
        i, h, n = seen.attention.shape
        features.has_cls = seen.cls_query is not None
        features.cls_attention[block] = seen.attention.view(i, h, n // group, group).mean(-1)
        if method is None or not method.needs_keys or seen.key is None or seen.query is None:
            continue
        features.keys[block] = _side_by_side(seen.key, group)
        features.queries[block] = _side_by_side(seen.query, group)
        # a cell is `group` times as wide: by this its logit is the mean of its patches' logits
        if seen.cls_query is not None and seen.cls_key is not None:
            features.cls_query[block] = seen.cls_query.repeat(1, 1, group) / group**0.5
            features.cls_key[block] = seen.cls_key.repeat(1, 1, group)
        else:
            features.cls_query[block] = features.queries[block].mean(1) / group**0.5
    return features


def _side_by_side(heads: Tensor, group: int) -> Tensor:
    """(I, H, n, d) -> (I, n / group, H, group * d)."""
    i, h, n, d = heads.shape
    return heads.view(i, h, n // group, group, d).transpose(1, 2).reshape(i, n // group, h, group * d)


def chosen(method: FeatureMethod, features: Features, width: int) -> tuple[list[Reduced], Tensor, Tensor]:
    """What a method after the encoder leaves of images of one size.

    Args:
        method: works after the encoder.
        features: of the images.
        width: rows that count as all of them.

    Returns:
        the answers, their rows (M, D) one image after the other, and (M,) int64 image * width + cell of each row.
    """
    answers = method.select(features)
    kept = [answer.kept.reshape(-1) + image * width for image, answer in enumerate(answers)]
    return answers, torch.cat([answer.x.flatten(0, 1) for answer in answers]), torch.cat(kept)


def write_rows(session: Session, kind: str, rows: Tensor | None, segments: Sequence[int]) -> None:
    """Tell the decoder which placeholder rows carry a feature.

    Args:
        session: the acceleration.
        kind: ``image`` or ``video``.
        rows: (P,) bool in the order of the features; None: all.
        segments: placeholder rows of each segment; empty: the decoder takes unbroken runs.
    """
    session.image_rows.pop(kind, None)
    session.segments.pop(kind, None)
    if rows is not None:
        session.image_rows[kind] = rows
    if segments:
        session.segments[kind] = list(segments)


def pend(session: Session, before: Sequence[MergeMap], maps: list[MergeMap]) -> list[MergeMap]:
    """Hand maps to the next prefill, in place of those of an earlier call that no prefill took; returns ``maps``."""
    stale = {id(one) for one in before}
    session.pending[:] = [one for one in session.pending if id(one) not in stale] + maps
    return maps


def merge_map(
    grid: tuple[int, int, int],
    prefix: int,
    group: int,
    tiles: Sequence[tuple[VisionState, int, Reduced | None]],
    block: int,
) -> MergeMap:
    """The map of one segment: vision steps, the method after the encoder, and the way to the placeholder rows.

    Args:
        grid: (tiles, height, width) in patches.
        prefix: rows in front of the patches.
        group: patches per cell.
        tiles: (state, row in the state, answer of the method after the encoder or None) of each tile, in order.
        block: what the method after the encoder and the splice are noted at.
    """
    found = MergeMap(grid=grid, prefix=prefix, group=group)
    for number, (step, _, _) in enumerate(tiles[0][0].taken):
        parts = [(state.taken[number], row) for state, row, _ in tiles]
        found.steps.append(
            joined_step("vision", step.layer, [(one[1][row : row + 1], one_image(one[2], row)) for one, row in parts])
        )
    answers = [(state.index[:1], answer) for state, _, answer in tiles if answer is not None]
    if answers:
        found.steps.append(joined_step("features", block, answers))
        found.steps[-1].score = None
    left = found.steps[-1].n_out if found.steps else grid[0] * grid[1] * grid[2] // group
    own = torch.arange(left, dtype=torch.int32).numpy()
    found.steps.append(MergeStep("splice", block, left, left, own, own.copy()))
    return found
