"""open_clip's ``VisionTransformer``, alone (``clip.visual``) or inside ``CLIP`` and ``CustomTextCLIP``.

Source: iLLaVA 7.1; read against open_clip 3.3. Two kinds of block:

* ``CustomResidualAttentionBlock``: queries and keys are taken from the outputs of ``ln_q`` and ``ln_k``; the attention
  itself runs as it is.
* ``ResidualAttentionBlock`` holds ``nn.MultiheadAttention``, which shows neither queries nor keys and gives weights
  only as a whole map. At blocks with a step its attention is therefore done here, with the operations of its own slow
  path (one projection, fused attention, output projection): equal to the module's up to rounding, and no map is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from torch import nn
from torch.nn import functional as F

from vlm_accel.encoders.plain import Call, Parts, PlainEncoder, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vlm_accel.encoders.base import EncoderAdapter
    from vlm_accel.session import Session

__all__ = ["OpenClipEncoder"]


class OpenClipEncoder(PlainEncoder):
    """Adapter of ``open_clip.VisionTransformer`` and of the models that hold one as ``visual``.

    A ``visual`` of timm (``TimmModel``) is handed to the timm adapter.

    Raises:
        UserError: another kind of ``visual`` (ModifiedResNet), scaled cosine attention.
    """

    num_prefix_tokens = 1

    def __new__(cls, model: nn.Module) -> EncoderAdapter:  # type: ignore[misc]
        """The adapter of ``model``: timm's for a timm tower."""
        if type(getattr(model, "visual", model)).__name__ == "TimmModel":
            from vlm_accel.encoders.timm import TimmEncoder

            return TimmEncoder(model.visual)  # type: ignore[arg-type]
        return super().__new__(cls)

    def __init__(self, model: nn.Module) -> None:
        visual: Any = getattr(model, "visual", model)
        self.name = f"open_clip {type(visual).__name__}"
        transformer = getattr(visual, "transformer", None)
        if transformer is None or not hasattr(visual, "class_embedding"):
            raise UserError(f"{self.name} cannot be accelerated: it is no vision transformer with a class token")
        if not getattr(transformer, "batch_first", True):
            raise UserError(f"{self.name} cannot be accelerated: batch_first=False; build it with batch_first=True")
        self.visual = visual
        self.blocks = list(transformer.resblocks)
        self.used = len(self.blocks)
        block: Any = self.blocks[0]
        self.width = int(transformer.width)
        self.heads = int(block.attn.num_heads)
        self.mlp = int(block.mlp.c_fc.out_features)
        if any(getattr(block.attn, "scaled_cosine", False) for block in self.blocks):
            raise UserError(f"{self.name} cannot be accelerated: scaled cosine attention is not supported")

    def grid_module(self) -> nn.Module:
        """The convolution that makes patches."""
        module: nn.Module = self.visual.conv1
        return module

    def parts(self, layer: int, session: Session) -> Parts:
        """A block cut between attention and MLP."""
        block: Any = self.blocks[layer]
        seen: dict[str, Tensor] = {}
        if isinstance(block.attn, nn.MultiheadAttention):

            def attend(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
                out, seen["q"], seen["k"] = _attention(block.attn, block.ln_1(x), kwargs.get("attn_mask"))
                return x + block.ls_1(out)
        else:
            session.hook(block.attn.ln_q.register_forward_hook(lambda _m, _i, out: seen.update(q=out)))
            session.hook(block.attn.ln_k.register_forward_hook(lambda _m, _i, out: seen.update(k=out)))

            def attend(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
                out = block.attn(block.ln_1(x), attn_mask=kwargs.get("attn_mask"))
                return x + block.ls_1(block.ln_attn(out))

        return Parts(
            attend,
            lambda u: u + block.ls_2(block.mlp(block.ln_2(u))),
            lambda _kwargs: (seen.pop("q"), seen.pop("k")),
            float(block.attn.head_dim**-0.5),
            seen.clear,
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block by name (checkpointing gives them by position); a caller's mask is refused."""
        kwargs = {**dict(zip(("k_x", "v_x", "attn_mask"), args, strict=False)), **kwargs}
        call = self.call
        assert call is not None
        if kwargs.get("k_x") is not None or (kwargs.get("attn_mask") is not None and call.state.key_bias is None):
            raise UserError(f"{self.name}: attention masks cannot be combined with fewer tokens; leave them out")
        return kwargs

    def adjust(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Add log sizes as a mask."""
        bias = call.bias(args[0].dtype)
        if bias is not None:
            kwargs = {**kwargs, "attn_mask": bias}
        return args, kwargs

    def install(self, session: Session) -> None:
        """Hook the encoder; after the first step all attention is done here, so that key biases need no full mask."""
        super().install(session)
        steps = {step.layer for step in session.plan.vision_steps}
        for layer in range(min(steps) + 1, self.used):
            block = self.blocks[layer]
            if layer not in steps and isinstance(block.attn, nn.MultiheadAttention):
                session.replace(block, "attention", _biased(block))

    def finish(self, session: Session) -> None:
        """Weighted average pooling, dense grids."""
        visual, options = self.visual, session.plan.options
        if options.get("layout") == "scatter":
            session.hook(visual.transformer.register_forward_hook(lambda _m, _i, out: self.dense(out)))
        elif options.get("size_weighted_pool"):
            session.replace(visual, "_global_pool", self._weighted_pool(visual._global_pool))
        if hasattr(visual, "forward_intermediates"):
            session.replace(visual, "forward_intermediates", self._dense_intermediates(visual.forward_intermediates))

    def _weighted_pool(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def pool(x: Tensor) -> Any:
            call = self.call
            if self.visual.pool_type != "avg" or self.visual.attn_pool is not None or call is None:
                return original(x)
            sizes = call.state.sizes
            return original(x) if sizes is None else (weighted_mean(x[:, 1:], sizes), x[:, 1:])

        return pool

    def _dense_intermediates(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_intermediates`` with every tapped block's tokens on the full grid."""

        def forward_intermediates(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            names = ("indices", "stop_early", "normalize_intermediates", "intermediates_only", "output_fmt")
            options = {**dict(zip(names, args, strict=False)), **kwargs}
            to_map = options.pop("output_fmt", "NCHW") == "NCHW"
            result = original(x, output_fmt="NLC", **options)
            result["image_intermediates"] = self.maps_of(result["image_intermediates"], to_map)
            return result

        return forward_intermediates


def _attention(attn: nn.MultiheadAttention, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention with the weights of ``attn``: (output (S, n, D), q, k (S, H, n, d))."""
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attn.out_proj(out.transpose(1, 2).flatten(2)), q, k


def _biased(block: Any) -> Callable[..., Tensor]:
    """``block.attention`` that takes a key bias (S, 1, 1, n); the module's own where there is none."""
    original = block.attention

    def attention(q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is None or attn_mask.ndim != 4:
            result: Tensor = original(q_x=q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
            return result
        return _attention(block.attn, q_x, attn_mask)[0]

    return attention
