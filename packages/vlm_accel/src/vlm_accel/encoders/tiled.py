"""Tiles of one size whose patches a pixel shuffle joins in cells after the blocks (InternVL, SmolVLM, Idefics3).

The blocks have no rotary tables: positions are in the rows, so rows may stand in any order. At the first step that
takes some away, patches are put in cell order and stay so; before the pixel shuffle they go back to their places of the
full grid, zero where none is left. The projector behind the shuffle runs on the cells left only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlm_accel.encoders.base import EncoderAdapter, VisionState
from vlm_accel.encoders.cells import (
    CellAttention,
    asked_blocks,
    cell_order,
    chosen,
    features_of,
    merge_map,
    pend,
    spread,
    write_rows,
)
from vlm_accel.encoders.padding import ValidFirst
from vlm_accel.encoders.scores import Seen, Watch, watch
from vlm_accel.encoders.surgery import Parts, check_grad, split
from vlm_accel.session import VisionRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.merge_map import MergeMap
    from vlm_accel.methods.base import Reduced
    from vlm_accel.schedule import Step
    from vlm_accel.session import Session

__all__ = ["TiledCall", "TiledEncoder", "attended"]


class TiledCall:
    """One encoder call over S tiles; x is (S, prefix + n, D).

    Args:
        session: the acceleration.
        tiles: S.
        grid: (height, width) of the patches.
        side: a cell is side x side patches.
        prefix: rows in front.
        device: of the rows.
        valid: (S, height * width) bool patches that are no padding, or None.
    """

    def __init__(
        self,
        session: Session,
        tiles: int,
        grid: tuple[int, int],
        side: int,
        prefix: int,
        device: torch.device,
        valid: Tensor | None = None,
    ) -> None:
        self.tiles = tiles
        self.grid = grid
        self.prefix = prefix
        self.patches = grid[0] * grid[1]
        self.state = VisionState(session, tiles, self.patches, grid, prefix, side * side, device)
        self.order = cell_order(*grid, side, device)
        self.valid = valid
        self.first_valid: ValidFirst | None = None
        if valid is not None and session.plan.vision is not None:
            cells = valid[:, self.order].view(tiles, -1, side * side).any(-1)
            self.first_valid = ValidFirst(session.plan.vision, cells)
        self.rows: Tensor | None = None
        self.record = VisionRecord(images=tiles)
        #: per block that a method after the encoder asks for: what was seen, and the rows that entered it
        self.looks: dict[int, tuple[Seen, Tensor | None]] = {}
        self.entered: Tensor | None = None

    @property
    def left(self) -> int:
        """Patches left of each tile."""
        return self.state.cells * self.state.group

    def merge(self, step: Step, rows: Tensor, seen: Seen) -> Tensor | None:
        """Take one step on all tiles; None where nothing changes."""
        if step.count(self.left, self.state.group) >= self.left:
            return None
        method = self.first_valid or self.state.session.plan.vision
        given = [rows[:, self.prefix :], seen.scores, seen.keys, seen.queries]
        if self.rows is None:
            given = [None if one is None else one[:, self.order] for one in given]
        x, scores, keys, queries = given
        assert x is not None
        patches = self.state.step(method, step, x, scores, keys, queries)  # type: ignore[arg-type]
        assert patches is not None
        self.rows = self.order[self.state.patch_index()]
        return torch.cat((rows[:, : self.prefix], patches), 1) if self.prefix else patches

    def enter(self) -> None:
        """Count the rows of the next block."""
        rows, record = self.prefix + self.left, self.record
        self.entered = self.rows
        record.tokens.append(self.tiles * rows)
        record.mlp_tokens.append(self.tiles * rows)
        record.lengths.append([rows] * self.tiles)
        record.full.append(self.tiles * (self.prefix + self.patches))
        record.full_lengths.append([self.prefix + self.patches] * self.tiles)

    def whole(self, x: Tensor) -> Tensor:
        """(S, prefix + m, D) at its places of (S, prefix + N, D), zero elsewhere."""
        if self.rows is None:
            return x
        full = spread(x[:, self.prefix :], self.rows, self.patches)
        return torch.cat((x[:, : self.prefix], full), 1) if self.prefix else full

    def attention(self, block: int) -> CellAttention:
        """Attention of a block, of the patches left, in cell order."""
        seen, entered = self.looks[block]
        found = CellAttention.of(seen, self.prefix)
        rows = self.order.expand(self.tiles, -1) if self.rows is None else self.rows
        if entered is not None:
            places = torch.arange(entered.shape[1], device=entered.device).expand_as(entered)
            rows = entered.new_zeros(self.tiles, self.patches).scatter(1, entered, places).gather(1, rows)
        return found.pick(rows)

    def key_bias(self) -> Tensor | None:
        """(S, n) bias of the patches' keys, or None."""
        bias = self.state.key_bias
        return None if bias is None else bias.repeat_interleave(self.state.group, 1)


class TiledEncoder(EncoderAdapter):
    """Base of the two families; subclasses set the attributes of ``EncoderAdapter`` and those below."""

    inner: Any
    tower: nn.Module
    #: (S, cells, D) -> (S, cells, D'), after the pixel shuffle
    projector: nn.Module
    #: a cell is side x side patches
    side: int
    #: segments are the tiles (text stands between them); False: the unbroken runs of placeholders
    by_tile: bool = True
    call: TiledCall | None = None

    @abstractmethod
    def parts(self, block: Any) -> Parts:
        """Named parts of a block."""

    def padding(self, kwargs: dict[str, Any]) -> Tensor | None:
        """(S, N) bool from the tower's arguments, where some patch is padding; else None."""
        return None

    def adjust(self, call: TiledCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a block after a step; None: only the rows matter."""
        return None

    def restore(self, call: TiledCall, output: Any) -> None:
        """Put the features of the tower's output back into the full grid."""
        output.last_hidden_state = call.whole(output.last_hidden_state)

    def install(self, session: Session) -> None:
        """Hook the encoder. Without vision steps and methods after it, only empty maps are written."""
        plan = session.plan
        self._session = session
        self._valid: Tensor | None = None
        self._waiting: tuple[TiledCall, dict[int, Reduced]] | None = None
        self._runs: list[int] | None = None
        self._pending: list[MergeMap] = []
        self._watches: dict[int, list[Watch]] = {}
        session.on_exit(self._forget)
        if plan.vision_steps or plan.features is not None:
            self._install_blocks(session)
            session.hook(self.projector.register_forward_pre_hook(self._gather))
            session.hook(self.projector.register_forward_hook(self._finish))
        elif session.trace:
            session.hook(self.projector.register_forward_hook(self._finish_plain))
        if session.trace and not self.by_tile:
            session.hook(self.inner.register_forward_pre_hook(self._look_at_prompt, with_kwargs=True))
            session.hook(self.inner.register_forward_hook(self._prompt_done))

    def _install_blocks(self, session: Session) -> None:
        plan = session.plan
        session.hook(self.tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        steps = {step.layer: step for step in plan.vision_steps}
        first = min(steps, default=self.used)
        wanted = asked_blocks(plan.features, len(self.blocks), self.used)
        cls_row = 0 if self.num_prefix_tokens else None
        for layer, block in enumerate(self.blocks):
            session.hook(block.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
            parts, looks = self.parts(block), []
            if layer in steps and plan.vision is not None:
                keys, step = plan.vision.needs_keys, steps[layer]
                looks.append(Watch(plan.vision.score("vision"), cls_row=cls_row, keys=keys, queries=keys))
                looks[-1].when = partial(self._needed, step)
                session.replace(block, "forward", split(parts, partial(self._merge, step, looks[-1])))
            if layer in wanted:
                looks.append(Watch(cls_row=cls_row, raw=True))
                session.hook(block.register_forward_hook(partial(self._look, layer, looks[-1])))
            if layer > first and plan.vision is not None and plan.vision.biases_keys:
                looks.append(Watch(key_bias=self._bias))
            for one in looks:
                one.prefix = self.num_prefix_tokens
                watch(session, parts.attention, one)
            self._watches[layer] = looks
        session.hook(self.tower.register_forward_hook(self._end))

    # ---- hooks

    def _forget(self) -> None:
        self.call = self._valid = self._waiting = self._runs = None
        self._watches, self._pending = {}, []

    def _begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_grad(self._session)
        self.call = None
        self._valid = self.padding(kwargs)

    def _enter(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            height = int((x.shape[1] - self.num_prefix_tokens) ** 0.5)
            self.call = TiledCall(
                self._session, len(x), (height, height), self.side, self.num_prefix_tokens, x.device, self._valid
            )
        call = self.call
        assert call is not None
        call.enter()
        for looks in self._watches[layer]:
            looks.rows = call.valid if call.valid is None or call.rows is None else call.valid.gather(1, call.rows)
        return None if call.rows is None else self.adjust(call, args, kwargs)

    def _needed(self, step: Step) -> bool:
        assert self.call is not None
        return step.count(self.call.left, self.group) < self.call.left

    def _merge(self, step: Step, looks: Watch, rows: Tensor) -> Tensor | None:
        call = self.call
        assert call is not None
        shorter = call.merge(step, rows, (looks.take() or [Seen()])[0])
        if shorter is not None:
            call.record.mlp_tokens[-1] = call.tiles * shorter.shape[1]
        return shorter

    def _look(self, layer: int, looks: Watch, block: nn.Module, args: Any, output: Any) -> None:
        assert self.call is not None
        self.call.looks[layer] = (looks.take()[0], self.call.entered)

    def _bias(self) -> Tensor | None:
        assert self.call is not None
        return self.call.key_bias()

    def _end(self, tower: nn.Module, args: Any, output: Any) -> Any:
        call = self.call
        assert call is not None
        call.record.left = [call.left] * call.tiles
        self._session.vision.append(call.record)
        if call.rows is None:
            return None
        self.restore(call, output)
        return output

    def _gather(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.call
        if call is None or call.rows is None:
            return None
        index = call.state.index[..., None].expand(-1, -1, args[0].shape[-1])
        return (args[0].gather(1, index), *args[1:])

    def _finish(self, projector: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        call, session = self.call, self._session
        if call is None:
            return None
        self.call = None
        cells = call.patches // self.group
        left: Tensor | None = None
        if call.rows is not None:
            output = spread(output, call.state.index, cells)
            left = torch.zeros(call.tiles, cells, dtype=torch.bool, device=output.device)
            left.scatter_(1, call.state.index, True)
        answers: dict[int, Reduced] = {}
        if session.plan.features is not None:
            output, left, answers = self._select(call, output, left)
        write_rows(
            session, "image", None if left is None else left.flatten(), [cells] * call.tiles if self.by_tile else []
        )
        if session.trace:
            self._waiting = (call, answers)
            if self.by_tile or self._runs is not None:
                self._write_maps()
        return output

    def _finish_plain(self, projector: nn.Module, args: Any, output: Tensor) -> None:
        """Note the tiles of a call that nothing shortens, for maps."""
        side = int(output.shape[1] ** 0.5) * self.side
        prefix = self.num_prefix_tokens
        call = TiledCall(self._session, len(output), (side, side), self.side, prefix, output.device)
        self._waiting = (call, {})
        if self.by_tile or self._runs is not None:
            self._write_maps()

    # ---- after the encoder

    def _select(
        self, call: TiledCall, output: Tensor, left: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[int, Reduced]]:
        """Let the method after the encoder choose among the cells left of each tile."""
        method, index = self._session.plan.features, call.state.index
        assert method is not None
        x = output.gather(1, index[..., None].expand(-1, -1, output.shape[-1]))
        grid = None if call.rows is not None else (call.grid[0] // self.side, call.grid[1] // self.side)
        found = {block: call.attention(block) for block in call.looks}
        answers, rows, kept = chosen(method, features_of(self._session, x, found, grid, self.group), index.shape[1])
        first = torch.arange(call.tiles, device=index.device)[:, None] * output.shape[1]
        places = (first + index).flatten()[kept]
        made = output.new_zeros(output.shape[0] * output.shape[1], output.shape[2])
        made[places] = rows.to(made.dtype)
        call.record.left = [answer.kept.shape[1] * self.group for answer in answers]
        if len(kept) < index.numel():
            left = torch.zeros(len(made), dtype=torch.bool, device=made.device)
            left[places] = True
            left = left.view(output.shape[:2])
        return made.view(output.shape), left, dict(enumerate(answers))

    def _write_maps(self) -> None:
        """One map a segment: of each tile, or of the tiles of each run of placeholders."""
        assert self._waiting is not None
        (call, answers), self._waiting = self._waiting, None
        cells = call.patches // self.group
        runs = [1] * call.tiles
        if not self.by_tile and self._runs is not None and all(run % cells == 0 for run in self._runs):
            runs = [run // cells for run in self._runs]
            if not runs or call.tiles != sum(runs):
                runs = [1] * call.tiles
        first, maps = 0, []
        for count in runs:
            tiles = [(call.state, tile, answers.get(tile)) for tile in range(first, first + count)]
            grid = (count, *call.grid)
            maps.append(merge_map(grid, call.prefix, self.group, tiles, self.used - 1))
            first += count
        self._pending = pend(self._session, self._pending, maps)

    def _look_at_prompt(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the runs of image placeholders, for maps; ``generate`` encodes images before, ``forward`` after this."""
        if kwargs.get("pixel_values") is not None:
            self._waiting = None  # this call encodes anew
        elif self._waiting is None:
            return
        mark = self.inner.config.image_token_id
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            token = self.inner.get_input_embeddings()(torch.tensor(mark, device=kwargs["inputs_embeds"].device))
            found = (kwargs["inputs_embeds"] == token).all(-1)
        else:
            found = ids == mark
        runs = _runs(found.tolist())
        if self._waiting is not None:  # beams repeat every sample
            call = self._waiting[0]
            times = max(1, sum(map(sum, runs)) // (call.tiles * (call.patches // self.group)))
            self._runs = [run for sample in runs[::times] for run in sample]
            self._write_maps()
        else:
            self._runs = [run for sample in runs for run in sample]

    def _prompt_done(self, *_: Any) -> None:
        self._runs = None


def _runs(rows: list[list[bool]]) -> list[list[int]]:
    """Lengths of the unbroken runs of True of each row."""
    found = []
    for row in rows:
        lengths: list[int] = []
        before = False
        for one in row:
            if one and before:
                lengths[-1] += 1
            elif one:
                lengths.append(1)
            before = one
        found.append(lengths)
    return found


def attended(attention: Any) -> Callable[..., Tensor]:
    """The first output of an attention module."""
    return lambda x, *args, **kwargs: attention(x, *args, **kwargs)[0]
