"""A classifier on ViLT, whose one encoder sees text and image rows together; the face of ``Classifier``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.backbones.vilt import ViltImage, ViltText
from missing_modal.classifier import Classifier
from missing_modal.methods.base import Context, Method
from missing_modal.patterns import all_masks

if TYPE_CHECKING:
    from missing_modal.backbones.base import Tower
    from missing_modal.batch import Batch

__all__ = ["FusedClassifier", "build_classifier"]


def build_classifier(
    towers: Sequence[Tower], method: Method, classes: int, seed: int = 0
) -> Classifier | FusedClassifier:
    """The classifier that fits the towers.

    Raises:
        UserError: a method for two towers on ViLT, or ``mmp_vilt`` on two towers.
    """
    vilt = len(towers) == 2 and isinstance(towers[0], ViltImage) and isinstance(towers[1], ViltText)
    if vilt != getattr(method, "fused", False):
        fitting = "choose mmp_vilt, or two towers such as open_clip" if vilt else "give --backbone vilt:FOLDER"
        raise UserError(f"method {type(method).__name__} does not run on {towers[0].identity}; {fitting}")
    return FusedClassifier(towers, method, classes, seed) if vilt else Classifier(towers, method, classes, seed)


class FusedClassifier(nn.Module):
    """logits = head(tanh(pooler(LN(text row 0)))) over one sequence [prompts; text; image].

    Placeholders of what is missing are encoded like anything else, as MMP does: the prompts say that it is missing.
    Nothing is skipped, since there is no tower to skip. The encoder is frozen and no submodule.

    Args:
        towers: image and text of ``load_vilt``.
        method: with a ``fused`` prompter, such as ``mmp_vilt``.
        classes: outputs C.
        seed: of the head: Linear(d, 2d), LayerNorm, GELU, Linear(2d, C), weights N(0, 0.02^2), biases 0.
        cut: leave out text rows behind the batch's longest text, which are masked (exact).

    Source: Lee et al. 2023 (arXiv 2303.03369), released code (DCP 5).
    """

    def __init__(self, towers: Sequence[Tower], method: Method, classes: int, seed: int = 0, cut: bool = True) -> None:
        super().__init__()
        image, text = towers
        if not isinstance(image, ViltImage) or not isinstance(text, ViltText):
            raise UserError(f"{image.identity} is no ViLT; give --backbone vilt:FOLDER")
        self._image, self._text = image, text
        self.context = Context((image.spec, text.spec), tuple(all_masks(("image", "text"))), seed)
        self.prompter = method.build(self.context)
        self.tuned = nn.ModuleList()
        self.pooler = image.pooler()
        width = image.spec.width
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
        )
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.head:
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 0.02, generator=draw)
                    layer.bias.zero_()
        self.cut = cut

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The frozen towers."""
        return self._image, self._text

    @property
    def num_prefix_tokens(self) -> dict[str, int]:
        """Rows in front of the sequence, which begins with the text."""
        return {"image": 0, "text": self.prompter.rows(0)}

    def forward(self, batch: Batch) -> Tensor:
        """(B, C) logits in float32."""
        return self.with_tables(batch)[0]

    def with_tables(self, batch: Batch) -> tuple[Tensor, Any]:
        """Logits, and the method's tables of this step."""
        features, tables = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits, tables

    def features(self, batch: Batch) -> tuple[Tensor, Any]:
        """(B, d) pooled rows, and the tables."""
        present = sorted(set(batch.masks))
        tables = self.prompter.tables(present)
        ids, images = self._inputs("text", self._text, batch), self._inputs("image", self._image, batch)
        which = torch.tensor([present.index(mask) for mask in batch.masks], device=ids.device)
        if self.cut:
            ids = ids[:, : self._text.length(ids)]
        text, image = self._text.embed(ids), self._image.embed(images)
        h = torch.cat([text, image.to(text.dtype)], dim=1)
        padding = torch.zeros(h.shape[:2], dtype=h.dtype, device=h.device)
        padding[:, : ids.shape[1]].masked_fill_(ids == 0, float("-inf"))
        own = h.shape[1]
        inserted = self.prompter.enter(0, h, which, tables)
        h = h if inserted is None else torch.cat([inserted, h], dim=1)
        for block in range(self._image.spec.depth):
            if block:
                h = self.prompter.before(0, block, h, which, tables)
            mask = nn.functional.pad(padding, (h.shape[1] - own, 0))[:, None, None].expand(-1, 1, h.shape[1], -1)
            h = self._image.block(block, h, mask, self.prompter.extra(0, block, which, tables))
        row = self.prompter.finish(0, h[:, h.shape[1] - own])
        with torch.autocast(row.device.type, enabled=False):
            return torch.tanh(self.pooler(row.to(self.pooler.weight.dtype))), tables

    def _inputs(self, name: str, tower: Tower, batch: Batch) -> Tensor:
        """(B, ...) inputs, placeholders where the modality is missing."""
        device = self.pooler.weight.device
        x = batch.inputs.get(name)
        held = tower.placeholder(len(batch)).to(device)
        if x is None or not len(x):
            return held
        if name == "text" and x.shape[1] > held.shape[1]:
            raise UserError(f"{x.shape[1]} text tokens; this model has {held.shape[1]} positions; cut the text")
        full = held[:, : x.shape[1]].to(x.dtype) if name == "text" else x.new_ones(len(batch), *x.shape[1:])
        return full.index_copy(0, batch.rows[name], x)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Nothing to know of the training set."""
