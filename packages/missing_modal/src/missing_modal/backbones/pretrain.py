"""Contrastive pre-training of small towers on the spot (DCP 8): frozen encoders where none were published."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.seeding import generator
from torch import Tensor, nn
from torch.nn import functional

from missing_modal.backbones.transformer import TransformerTower
from missing_modal.backbones.weights import read_towers, save_towers

__all__ = ["contrast", "pretrain"]

_LOG = logging.getLogger(__name__)


def pretrain(
    towers: Sequence[TransformerTower],
    inputs: Mapping[str, Tensor],
    *,
    steps: int = 250,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    cache: Path | None = None,
) -> tuple[TransformerTower, ...]:
    """Train towers to agree on which rows belong together: CLIP's loss, averaged over all pairs of modalities.

    The given towers stay as they are. A sample whose modality is missing has no business here: pre-training wants
    complete rows.

    Args:
        towers: at least two, with the same number of features.
        inputs: per modality (N, ...), row i of all of them one sample.
        steps: of AdamW (weight decay 0.01), each on ``batch_size`` rows drawn without replacement.
        batch_size: rows a step, at most N.
        lr: step size, constant.
        seed: of the draws.
        cache: file; read when it was made from the same towers, inputs and settings, written otherwise.

    Returns:
        The trained towers, frozen.

    Raises:
        UserError: fewer than two towers, features of different lengths, inputs that lack a modality or a row.
    """
    count = _check(towers, inputs, batch_size)
    about: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    about |= {
        "start": [_digest(tower.state()) for tower in towers],
        "inputs": _digest({tower.spec.name: inputs[tower.spec.name] for tower in towers}),
    }
    if cache is not None and cache.is_file() and (known := _cached(cache, about)) is not None:
        return known
    learners = [_Learner(tower) for tower in towers]
    scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    weights = [value for learner in learners for value in learner.parameters()]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    loss = torch.zeros(())
    for step in range(steps):
        rows = torch.randperm(count, generator=generator(seed, "pretrain", step))[:batch_size]
        found = [learner(inputs[tower.spec.name][rows]) for tower, learner in zip(towers, learners, strict=True)]
        pairs = [contrast(found[a], found[b], scale) for a, b in combinations(range(len(found)), 2)]
        loss = torch.stack(pairs).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _LOG.info("the small encoders are trained: contrastive loss %.3f", float(loss.detach()))
    trained = tuple(learner.frozen() for learner in learners)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_towers(cache, trained, about)
    return trained


def contrast(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the cosine similarities of n pairs.

    Args:
        a: (n, e).
        b: (n, e).
        logit_scale: logarithm of the factor, clamped so that the factor is at most 100.
    """
    score = functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T * logit_scale.exp().clamp(max=100.0)
    own = torch.arange(len(a), device=a.device)
    return (functional.cross_entropy(score, own) + functional.cross_entropy(score.T, own)) / 2


class _Learner(nn.Module):
    """A tower's trainable copy with its last norm and projection."""

    def __init__(self, tower: TransformerTower) -> None:
        super().__init__()
        self._tower = tower
        self._twin, self.module = tower.tuned()
        spec = tower.spec
        self.norm_weight = nn.Parameter(spec.norm_weight.clone())
        self.norm_bias = nn.Parameter(spec.norm_bias.clone())
        self.projection = None if spec.projection is None else nn.Parameter(spec.projection.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) -> (b, e)."""
        twin, spec = self._twin, self._tower.spec
        h = twin.embed(x)
        mask = twin.mask(h.shape[1], h)
        for index in range(spec.depth):
            h = twin.block(index, h, mask)
        row = h[torch.arange(len(h)), twin.pool_rows(x)]
        row = functional.layer_norm(row, row.shape[-1:], self.norm_weight, self.norm_bias, spec.norm_eps)
        return row if self.projection is None else row @ self.projection

    def frozen(self) -> TransformerTower:
        """The tower with what was learnt."""
        weights = dict(self._twin.state()) | {"out.norm.weight": self.norm_weight, "out.norm.bias": self.norm_bias}
        if self.projection is not None:
            weights["out.projection"] = self.projection
        return self._tower.replaced({key: value.detach().clone() for key, value in weights.items()})


def _check(towers: Sequence[TransformerTower], inputs: Mapping[str, Tensor], batch: int) -> int:
    if len(towers) < 2 or len({tower.spec.features for tower in towers}) > 1:
        raise UserError("contrastive training wants two towers or more with the same number of features")
    lacking = [tower.spec.name for tower in towers if tower.spec.name not in inputs]
    if lacking:
        raise UserError(f"contrastive training has no inputs for {', '.join(lacking)}")
    counts = {len(inputs[tower.spec.name]) for tower in towers}
    if len(counts) > 1 or batch < 2 or min(counts) < 2:
        raise UserError(
            f"contrastive training wants as many rows of each modality, at least two; given {sorted(counts)}"
        )
    return counts.pop()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(flat.shape)}|{flat.dtype}|".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def _cached(cache: Path, about: dict[str, Any]) -> tuple[TransformerTower, ...] | None:
    try:
        towers, known = read_towers(cache)
    except UserError:
        return None
    held = tuple(tower for tower in towers if isinstance(tower, TransformerTower))
    return held if known == json.loads(json.dumps(about)) else None
