"""One pre-norm transformer over named weights: what every tower of this package is, wherever its weights come from.

The adapters read a library's weights into this one layout instead of calling the library's own blocks, whose order of
axes, attention class and return types change between releases (DCP 3.8). That the loop equals the library's
``encode_image`` and ``encode_text`` is tested for each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn
from torch.nn import functional

from missing_modal.backbones.base import Tower, TowerSpec

__all__ = ["ACTIVATIONS", "BLOCK", "ClassTower", "TransformerTower"]

ACTIVATIONS = ("gelu", "quick_gelu")
BLOCK = tuple(
    f"{part}.{kind}"
    for part in ("norm_1", "attention_in", "attention_out", "norm_2", "mlp_in", "mlp_out")
    for kind in ("weight", "bias")
)
"""Weights of one block: the input projection holds queries, keys and values, (3d, d)."""

_OUT = "out."


class TransformerTower(Tower):
    """Blocks x + Attention(LN(x)), x + MLP(LN(x)); a subclass embeds its inputs and says which row is read.

    Args:
        name: modality.
        weights: by name: ``block.I.NAME`` for each name of ``BLOCK``, ``out.norm.weight``, ``out.norm.bias``,
            ``out.projection`` (d, e; may lack: e = d), and what the subclass's ``embed`` reads. Not copied.
        heads: H, a divisor of d.
        identity: ``kind:name``.
        activation: ``gelu`` (exact) or ``quick_gelu`` (OpenAI's weights).
        eps: of all layer norms.
        causal: whether row i sees rows <= i only.
        train_projection: see ``TowerSpec``.

    Raises:
        UserError: heads that do not divide the width, an unknown activation, a missing weight.
    """

    kind = ""
    """name of the class in files"""

    def __init__(
        self,
        name: str,
        weights: Mapping[str, Tensor],
        *,
        heads: int,
        identity: str,
        activation: str = "gelu",
        eps: float = 1e-5,
        causal: bool = False,
        train_projection: bool = False,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise UserError(f"{identity}: activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self._weights: Mapping[str, Tensor] = {key: value.detach() for key, value in weights.items()}
        self.identity, self.causal = identity, causal
        self._activation, self._moves = activation, True
        norm = self._need(f"{_OUT}norm.weight")
        depth = sum(key.startswith("block.") and key.endswith(".norm_1.weight") for key in self._weights)
        for index in range(depth):
            for part in BLOCK:
                self._need(f"block.{index}.{part}")
        projection = self._weights.get(f"{_OUT}projection")
        width = len(norm)
        if width % heads:
            raise UserError(f"{identity}: {heads} heads do not divide the width {width}; choose a divisor")
        self.spec = TowerSpec(
            name=name,
            width=width,
            depth=depth,
            features=width if projection is None else projection.shape[1],
            heads=heads,
            norm_weight=norm,
            norm_bias=self._need(f"{_OUT}norm.bias"),
            norm_eps=eps,
            projection=projection,
            train_projection=train_projection,
        )

    def _need(self, name: str) -> Tensor:
        if name not in self._weights:
            raise UserError(f"{self.identity}: the weights lack {name}; give the file that belongs to this model")
        return self._weights[name]

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor besides the weights, for files."""
        spec = self.spec
        return {
            "name": spec.name,
            "heads": spec.heads,
            "identity": self.identity,
            "activation": self._activation,
            "eps": spec.norm_eps,
            "train_projection": spec.train_projection,
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' weights."""
        return self._weights["block.0.mlp_in.weight"].dtype

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.spec.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def block(self, index: int, h: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """One block on (b, R, d); see ``Tower.block``."""
        here = f"block.{index}"
        h = h + self._attention(here, self._norm(h, f"{here}.norm_1"), mask, extra)
        inner = self._linear(self._norm(h, f"{here}.norm_2"), f"{here}.mlp_in")
        quick = self._activation == "quick_gelu"
        inner = inner * torch.sigmoid(1.702 * inner) if quick else functional.gelu(inner)
        return h + self._linear(inner, f"{here}.mlp_out")

    def _attention(self, here: str, x: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = self._linear(x, f"{here}.attention_in").chunk(3, dim=-1)
        if extra is not None:
            key = torch.cat([key, extra[0].to(key.dtype)], dim=1)
            value = torch.cat([value, extra[1].to(value.dtype)], dim=1)
            mask = None if mask is None else functional.pad(mask, (0, extra[0].shape[1]))  # seen by every row
        query, key, value = (part.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mask = None if mask is None else mask.to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self._linear(mixed.transpose(1, 2).flatten(2), f"{here}.attention_out")

    def state(self) -> Mapping[str, Tensor]:
        """All weights by name, the last norm and projection among them."""
        return dict(self._weights)

    def tuned(self) -> tuple[Tower, nn.Module]:
        """A copy that reads its weights from a module of parameters; see ``Tower.tuned``."""
        module = _Weights({key: value for key, value in self._weights.items() if not key.startswith(_OUT)})
        twin = copy.copy(self)
        twin._weights, twin._moves = _View(module), False
        return twin, module

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tower:
        """Move the weights (in place). The last norm and projection, which methods copy, stay in float32 at least."""
        if not self._moves:
            return self
        moved = {}
        for key, value in self._weights.items():
            kind = dtype if dtype is None or not key.startswith(_OUT) else torch.promote_types(dtype, torch.float32)
            moved[key] = value.to(device, kind)
        self._weights = moved
        self._respec()
        return self

    def replaced(self, weights: Mapping[str, Tensor]) -> TransformerTower:
        """A copy with other weights of the same names and shapes (pre-training)."""
        if {key: value.shape for key, value in weights.items()} != {key: v.shape for key, v in self._weights.items()}:
            raise ValueError("other names or shapes than this tower's weights")
        twin = copy.copy(self)
        twin._weights, twin._moves = {key: value.detach() for key, value in weights.items()}, True
        twin._respec()
        return twin

    def _respec(self) -> None:
        held = self._weights
        self.spec = replace(
            self.spec,
            norm_weight=held[f"{_OUT}norm.weight"],
            norm_bias=held[f"{_OUT}norm.bias"],
            projection=held.get(f"{_OUT}projection"),
        )


class ClassTower(TransformerTower):
    """A tower that puts a class row in front of its tokens and reads it at the end.

    Further weights: ``class_embedding`` (d,), ``position`` (1 + S, d; may lack), ``norm_pre`` (may lack).
    """

    def _tokens(self, tokens: Tensor) -> Tensor:
        """(b, S, d) -> (b, 1 + S, d): class row, positions, first norm."""
        first = self._weights["class_embedding"].to(tokens.dtype).expand(len(tokens), 1, -1)
        rows = torch.cat([first, tokens], dim=1)
        if "position" in self._weights:
            position = self._weights["position"]
            if len(position) < rows.shape[1]:
                raise UserError(
                    f"{self.identity} {self.spec.name}: {rows.shape[1] - 1} tokens; it has positions for "
                    f"{len(position) - 1}; give smaller inputs"
                )
            rows = rows + position[: rows.shape[1]].to(rows.dtype)
        return self._norm(rows, "norm_pre") if "norm_pre.weight" in self._weights else rows

    def pool_rows(self, x: Tensor) -> Tensor:
        """The class row, 0, for each of the b inputs."""
        return torch.zeros(len(x), dtype=torch.long, device=x.device)


class _Weights(nn.Module):
    """Weights as parameters; a parameter's name holds no dot."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(weights)
        for key, value in weights.items():
            self.register_parameter(_flat(key), nn.Parameter(value.detach().clone()))


class _View(Mapping[str, Tensor]):
    """Weights of a module under their own names, looked up at each access."""

    def __init__(self, module: _Weights) -> None:
        self._module = module

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return self._module.get_parameter(_flat(key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _flat(key) in self._module._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._module.names)

    def __len__(self) -> int:
        return len(self._module.names)


def _flat(key: str) -> str:
    return key.replace(".", "__")
