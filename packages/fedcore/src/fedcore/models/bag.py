"""Mean of word vectors: the small model for texts."""

from __future__ import annotations

from polymodal.errors import UserError
from torch import Tensor, nn

__all__ = ["Bag"]


class Bag(nn.Module):
    """Mean of the embeddings of all tokens but padding (id 0), then a linear layer, or one hidden layer before it.

    Args:
        num_classes: outputs.
        input_shape: (longest text,); any length is taken.
        vocabulary: number of token ids, padding included; 16385 are those of the readers' hashed words.
        dim: width of the embeddings.
        hidden: width of the hidden layer; 0: none.

    Raises:
        UserError: inputs that are no texts, or a size below 1.

    Source: Joulin et al. 2017, Bag of Tricks for Efficient Text Classification (arXiv 1607.01759), section 2.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        vocabulary: int = 16385,
        dim: int = 32,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise UserError(
                f"model bag takes token ids (length,); inputs here are {input_shape}: choose a picture model"
            )
        if min(vocabulary, dim) < 1 or hidden < 0:
            raise UserError(f"bag: vocabulary={vocabulary}, dim={dim}, hidden={hidden}; expected at least 1, 1 and 0")
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=0)
        layers: list[nn.Module] = [nn.Linear(dim, hidden), nn.ReLU()] if hidden else []
        self.inner = nn.Sequential(*layers)
        self.head = nn.Linear(hidden or dim, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, length) token ids -> logits (B, num_classes)."""
        used = (ids != 0).unsqueeze(-1).to(self.embedding.weight.dtype)
        mean = (self.embedding(ids) * used).sum(dim=1) / used.sum(dim=1).clamp(min=1.0)
        logits: Tensor = self.head(self.inner(mean))
        return logits
