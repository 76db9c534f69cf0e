"""Plain image encoders of one fixed size per call (timm, open_clip, DINOv2): what their adapters share.

An adapter names its blocks, how each is split around its attention (``Parts``), where a block's queries and keys can
be read, and how later blocks are told about rotary rows and key biases. The rest is here: one ``Call`` per encoder
call, the shortened forward of blocks with a step, the record, the merge maps, dense layouts and weighted pooling.

Decisions where the specification is silent:

* scores are computed beside the attention kernel from its own queries and keys (after norm and rotary embedding), so
  that the block's output does not depend on whether it is scored;
* the score of a patch counts the attention of all queries, prefix rows included (its sum over all rows is 1);
* with ``layout="scatter"`` the final norm (or the transformer's output) is expanded to the full grid, so that pooling,
  too, sees the full grid; ``forward_intermediates`` and backbones always give dense grids, since they promise one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from vlm_accel.encoders.base import EncoderAdapter, VisionState
from vlm_accel.encoders.layout import fill
from vlm_accel.encoders.scores import importance
from vlm_accel.encoders.surgery import check_grad
from vlm_accel.merge_map import MergeMap, MergeStep
from vlm_accel.session import VisionRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["Call", "Parts", "PlainEncoder", "weighted_mean"]


@dataclass(frozen=True)
class Parts:
    """A block cut in two around the place where tokens are merged.

    Args:
        attend: (x, kwargs) -> u, the first residual branch added; for blocks whose branches are parallel, all of it.
        feed: u -> out, the second residual branch; None: merging comes after the block (``where="post"``).
        queries_keys: kwargs -> (q, k), each (S, H, n, d), of the ``attend`` call that just ended, rotated.
        scaling: of the attention logits.
        clear: let go of queries and keys.
    """

    attend: Callable[[Tensor, dict[str, Any]], Tensor]
    feed: Callable[[Tensor], Tensor] | None
    queries_keys: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
    scaling: float
    clear: Callable[[], Any]


class Call:
    """One call of the encoder: its state, its record, its maps.

    Args:
        session: the acceleration. images: S. grid: (height, width). depth: blocks. prefix: rows in front.
    """

    def __init__(
        self, session: Session, images: int, grid: tuple[int, int], depth: int, prefix: int, device: torch.device
    ) -> None:
        patches = grid[0] * grid[1]
        self.state = VisionState(session, images, patches, grid, prefix, device=device)
        self.prefix = prefix
        self.patches = patches
        self.images = images
        self.grid = grid
        self.shortened = False
        self.owner: Tensor | None = None
        #: by patches left: where they stood, and which of them every patch ended in
        self.taken: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.rotary: tuple[Tensor, Tensor, Tensor] | None = None
        rows = patches + prefix
        every = [rows * images] * depth
        self.record = VisionRecord(
            images, tokens=every.copy(), mlp_tokens=every.copy(), full=every, lengths=[[rows] for _ in every],
            left=[patches] * images,
        )  # fmt: skip
        session.vision.append(self.record)
        self.maps: list[MergeMap] = []
        if session.trace:
            self.maps = [MergeMap(grid=(1, *grid), prefix=prefix) for _ in range(images)]
            session.maps += self.maps

    def note(self, layer: int, left: int, post: bool) -> None:
        """Record that block ``layer`` left ``left`` patches of each image."""
        rows, depth = left + self.prefix, len(self.record.tokens)
        for block in range(layer, depth):
            if block > layer:
                self.record.tokens[block] = rows * self.images
                self.record.lengths[block] = [rows]
            if block > layer or not post:
                self.record.mlp_tokens[block] = rows * self.images
        self.record.left[:] = [left] * self.images

    def follow(self, assign: Tensor | None) -> None:
        """Remember where every patch went; ``assign`` (S, n) of the merge, None where it is not known."""
        if assign is not None:
            if self.owner is None:
                self.owner = assign
            else:
                moved = assign.gather(1, self.owner.clamp(min=0))
                self.owner = torch.where(self.owner < 0, self.owner, moved)
        self.taken[self.state.cells] = (self.state.index, self.owner)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(S, 1, 1, prefix + m) additive key bias of the rows left, or None."""
        bias = self.state.key_bias
        return None if bias is None else torch.nn.functional.pad(bias, (self.prefix, 0))[:, None, None].to(dtype)


class PlainEncoder(EncoderAdapter):
    """Base of the adapters of plain encoders; subclasses set the attributes of ``EncoderAdapter``."""

    #: name in messages
    name: str
    #: whether row 0 is a class token
    has_cls: bool = True
    call: Call | None = None

    @abstractmethod
    def grid_module(self) -> nn.Module:
        """The module whose output is the (S, D, height, width) map of patch embeddings: a call starts there."""

    @abstractmethod
    def parts(self, layer: int, session: Session) -> Parts:
        """How block ``layer`` is cut; hooks that it needs are registered with the session."""

    @abstractmethod
    def adjust(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Arguments of a block that follows a merge: rotary rows gathered, key bias added."""

    def finish(self, session: Session) -> None:
        """Hook what comes after the blocks: pooling, dense grids."""

    def install(self, session: Session) -> None:
        """Hook the encoder for ``session.plan``.

        Raises:
            UserError: a method that works after the encoder.
        """
        if session.plan.features is not None:
            name = type(session.plan.features).__name__
            raise UserError(
                f"{name} works between an encoder and a language model, and {self.name} has none; name a method that "
                "works inside the encoder, such as recycle, rank1, tome"
            )
        steps = {step.layer: step for step in session.plan.vision_steps}
        if not steps:
            return
        session.hook(self.grid_module().register_forward_hook(lambda _m, _i, out: self._begin(session, out)))
        session.on_exit(setattr, self, "call", None)
        first = min(steps)
        for layer in range(first, self.used):
            block = self.blocks[layer]
            if layer > first:
                session.hook(block.register_forward_pre_hook(self._follow, with_kwargs=True))
            if layer in steps:
                session.replace(block, "forward", self._shorten(session, steps[layer], block))
        self.finish(session)

    def _begin(self, session: Session, out: Tensor) -> None:
        if out.ndim != 4:
            raise UserError(f"{self.name}: its patch embedding gives no grid, so it cannot be accelerated")
        check_grad(session)
        grid = (int(out.shape[2]), int(out.shape[3]))
        self.call = Call(session, int(out.shape[0]), grid, len(self.blocks), self.num_prefix_tokens, out.device)
        self.call.state.wants_assign = session.plan.options.get("layout") == "scatter"

    def _follow(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.call
        if call is None or not call.shortened:
            return None
        return self.adjust(call, args, kwargs)

    def _shorten(self, session: Session, step: Step, block: nn.Module) -> Callable[..., Tensor]:
        """The forward of a block with a step."""
        original = block.forward
        parts = self.parts(step.layer, session)
        method = session.plan.vision
        assert method is not None
        kind, cls_row = method.score("vision"), 0 if self.has_cls else None

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            call = self.call
            assert call is not None, "a block ran outside of the encoder's forward"
            if step.count(call.state.cells) >= call.state.cells:
                unchanged: Tensor = original(x, *args, **kwargs)
                parts.clear()
                return unchanged
            kwargs = self.named(args, kwargs)
            u = parts.attend(x, kwargs)
            scores = keys = queries = None
            if kind != "none" or method.needs_keys:
                q, k = parts.queries_keys(kwargs)
                prefix = self.num_prefix_tokens
                if kind != "none":
                    scores = importance(q, k, parts.scaling, kind, call.state.key_bias, prefix, cls_row)
                if method.needs_keys:
                    queries, keys = (t[:, :, prefix:].transpose(1, 2) for t in (q, k))
            parts.clear()
            z = self._merge(session, call, step, u, scores, keys, queries)
            call.note(step.layer, call.state.cells, post=parts.feed is None)
            return z if parts.feed is None else parts.feed(z)

        return forward

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments of a block after the tokens, by name."""
        if args:
            raise UserError(f"{self.name}: a block got unnamed arguments; call the model as its library does")
        return kwargs

    def _merge(
        self,
        session: Session,
        call: Call,
        step: Step,
        u: Tensor,
        scores: Tensor | None,
        keys: Tensor | None,
        queries: Tensor | None,
    ) -> Tensor:
        assert session.plan.vision is not None
        prefix = self.num_prefix_tokens
        patches = call.state.step(session.plan.vision, step, u[:, prefix:], scores, keys, queries)
        assert patches is not None
        call.shortened = True
        call.follow(call.state.assign)
        if session.trace:
            reduced = call.state.taken[-1][2]
            for image, item in enumerate(call.maps):
                score = None if scores is None else scores[image]
                item.steps.append(MergeStep.of("vision", step.layer, reduced, image, score))
        return patches if prefix == 0 else torch.cat((u[:, :prefix], patches), 1)

    def dense(self, x: Tensor) -> Tensor:
        """(S, rows, D) of the current call -> all rows: the full grid behind the prefix; no change where none is due.

        The number of rows tells after which merge ``x`` was taken.
        """
        call, prefix = self.call, self.num_prefix_tokens
        if call is None or x.ndim != 3 or x.shape[1] == prefix + call.patches:
            return x
        index, owner = call.taken[x.shape[1] - prefix]
        return torch.cat((x[:, :prefix], fill(x[:, prefix:], index, owner, call.grid)), 1)

    def maps_of(self, intermediates: Sequence[Tensor], to_map: bool) -> list[Tensor]:
        """Dense patch tokens (S, N, D) or maps (S, D, height, width) of shortened ones without their prefix."""
        call = self.call
        assert call is not None
        done = []
        for x in intermediates:
            if x.shape[1] != call.patches:
                x = fill(x, *call.taken[x.shape[1]], call.grid)
            done.append(x.transpose(1, 2).unflatten(2, call.grid).contiguous() if to_map else x)
        return done


def weighted_mean(x: Tensor, sizes: Tensor) -> Tensor:
    """Mean of rows (S, m, D), each counted as many times as the patches it stands for, sizes (S, m)."""
    weights = (sizes / sizes.sum(1, keepdim=True)).to(x.dtype)
    return torch.einsum("sm,smd->sd", weights, x)
