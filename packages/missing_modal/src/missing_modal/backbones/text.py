"""Text tower: CLIP's causal transformer, read at the end of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor
from torch.nn import functional

from missing_modal.backbones.transformer import TransformerTower

__all__ = ["TextTower", "Tokenizer"]


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> (n, context) ids, zeros behind the end; it can be pickled for the loader's workers.

    Args:
        source: ``clip`` or a folder, see ``data.tokenize.tokenizer``.
        context: ids of a row.
    """

    source: str
    context: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, context) int64."""
        from missing_modal.data.tokenize import tokenizer

        return tokenizer(self.source, self.context)(texts)


class TextTower(TransformerTower):
    """A causal transformer over token ids (b, S) int64.

    Further weights: ``token.weight`` (V, d), ``position`` (S, d).

    Args:
        eos: id whose first place is read; None: the place of the largest id (CLIP's end of text is the last id).
        start, end: ids of an empty text, for placeholders; by default the last two of the vocabulary.
        tokenizer: texts -> (n, S) ids, zeros behind the end (dynamic prompts look at them, DCP 3.4), or the source of a
            ``Tokenizer``; None: there is none, inputs come as ids.
        options: of ``TransformerTower``.
    """

    kind = "text"

    def __init__(
        self,
        *args: Any,
        eos: int | None = None,
        start: int | None = None,
        end: int | None = None,
        tokenizer: Callable[[Sequence[str]], Tensor] | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, causal=True, **options)
        vocabulary = len(self._need("token.weight"))
        self._need("position")
        self.eos = eos
        self.tokenizer = Tokenizer(tokenizer, self.context) if isinstance(tokenizer, str) else tokenizer
        self.start = vocabulary - 2 if start is None else start
        self.end = (vocabulary - 1 if eos is None else eos) if end is None else end

    @property
    def context(self) -> int:
        """S: positions there are."""
        return len(self._weights["position"])

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor besides the weights; of tokenizers only a named source is kept."""
        source = self.tokenizer.source if isinstance(self.tokenizer, Tokenizer) else None
        return super().config() | {"eos": self.eos, "start": self.start, "end": self.end, "tokenizer": source}

    def embed(self, x: Tensor) -> Tensor:
        """(b, S) ids -> (b, S, d). UserError for more ids than there are positions."""
        if x.shape[1] > self.context:
            raise UserError(f"{self.identity}: {x.shape[1]} text tokens; it has {self.context} positions; cut the text")
        return functional.embedding(x, self._weights["token.weight"]) + self._weights["position"][: x.shape[1]]

    def pool_rows(self, x: Tensor) -> Tensor:
        """(b,) place of the end of text."""
        return x.argmax(dim=-1) if self.eos is None else (x == self.eos).int().argmax(dim=-1)

    def length(self, x: Tensor) -> int | None:
        """Rows up to the batch's last end of text: nothing behind it reaches a row that is read (causal)."""
        return int(self.pool_rows(x).max()) + 1

    def placeholder(self, count: int) -> Tensor:
        """An empty text: start, end, zeros (DCP 4.2)."""
        ids = torch.zeros(count, self.context, dtype=torch.long, device=self._weights["position"].device)
        ids[:, 0], ids[:, 1] = self.start, self.end
        return ids
