"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos packed into one sequence, 2 x 2 cells, windows, DeepStack.

Read in transformers 5.23. The encoder's loop holds ``cu_seqlens``, ``max_seqlen`` and the rotary tables fixed: after
the first step that takes rows away, a pre-hook of every later block swaps in those of the rows left. The mergers (the
last one, and those of DeepStack taps) run on the survivors; a hook puts their output back into the full grid, so that
what follows (order of windows restored, split by image, counts checked) is the model's own code.

* An image is a segment; so is every temporal slice of a video (attention never crosses them, neither do merges).
* Qwen2.5-VL is shortened at its full-attention blocks only: there a score compares all cells of an image (iLLaVA 3.6).
* DeepStack features of a tap before the last step hold more cells than the end; those that do not survive are set to
  zero, so that all lists agree with the final set of cells. A merged cell is merged in the main features only: a tap
  shows a survivor as it was at the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch

from vlm_accel.encoders.base import EncoderAdapter
from vlm_accel.encoders.cells import CellAttention, asked_blocks, chosen, features_of, merge_map, pend, write_rows
from vlm_accel.encoders.packed import Group, PackedCall, Windows
from vlm_accel.encoders.scores import Seen, Watch, attention_map, watch
from vlm_accel.encoders.surgery import Parts, check_grad, split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.merge_map import MergeMap
    from vlm_accel.methods.base import Reduced
    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["Qwen2VLEncoder", "Qwen3VLEncoder", "Qwen25VLEncoder"]


class Qwen2VLEncoder(EncoderAdapter):
    """Qwen2-VL: every block attends within an image (or temporal slice)."""

    #: blocks with windowed attention
    windowed: frozenset[int] = frozenset()

    def __init__(self, model: nn.Module) -> None:
        self.inner: Any = getattr(model, "model", model)
        self.visual: Any = self.inner.visual
        config = self.visual.config
        self.blocks: list[Any] = list(self.visual.blocks)
        self.used = len(self.blocks)
        self.width = getattr(config, "embed_dim", None) or config.hidden_size
        self.heads = config.num_heads
        self.mlp = getattr(config, "intermediate_size", None) or int(self.width * config.mlp_ratio)
        self.group = config.spatial_merge_size**2
        self.call: PackedCall | None = None
        self.kind: str | None = None
        self._watches: dict[int, list[Watch]] = {}
        #: per block that a method after the encoder asks for: its attention; the rows that entered it, and how many of
        #: each segment
        self._looks: dict[int, list[Seen]] = {}
        self._before: dict[int, tuple[Tensor | None, list[int]]] = {}
        self._pending: dict[str, list[MergeMap]] = {}

    # ---- to be told apart by family

    def windows(self, grid: Tensor) -> Windows | None:
        """Order of the cells; None: as they come."""
        return None

    def mergers(self) -> list[nn.Module]:
        """Modules whose output has one row a cell."""
        return [self.visual.merger]

    # ---- hooks

    def install(self, session: Session) -> None:
        """Hook the encoder. Without vision steps and methods after it, only segments (and empty maps) are written."""
        self._session = session
        for name, kind in (("get_image_features", "image"), ("get_video_features", "video")):
            session.replace(self.inner, name, self._named(getattr(self.inner, name), kind))
        session.on_exit(self._forget)
        session.hook(self.visual.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._watches, self._before = {}, {}
        if session.plan.vision_steps or session.plan.features is not None:
            self._install_blocks(session)
            for merger in self.mergers():
                session.hook(merger.register_forward_hook(self._spread))
        session.hook(self.visual.register_forward_hook(self._end))

    def _install_blocks(self, session: Session) -> None:
        plan = session.plan
        steps = {step.layer: step for step in plan.vision_steps}
        first = min(steps, default=self.used)
        wanted = asked_blocks(plan.features, self.used, self.used)
        for layer, block in enumerate(self.blocks):
            session.hook(block.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
            looks = []
            if layer in steps and plan.vision is not None:
                keys, step = plan.vision.needs_keys, steps[layer]
                looks.append(Watch(plan.vision.score("vision"), cls_row=None, keys=keys, queries=keys))
                looks[-1].when = partial(self._needed, step)
                session.replace(block, "forward", split(_parts(block), partial(self._merge, step, looks[-1])))
            if layer in wanted:
                looks.append(Watch(cls_row=None, raw=True))
                session.hook(block.register_forward_hook(partial(self._look, layer, looks[-1])))
                self._before[layer] = (None, [])
            if layer > first and plan.vision is not None and plan.vision.biases_keys:
                looks.append(Watch(key_bias=self._biases()))
            for one in looks:
                watch(session, block.attn, one)
            self._watches[layer] = looks

    def _named(self, original: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """Remember what is encoded: Qwen3-VL's videos go through ``get_image_features``, so the outer one counts."""

        @wraps(original)  # generate() reads its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            before = self.kind
            self.kind = before or kind
            try:
                return original(*args, **kwargs)
            finally:
                self.kind = before

        return features

    def _forget(self) -> None:
        self.call = None
        self._watches, self._looks, self._before, self._pending = {}, {}, {}, {}

    def _begin(self, visual: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self._session
        if session.plan.vision_steps or session.plan.features is not None:
            check_grad(session)
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        rows = args[0] if args else kwargs["hidden_states"]
        grids = [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
        self.call = PackedCall(session, grids, self.group, self.windows(grid), rows.device)
        self._looks = {}

    def _enter(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count the rows of a block; give the rows left their own lengths and rotary tables."""
        call = self.call
        assert call is not None
        windowed = layer in self.windowed
        record = call.record
        lengths = call.lengths_at(windowed)
        record.tokens.append(sum(lengths))
        record.mlp_tokens.append(sum(lengths))
        record.full.append(sum(call.full))
        record.lengths.append(lengths)
        record.full_lengths.append(call.full_lengths_at(windowed))
        self._position = kwargs["position_embeddings"]
        flash = "flash" in (self.visual.config._attn_implementation or "")
        for looks in self._watches.get(layer, ()):
            looks.lengths = lengths if flash else None
        if layer in self._before:
            self._before[layer] = (call.origin, list(call.lengths))
        if not call.shortened:
            return None
        self._position = call.position
        device = call.device if flash else torch.device("cpu")
        cu_seqlens, longest = call.seqlens(windowed, device)
        kwargs = {**kwargs, "cu_seqlens": cu_seqlens, "position_embeddings": call.position}
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = longest
        return args, kwargs

    def _merge(self, step: Step, looks: Watch, rows: Tensor) -> Tensor | None:
        call, method = self.call, self._session.plan.vision
        assert call is not None
        assert method is not None
        seen = looks.take()
        found = ([getattr(one, name) for one in seen] for name in ("scores", "keys", "queries"))
        scores, keys, queries = (torch.cat(parts, 1)[0] if parts and parts[0] is not None else None for parts in found)
        shorter = call.shorten(method, step, rows, self._position, scores, keys, queries)
        call.record.mlp_tokens[-1] = shorter.shape[0]
        return None if shorter is rows else shorter

    def _needed(self, step: Step) -> bool:
        assert self.call is not None
        return any(step.count(length, self.group) < length for length in self.call.lengths)

    def _look(self, layer: int, looks: Watch, block: nn.Module, args: Any, output: Any) -> None:
        self._looks[layer] = looks.take()

    def _biases(self) -> Callable[[], Tensor | None]:
        """Gives each kernel call its part of the key bias: kernels are called once a segment or window."""
        state: dict[str, Any] = {"call": None, "block": -1, "parts": iter(())}

        def next_bias() -> Tensor | None:
            call = self.call
            assert call is not None
            if state["call"] is not call or state["block"] != len(call.record.tokens):
                bias = call.key_bias()
                parts: Iterator[Any] = iter(()) if bias is None else iter(bias.split(call.record.lengths[-1]))
                state.update(call=call, block=len(call.record.tokens), parts=parts)
            part = next(state["parts"], None)
            return None if part is None else part[None]

        return next_bias

    def _spread(self, merger: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Put the merged cells back where they stood; zero where none is left."""
        call = self.call
        if call is None or not call.shortened:
            return None
        full = output.new_zeros(sum(call.full) // self.group, output.shape[-1])
        full[call.cells_left()] = output
        return full

    def _end(self, visual: nn.Module, args: Any, output: Any) -> Any:
        call, session = self.call, self._session
        assert call is not None
        kind = self.kind or "image"
        self.call = None
        segments = [length // self.group for length in call.full]
        if not (session.plan.vision_steps or session.plan.features is not None):
            write_rows(session, kind, None, segments)
            if session.trace:
                self._pending[kind] = pend(session, self._pending.get(kind, []), self._maps(call, {}))
            return None
        left = self._left(call, output.pooler_output.device) if call.shortened else None
        answers: dict[int, Reduced] = {}
        if session.plan.features is not None:
            left, answers = self._select(call, output, left)
        if left is not None:
            for number, tap in enumerate(getattr(output, "deepstack_features", None) or []):
                output.deepstack_features[number] = tap.masked_fill(~left[:, None], 0)
        write_rows(session, kind, left, segments)
        if session.trace:
            self._pending[kind] = pend(session, self._pending.get(kind, []), self._maps(call, answers))
        call.record.left = list(call.lengths)
        for number, answer in answers.items():
            call.record.left[number] = answer.kept.shape[1] * self.group
        session.vision.append(call.record)
        self._looks = {}
        return output

    # ---- after the encoder

    def _cells(self, call: PackedCall, group: Group) -> Tensor:
        """(S, m) int64 place among the features of each cell left of a group, raster order."""
        starts, total = [], 0
        for length in call.full:
            starts.append(total)
            total += length // self.group
        first = torch.tensor([starts[number] for number in group.members]).to(call.device, non_blocking=True)
        return first[:, None] + group.state.index

    def _left(self, call: PackedCall, device: torch.device) -> Tensor:
        """(P,) bool: features that survived, in the order of the features."""
        left = torch.zeros(sum(call.full) // self.group, dtype=torch.bool, device=device)
        for group in call.groups:
            left[self._cells(call, group).flatten()] = True
        return left

    def _select(self, call: PackedCall, output: Any, left: Tensor | None) -> tuple[Tensor | None, dict[int, Reduced]]:
        """Let the method after the encoder choose among the cells left; writes ``output.pooler_output``."""
        method, merged = self._session.plan.features, output.pooler_output
        assert method is not None
        answers: dict[int, Reduced] = {}
        made, places, changed = merged.new_zeros(merged.shape), [], False
        for group in call.groups:
            cells = self._cells(call, group)
            x = merged[cells.flatten()].view(*cells.shape, -1)
            found = {block: self._attention(call, group, block) for block in self._looks}
            grid = None if call.shortened else tuple(side // int(self.group**0.5) for side in group.state.grid or ())
            features = features_of(self._session, x, found, grid, self.group)  # type: ignore[arg-type]
            chosen_here, rows, kept = chosen(method, features, cells.shape[1])
            answers |= dict(zip(group.members, chosen_here, strict=True))
            changed = changed or len(kept) < cells.numel()
            places.append(cells.flatten()[kept])
            made[places[-1]] = rows.to(made.dtype)
        output.pooler_output = made
        if not changed:
            return left, answers
        left = torch.zeros(len(merged), dtype=torch.bool, device=merged.device)
        left[torch.cat(places)] = True
        return left, answers

    def _attention(self, call: PackedCall, group: Group, block: int) -> CellAttention:
        """Attention of a block, of the patches left of one group."""
        seen, rows, (origin, lengths) = self._looks[block], group.rows, self._before[block]
        if call.origin is not None:  # the block had more rows than are left
            rows = call.origin[rows.flatten()].view_as(rows)
            if origin is not None:
                rows = torch.searchsorted(origin, rows)
        # mean over the queries of the segment, of which a window holds a part
        total = lengths[group.members[0]]
        maps = [attention_map(one.query, one.key, one.scaling, one.bias)[0] for one in seen]  # type: ignore[arg-type]
        attention = torch.cat([one * (one.shape[1] / total) for one in maps], 1)
        key, query = (torch.cat(parts, 2)[0] for parts in zip(*((one.key, one.query) for one in seen), strict=True))
        flat = rows.flatten()
        return CellAttention(
            attention[:, flat].unflatten(1, rows.shape).transpose(0, 1),
            key[:, flat].unflatten(1, rows.shape).transpose(0, 1),
            query[:, flat].unflatten(1, rows.shape).transpose(0, 1),
        )

    def _maps(self, call: PackedCall, answers: dict[int, Reduced]) -> list[MergeMap]:
        made = {}
        for group in call.groups:
            for row, number in enumerate(group.members):
                tile = (group.state, row, answers.get(number))
                made[number] = merge_map((1, *call.grids[number]), 0, self.group, [tile], self.used - 1)
        return [made[number] for number in sorted(made)]


class Qwen25VLEncoder(Qwen2VLEncoder):
    """Qwen2.5-VL: windows except at ``fullatt_block_indexes``, where alone it is shortened; gated MLP."""

    gated = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        whole = sorted(int(block) for block in self.visual.fullatt_block_indexes)
        self.allowed = whole
        self.windowed = frozenset(range(self.used)) - frozenset(whole)

    def windows(self, grid: Tensor) -> Windows:
        """The model's own order of cells, and its windows."""
        visual = self.visual
        try:
            from transformers.vision_utils import get_vision_window_index
        except ImportError:  # before 5.10 or so the encoder has it as a method
            order, bounds = visual.get_window_index(grid)
        else:
            order, bounds = get_vision_window_index(
                grid,
                spatial_merge_size=visual.spatial_merge_size,
                window_size=visual.window_size,
                patch_size=visual.patch_size,
            )
        edges = bounds.tolist() if isinstance(bounds, torch.Tensor) else [int(edge) for edge in bounds]
        return Windows(order, sorted(set(edges)))


class Qwen3VLEncoder(Qwen2VLEncoder):
    """Qwen3-VL: DeepStack taps, each with a merger of its own."""

    def mergers(self) -> list[nn.Module]:
        """The last merger and those of the taps."""
        return [self.visual.merger, *self.visual.deepstack_merger_list]


def _parts(block: Any) -> Parts:
    return Parts(block.norm1, block.attn, block.attn, block.norm2, block.mlp)
