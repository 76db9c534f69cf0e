"""VisionZip: the most attended tokens, and a few contextual ones into which the others flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import attention, check_ratio, gathered, images, one_hot, share
from vlm_accel.methods.base import FeatureMethod
from vlm_accel.ops._select import gather_rows, owners, ranked, wide

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import Features, Reduced

__all__ = ["VisionZip"]


@dataclass(frozen=True)
class VisionZip(FeatureMethod):
    """Dominant tokens as they are, contextual ones with what is like them.

    Keep the ``dominant`` tokens by CLS attention summed over heads; of the rest, in raster order, every step-th
    (step = max(1, n // contextual), the first ``contextual`` of them) is a target. Each other one joins the target with
    the largest cosine of head-mean keys; a target becomes itself **plus** the mean of those that joined it.

    Attention and keys of the block whose output the model reads (L - 2 for LLaVA-1.5). Deviations: the official 54
    dominant tokens hold the CLS row, which has no placeholder in transformers' models: here all 54 are patches. A
    contextual token keeps its target's position instead of following all dominant ones. Without a CLS row: attention
    received (as the official code for SigLIP).

    Args:
        dominant: tokens kept as they are, of each encoder row (tile).
        contextual: tokens into which the rest flows; 0: the rest is dropped.
        ratio: share kept altogether, in (0, 1]; splits in the proportion of the two numbers, in their place.

    Raises:
        UserError: a number out of range.

    Source: Yang et al. 2024, arXiv 2412.04467; rule as in iLLaVA 5 (read in the authors' code).
    """

    needs_keys: ClassVar[bool] = True

    dominant: int = 54
    contextual: int = 10
    ratio: float | None = None

    def __post_init__(self) -> None:
        check_ratio("visionzip", self.ratio)
        if self.dominant < 1 or self.contextual < 0:
            raise UserError(
                f"visionzip: dominant={self.dominant}, contextual={self.contextual}; expected at least 1 and 0"
            )

    def split(self, tokens: int) -> tuple[int, int]:
        """(dominant, contextual) for an image of ``tokens``."""
        if self.ratio is None:
            dominant = min(tokens, self.dominant)
            return dominant, min(tokens - dominant, self.contextual)
        total = share(tokens, self.ratio)
        contextual = min(total - 1, round(total * self.contextual / (self.dominant + self.contextual)))
        return total - contextual, contextual

    def count(self, tokens: int) -> int:
        """Dominant and contextual tokens together."""
        return sum(self.split(tokens))

    def select(self, features: Features) -> list[Reduced]:
        """One answer an image; all keep the same number."""
        tokens = features.x.shape[1]
        dominant, contextual = self.split(tokens)
        if dominant + contextual == tokens:
            return gathered(features, torch.arange(tokens, device=features.x.device).expand(len(features.x), tokens))
        block = max(features.cls_attention)
        order = ranked(attention(features, block))
        if contextual == 0:
            return gathered(features, order[:, :dominant].sort(-1).values)
        return _merged(features, features.keys[block], order, dominant, contextual)


def _merged(features: Features, keys: Tensor, order: Tensor, dominant: int, contextual: int) -> list[Reduced]:
    """Dominant rows and contextual rows with what flowed into them, in raster order."""
    x = features.x
    tokens = x.shape[1]
    rest = order[:, dominant:].sort(-1).values
    step = max(1, rest.shape[1] // contextual)
    at = torch.arange(rest.shape[1], device=x.device)
    last = ((at % step == 0) & (at < step * contextual)).to(torch.uint8).argsort(stable=True)
    others, targets = torch.split(rest[:, last], [rest.shape[1] - contextual, contextual], 1)
    metric = torch.nn.functional.normalize(wide(keys).mean(2), dim=-1)
    joins = (gather_rows(metric, others) @ gather_rows(metric, targets).transpose(1, 2)).argmax(-1)

    kept, where = torch.cat([order[:, :dominant], targets], 1).sort(-1)
    # output row of each contextual token, then of each token that joins it
    row = where.argsort(-1)[:, dominant:].gather(1, joins)
    rows = wide(x)
    flow = torch.zeros(len(x), kept.shape[1], tokens, device=x.device, dtype=rows.dtype)
    flow[torch.arange(len(x), device=x.device)[:, None], row, others] = 1
    flow /= flow.sum(-1, keepdim=True).clamp(min=1)
    out = (gather_rows(rows, kept) + flow @ rows).to(x.dtype)
    if not features.trace:
        return images(out, kept)
    assign = owners(kept, tokens).scatter(1, others, row)
    return images(out, kept, assign, flow.float() + one_hot(kept, tokens))
