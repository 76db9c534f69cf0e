"""PACT: unimportant image tokens go, the others are clustered by their keys, once, inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from polymodal.errors import UserError

from vlm_accel.methods._features import check_ratio
from vlm_accel.methods.base import Reduced, TokenMethod, Tokens
from vlm_accel.ops._select import gather_rows, top, wide
from vlm_accel.ops.cluster import cosine_distance, density_centres
from vlm_accel.schedule import Schedule, Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import ScoreKind

__all__ = ["PACT", "importance"]


@dataclass(frozen=True)
class PACT(TokenMethod):
    """Prune by importance, cluster what is left, let pruned tokens rejoin.

    Before layer K, with its own queries and keys: s_j = mean_h softmax_j(mean_q(q) . k_j / sqrt(d)) * ||x_j||_2 over
    the image tokens of a sample, unrotated. The top ``stay`` share remains and is clustered on rotated keys (heads side
    by side, cosine distance) by DBDPC: by falling density (see ``ops.cluster.density_centres``) a token becomes a
    centre if farther than ``cutoff`` from every centre. Every token, a pruned one too, joins its nearest centre if it
    lies within ``join * cutoff``, else it goes. A centre becomes the mean of its members and keeps its position.

    This is our reading, a reconstruction: the number of clusters is the step's count instead of what the cutoff gives
    for a picture (all samples of a batch keep equal numbers and counts are known beforehand), so that DBDPC ends early
    or goes on with the tokens farthest from their centres; proportional attention is ``accelerate(...,
    log_size=True)``, off by default; images are clustered one by one.

    Args:
        layer: K, from 1.
        ratio: share left after clustering, in (0, 1]; ours, see above.
        stay: share left after pruning, before clustering.
        cutoff: cosine distance between centres.
        join: how many cutoffs away a token may be from its centre.

    Raises:
        UserError: a number out of range.

    Source: Dhouib et al. 2025, arXiv 2504.08966 (CVPR 2025); iLLaVA 5, joining read again in the authors' code.
    """

    stages: ClassVar[tuple[str, ...]] = ("llm",)
    needs_keys: ClassVar[bool] = True
    own_llm_scores: ClassVar[bool] = True

    layer: int = 4
    ratio: float = 0.3
    stay: float = 0.55
    cutoff: float = 0.21
    join: float = 1.5

    def __post_init__(self) -> None:
        check_ratio("pact", self.ratio)
        if not 0 < self.stay <= 1 or self.layer < 1 or min(self.cutoff, self.join) < 0:
            raise UserError(
                f"pact: layer={self.layer}, stay={self.stay}, cutoff={self.cutoff}, join={self.join}; expected a layer "
                "from 1, a share in (0, 1], and numbers from 0"
            )

    def schedule(self) -> Schedule:
        """One step."""
        return [Step("llm", self.layer, ratio=self.ratio)]

    def score(self, stage: str) -> ScoreKind:
        """The step's own layer is looked at, by ``llm_scores``."""
        return "self"

    def llm_scores(self, view: Any) -> Tensor:
        """(B, t) float32 ``importance`` in the step's own layer."""
        return importance(view.queries(rope=False), view.keys(rope=False), view.x, view.image & view.visible)

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Prune to max(keep, stay * N), then cluster to ``keep``."""
        assert tokens.scores is not None
        assert tokens.keys is not None
        x, keys = tokens.x, tokens.keys.flatten(2)
        n = x.shape[1]
        left = max(keep, round(n * self.stay))
        stays = top(tokens.scores, left)[0]
        near = cosine_distance(gather_rows(keys, stays), gather_rows(keys, stays))
        near = near.masked_fill(torch.eye(left, dtype=torch.bool, device=x.device), 0.0)
        kept = stays.gather(1, density_centres(near, keep, self.cutoff))
        # the pruned and the others alike join the nearest centre that is near enough
        reach, owner = cosine_distance(keys, gather_rows(keys, kept)).min(-1)
        own = torch.arange(keep, device=x.device).expand_as(kept)
        owner = owner.masked_fill(reach > self.join * self.cutoff, -1).scatter(1, kept, own)
        member = torch.nn.functional.one_hot(owner + 1, keep + 1)[..., 1:].transpose(1, 2).to(wide(x).dtype)
        sizes = torch.ones_like(member[:, 0]) if tokens.sizes is None else tokens.sizes.to(member.dtype)
        weight = member * sizes[:, None]
        mass = weight.sum(-1, keepdim=True)
        weight = weight / mass
        return Reduced(
            x=(weight @ wide(x)).to(x.dtype),
            kept=kept,
            sizes=mass.squeeze(-1).float(),
            assign=owner if tokens.trace else None,
            weight=weight.float() if tokens.trace else None,
        )


def importance(queries: Tensor, keys: Tensor, x: Tensor, image: Tensor) -> Tensor:
    """mean_h softmax_j(mean_q(q) . k_j / sqrt(d)) * ||x_j||_2 over the image tokens of each sample.

    Args:
        queries: (B, H, t, d), not rotated.
        keys: (B, K, t, d), not rotated; H is a multiple of K.
        x: (B, t, D) hidden states that enter the layer.
        image: (B, t) bool.

    Returns:
        (B, t) float32; 0 for rows that are no image tokens.
    """
    count = image.sum(1).clamp(min=1)[:, None, None]
    mean = (wide(queries) * image[:, None, :, None]).sum(2) / count
    keys = wide(keys).repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (keys @ mean[..., None]).squeeze(-1) * queries.shape[-1] ** -0.5
    shares = logits.masked_fill(~image[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    scored: Tensor = shares.mean(1) * wide(x).norm(dim=-1) * image
    return scored
