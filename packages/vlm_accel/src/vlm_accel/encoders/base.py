"""What all encoder adapters share: their face, and the state of one encoder call while its tokens shrink."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from vlm_accel.methods.base import Reduced, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlm_accel.methods.base import TokenMethod
    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["EncoderAdapter", "VisionState"]


class EncoderAdapter(ABC):
    """One encoder family: where its blocks are, and how they are made to work on fewer rows.

    Attributes:
        blocks: the blocks in order. used: blocks whose output is used (LLaVA-1.5 reads block L - 2: used = L - 1).
        width, heads, mlp: D, H, F of a block, for the cost model; gated: the MLP has a gate (3 D F instead of 2 D F).
        num_prefix_tokens: rows in front of the patches (CLS, registers): protected, never ranked, never sources.
        group: patches that must stay together (1, or 4 for 2 x 2 cells, or scale ** 2).
        allowed: blocks at which tokens may be shortened; None: all below ``used``.
    """

    blocks: Sequence[nn.Module]
    used: int
    width: int
    heads: int
    mlp: int
    gated: bool = False
    num_prefix_tokens: int = 0
    group: int = 1
    allowed: Sequence[int] | None = None

    @abstractmethod
    def install(self, session: Session) -> None:
        """Hook the encoder for ``session.plan`` (vision steps and / or features), undo registered with the session.

        With keep = N everywhere the encoder's output stays bit-equal. Blocks without a step are not touched.
        """


class VisionState:
    """One encoder call: S images of N patches (or cells) each, all of one size.

    Encoders that pack images of several sizes into one sequence keep one state per image (S = 1).

    Args:
        session: the acceleration.
        images: S.
        patches: N_0 patches of each image, before any step, prefix not counted.
        grid: (height, width) of the patches; None: unknown.
        prefix: rows in front of the patches.
        group: patches per cell; x given to ``step`` is (S, n, D) patches in an order where a cell's patches are
            neighbours when group > 1.
        first_span: number of the first image among all of this model call, for seeded draws.
    """

    def __init__(
        self,
        session: Session,
        images: int,
        patches: int,
        grid: tuple[int, int] | None,
        prefix: int = 0,
        group: int = 1,
        device: torch.device | None = None,
        first_span: int = 0,
    ) -> None:
        self.session = session
        self.group = group
        self.grid = grid
        self.prefix = prefix
        self.images = images
        cells = patches // group
        self.index = torch.arange(cells, device=device).expand(images, cells)
        self.span = torch.arange(first_span, first_span + images, device=device)
        self.sizes: Tensor | None = None
        self.key_bias: Tensor | None = None
        self.taken: list[tuple[Step, Tensor, Reduced]] = []
        #: dense layouts need to know where each row went, traced or not
        self.wants_assign = False
        self.assign: Tensor | None = None

    @property
    def cells(self) -> int:
        """Cells left."""
        return self.index.shape[1]

    def step(
        self,
        method: TokenMethod,
        step: Step,
        x: Tensor,
        scores: Tensor | None,
        keys: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor | None:
        """Apply one step to the patches x (S, n, D) with scores (S, n).

        Returns:
            the shortened (S, m, D), or None where nothing changes (keep = N). ``kept_rows()`` then tells which patch
            rows of the input stayed, for rotary tables and the like.
        """
        keep = step.count(x.shape[1], self.group) // self.group
        self.last: Tensor | None = None
        if keep >= self.cells:
            return None
        s, n, d = x.shape
        if self.group > 1:
            x = x.reshape(s, n // self.group, self.group * d)
            scores = None if scores is None else scores.reshape(s, -1, self.group).mean(-1)
            keys, queries = (None if t is None else _by_cell(t, self.group) for t in (keys, queries))
        sizes = self.sizes if self.sizes is not None else torch.ones(s, self.cells, device=x.device)
        tokens = Tokens(
            x=x, stage="vision", layer=step.layer, scores=scores, sizes=sizes, index=self.index, grid=self._cell_grid(),
            keys=keys, queries=queries, seed=self.session.seed, span=self.span, prefix=self.prefix,
            trace=self.session.trace or ("assign" if self.wants_assign else False),
        )  # fmt: skip
        reduced = method.reduce(tokens, keep)
        self.index = self.index.gather(1, reduced.kept)
        self.sizes = reduced.sizes if reduced.sizes is not None else sizes.gather(1, reduced.kept)
        self.key_bias = reduced.key_bias
        self.last = reduced.kept
        self.assign = reduced.assign
        if self.session.trace:
            self.taken.append((step, scores if scores is not None else torch.zeros_like(sizes), reduced))
        return reduced.x.reshape(s, -1, d)

    def kept_rows(self) -> Tensor:
        """(S, m) int64 rows of the last step's input patches that stayed (cells expanded to patches)."""
        assert self.last is not None
        if self.group == 1:
            return self.last
        slots = torch.arange(self.group, device=self.last.device)
        return (self.last[..., None] * self.group + slots).flatten(1)

    def patch_index(self) -> Tensor:
        """(S, m) int64: original patch row (in the encoder's order) of each row left."""
        if self.group == 1:
            return self.index
        slots = torch.arange(self.group, device=self.index.device)
        return (self.index[..., None] * self.group + slots).flatten(1)

    def _cell_grid(self) -> tuple[int, int] | None:
        if self.grid is None or self.group == 1:
            return self.grid
        side = round(self.group**0.5)
        return self.grid[0] // side, self.grid[1] // side


def _by_cell(heads: Tensor, group: int) -> Tensor:
    """(S, n, H, d) -> (S, n / group, H, group * d): a cell's keys are those of its slots side by side."""
    s, n, h, d = heads.shape
    return heads.reshape(s, n // group, group, h, d).transpose(2, 3).reshape(s, n // group, h, group * d)
