"""Frame encoders: packed frames, landmarks or cached features in, one vector per frame out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from polymodal.errors import UserError
from polymodal.weights import load_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slt.config import ModelConfig

__all__ = ["CachedFeatures", "FrameCNN", "PoseEncoder", "build_backbone"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms use batch statistics without recording them: a recomputed forward must not count a batch twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


class FrameCNN(nn.Module):
    """A CNN over packed frames.

    Each frame counts once in the batch-norm statistics: repeated edge frames are added after the CNN. (The code that
    we follow repeats them before it, which weights the first and last frame of each clip more.)

    Args:
        network: children that, one after another, map normalised (N, 3, H, W) to (N, ``width``, 1, 1).
        width: number of features per frame.
        frames_per_pass: largest chunk in evaluation, where chunks do not change the result.
        recompute: gradient checkpointing in training, stage by stage: the whole network as one stage would hold all
            its activations at once in the backward pass after all.
        splits: numbers of the network's children at which a stage begins.
        mean: of the pixels' three channels, 0..1.
        std: likewise.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        width: int,
        frames_per_pass: int = 512,
        recompute: bool = False,
        splits: Sequence[int] = (),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.width = width
        self.frames_per_pass = frames_per_pass
        self.recompute = recompute
        self.splits = tuple(splits)
        spread = torch.tensor(std)
        self.register_buffer("scale", (1 / (255 * spread)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("mean", (torch.tensor(mean) / spread).view(1, 3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → (N, width)."""
        if frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
            raise UserError(
                f"frames of shape {tuple(frames.shape)} and type {frames.dtype}; this backbone takes (N, 3, H, W) uint8"
            )
        if self.training:
            return self._encode(frames)
        return torch.cat([self._encode(part) for part in torch.split(frames, self.frames_per_pass)])

    def _encode(self, frames: Tensor) -> Tensor:
        frames = frames.contiguous(memory_format=torch.channels_last)
        pixels = frames * self.scale - self.mean
        children = list(self.network.children())
        for start, end in zip((0, *self.splits), (*self.splits, len(children)), strict=True):
            pixels = self._stage(nn.Sequential(*children[start:end]), pixels)
        return pixels.flatten(1)

    def _stage(self, stage: nn.Sequential, pixels: Tensor) -> Tensor:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_statistics(stage)

        if self.training and self.recompute and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(stage, pixels, use_reentrant=False, context_fn=contexts)
            return recomputed
        out: Tensor = stage(pixels)
        return out


class PoseEncoder(nn.Module):
    """Two-layer network over the landmarks of a frame.

    A missing landmark (last channel 0) enters as zeros whatever its coordinates hold, NaN included; the validity
    itself is an input, so that zero means something else than the origin.

    Args:
        landmarks: number P of landmarks per frame.
        width: features per frame.
    """

    def __init__(self, landmarks: int, width: int) -> None:
        super().__init__()
        self.landmarks = landmarks
        self.width = width
        self.network = nn.Sequential(
            nn.Linear(4 * landmarks, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.ReLU(),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """(N, P, 4) of x, y, z, valid → (N, width)."""
        if frames.dim() != 3 or frames.shape[1:] != (self.landmarks, 4):
            raise UserError(
                f"landmarks of shape {tuple(frames.shape)}; this model takes (N, {self.landmarks}, 4): x, y, z, valid"
            )
        frames = frames.to(next(self.parameters()).dtype)
        valid = frames[..., 3:] > 0
        points = torch.where(valid, frames[..., :3], 0.0)
        features: Tensor = self.network(torch.cat([points, valid.to(points.dtype)], dim=-1).flatten(1))
        return features


class CachedFeatures(nn.Module):
    """Frame features that a frozen ResNet-18 made once (``loader.feature_cache``); nothing to compute.

    Args:
        width: features per frame.
    """

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.width = width

    def forward(self, frames: Tensor) -> Tensor:
        """(N, width) float → the same."""
        if frames.dim() != 2 or frames.shape[1] != self.width:
            raise UserError(
                f"frames of shape {tuple(frames.shape)}; backbone=features takes (N, {self.width}) cached features: "
                "give their folder with --loader.feature_cache"
            )
        return frames


def _tiny_network() -> nn.Module:
    # ReLU after max pooling gives the values of ReLU before it at a quarter of the cost.
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.AdaptiveMaxPool2d(1),
        nn.ReLU(),
    )


def _resnet18(weights: str | None) -> nn.Module:
    from torchvision.models import resnet18

    network: nn.Module = resnet18(weights=None)
    network.fc = nn.Identity()
    if weights is not None:
        tensors = {k: v for k, v in load_tensors(weights).items() if not k.startswith("fc.")}
        problems = network.load_state_dict(tensors, strict=False)
        if problems.missing_keys or problems.unexpected_keys:
            raise UserError(
                f"{weights} is not a torchvision resnet18: missing {problems.missing_keys[:3]}, "
                f"unexpected {problems.unexpected_keys[:3]}; save resnet18(weights='IMAGENET1K_V1').state_dict()"
            )
    return network


def build_backbone(config: ModelConfig) -> FrameCNN | PoseEncoder | CachedFeatures:
    """The frame encoder named by the settings; never downloads.

    Raises:
        UserError: ``backbone_weights`` is not a ResNet-18.
    """
    if config.backbone == "features":
        return CachedFeatures()
    if config.backbone == "pose":
        if config.pose_landmarks < 1:
            raise UserError("backbone=pose needs pose_landmarks >= 1, the number of landmarks per frame")
        return PoseEncoder(config.pose_landmarks, config.pose_width)
    if config.backbone_weights is not None and config.backbone != "resnet18":
        raise UserError(f"backbone_weights is for resnet18, not for backbone={config.backbone}; leave it empty")
    options = (config.frames_per_pass, config.checkpoint_frames)
    if config.backbone == "resnet18":
        return FrameCNN(_resnet18(config.backbone_weights), 512, *options, splits=(4, 5, 6, 7))
    # Dark stays near 0, the value of the convolutions' zero padding: no edge for the max pooling to find.
    return FrameCNN(_tiny_network(), 32, *options, splits=(4, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
