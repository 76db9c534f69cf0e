"""Deep correlated prompting: ``missing_modal.prompts`` in front of frozen towers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from missing_modal.methods._rows import reach_of
from missing_modal.methods.base import Context, Method, Prompter
from missing_modal.prompts import BakedPrompts, CorrelatedPrompts, PromptTables

__all__ = ["DCP", "DCPPrompter"]


@dataclass(frozen=True)
class DCP(Method):
    """Deep Correlated Prompts of missing modalities (not the ACL 2023 method of the same letters).

    Args:
        length: L, rows in front of each tower, a multiple of three. 0: plain towers.
        depth: J, blocks with fresh correlated prompts.
        reduction: r of the generators.
        correlated: correlated prompts (a third of the rows).
        common: modal-common prompts (a third of the rows).
        dynamic: dynamic prompts (a third of the rows).
        dynamic_queries: param (trained) or frozen (as drawn, the released code in effect).
        init: independent, or official (all generators of a modality start equal).
        pattern_params: auto, table, additive (more than two modalities).
        train_out: train copies of the last norms and of the image projection, as the released code does.
        blind: every sample counts as complete: what is left without the pattern (control of the experiments).

    Source: Hu et al. 2024 (arXiv 2410.06558), released code; sizes of CLIP ViT-B/16. Deviations: ``dynamic_queries``
    and ``init`` (see ``CorrelatedPrompts``), more than two modalities.
    """

    length: int = 36
    depth: int = 6
    reduction: int = 16
    correlated: bool = True
    common: bool = True
    dynamic: bool = True
    dynamic_queries: str = "param"
    init: str = "independent"
    pattern_params: str = "auto"
    train_out: bool = True
    blind: bool = False

    def build(self, context: Context) -> DCPPrompter:
        """Prompts for these towers (UserError for sizes that do not fit them)."""
        reach_of(context, self.depth)
        prompts = CorrelatedPrompts(
            {tower.name: tower.width for tower in context.towers},
            self.length,
            self.depth,
            blocks=[tower.depth for tower in context.towers],
            reduction=self.reduction,
            correlated=self.correlated,
            common=self.common,
            dynamic=self.dynamic,
            dynamic_queries=self.dynamic_queries,
            init=self.init,
            pattern_params=self.pattern_params,
            seed=context.seed,
        )
        return DCPPrompter(context, prompts, self.train_out, self.blind)


class DCPPrompter(Prompter):
    """``CorrelatedPrompts``, or their baked tables, for the classifier's loop.

    Args:
        context: of the build.
        prompts: the learner.
        train_out: see ``Prompter``.
        blind: take each sample for complete.
    """

    def __init__(
        self, context: Context, prompts: CorrelatedPrompts | BakedPrompts, train_out: bool = True, blind: bool = False
    ) -> None:
        super().__init__(context, train_out)
        self.prompts = prompts
        self.blind = blind

    def rows(self, tower: int) -> int:
        """Rows in front of the tower's tokens."""
        return self.prompts.rows(tower)

    def tables(self, masks: Sequence[int]) -> PromptTables:
        """Prompts of the patterns in this batch."""
        full = 2 ** len(self.context.towers) - 1
        return self.prompts.tables([full] * len(masks) if self.blind else masks)

    def enter(self, tower: int, tokens: Tensor, which: Tensor, tables: Any) -> Tensor | None:
        """[correlated | common | dynamic] rows."""
        return self.prompts.enter(tower, tokens, which, tables)

    def before(self, tower: int, block: int, h: Tensor, which: Tensor, tables: Any) -> Tensor:
        """Correlated rows replaced."""
        return self.prompts.before(tower, block, h, which, tables)

    def bake(self) -> DCPPrompter:
        """A copy for inference whose prompts are tables of all patterns."""
        if isinstance(self.prompts, BakedPrompts):
            return self
        baked = DCPPrompter(self.context, self.prompts.bake(self.context.masks), blind=self.blind)
        baked.outputs = copy.deepcopy(self.outputs).requires_grad_(False)
        return baked
