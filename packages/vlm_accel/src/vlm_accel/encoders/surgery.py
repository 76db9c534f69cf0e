"""Blocks that shorten their rows between attention and MLP (iLLaVA 3.5), and what a call of fixed size leaves behind.

u = x + scale1(attention(norm1(x)));  y = merge(u, scores);  out = y + scale2(mlp(norm2(y)))

An adapter names the parts; ``split`` makes the forward. Only blocks with a step get it, on the instance, undone with
the session. ``BatchedCall`` is for encoders whose images all have the same number of patches (CLIP, SigLIP): rows are
(S, prefix + n, D). Encoders that pack images into one row keep their own calls and use ``split`` and ``watch``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from vlm_accel.encoders.base import VisionState
from vlm_accel.encoders.scores import Seen, Watch, watch
from vlm_accel.session import VisionRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["BatchedCall", "Parts", "check_grad", "install_steps", "split"]


@dataclass(frozen=True)
class Parts:
    """Named parts of one encoder block.

    Args:
        norm1, norm2, mlp: as in the formula above.
        attention: module whose kernel is watched.
        attend: (normed rows, the block's other arguments) -> attention output.
        scale1, scale2: what a branch goes through before it is added (layer scale, dropout); None: nothing.
    """

    norm1: Callable[[Tensor], Tensor]
    attention: nn.Module
    attend: Callable[..., Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale1: Callable[[Tensor], Tensor] | None = None
    scale2: Callable[[Tensor], Tensor] | None = None


def split(parts: Parts, merge: Callable[[Tensor], Tensor | None]) -> Callable[..., Tensor]:
    """The forward of a block whose rows go through ``merge`` after the attention.

    Args:
        parts: of the block.
        merge: rows -> fewer rows, or None where nothing changes (then the output is bit-equal to the block's own).
    """

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        update = parts.attend(parts.norm1(hidden_states), *args, **kwargs)
        rows = hidden_states + (update if parts.scale1 is None else parts.scale1(update))
        shorter = merge(rows)
        rows = rows if shorter is None else shorter
        update = parts.mlp(parts.norm2(rows))
        return rows + (update if parts.scale2 is None else parts.scale2(update))

    return forward


def check_grad(session: Session) -> None:
    """Refuse an encoder call that would record gradients or that trains (iLLaVA 7.5).

    Raises:
        UserError: gradients are on and ``allow_grad`` is not; the model was put into training mode.
    """
    name = type(session.model).__name__
    if session.model.training:
        raise UserError(f"{name} is in training mode; call model.eval()")
    if torch.is_grad_enabled() and not session.plan.options.get("allow_grad", False):
        raise UserError(f"{name} is called with gradients on; use torch.no_grad() or pass allow_grad=True")


class BatchedCall:
    """One encoder call over S images of one size; x is (S, prefix + n, D).

    Args:
        session: the acceleration. depth: blocks. images: S. grid: (height, width) in patches. prefix: rows in front.
        first_span: number of the first image among all of this model call.
    """

    def __init__(
        self,
        session: Session,
        depth: int,
        images: int,
        grid: tuple[int, int],
        prefix: int,
        device: torch.device | None = None,
        first_span: int = 0,
    ) -> None:
        self.session = session
        self.depth = depth
        self.patches = grid[0] * grid[1]
        self.state = VisionState(session, images, self.patches, grid, prefix, device=device, first_span=first_span)
        #: per step taken: (block, patches before, index (S, n) before, patches after)
        self.trail: list[tuple[int, int, Tensor, int]] = []
        self.owner: Tensor | None = None
        self.owned = True
        #: (S, m) scores that the patches left had at the last step
        self.score: Tensor | None = None

    def merge(self, step: Step, rows: Tensor, seen: Seen | None) -> Tensor | None:
        """Take one step on all rows; None where nothing changes."""
        state, prefix = self.state, self.state.prefix
        method = self.session.plan.vision
        assert method is not None
        before, index = state.cells, state.index
        seen = Seen() if seen is None else seen
        patches = state.step(method, step, rows[:, prefix:], seen.scores, seen.keys, seen.queries)
        if patches is None:
            return None
        self.trail.append((step.layer, before, index, state.cells))
        assert state.last is not None
        self.score = None if seen.scores is None else seen.scores.gather(1, state.last)
        self._follow()
        return torch.cat((rows[:, :prefix], patches), 1) if prefix else patches

    def index_before(self, block: int) -> Tensor:
        """(S, n) original patch of each row that enters block ``block``."""
        for layer, _, index, _ in self.trail:
            if block <= layer:
                return index
        return self.state.index

    def rows_now(self, block: int) -> Tensor:
        """(S, m) int64: for each patch left now, its row among the patches that entered block ``block``."""
        index = self.index_before(block)
        if index is self.state.index:
            return torch.arange(index.shape[1], device=index.device).expand_as(index)
        places = index.new_zeros(index.shape[0], self.patches)
        places.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        return places.gather(1, self.state.index)

    def record(self) -> VisionRecord:
        """What this call did, for the session."""
        images, prefix = self.state.images, self.state.prefix
        ends = {layer: after for layer, _, _, after in self.trail}
        full = self.patches + prefix
        record = VisionRecord(images, full=[images * full] * self.depth)
        left = self.patches
        for block in range(self.depth):
            record.tokens.append(images * (left + prefix))
            record.lengths.append([left + prefix])
            left = ends.get(block, left)
            record.mlp_tokens.append(images * (left + prefix))
        record.left = [left] * images
        return record

    def _follow(self) -> None:
        """Compose where every original patch went, while the method says so."""
        assign = self.state.assign
        if assign is None or not self.owned:
            self.owner, self.owned = None, False
            return
        if self.owner is None:
            self.owner = assign
        else:
            moved = assign.gather(1, self.owner.clamp(min=0))
            self.owner = torch.where(self.owner < 0, self.owner, moved)


def install_steps(
    session: Session,
    blocks: Sequence[nn.Module],
    parts: Callable[[nn.Module], Parts],
    call: Callable[[], BatchedCall],
    prefix: int = 0,
    cls_row: int | None = 0,
) -> None:
    """Give the blocks with a step their forward and their watch, and later blocks the key bias where a method has one.

    Args:
        session: with the plan.
        blocks: of the encoder, in order.
        parts: of a block.
        call: the call that is running.
        prefix: rows in front of the patches.
        cls_row: row of the class token; None: none.
    """
    method = session.plan.vision
    if method is None:
        return
    first = session.plan.vision_steps[0].layer
    steps = {step.layer: step for step in session.plan.vision_steps}
    for layer, block in enumerate(blocks):
        named = parts(block)
        wanted = Watch(prefix=prefix, cls_row=cls_row)
        if layer in steps:
            wanted.kind, wanted.keys, wanted.queries = method.score("vision"), method.needs_keys, method.needs_keys
            wanted.when = _needed(call, steps[layer])
            session.replace(block, "forward", split(named, _merger(call, steps[layer], wanted)))
        if layer > first and method.biases_keys:
            wanted.key_bias = lambda: call().state.key_bias
        if wanted.scores_wanted or wanted.key_bias is not None:
            watch(session, named.attention, wanted)


def _merger(call: Callable[[], BatchedCall], step: Step, wanted: Watch) -> Callable[[Tensor], Tensor | None]:
    def merge(rows: Tensor) -> Tensor | None:
        seen = wanted.take()
        return call().merge(step, rows, seen[0] if seen else None)

    return merge


def _needed(call: Callable[[], BatchedCall], step: Step) -> Callable[[], bool]:
    return lambda: step.count(call().state.cells) < call().state.cells
