"""DINOv2 of transformers, with and without registers: model, classifier, backbone.

Source: iLLaVA 7.1; read against transformers 5.23 and 5.3, whose attentions are nested differently. Queries, keys and
key biases go through ``vlm_accel.encoders.scores.watch``: the model's own kernel runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from torch.nn import functional as F

from vlm_accel.encoders.plain import Call, Parts, PlainEncoder
from vlm_accel.encoders.scores import Watch, watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.session import Session

__all__ = ["Dinov2Encoder"]


class Dinov2Encoder(PlainEncoder):
    """Adapter of ``Dinov2Model``, ``Dinov2ForImageClassification``, ``Dinov2Backbone`` and those with registers.

    Raises:
        UserError: a backbone whose feature maps skip the final norm: nowhere can its grid be made dense.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        base: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
        self.base = base
        config = base.config
        self.name = type(model).__name__
        self.backbone = hasattr(model, "out_features")
        if self.backbone and config.reshape_hidden_states and not config.apply_layernorm:
            raise UserError(f"{self.name} cannot be accelerated with apply_layernorm=False; set it to True")
        self.blocks = list(base.encoder.layer)
        self.used = len(self.blocks)
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        mlp = self.blocks[0].mlp
        self.gated = bool(config.use_swiglu_ffn)
        self.mlp = int(_first_linear(mlp).out_features) // (2 if hasattr(mlp, "weights_in") else 1)
        self.num_prefix_tokens = 1 + int(getattr(config, "num_register_tokens", 0))

    def grid_module(self) -> nn.Module:
        """The convolution that makes patches."""
        module: nn.Module = self.base.embeddings.patch_embeddings.projection
        return module

    def parts(self, layer: int, session: Session) -> Parts:
        """A block cut between attention and MLP."""
        block: Any = self.blocks[layer]
        inner = _inner(block)
        wanted = Watch(raw=True, prefix=self.num_prefix_tokens)
        watch(session, inner, wanted)

        def attend(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
            out = block.attention(block.norm1(x), **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            added: Tensor = block.drop_path(block.layer_scale1(out)) + x
            return added

        def feed(u: Tensor) -> Tensor:
            added: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(u)))) + u
            return added

        def queries_keys(_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
            seen = wanted.take()[-1]
            assert seen.query is not None
            assert seen.key is not None
            return seen.query, seen.key

        return Parts(attend, feed, queries_keys, float(inner.scaling), wanted.take)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block by name; a caller's mask is refused."""
        kwargs = {**dict(zip(("attention_mask",), args, strict=False)), **kwargs}
        if kwargs.pop("attention_mask", None) is not None:
            raise UserError(f"{self.name}: attention_mask cannot be combined with fewer tokens; leave it out")
        return kwargs

    def adjust(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Nothing: there are no rotary rows, and key biases are added by the watch."""
        return args, kwargs

    def finish(self, session: Session) -> None:
        """Key biases of old releases, dense grids, weighted means."""
        options = session.plan.options
        if self.backbone or options.get("layout") == "scatter":
            session.hook(self.base.layernorm.register_forward_hook(lambda _m, _i, out: self.dense(out)))
        elif options.get("size_weighted_pool") and self.base is not self.model:
            session.hook(self.base.register_forward_hook(self._weigh))
        method = session.plan.vision
        if method is not None and method.biases_keys:
            for block in self.blocks[session.plan.vision_steps[0].layer + 1 :]:
                watch(session, _inner(block), Watch(prefix=self.num_prefix_tokens, key_bias=self._key_bias))

    def _key_bias(self) -> Tensor | None:
        return None if self.call is None else self.call.state.key_bias

    def _weigh(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Scale patch rows so that the classifier's plain mean over them counts each as the patches it stands for."""
        sizes = self.call.state.sizes if self.call is not None else None
        if sizes is not None:
            weights = sizes * (sizes.shape[1] / sizes.sum(1, keepdim=True))
            weights = F.pad(weights, (self.num_prefix_tokens, 0), value=1.0)
            output.last_hidden_state = output.last_hidden_state * weights[..., None].to(output.last_hidden_state.dtype)
        return output


def _inner(block: Any) -> Any:
    """The module with the projections: ``attention`` itself, or ``attention.attention`` in older transformers."""
    return getattr(block.attention, "attention", block.attention)


def _first_linear(mlp: Any) -> Any:
    names = ("fc1", "gate_proj", "weights_in")
    return next(getattr(mlp, name) for name in names if hasattr(mlp, name))
