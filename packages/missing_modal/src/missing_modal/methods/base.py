"""What a method is: a frozen dataclass of options that builds a ``Prompter``, the module that is trained.

The loop over towers and blocks (``missing_modal.classifier``) calls a Prompter at fixed places; no method knows a
backbone, a trainer or a data set. Everything that depends on the pattern alone is made once a step by ``tables``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from missing_modal.backbones.base import TowerSpec

__all__ = ["Context", "Method", "Output", "Prompter"]


@dataclass(frozen=True)
class Context:
    """What a method is built for.

    Args:
        towers: specs in the order of the modalities (image, text first).
        masks: all patterns that may come (``patterns.all_masks``).
        seed: of the initial values: a function of (seed, method), never of the global generator.
    """

    towers: tuple[TowerSpec, ...]
    masks: tuple[int, ...]
    seed: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(tower.name for tower in self.towers)


class Method:
    """Base of all methods; subclasses are frozen dataclasses of options, one file each."""

    #: also trains the towers themselves (copies of them): CLIP fine-tuning with modality dropout
    tunes_towers: ClassVar[bool] = False

    def build(self, context: Context) -> Prompter:
        """The module that is trained. UserError for options that do not fit the towers."""
        raise NotImplementedError


class Output(nn.Module):
    """Last norm and projection of one tower: trained copies, or frozen ones (DCP 3.5).

    Args:
        spec: of the tower.
        train: whether the copy of the norm (and of the projection where ``spec.train_projection``) is trained.
    """

    def __init__(self, spec: TowerSpec, train: bool) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.norm_weight = nn.Parameter(spec.norm_weight.detach().clone().float(), requires_grad=train)
        self.norm_bias = nn.Parameter(spec.norm_bias.detach().clone().float(), requires_grad=train)
        if spec.projection is None:
            self.projection = None
        else:
            trained = train and spec.train_projection
            self.projection = nn.Parameter(spec.projection.detach().clone().float(), requires_grad=trained)

    def forward(self, row: Tensor) -> Tensor:
        """(b, d) -> (b, e), in float32."""
        row = nn.functional.layer_norm(row.float(), row.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
        return row if self.projection is None else row @ self.projection


class Prompter(nn.Module):
    """The trained part of a method (without the head). The default inserts nothing: head only.

    Args:
        context: what it is built for.
        train_out: whether norms and image projection are trained copies.
    """

    #: a missing modality's tower runs on its placeholder, and the feature is kept (zero imputation)
    encodes_missing: ClassVar[bool] = False

    def __init__(self, context: Context, train_out: bool = True) -> None:
        super().__init__()
        self.context = context
        self.outputs = nn.ModuleList(Output(tower, train_out) for tower in context.towers)

    def rows(self, tower: int) -> int:
        """Rows put in front of the tokens of ``tower``: its ``num_prefix_tokens`` (before CLS)."""
        return 0

    def tables(self, masks: Sequence[int]) -> Any:
        """What depends on the pattern alone, for the patterns of this batch, once a step."""
        return None

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """Rows in front of block 0: (b, rows(tower), d), or None.

        Args:
            tower: its index.
            tokens: (b, S, d) of the b samples that have it.
            which: (b,) int64 into the ``masks`` that ``tables`` was called with.
            tables: what ``tables`` returned.
        """
        return None

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Rows (b, rows + S, d) in front of ``block`` >= 1, some replaced (out of place)."""
        return h

    def extra(self, tower: int, block: int, which: Tensor, tables: Any) -> tuple[Tensor, Tensor] | None:
        """Keys and values (b, E, d) that join the block's attention."""
        return None

    def finish(self, tower: int, row: Tensor) -> Tensor:
        """(b, d) the pooled row -> (b, e)."""
        output: Tensor = self.outputs[tower](row)
        return output

    def fuse(self, features: Mapping[int, Tensor], rows: Mapping[int, Tensor], masks: Sequence[int]) -> Tensor:
        """Features of the towers that ran -> (B, sum of e): concatenated, zeros where a modality is missing."""
        parts = []
        for number, tower in enumerate(self.context.towers):
            one = features.get(number)
            like = next(iter(features.values()))
            filled = like.new_zeros(len(masks), tower.features)
            parts.append(filled if one is None else filled.index_copy(0, rows[number], one.to(filled.dtype)))
        return torch.cat(parts, dim=1)

    def penalty(self, tables: Any) -> dict[str, Tensor]:
        """Further loss terms by name (MSPs)."""
        return {}
