"""From packed frames to visual tokens: edge padding, temporal convolutions, projection (our reading, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from slt.config import ModelConfig
from slt.models.backbones import build_backbone
from slt.ops.lengths import SCHEMES, padded_length, token_length

__all__ = ["TemporalConv", "VisualEncoder", "edge_padding", "pad_clips"]

KERNEL = 5


def edge_padding(lengths: Sequence[int], scheme: str) -> Tensor:
    """Rows of packed frame features that make up the padded clips: edge frames repeated, clips one after another.

    Repeating the feature of an edge frame is the same as repeating the frame before the frame encoder, without
    encoding it again.

    Args:
        lengths: frames of each clip, at least 1.
        scheme: ``gfslt`` (8 frames to the left) or ``vac`` (6); the right side fills up ``padded_length``.

    Returns:
        (sum of padded lengths,) int64 indices into the packed frames.
    """
    parts, start = [], 0
    for frames in lengths:
        positions = torch.arange(padded_length(frames, scheme)) - SCHEMES[scheme]
        parts.append(positions.clamp_(0, frames - 1) + start)
        start += frames
    return torch.cat(parts)


def _inner_rows(lengths: Sequence[int]) -> Tensor:
    """Rows of a kernel-5 convolution over clips laid end to end that do not reach into the next clip."""
    parts, start = [], 0
    for length in lengths:
        parts.append(torch.arange(start, start + length - KERNEL + 1))
        start += length
    return torch.cat(parts)


def pad_clips(rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Unpack (sum of lengths, d) into a zero-padded batch.

    Returns:
        Tokens (batch, longest, d), 0 outside the mask, and the mask (batch, longest) bool, True = valid.
    """
    counts = torch.tensor(lengths, device=rows.device)
    mask = torch.arange(max(lengths), device=rows.device) < counts[:, None]
    return nn.utils.rnn.pad_sequence(list(torch.split(rows, list(lengths))), batch_first=True), mask


class TemporalConv(nn.Module):
    """Conv5 - BN - ReLU - max pool 2, twice, over clips laid end to end.

    Padded lengths are multiples of 4, so that pooling windows never cross a clip; rows of the convolutions that do
    cross are dropped before batch norm. Padding of a batch therefore never exists: neither statistics nor outputs
    of a clip depend on how long its batch mates are.

    Args:
        inputs: features per frame.
        width: output features.
        scheme: ``gfslt`` or ``vac``.
    """

    def __init__(self, inputs: int, width: int, scheme: str = "gfslt") -> None:
        super().__init__()
        self.scheme = scheme
        self.conv1 = nn.Conv1d(inputs, width, KERNEL)
        self.norm1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, KERNEL)
        self.norm2 = nn.BatchNorm1d(width)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Packed frame features (sum of lengths, inputs) → packed tokens (sum of counts, width) and the counts."""
        rows = features[edge_padding(lengths, self.scheme).to(features.device, non_blocking=True)]
        spans = [padded_length(frames, self.scheme) for frames in lengths]
        rows = self._block(rows, spans, self.conv1, self.norm1)
        spans = [(span - KERNEL + 1) // 2 for span in spans]
        rows = self._block(rows, spans, self.conv2, self.norm2)
        return rows, [token_length(frames, self.scheme) for frames in lengths]

    @staticmethod
    def _block(rows: Tensor, spans: Sequence[int], conv: nn.Conv1d, norm: nn.BatchNorm1d) -> Tensor:
        rows = conv(rows.T[None])[0].T[_inner_rows(spans).to(rows.device, non_blocking=True)]
        return torch.relu(norm(rows)).view(rows.shape[0] // 2, 2, -1).amax(1)


class VisualEncoder(nn.Module):
    """Packed frames → visual tokens of the model's width.

    Args:
        config: the network's settings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        self.temporal = TemporalConv(self.backbone.width, config.width, config.padding)
        self.sign_emb = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width) if config.sign_proj_norm == "ln" else nn.BatchNorm1d(config.width)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            frames: frames of all clips one after another: (N, 3, H, W) uint8 or (N, P, 4) landmarks.
            lengths: (batch,) int64 frames per clip; their sum is N.

        Returns:
            Tokens (batch, L, d), 0 at padding, and mask (batch, L), True = valid.

        Raises:
            UserError: a clip without frames, or lengths that do not add up to N.
        """
        counts: list[int] = lengths.tolist()
        if min(counts, default=0) < 1 or sum(counts) != frames.shape[0]:
            raise UserError(
                f"{frames.shape[0]} packed frames for clips of {counts} frames; every clip needs at least one"
            )
        rows, spans = self.temporal(self.backbone(frames), counts)
        return pad_clips(torch.relu(self.norm(self.sign_emb(rows))), spans)
