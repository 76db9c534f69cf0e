"""ViLT of transformers: one encoder over text and image rows, as two towers that share their blocks.

The image tower holds the blocks, the text tower only its embedding: ``FusedClassifier`` puts both token rows into one
sequence. Methods for two towers refuse them, since a tower of ViLT cannot run alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn
from torch.nn import functional

from missing_modal.backbones.base import Tower, TowerSpec
from missing_modal.backbones.transformer import TransformerTower

__all__ = ["BertTokens", "ViltImage", "ViltText", "load_vilt", "read_vilt"]

_BLOCK = {
    "norm_1": "layernorm_before",
    "attention_out": "attention.output.dense",
    "norm_2": "layernorm_after",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
_HALF = (0.5, 0.5, 0.5)


class ViltImage(TransformerTower):
    """Image rows and the shared blocks.

    Further weights: ``patch.weight`` (d, 3, p, p), ``patch.bias``, ``class_embedding`` (d,), ``position`` (1 + S, d),
    ``type`` (d,), ``pooler.weight`` (d, d), ``pooler.bias`` (d,).

    Args:
        size: (H, W) in pixels, multiples of the patch; another size than the positions were trained for resizes their
            table bilinearly, as ViLT does.
        options: of ``TransformerTower``.
    """

    kind = "vilt_image"

    def __init__(self, *args: Any, size: tuple[int, int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.size, self.mean, self.std = size, _HALF, _HALF

    def embed(self, x: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, 1 + patches, d). UserError for a size that is no multiple of the patch."""
        weight = self._weights["patch.weight"]
        if any(pixels % patch or not pixels for pixels, patch in zip(x.shape[2:], weight.shape[2:], strict=True)):
            raise UserError(
                f"{self.identity}: images of {tuple(x.shape[2:])}; ViLT takes multiples of {weight.shape[2]}"
            )
        patches = functional.conv2d(x.to(weight.dtype), weight, self._weights["patch.bias"], weight.shape[2:])
        position = self._weights["position"]
        side = round((len(position) - 1) ** 0.5)
        grid = position[1:].T.reshape(1, -1, side, side)
        if tuple(patches.shape[2:]) != (side, side):
            grid = functional.interpolate(grid, size=patches.shape[2:], mode="bilinear", align_corners=True)
        tokens = (patches + grid).flatten(2).transpose(1, 2)
        first = (self._weights["class_embedding"] + position[0]).expand(len(x), 1, -1)
        return torch.cat([first, tokens], dim=1) + self._weights["type"]

    def pool_rows(self, x: Tensor) -> Tensor:
        """ViLT reads the first row of the text; there is none here."""
        raise UserError(f"{self.identity}: ViLT is one encoder for both modalities; use --method mmp_vilt")

    def placeholder(self, count: int) -> Tensor:
        """Ones after normalisation (DCP 4.2)."""
        weight = self._weights["patch.weight"]
        return torch.ones(count, weight.shape[1], *self.size, dtype=weight.dtype, device=weight.device)

    def pooler(self) -> nn.Linear:
        """A copy of ViLT's pooler, which is trained (its tanh follows)."""
        weight = self._weights["pooler.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": self._weights["pooler.bias"].float()})
        return layer.to(torch.promote_types(weight.dtype, torch.float32))


class ViltText(Tower):
    """Text rows: BERT's embedding with ViLT's type added. It has no blocks of its own.

    Args:
        weights: ``token.weight`` (V, d), ``position`` (S, d), ``norm.weight``, ``norm.bias`` (d,), ``type`` (d,).
        spec: that of the image tower, under the name of the text.
        identity: ``kind:name``.
        length: positions; another number than there are resizes the table bilinearly, as MMP does.
        tokenizer: texts -> (n, length) ids with zeros behind the end.
        start: id of an empty text's start.
        end: id of its end.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        spec: TowerSpec,
        identity: str,
        length: int | None = None,
        tokenizer: BertTokens | None = None,
        start: int = 101,
        end: int = 102,
    ) -> None:
        self.spec, self.identity, self.tokenizer = spec, identity, tokenizer
        self.start, self.end = start, end
        self._weights = {key: value.detach() for key, value in weights.items()}
        position = self._weights["position"]
        if length is not None and length != len(position):
            size = (length, position.shape[1])
            # Centres of cells stay, not corners: the released code leaves the default, unlike ViLT where it resizes
            # the positions of images.
            grown = functional.interpolate(position[None, None], size=size, mode="bilinear", align_corners=False)
            self._weights["position"] = grown[0, 0]

    @property
    def context(self) -> int:
        """Positions there are."""
        return len(self._weights["position"])

    def embed(self, x: Tensor) -> Tensor:
        """(b, S) ids -> (b, S, d). UserError for more ids than there are positions."""
        if x.shape[1] > self.context:
            raise UserError(f"{self.identity}: {x.shape[1]} text tokens; it has {self.context} positions; cut the text")
        held = self._weights
        rows = functional.embedding(x, held["token.weight"]) + held["position"][: x.shape[1]]
        rows = functional.layer_norm(rows, rows.shape[-1:], held["norm.weight"], held["norm.bias"], self.spec.norm_eps)
        return rows + held["type"]

    def block(self, index: int, h: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The blocks belong to both modalities."""
        raise UserError(f"{self.identity}: ViLT is one encoder for both modalities; use --method mmp_vilt")

    def pool_rows(self, x: Tensor) -> Tensor:
        """The first row, 0, for each of the b texts."""
        return torch.zeros(len(x), dtype=torch.long, device=x.device)

    def length(self, x: Tensor) -> int | None:
        """Rows up to the end of the longest text; what lies behind is masked."""
        return int((x != 0).sum(-1).max())

    def placeholder(self, count: int) -> Tensor:
        """An empty text: start, end, zeros."""
        ids = torch.zeros(count, self.context, dtype=torch.long, device=self._weights["position"].device)
        ids[:, 0], ids[:, 1] = self.start, self.end
        return ids

    def state(self) -> Mapping[str, Tensor]:
        """Weights of the embedding."""
        return dict(self._weights)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tower:
        """Move the weights (in place)."""
        self._weights = {key: value.to(device, dtype) for key, value in self._weights.items()}
        return self


@dataclass(frozen=True)
class BertTokens:
    """Texts -> (n, length) ids of BERT, zeros behind the end; it can be pickled.

    Args:
        folder: with ``vocab.txt`` or ``tokenizer.json``.
        length: ids of a row.
    """

    folder: str
    length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, length) int64; longer texts are cut."""
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, found in enumerate(
            _bert(self.folder)(list(texts), truncation=True, max_length=self.length)["input_ids"]
        ):
            ids[row, : len(found)] = torch.tensor(found)
        return ids


_KNOWN: dict[str, Any] = {}


def _bert(folder: str) -> Any:
    if folder not in _KNOWN:
        from transformers import BertTokenizer

        _KNOWN[folder] = BertTokenizer.from_pretrained(folder, local_files_only=True)
    return _KNOWN[folder]


def load_vilt(folder: Path | str, length: int | None = None) -> tuple[ViltImage, ViltText]:
    """Towers of a ViLT folder in the layout of Hugging Face (``dandelin/vilt-b32-mlm``).

    Args:
        folder: with ``config.json``, ``model.safetensors`` and, for texts, ``vocab.txt``.
        length: text positions; MMP takes 1024 (MM-IMDb), 512 (Food-101), 128 (Hateful Memes). None: as trained, 40.

    Raises:
        UserError: no such folder, another kind of model, broken weights.
    """
    from transformers import ViltModel

    place = Path(folder).expanduser()
    identity = f"vilt:{place.name}"
    if not (place / "config.json").is_file():
        raise UserError(f"{identity}: no config.json in {place}; give the folder of the model")
    try:
        model = ViltModel.from_pretrained(place, local_files_only=True, weights_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{identity}: {place} cannot be read ({reason}); give the folder of a ViltModel") from error
    image, text = read_vilt(model, identity, length)
    if (place / "vocab.txt").is_file() or (place / "tokenizer.json").is_file():
        text.tokenizer = BertTokens(str(place), text.context)
    return image, text


def read_vilt(model: nn.Module, identity: str, length: int | None = None) -> tuple[ViltImage, ViltText]:
    """Image and text tower of a ``ViltModel`` (with its pooler).

    Args:
        model: a ``ViltModel``.
        identity: name for messages and exports.
        length: text positions, see ``load_vilt``.
    """
    config: Any = model.config
    state = model.state_dict()
    here = "embeddings"
    kinds = state[f"{here}.token_type_embeddings.weight"]
    weights = {
        "patch.weight": state[f"{here}.patch_embeddings.projection.weight"],
        "patch.bias": state[f"{here}.patch_embeddings.projection.bias"],
        "class_embedding": state[f"{here}.cls_token"][0, 0],
        "position": state[f"{here}.position_embeddings"][0],
        "type": kinds[1],
        **_pair(state, "out.norm", "layernorm"),
        **_pair(state, "pooler", "pooler.dense"),
    }
    for index in range(config.num_hidden_layers):
        weights |= _block(state, index)
    size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    image = ViltImage(
        "image",
        weights,
        heads=config.num_attention_heads,
        identity=identity,
        activation=config.hidden_act,
        eps=config.layer_norm_eps,
        size=(int(size[0]), int(size[1])),
    )
    there = f"{here}.text_embeddings"
    text = {
        "token.weight": state[f"{there}.word_embeddings.weight"],
        # Inputs are single texts: the first of BERT's two segments for all rows.
        "position": state[f"{there}.position_embeddings.weight"] + state[f"{there}.token_type_embeddings.weight"][0],
        "type": kinds[0],
        **_pair(state, "norm", f"{there}.LayerNorm"),
    }
    return image, ViltText(text, replace(image.spec, name="text"), identity, length)


def _pair(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _block(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    here, there = f"block.{index}", f"encoder.layer.{index}"
    parts = [f"{there}.attention.attention.{part}" for part in ("query", "key", "value")]
    weights = {f"{here}.attention_in.weight": torch.cat([state[f"{part}.weight"] for part in parts])}
    width = len(state[f"{parts[0]}.weight"])
    none = torch.zeros(width)
    weights[f"{here}.attention_in.bias"] = torch.cat([state.get(f"{part}.bias", none) for part in parts])
    for ours, theirs in _BLOCK.items():
        weights |= _pair(state, f"{here}.{ours}", f"{there}.{theirs}")
    return weights
