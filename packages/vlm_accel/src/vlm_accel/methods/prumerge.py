"""PruMerge: outliers of the CLS attention stay, each gathers its nearest others, the rest becomes one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio, gathered, images, share
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops._select import owners, ranked, wide

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import Features, Reduced

__all__ = ["PruMerge"]


@dataclass(frozen=True)
class PruMerge(FeatureMethod):
    """Outliers stay and gather what is like them.

    a = softmax of the CLS row of the last block's queries and keys, heads **not** split (width C, scale C^-.5). The
    tokens with a above Q3 + 1.5 IQR stay. Each takes its ``neighbours`` nearest of all other tokens by key cosine:
    x_i += sum_j a_j x_j (weights not normalised, values from before any merge). One token more is sum_rest a_j x_j.

    Deviations: the threshold is each image's own (the official code takes quartiles over the batch, so an image depends
    on its neighbours); the outliers are counted, not a share multiplied back; at least one token stays; the token made
    of the rest stands at the position of the most attended of them, since every row needs a placeholder (official: at
    the end); without a CLS row the mean query takes its place.

    Args:
        neighbours: tokens that each kept one gathers.
        ratio: share left altogether, the made token included, in (0, 1]: the top take the place of the outliers; None:
            the picture decides, as published.

    Raises:
        UserError: a number out of range.

    Source: Shang et al. 2024, arXiv 2403.15388; rule as in iLLaVA 5 (read in the authors' code).
    """

    needs_keys: ClassVar[bool] = True

    neighbours: int = 32
    ratio: float | None = None

    def __post_init__(self) -> None:
        check_ratio("prumerge", self.ratio)
        if self.neighbours < 0:
            raise UserError(f"prumerge: neighbours={self.neighbours}; expected 0 or more")

    def blocks(self, depth: int, used: int) -> tuple[int, ...]:
        """The last block, even where the features come from an earlier one."""
        return (depth - 1,)

    def count(self, tokens: int) -> int | None:
        """The share of ``tokens``; None where the picture decides."""
        return None if self.ratio is None else share(tokens, self.ratio)

    def select(self, features: Features) -> list[Reduced]:
        """One answer an image; counts differ where the picture decides."""
        rows, tokens = features.x.shape[:2]
        if self.count(tokens) == tokens:
            return gathered(features, torch.arange(tokens, device=features.x.device).expand(rows, tokens))
        block = max(features.keys)
        scores = unsplit_attention(features, block)
        order = ranked(scores)
        kept = self.chosen(scores, order)
        keys = torch.nn.functional.normalize(wide(features.keys[block]).flatten(2), dim=-1)
        return [self._merge(features, i, kept[i], scores[i], keys[i]) for i in range(rows)]

    def chosen(self, scores: Tensor, order: Tensor) -> list[Tensor]:
        """Rows that stay of each image, ascending; ``order`` holds the rows by falling score."""
        tokens = scores.shape[1]
        total = self.count(tokens)
        numbers = outliers(scores) if total is None else [max(1, total - 1)] * len(order)
        return [row[:number].sort().values for row, number in zip(order, numbers, strict=True)]

    def _merge(self, features: Features, image: int, stay: Tensor, scores: Tensor, keys: Tensor) -> Reduced:
        x = wide(features.x[image])
        tokens = len(x)
        total = self.count(tokens)
        likeness = keys[stay] @ keys.T
        likeness[torch.arange(len(stay), device=x.device), stay] = -torch.inf
        near = ranked(likeness)[:, : min(self.neighbours, tokens - 1)]
        weight = torch.nn.functional.one_hot(stay, tokens).to(x.dtype)
        weight.scatter_add_(1, near, scores.to(x.dtype)[near])
        kept, assign = stay, owners(stay[None], tokens)
        if len(stay) < tokens and (total is None or total > 1):
            removed = assign[0] < 0
            # the made token stands where the most attended of its sources stood
            place = scores.masked_fill(~removed, -torch.inf).argmax()
            kept, where = torch.cat([stay, place[None]]).sort()
            made = where.argsort()[-1]
            assign = torch.where(removed, made, owners(kept[None], tokens)[0])[None]
            weight = torch.cat([weight, (scores * removed).to(x.dtype)[None]])[where]
        out = (weight @ x).to(features.x.dtype)
        if not features.trace:
            return images(out[None], kept[None])[0]
        return images(out[None], kept[None], assign, weight.float()[None])[0]


def unsplit_attention(features: Features, block: int) -> Tensor:
    """(I, N) softmax of q_cls . k / sqrt(C) over the CLS key (where there is one) and the patches', heads as one."""
    query = wide(features.cls_query[block]).flatten(1)
    keys = wide(features.keys[block]).flatten(2)
    logits = (keys @ query[..., None]).squeeze(-1) * query.shape[-1] ** -0.5
    own = features.cls_key.get(block)
    if own is not None:
        first = (wide(own).flatten(1) * query).sum(-1, keepdim=True) * query.shape[-1] ** -0.5
        logits = torch.cat([first, logits], 1)
    shares: Tensor = logits.softmax(-1)[:, -keys.shape[1] :]
    return shares


def outliers(scores: Tensor) -> list[int]:
    """How many scores of each row of (I, N) lie above Q3 + 1.5 (Q3 - Q1), at least 1; quartiles are interpolated."""
    low, high = torch.quantile(scores, torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device), dim=-1)
    above = (scores > (high + 1.5 * (high - low))[:, None]).sum(-1).clamp(min=1)
    # how many tokens stay shapes what follows: the one place where the device is asked
    found: list[int] = above.tolist()
    return found
