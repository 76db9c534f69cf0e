"""SparseVLM: words of the question rate the image tokens; some of what goes is clustered into a few tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio
from vlm_accel.methods.base import Reduced, TokenMethod, Tokens
from vlm_accel.methods.pyramiddrop import check_layers
from vlm_accel.ops._select import gather_rows, owners, ranked, wide
from vlm_accel.ops.cluster import dpc_knn
from vlm_accel.schedule import Pyramid, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import ScoreKind

__all__ = ["SparseVLM", "clusters", "raters", "split"]

#: raters whose attention is computed at once
_CHUNK = 128
#: image tokens rated highest that stay at each layer, of 576 (without those made by recycling)
_PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


@dataclass(frozen=True)
class SparseVLM(TokenMethod):
    """Rate by chosen words, keep the top, recycle the best of the rest.

    Raters are chosen once, on what enters the decoder: the text tokens after the last image whose mean over the image
    tokens of softmax_text(x_v x_t^T) is above the mean. On the output of layers 2, 6, 15 of 32 (= before 3, 7, 16; at
    the same shares of other depths) an image token's score is that layer's own attention from the raters, mean over
    heads and raters. Of n tokens that do not stay the top int(.3 n) + 1 are clustered by DPC-kNN into
    int(that / 10) + 1 means. ``keep`` of a step counts both, see ``split``.

    Deviations: a cluster stands at its centre's position and positions are gathered (the official version 1 puts
    clusters last and gives out the first positions of the list); equal densities are ordered by index instead of by
    noise; without text after the image the last token rates, without a word above the mean all do.

    Args:
        retained: published setting, named by its mean number of tokens of 576: 192, 128 or 64. As shares for other N.
        ratio: share left at the end, in (0, 1], in equal steps, in place of ``retained``; None: the published shares.
        recycle: share of the deleted that is clustered, in [0, 1].
        layers: layers before which tokens go, for a model of ``of`` layers.
        of: that depth; None: ``layers`` are meant as they are.

    Raises:
        UserError: a number out of range.

    Source: Zhang et al. 2024, arXiv 2410.04417 (ICML 2025); rule as in LightVLM 5 (read in the authors' code,
    version 1).
    """

    stages: ClassVar[tuple[str, ...]] = ("llm",)
    own_llm_scores: ClassVar[bool] = True

    retained: int = 192
    ratio: float | None = None
    recycle: float = 0.3
    layers: tuple[int, ...] = (3, 7, 16)
    of: int | None = 32

    def __post_init__(self) -> None:
        check_ratio("sparsevlm", self.ratio)
        check_layers("sparsevlm", self.layers)
        if self.retained not in _PUBLISHED:
            raise UserError(f"sparsevlm: retained={self.retained}; published are 192, 128, 64; or give ratio")
        if not 0 <= self.recycle <= 1:
            raise UserError(f"sparsevlm: recycle={self.recycle}; expected a share in [0, 1]")
        if self.ratio is None and len(self.layers) != 3:
            raise UserError(f"sparsevlm: layers={list(self.layers)}; the published settings have three, or give ratio")

    def schedule(self) -> Schedule:
        """Steps that find their layers when the depth is known."""
        layers = tuple(self.layers)
        if self.ratio is not None:
            each = self.ratio ** (1 / len(layers))
            return [Pyramid(self.ratio, layers, ratios=(each,) * len(layers), of=self.of)]
        counts = [576]
        for stay in _PUBLISHED[self.retained]:
            counts.append(stay + clusters(counts[-1] - stay, self.recycle))
        ratios = tuple(after / before for before, after in itertools.pairwise(counts))
        return [Pyramid(counts[-1] / 576, layers, ratios=ratios, of=self.of)]

    def score(self, stage: str) -> ScoreKind:
        """``llm_scores`` makes it."""
        return "none"

    def llm_scores(self, view: Any) -> Tensor:
        """(B, t) float32: mean over heads and raters of the attention of the layer before the step."""
        chosen = raters(view.embeds, view.embeds_image & view.embeds_visible, view.embeds_visible)
        chosen = chosen.gather(1, view.origin.clamp(min=0)) & (view.origin >= 0)
        # raters are text after the last image: among the last rows, as many as any sample has there
        last = view.last_row()
        back = torch.arange(max(1, min(view.tail, chosen.shape[1])) - 1, -1, -1, device=last.device)
        rows = (last - back).clamp(min=0)
        weight = (chosen.gather(1, rows) & (last >= back)).float()
        total = torch.zeros(chosen.shape, device=last.device)
        for some, share in zip(rows.split(_CHUNK, 1), weight.split(_CHUNK, 1), strict=True):
            total = total + torch.einsum("brt,br->bt", view.attention(some).mean(1), share)
        mean: Tensor = total / weight.sum(1, keepdim=True)
        return mean

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Top tokens stay, the best of the rest become clusters; ``keep`` rows in all."""
        assert tokens.scores is not None
        x = tokens.x
        n = x.shape[1]
        stay, made = split(n, keep, self.recycle)
        order = ranked(tokens.scores)
        pool = order[:, stay : stay + _pool(n - stay, self.recycle)].sort(-1).values
        centres, owner = dpc_knn(gather_rows(x, pool), made)
        spots = pool.gather(1, centres)
        kept, where = torch.cat([order[:, :stay], spots], 1).sort(-1)
        member = torch.nn.functional.one_hot(owner, made).transpose(1, 2).to(wide(x).dtype)
        means = (member / member.sum(-1, keepdim=True)) @ wide(gather_rows(x, pool))
        both = torch.cat([wide(gather_rows(x, order[:, :stay])), means], 1).to(x.dtype)
        out = gather_rows(both, where)
        row = where.argsort(-1)[:, stay:].gather(1, owner)
        return Reduced(
            x=out,
            kept=kept,
            sizes=None if tokens.sizes is None else _sizes(tokens.sizes, kept, pool, row),
            assign=owners(kept, n).scatter(1, pool, row) if tokens.trace else None,
            weight=_weight(kept, pool, row, n) if tokens.trace else None,
        )


def clusters(deleted: int, share: float = 0.3) -> int:
    """Clusters made of ``deleted`` tokens: int((int(share * deleted) + 1) / 10) + 1; none of none."""
    return _pool(deleted, share) // 10 + 1 if deleted else 0


def split(tokens: int, keep: int, share: float = 0.3) -> tuple[int, int]:
    """(tokens that stay, clusters) with stay + clusters = keep < tokens, the most that stay.

    Where ``keep`` is less than the clusters of nearly all tokens alone, one token stays and the rest are clusters.
    """
    for stay in range(keep - 1, 0, -1):
        if stay + clusters(tokens - stay, share) == keep:
            return stay, keep - stay
    return (1, keep - 1) if keep > 1 else (0, 1)


def raters(embeds: Tensor, image: Tensor, valid: Tensor) -> Tensor:
    """Text tokens that rate the image (LightVLM 5, SparseVLM).

    Args:
        embeds: (B, T, D) what enters the decoder.
        image: (B, T) bool, image tokens.
        valid: (B, T) bool, no padding.

    Returns:
        (B, T) bool, at least one token in each row that has valid ones.
    """
    after = valid & ~image & (image.flip(1).cumsum(1).flip(1) == 0)
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    after = torch.where(after.any(1, keepdim=True), after, last)
    x = wide(embeds)
    shares = (x @ x.transpose(1, 2)).masked_fill(~after[:, None], -torch.inf).softmax(-1)
    seen = (shares * image[..., None]).sum(1) / image.sum(1, keepdim=True).clamp(min=1)
    mean = (seen * after).sum(1, keepdim=True) / after.sum(1, keepdim=True)
    chosen = after & (seen > mean)
    return torch.where(chosen.any(1, keepdim=True), chosen, after)


def _pool(deleted: int, share: float) -> int:
    """Deleted tokens that are clustered."""
    return min(deleted, int(share * deleted + 1e-9) + 1)


def _sizes(sizes: Tensor, kept: Tensor, pool: Tensor, row: Tensor) -> Tensor:
    """Sizes of kept rows, with those of a cluster's members summed."""
    own = sizes.scatter(1, pool, 0.0).gather(1, kept)
    return own.scatter_add(1, row, sizes.gather(1, pool))


def _weight(kept: Tensor, pool: Tensor, row: Tensor, tokens: int) -> Tensor:
    """(S, M, N): one for a token that stays, 1 / members for those of a cluster."""
    weight = torch.nn.functional.one_hot(kept, tokens).float()
    weight = weight.scatter(2, pool[:, None].expand(-1, kept.shape[1], -1), 0.0)
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    weight[batch, row, pool] = 1.0
    return weight / weight.sum(-1, keepdim=True)
