"""What a method is: a frozen dataclass of options that builds a ``Prompter``, the module that is trained.

The loop over towers and blocks (``missing_modal.classifier``) calls a Prompter at fixed places; no method knows a
backbone, a trainer or a data set. Everything that depends on the pattern alone is made once a step by ``tables``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from missing_modal.backbones.base import TowerSpec
    from missing_modal.batch import Batch

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


class Method(ABC):
    """Base of all methods; subclasses are frozen dataclasses of options, one file each."""

    @property
    def tunes_towers(self) -> bool:
        """Whether copies of the towers are trained, too: fine-tuning with modality dropout."""
        return False

    @abstractmethod
    def build(self, context: Context) -> Prompter:
        """The module that is trained. UserError for options that do not fit the towers."""


class Output(nn.Module):
    """Last norm and projection of one tower: trained copies, or frozen ones (DCP 3.5).

    Args:
        spec: of the tower.
        train: whether the copy of the norm (and of the projection where ``spec.train_projection``) is trained.
    """

    def __init__(self, spec: TowerSpec, train: bool) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.norm_weight = nn.Parameter(_copy(spec.norm_weight), requires_grad=train)
        self.norm_bias = nn.Parameter(_copy(spec.norm_bias), requires_grad=train)
        self.projection = None
        if spec.projection is not None:
            self.projection = nn.Parameter(_copy(spec.projection), requires_grad=train and spec.train_projection)

    def forward(self, row: Tensor) -> Tensor:
        """(b, d) -> (b, e), in the copies' dtype: float32, under autocast too; float64 for towers in float64."""
        with torch.autocast(row.device.type, enabled=False):
            row = row.to(self.norm_weight.dtype)
            row = nn.functional.layer_norm(row, row.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
            return row if self.projection is None else row @ self.projection


def _copy(value: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return value.detach().clone().to(torch.promote_types(value.dtype, torch.float32))


class Prompter(nn.Module):
    """The trained part of a method (without the head). The default inserts nothing: head only.

    Args:
        context: what it is built for.
        train_out: whether norms and image projection are trained copies.
    """

    #: a missing modality's tower runs on its placeholder, and the feature is kept (zero imputation)
    encodes_missing: ClassVar[bool] = False
    #: wants the mean features of the training set before training (``Classifier.prepare``)
    wants_means: ClassVar[bool] = False

    def __init__(self, context: Context, train_out: bool = True) -> None:
        super().__init__()
        self.context = context
        self.outputs = nn.ModuleList(
            Output(tower, train_out) if tower.depth else nn.Identity() for tower in context.towers
        )

    def rows(self, tower: int) -> int:
        """Rows in front of the tokens of ``tower`` after its last block: its ``num_prefix_tokens`` (before CLS)."""
        return 0

    def tables(self, masks: Sequence[int]) -> Any:
        """What depends on the pattern alone, for the patterns of this batch, once a step."""
        return None

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """Rows in front of block 0: (b, rows(tower), d), or None.

        Args:
            tower: its index.
            tokens: (b, S, d) of the b samples that have it: all S rows, also those that are cut afterwards.
            which: (b,) int64 into the ``masks`` that ``tables`` was called with.
            tables: what ``tables`` returned.
        """
        return None

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Rows (b, R, d) in front of ``block`` >= 1, some replaced (out of place), or further ones put in front."""
        return h

    def extra(self, tower: int, block: int, which: Tensor, tables: Any) -> tuple[Tensor, Tensor] | None:
        """Keys and values (b, E, d) that join the block's attention."""
        return None

    def finish(self, tower: int, row: Tensor) -> Tensor:
        """(b, d) the pooled row -> (b, e), float32 at least; a tower without blocks gave its features already."""
        output: Tensor = self.outputs[tower](row)
        return output.to(torch.promote_types(output.dtype, torch.float32))

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
        """Further loss terms by name, weighted (MSPs)."""
        return {}

    def thin(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The training batch as the model is to see it, before the forward pass (modality dropout); not in evaluation.

        Args:
            batch: one training batch.
            generator: of this step, on the CPU.
        """
        return batch

    def set_means(self, means: Sequence[Tensor]) -> None:
        """Mean feature (e,) of each tower over the training samples that have it; see ``wants_means``."""
