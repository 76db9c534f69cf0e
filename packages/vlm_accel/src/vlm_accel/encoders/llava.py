"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision with images, several images and video (iLLaVA 3.5 to 3.7).

The tower works on fewer rows; the projector sees only the survivors; then they are put back to full size, so that the
model's packing (tiles side by side, unpadding, pooling, newlines) and its count of placeholders run unchanged.
``session.image_rows`` says which placeholder rows the decoder is to read.

* ``layout="scatter"`` (also "auto"): each survivor at its own place. Where cells are pooled (video, many tiles) empty
  cells are filled first (iLLaVA 3.6) and the n cells with most survivors stay, n as ``pseudo_grid`` gives.
* ``layout="pseudo_grid"``: survivors are re-read in raster order as a square grid, as the official code does. Its n
  rows are not the first n rows of the image's run (wrong positions, iLLaVA 3.7): cell (r, c) of the small grid sits at
  the row of the cell of the full grid that it covers, newlines at newlines: in order, and all over the run.

The specification makes pseudo_grid the default where the count is a square. Here ``scatter`` always is: its positions
are exact, its geometry is right, and a setting that changes with the last step's count would surprise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from vlm_accel.encoders.base import EncoderAdapter
from vlm_accel.encoders.clip import Tower, block_parts
from vlm_accel.encoders.features import Collector, Survivors
from vlm_accel.encoders.grids import Current, Grids, Picture
from vlm_accel.encoders.layout import fill

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.encoders.surgery import BatchedCall
    from vlm_accel.methods.base import Reduced
    from vlm_accel.session import Session

__all__ = ["LlavaEncoder", "LlavaNextEncoder", "LlavaOnevisionEncoder"]

#: numbers of frames in seeded draws start here, those of images at 0
_FRAMES = 1 << 20


class LlavaEncoder(EncoderAdapter):
    """LLaVA 1.5: one run of patches per image, no grid behind the projector.

    ``vision_feature_layer`` may be one layer or a list: then the rows of each layer are gathered to those that are left
    at the last one. The last blocks of the tower, whose output nobody reads, run on the shortened rows.

    Features are good for the prefill that follows them: the decoder then forgets which of their rows are empty.
    """

    name = "LLaVA 1.5"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = getattr(model, "model", model)
        module = self.inner.vision_tower
        self.tower = Tower(module) if Tower.fits(module) else None
        self.blocks = self.tower.blocks if self.tower else []
        self.used = 0
        config = getattr(module, "config", None)
        self.width = getattr(config, "hidden_size", 0)
        self.heads = getattr(config, "num_attention_heads", 1)
        self.mlp = getattr(config, "intermediate_size", 0)
        if self.tower is not None:
            self.num_prefix_tokens = self.tower.prefix
            self.used = max(self._hidden(layer) for layer in self._layers(self.inner.config.vision_feature_layer))
        self.current: Current | None = None
        self.collector: Collector | None = None
        self.grids = Grids(self.inner)
        self.waiting: dict[str, list[Any]] = {}

    # ---- installation

    def install(self, session: Session) -> None:
        """See the base class. Without vision steps and methods after the encoder only segments and maps are written.

        Raises:
            UserError: a tower that cannot be shortened, a selection strategy that does not fit it.
        """
        plan = session.plan
        self.session = session
        self.waiting = {}
        session.on_exit(self._forget)
        if plan.vision_steps or plan.features is not None:
            self._check()
            assert self.tower is not None
            cls_row = 0 if self.tower.prefix else None
            if plan.features is not None:
                self.collector = Collector(session, self.blocks, self.used - 1, block_parts, self.tower.prefix, cls_row)
        if self.tower is not None:
            self.tower.install(session)
            session.hook(self.tower.module.register_forward_hook(self._tower_done))
            projector = self.inner.multi_modal_projector
            session.hook(projector.register_forward_pre_hook(self._before_projector))
            session.hook(projector.register_forward_hook(self._after_projector))
        for kind in ("image", "video"):
            if hasattr(self.inner, f"get_{kind}_features"):
                session.replace(self.inner, f"get_{kind}_features", self._wrapped(kind))
        self._pack_small(session)

    def _check(self) -> None:
        if self.tower is None:
            kind = getattr(self.inner.vision_tower.config, "model_type", type(self.inner.vision_tower).__name__)
            raise UserError(
                f"the vision tower {kind!r} of {self.name} cannot be shortened (CLIP and SigLIP can); use a method "
                "that works in the language model, such as lightvlm"
            )
        if self.tower.prefix == 0 and self.inner.config.vision_feature_select_strategy == "default":
            raise UserError(
                f"vision_feature_select_strategy='default' cuts the first patch of an encoder without class token; "
                f"set {type(self.model).__name__}.config.vision_feature_select_strategy to 'full'"
            )

    def _forget(self) -> None:
        self.current = self.collector = None
        self.waiting = {}

    def _wrapped(self, kind: str) -> Callable[..., Any]:
        """get_image_features or get_video_features with our state around it."""
        original = getattr(self.inner, f"get_{kind}_features")
        signature = inspect.signature(original)

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs).arguments
            self.current = self._begin(kind, given)
            try:
                out = original(*args, **kwargs)
                self._finish(self.current)
            finally:
                self.current = None
            return out

        return run

    def _begin(self, kind: str, given: dict[str, Any]) -> Current:
        strategy = given.get("vision_feature_select_strategy") or self.inner.config.vision_feature_select_strategy
        prefix = self.tower.prefix if self.tower is not None else 0
        current = Current(kind, prefix if strategy == "full" else 0, None)
        self._describe(current, given, strategy)
        if self.tower is not None:
            self.tower.first_span = 0 if kind == "image" else _FRAMES
            self.tower.follow = self._fills(current)
        return current

    def _describe(self, current: Current, given: dict[str, Any], strategy: str) -> None:
        """Write down what the tiles of the call belong to."""

    def _pack_small(self, session: Session) -> None:
        """Replace the packing of grids by that of smaller ones, where the layout asks for it and there are grids."""

    def _small_wanted(self) -> bool:
        return False

    def _fills(self, current: Current) -> bool:
        """Whether empty cells are filled: where they get pooled, and where the user asks for a dense grid."""
        if self._small_wanted():
            return False
        if self.session.plan.options.get("layout") == "scatter":
            return True
        side = self._side()
        return any(self.grids.packing(picture, side).pooled for picture in set(current.pictures or []))

    def _side(self) -> tuple[int, int]:
        """(height, width) of a tile in patches, as the model's packing code has it."""
        vision = self.inner.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        return side, side

    # ---- tower

    def _tower_done(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Write the record; bring the hidden states of several layers to the rows that are left."""
        assert self.tower is not None
        call = self.tower.running()
        self.session.vision.append(call.record())
        states = getattr(output, "hidden_states", None)
        if not call.trail or states is None:
            return None
        prefix, left = self.tower.prefix, call.state.cells
        output.hidden_states = tuple(
            state if state is None or state.shape[1] == prefix + left else _gathered(state, call, number, prefix)
            for number, state in enumerate(states)
        )
        return output

    def _layers(self, layers: int | list[int] | tuple[int, ...]) -> list[int]:
        return [layers] if isinstance(layers, int) else list(layers)

    def _hidden(self, layer: int) -> int:
        """Blocks that hidden state ``layer`` has gone through."""
        return layer if layer >= 0 else len(self.blocks) + 1 + layer

    # ---- projector

    def _before_projector(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        current = self.current
        if current is None or self.tower is None or self.tower.call is None:
            return None
        current.left = Survivors.of(self.tower.running())
        if self.collector is None or self.collector.method.after_projector:
            return None
        chosen = self._select(current, args[0])
        return None if chosen is None else (chosen, *args[1:])

    def _after_projector(self, _module: nn.Module, _args: Any, out: Tensor) -> Any:
        current = self.current
        if current is None or current.left is None:
            return None
        if self.collector is not None and self.collector.method.after_projector:
            chosen = self._select(current, out)
            out = out if chosen is None else chosen
        call = self._call()
        if current.left.even and current.left.counts[0] == call.patches:
            return None
        if self._small_wanted():
            self.grids.square(current.left)  # refused here, with a message, where it is none
            current.small = True
            return out
        return self._scattered(current, call, out)

    def _select(self, current: Current, x: Tensor) -> Tensor | None:
        """Rows that a method after the encoder leaves; (S, front + m, D), or all in one (1, rows, D); None: all."""
        assert self.collector is not None
        assert current.left is not None
        front = current.front
        trace = self.session.trace or self._fills(current)
        patches = x[:, front:]
        reduced = self.collector.select(self._call(), patches, self._groups(current), trace)
        if all(one.kept.shape[1] == patches.shape[1] for one in reduced):
            return None
        current.left = current.left.then(reduced, trace)
        return _joined(x[:, :front], reduced, current.left.even)

    def _groups(self, current: Current) -> list[tuple[int, list[int], tuple[int, int]]] | None:
        """Rows of each picture for methods that share a budget over tiles."""
        if current.pictures is None or current.kind == "video":
            return None
        groups, row = [], 0
        for picture in current.pictures:
            groups.append((row, list(range(row + 1, row + picture.tiles)), picture.shape))
            row += picture.tiles
        return groups

    def _scattered(self, current: Current, call: BatchedCall, out: Tensor) -> Tensor:
        """Projected survivors back at full size: (S, front + N, D)."""
        left, front, n = current.left, current.front, call.patches
        assert left is not None
        images, dim = call.state.images, out.shape[-1]
        if left.even and isinstance(left.index, torch.Tensor):
            out = out.reshape(images, -1, dim)
            if self._fills(current):
                patches = fill(out[:, front:], left.index, left.owner, call.state.grid)
            else:
                index = left.index[..., None].expand(-1, -1, dim)
                patches = out.new_zeros(images, n, dim).scatter(1, index, out[:, front:])
            return torch.cat((out[:, :front], patches), 1) if front else patches
        rows = out.reshape(-1, dim).split([front + count for count in left.counts])
        made = out.new_zeros(images, front + n, dim)
        for number, (part, index) in enumerate(zip(rows, left.index, strict=True)):
            made[number, :front] = part[:front]
            if self._fills(current) and left.counts[number]:
                owner = None if left.owner is None else left.owner[number : number + 1]
                made[number, front:] = fill(part[None, front:], index[None], owner, call.state.grid)[0]
            else:
                made[number, front + index] = part[front:]
        return made

    # ---- what the decoder is told

    def _finish(self, current: Current) -> None:
        """Rows, segments and maps of the call, for the prefill that follows."""
        session, kind = self.session, current.kind
        if not session.image_rows and not session.segments:
            self.waiting = {}
        if self.tower is None or current.left is None:
            return
        call = self._call()
        session.vision[-1].left = list(current.left.counts)
        session.segments[kind] = self.grids.segments(current, call)
        whole = current.left.even and current.left.counts[0] == call.patches
        if whole:
            session.image_rows.pop(kind, None)
        if whole and not session.trace:
            return
        rows = self.grids.rows(current, call)
        if not whole:
            session.image_rows[kind] = rows
        if session.trace:
            self.waiting[kind] = self.grids.maps(current, call, self.used - 1, rows)
            session.pending = [one for name in ("image", "video") for one in self.waiting.get(name, [])]

    def _call(self) -> BatchedCall:
        assert self.tower is not None
        return self.tower.running()


def _gathered(state: Tensor, call: BatchedCall, block: int, prefix: int) -> Tensor:
    """Rows (S, prefix + n, D) that enter block ``block``, of those that are left at the end."""
    index = call.rows_now(block)[..., None].expand(-1, -1, state.shape[2])
    return torch.cat((state[:, :prefix], state[:, prefix:].gather(1, index)), 1)


def _joined(front: Tensor, reduced: list[Reduced], even: bool) -> Tensor:
    """Front rows and survivors of each image: (S, front + m, D), or all in one (1, rows, D) where counts differ."""
    if even:
        return torch.cat((front, torch.cat([one.x for one in reduced])), 1)
    return torch.cat([torch.cat((front[i : i + 1], one.x), 1) for i, one in enumerate(reduced)], 1)


class LlavaNextEncoder(LlavaEncoder):
    """LLaVA-NeXT: a base tile and tiles at any resolution, unpadded, with a newline behind each line of cells."""

    name = "LLaVA-NeXT"

    def _describe(self, current: Current, given: dict[str, Any], strategy: str) -> None:
        options = (("vision_feature_select_strategy", strategy),)
        current.pictures = [Picture("tiles", self.grids.shape_of(size), size, options) for size in _sizes(given)]

    def _small_wanted(self) -> bool:
        return self.session.plan.options.get("layout") == "pseudo_grid"

    def _pack_small(self, session: Session) -> None:
        if not self._small_wanted():
            return
        original = self.inner.pack_image_features

        @functools.wraps(original)
        def pack(image_features: Any, *args: Any, image_newline: Any = None, **kwargs: Any) -> Any:
            current = self.current
            if current is None or not current.small or current.left is None:
                return original(image_features, *args, image_newline=image_newline, **kwargs)
            side, grid = self.grids.square(current.left), self._side()
            made = [
                self.grids.placed(picture, side, grid, self.grids.pack(picture, side, features, image_newline))
                for picture, features in zip(current.pictures or [], image_features, strict=True)
            ]
            return made, torch.tensor([len(one) for one in made], device=made[0].device)

        session.replace(self.inner, "pack_image_features", pack)


class LlavaOnevisionEncoder(LlavaNextEncoder):
    """LLaVA-OneVision: as NeXT, with pooling where there are many cells; several images as one tile each; video."""

    name = "LLaVA-OneVision"

    def _describe(self, current: Current, given: dict[str, Any], strategy: str) -> None:
        if current.kind == "video":
            # transformers 5.3 calls the argument pixel_values
            pixels = given["pixel_values_videos"] if "pixel_values_videos" in given else given["pixel_values"]
            videos, frames = pixels.shape[:2]
            current.frames = int(frames)
            current.pictures = [Picture("frame")] * (int(videos) * int(frames))
            return
        aspect = given.get("vision_aspect_ratio") or self.inner.config.vision_aspect_ratio
        options = (("vision_aspect_ratio", aspect),)
        sizes = _sizes(given)
        numbers = given.get("batch_num_images")
        alone = [True] * len(sizes) if numbers is None else [n == 1 for n in _ints(numbers) for _ in range(n)]
        current.pictures = [
            Picture("tiles", self.grids.shape_of(size) if tiled else (0, 0), size, options)
            for size, tiled in zip(sizes, alone, strict=False)
        ]

    def _pack_small(self, session: Session) -> None:
        super()._pack_small(session)
        if not self._small_wanted():
            return
        original = self.inner.apply_pooling

        @functools.wraps(original)
        def pool(image_features: Tensor) -> Tensor:
            current = self.current
            if current is None or not current.small or current.left is None:
                pooled: Tensor = original(image_features)
                return pooled
            side = self.grids.square(current.left)
            return self.grids.placed(Picture("frame"), side, self._side(), self.grids.pool(image_features, side))

        session.replace(self.inner, "apply_pooling", pool)


def _sizes(given: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each picture; the model's own code reads them back from the device as well."""
    sizes = given["image_sizes"]
    rows = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    return [(int(height), int(width)) for height, width in rows]


def _ints(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
