"""CLIP and SigLIP of transformers: alone, and as the vision tower of LLaVA (iLLaVA 3.5, 7.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError

from vlm_accel.encoders.base import EncoderAdapter
from vlm_accel.encoders.layout import fill
from vlm_accel.encoders.records import maps_of
from vlm_accel.encoders.surgery import BatchedCall, Parts, check_grad, install_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_accel.session import Session

__all__ = ["ClipEncoder", "SiglipEncoder", "Tower"]


def block_parts(block: Any) -> Parts:
    """Parts of a CLIP or SigLIP block."""

    def attend(rows: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        update: Tensor = block.self_attn(hidden_states=rows, attention_mask=attention_mask, **kwargs)[0]
        return update

    return Parts(block.layer_norm1, block.self_attn, attend, block.layer_norm2, block.mlp)


class Tower:
    """A CLIP or SigLIP vision transformer inside of some model: where its blocks are, and its running call.

    Args:
        module: the vision model, with or without projection; older transformers wrap it once more.

    Attributes:
        prefix: 1 where there is a class token, 0 otherwise.
    """

    def __init__(self, module: Any) -> None:
        while hasattr(module, "vision_model"):
            module = module.vision_model
        self.module = module
        self.config = module.config
        self.blocks: list[nn.Module] = list(module.encoder.layers)
        self.prefix = int(hasattr(module.embeddings, "class_embedding"))
        self.call: BatchedCall | None = None
        self.first_span = 0
        #: follow which token every patch merged into (dense layouts need it)
        self.follow = False

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether ``module`` is a tower of this kind."""
        while hasattr(module, "vision_model"):
            module = module.vision_model
        return hasattr(module, "encoder") and hasattr(getattr(module, "embeddings", None), "patch_embedding")

    def running(self) -> BatchedCall:
        """The call that is running."""
        assert self.call is not None, "a block ran outside of the encoder's forward"
        return self.call

    def install(self, session: Session) -> None:
        """Start a call at each forward; give the blocks with a step their forward."""

        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            check_grad(session)
            pixels: Tensor = args[0] if args else kwargs["pixel_values"]
            side = int(self.config.patch_size)
            grid = (pixels.shape[-2] // side, pixels.shape[-1] // side)
            images = int(pixels.shape[0])
            self.call = BatchedCall(
                session, len(self.blocks), images, grid, self.prefix, pixels.device, self.first_span
            )
            self.call.state.wants_assign = self.follow

        session.hook(self.module.register_forward_pre_hook(begin, with_kwargs=True))
        session.on_exit(setattr, self, "call", None)
        cls_row = 0 if self.prefix else None
        install_steps(session, self.blocks, block_parts, self.running, self.prefix, cls_row)


class ClipEncoder(EncoderAdapter):
    """CLIP alone: ``CLIPVisionModel`` (with projection or not), ``CLIPModel``, ``CLIPForImageClassification``.

    The pooled output is the class token's. ``last_hidden_state`` has the survivors only, unless ``layout="scatter"``
    asks for the full grid: then each survivor lies in its own cell, and a missing cell has the token its patch merged
    into, else the nearest survivor (iLLaVA 3.6).
    """

    name = "CLIP"

    def __init__(self, model: Any) -> None:
        self.tower = Tower(model)
        config = self.tower.config
        self.model = model
        self.blocks = self.tower.blocks
        self.used = len(self.blocks)
        self.width = config.hidden_size
        self.heads = config.num_attention_heads
        self.mlp = config.intermediate_size
        self.num_prefix_tokens = self.tower.prefix

    def install(self, session: Session) -> None:
        """See the base class.

        Raises:
            UserError: a method that works between an encoder and a language model.
        """
        if session.plan.features is not None:
            name = type(session.plan.features).__name__
            raise UserError(
                f"{name} works between an encoder and a language model, and {self.name} alone has none; name a method "
                "that works inside the encoder, such as recycle, rank1, tome"
            )
        scatter = session.plan.options.get("layout") == "scatter"
        self.tower.follow = scatter
        self.tower.install(session)

        def end(_module: nn.Module, _args: Any, output: Any) -> Any:
            call = self.tower.running()
            session.vision.append(call.record())
            if session.trace:
                session.maps += maps_of(call)
            if not call.trail:
                return None
            return self._finish(session, call, output, scatter)

        session.hook(self.tower.module.register_forward_hook(end))

    def _finish(self, session: Session, call: BatchedCall, output: Any, scatter: bool) -> Any:
        """Dense grid or weighted rows where they are asked for; the pooled output has been made by then."""
        rows = output[0]
        prefix = call.state.prefix
        patches = rows[:, prefix:]
        if self._pools_mean() and session.plan.options.get("size_weighted_pool"):
            sizes = call.state.sizes
            assert sizes is not None
            weights = (sizes * (sizes.shape[1] / sizes.sum(1, keepdim=True))).to(rows.dtype)
            patches = patches * weights[..., None]
        elif scatter:
            patches = fill(patches, call.state.index, call.owner, call.state.grid)
        else:
            return None
        rows = torch.cat((rows[:, :prefix], patches), 1) if prefix else patches
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output.last_hidden_state = rows
        return output

    def _pools_mean(self) -> bool:
        """Whether the model takes the plain mean of the patches; rows are then weighted so that it is the right one."""
        return type(self.model).__name__.endswith("ForImageClassification")


class SiglipEncoder(ClipEncoder):
    """SigLIP alone: as CLIP, without class token; the attention pooling of its head runs over the survivors."""

    name = "SigLIP"
