"""timm's plain vision transformers: ``VisionTransformer`` (distilled and with registers too), ``Eva``, a ``TimmModel``.

Source: iLLaVA 7.1; read against timm 1.0.31. Queries and keys are taken from the outputs of an attention's ``q_norm``
and ``k_norm`` (identities where there is no norm), so fused attention stays on and nothing is projected twice. Key
biases (ToMe) go in as ``attn_mask``, which timm's blocks take from 1.0.20 on.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import nn

from vlm_accel.encoders.plain import Call, Parts, PlainEncoder, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from vlm_accel.session import Session

__all__ = ["TimmEncoder"]

#: blocks that are cut between attention and MLP, and those after which tokens are merged
_SEQUENTIAL = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm")
_PARALLEL = ("ParallelScalingBlock",)
_ATTENTION = ("Attention", "AttentionRope", "EvaAttention")


class TimmEncoder(PlainEncoder):
    """Adapter of a timm vision transformer, alone or as the trunk of open_clip's ``TimmModel``.

    Raises:
        UserError: windows, relative position biases, blocks or attention of another kind; a timm that is too old.
    """

    def __init__(self, model: nn.Module) -> None:
        trunk: Any = getattr(model, "trunk", model)
        self.trunk = trunk
        self.name = f"timm {type(trunk).__name__}"
        self._check(trunk)
        self.blocks = list(trunk.blocks)
        self.used = len(self.blocks)
        self.width = int(trunk.embed_dim)
        self.num_prefix_tokens = int(trunk.num_prefix_tokens)
        self.has_cls = getattr(trunk, "cls_token", None) is not None
        block: Any = self.blocks[0]
        attention = getattr(block, "attn", block)
        self.heads = int(attention.num_heads)
        self.mlp, self.gated = _mlp_size(block)

    def _check(self, trunk: nn.Module) -> None:
        blocks = getattr(trunk, "blocks", None)
        kinds = {type(block).__name__ for block in blocks} if blocks is not None else set()
        if not kinds or not hasattr(trunk, "num_prefix_tokens") or not kinds <= {*_SEQUENTIAL, *_PARALLEL}:
            raise UserError(
                f"{self.name} cannot be accelerated: its blocks ({', '.join(sorted(kinds)) or 'none found'}) use "
                "windows, relative position biases, or several attentions, which need the full grid; use a plain "
                "VisionTransformer or Eva"
            )
        if getattr(trunk, "shared_rel_pos_bias", None) is not None or getattr(trunk, "rel_pos_bias", None) is not None:
            raise UserError(f"{self.name} cannot be accelerated: its relative position bias needs the full grid")
        for block in blocks or ():
            attention = getattr(block, "attn", None)
            known = attention is None or type(attention).__name__ in _ATTENTION
            if not known or not hasattr(attention or block, "q_norm"):
                raise UserError(
                    f"{self.name} cannot be accelerated: {type(attention).__name__} is not one of "
                    f"{', '.join(_ATTENTION)} of timm 1.0.16 or later"
                )

    def grid_module(self) -> nn.Module:
        """The convolution that makes patches."""
        module: nn.Module = self.trunk.patch_embed.proj
        return module

    def parts(self, layer: int, session: Session) -> Parts:
        """A block cut between its branches, or, where they are parallel, left whole."""
        block: Any = self.blocks[layer]
        attention = getattr(block, "attn", block)
        seen: dict[str, Tensor] = {}
        for name in ("q_norm", "k_norm"):
            session.hook(getattr(attention, name).register_forward_hook(_keep(seen, name)))
        original = block.forward

        def queries_keys(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return _rotated(attention, seen.pop("q_norm"), seen.pop("k_norm"), kwargs.get("rope"))

        if type(block).__name__ in _PARALLEL:
            # norms come before the heads are moved in front there
            def swapped(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
                q, k = queries_keys(kwargs)
                return q.transpose(1, 2), k.transpose(1, 2)

            return Parts(lambda x, kwargs: original(x, **kwargs), None, swapped, float(attention.scale), seen.clear)
        attend, feed = _cut(block)
        return Parts(attend, feed, queries_keys, float(attention.scale), seen.clear)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block by name; a caller's mask is refused."""
        kwargs = super().named(args, kwargs)
        call = self.call
        assert call is not None
        masked = kwargs.get("is_causal") or (kwargs.get("attn_mask") is not None and call.state.key_bias is None)
        if masked:
            raise UserError(f"{self.name}: attention masks cannot be combined with fewer tokens; leave them out")
        return kwargs

    def adjust(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Gather rotary rows at the survivors' patches, add log sizes as a mask."""
        kwargs = dict(kwargs)
        if kwargs.get("rope") is not None:
            kwargs["rope"] = _gather_rotary(call, kwargs["rope"])
        bias = call.bias(args[0].dtype)
        if bias is not None:
            if "attn_mask" not in inspect.signature(type(self.blocks[-1]).forward).parameters:
                raise UserError(f"{self.name}: this method needs blocks that take attn_mask; use timm 1.0.20 or later")
            kwargs["attn_mask"] = bias
        return args, kwargs

    def finish(self, session: Session) -> None:
        """Weighted average pooling, dense grids."""
        trunk: Any = self.trunk
        options = session.plan.options
        if options.get("layout") == "scatter":
            session.hook(trunk.norm.register_forward_hook(lambda _m, _i, out: self.dense(out)))
        elif options.get("size_weighted_pool"):
            session.replace(trunk, "pool", self._weighted_pool(trunk.pool))
        session.replace(trunk, "forward_intermediates", self._dense_intermediates(trunk.forward_intermediates))

    def _weighted_pool(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        trunk: Any = self.trunk

        def pool(x: Tensor, pool_type: str | None = None) -> Tensor:
            kind = trunk.global_pool if pool_type is None else pool_type
            call = self.call
            if kind != "avg" or trunk.attn_pool is not None or call is None or call.state.sizes is None:
                return original(x, pool_type)
            sizes, prefix = call.state.sizes, self.num_prefix_tokens
            if not getattr(trunk, "pool_include_prefix", False):
                return weighted_mean(x[:, prefix:], sizes)
            return weighted_mean(x, nn.functional.pad(sizes, (prefix, 0), value=1.0))

        return pool

    def _dense_intermediates(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_intermediates`` with every tapped block's tokens on the full grid."""

        def forward_intermediates(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(x, *args, **kwargs)
            given.apply_defaults()
            options = given.arguments
            to_map, options["output_fmt"] = options["output_fmt"] == "NCHW", "NLC"
            result = original(*given.args, **given.kwargs)
            if isinstance(result, dict):
                result["image_intermediates"] = self.maps_of(result["image_intermediates"], to_map)
                return result
            if options["intermediates_only"]:
                return self._expand(result, to_map)
            return result[0], self._expand(result[1], to_map)

        return forward_intermediates

    def _expand(self, intermediates: Sequence[Any], to_map: bool) -> list[Any]:
        """Dense intermediates; pairs (patches, prefix) stay pairs."""
        if intermediates and isinstance(intermediates[0], tuple):
            patches = self.maps_of([pair[0] for pair in intermediates], to_map)
            return [(dense, pair[1]) for dense, pair in zip(patches, intermediates, strict=True)]
        return self.maps_of(intermediates, to_map)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook that keeps a module's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[name] = output

    return hook


def _cut(block: Any) -> tuple[Callable[[Tensor, dict[str, Any]], Tensor], Callable[[Tensor], Tensor]]:
    """The two residual branches of a block of a known kind."""
    if type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm"):
        return (
            lambda x, kwargs: x + block.drop_path1(block.norm1(block.attn(x, **kwargs))),
            lambda u: u + block.drop_path2(block.norm2(block.mlp(u))),
        )
    if type(block).__name__ == "EvaBlock":
        return (
            lambda x, kwargs: x + block.drop_path1(_scaled(block.gamma_1, block.attn(block.norm1(x), **kwargs))),
            lambda u: u + block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(u)))),
        )
    return (
        lambda x, kwargs: x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs))),
        lambda u: u + block.drop_path2(block.ls2(block.mlp(block.norm2(u)))),
    )


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _rotated(attention: Any, q: Tensor, k: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys (S, H, n, d) as the attention uses them: rotated behind the prefix, key heads repeated."""
    if rope is not None:
        from timm.layers import apply_rot_embed_cat

        prefix = attention.num_prefix_tokens
        # older releases have one layout and no argument for it
        options = {"half": True} if getattr(attention, "rotate_half", False) else {}
        q, k = (
            torch.cat((t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, **options)), 2).to(t.dtype)
            for t in (q, k)
        )
    groups = getattr(attention, "num_kv_groups", 1)
    return q, k.repeat_interleave(groups, 1) if groups > 1 else k


def _gather_rotary(call: Call, rope: Tensor) -> Tensor:
    """Rotary rows of the survivors: (N, d) -> (S, 1, m, d); (H, N, d) -> (S, H, m, d)."""
    index = call.state.index
    if call.rotary is not None and call.rotary[0] is rope and call.rotary[1] is index:
        return call.rotary[2]
    rows = rope.movedim(-2, 0)[index.clamp(min=0)]
    gathered = rows[:, None] if rope.ndim == 2 else rows.movedim(1, 2)
    call.rotary = (rope, index, gathered)
    return gathered


def _mlp_size(block: Any) -> tuple[int, bool]:
    """(hidden width, whether gated) of a block's MLP, for the cost model."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return int(block.in_split[0]), False
    if hasattr(mlp, "fc1_g"):
        return int(mlp.fc1_g.out_features), True
    packed = type(mlp).__name__ in ("GluMlp", "SwiGLUPacked")
    return int(mlp.fc1.out_features) // (2 if packed else 1), packed
