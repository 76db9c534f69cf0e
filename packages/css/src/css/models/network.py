"""The network of every method: a feature extractor under heads that grow with each step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from polymodal.errors import UserError
from torch import Tensor, nn

from css.models.base import FeatureExtractor, Features, Output
from css.models.heads import HeadKind, classifier, make_head

__all__ = ["CSSNet"]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


class CSSNet(nn.Module):
    """Extractor and one head a step: ``heads[0]`` the background (one channel), ``heads[k]`` the classes of step k-1.

    State-dict names: ``extractor.*``, ``heads.<k>.*``, ``unknown.*``.

    Args:
        extractor: backbone and neck, an image to a feature map.
        channels: number of classes of each step so far.
        detach_background: the background head reads features without gradient: background does not shape them.
        head: form of the heads, see ``make_head``.
        unknown: a further head for the class "unknown", outside the logits.

    Raises:
        ValueError: no step, or a step without a class.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        channels: Sequence[int],
        *,
        detach_background: bool = True,
        head: HeadKind = "linear",
        unknown: bool = False,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"channels={list(channels)}; expected the number of classes of each step, all at least 1")
        self.extractor = extractor
        self.detach_background = detach_background
        self.head = head
        width = extractor.out_channels
        self.heads = nn.ModuleList(make_head(width, classes, head) for classes in (1, *channels))
        self.unknown = make_head(width, 1, head) if unknown else None
        self._norm_frozen = False

    # --- sizes ------------------------------------------------------------------------------------------------------

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of classes of each step."""
        return tuple(classifier(head).out_channels for head in self.heads)[1:]

    @property
    def num_channels(self) -> int:
        """Channels of the logits: background and all classes."""
        return 1 + sum(self.channels)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Output:
        """Logits at feature resolution.

        Args:
            x: (B, 3, H, W) normalised images.

        Returns:
            Logits (B, num_channels, h, w), the features they were made from, the backbone's stages.
        """
        features: Features = self.extractor(x)
        feature = features.feature
        background = feature.detach() if self.detach_background else feature
        logits = [self.heads[0](background), *(head(feature) for head in self.heads[1:])]
        unknown = None if self.unknown is None else self.unknown(feature)
        return Output(torch.cat(logits, dim=1), feature, features.stages, unknown)

    def full_logits(self, x: Tensor) -> Tensor:
        """Logits at image size.

        Args:
            x: (B, 3, H, W) normalised images.

        Returns:
            (B, num_channels, H, W), bilinear.
        """
        output: Output = self(x)
        return self.upsample(output.logits, x.shape[-2:])

    @staticmethod
    def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
        """Bilinear resize, corners not aligned.

        Args:
            maps: (B, C, h, w).
            size: H, W in pixels.

        Returns:
            (B, C, H, W); ``maps`` itself where it has that size.
        """
        if tuple(maps.shape[-2:]) == tuple(size):
            return maps
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

    # --- growing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_head(self, classes: int) -> None:
        """Append the head of a new step; logits of the classes before it stay the same, bit for bit.

        Args:
            classes: number of new classes.

        Raises:
            ValueError: no class.
        """
        if classes < 1:
            raise ValueError(f"classes={classes}; a step brings at least one class")
        where = classifier(self.heads[0]).weight
        new = make_head(self.extractor.out_channels, classes, self.head).to(where.device, where.dtype)
        self.heads.append(new.train(self.training))
        if self._norm_frozen:
            self.freeze_norm()

    def load_earlier(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of an earlier step; heads that the earlier network did not have keep theirs.

        Args:
            state: state dict of a network of the same kind with the same or fewer heads.

        Raises:
            UserError: weights of another network.
        """
        own = self.state_dict()
        heads = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("heads.")), default=-1)
        newer = {key for key in own if key.startswith("heads.") and int(key.split(".")[1]) >= heads}
        missing = [key for key in own if key not in state and key not in newer]
        extra = [key for key in state if key not in own]
        wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
        if missing or extra or wrong:
            raise UserError(
                f"weights of an earlier step do not fit the network: missing {missing[:2]}, unknown {extra[:2]}, "
                f"of another shape {wrong[:2]}; keep network, order and task of the run"
            )
        self.load_state_dict(state, strict=False)

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CSSNet:
        """Training mode; after ``freeze_norm`` all layers stay in evaluation mode: fixed statistics, no dropout."""
        super().train(mode)
        if self._norm_frozen:
            for child in self.children():
                child.eval()
        return self

    def freeze_norm(self) -> None:
        """Later steps: normalisation keeps its statistics and is not trained, dropout and stochastic depth are off."""
        self._norm_frozen = True
        for module in self.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(False)
        self.train(self.training)

    def frozen_copy(self) -> CSSNet:
        """A copy that nothing trains, in evaluation mode: the teacher of the next step."""
        teacher = copy.deepcopy(self)
        teacher.requires_grad_(False)
        return teacher.eval()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by their place.

        Returns:
            ``backbone``, ``neck``, ``heads`` (background, earlier steps, unknown), ``new_head``; lists may be empty.
        """
        older: list[nn.Module] = list(self.heads)[:-1]
        if self.unknown is not None:
            older.append(self.unknown)
        return {
            "backbone": list(self.extractor.backbone_parameters()),
            "neck": list(self.extractor.neck_parameters()),
            "heads": [parameter for head in older for parameter in head.parameters()],
            "new_head": list(self.heads[-1].parameters()),
        }

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of all heads, "unknown" included."""
        yield from self.heads.parameters()
        if self.unknown is not None:
            yield from self.unknown.parameters()

    def class_weights(self) -> Tensor:
        """Rows of the classifiers, (num_channels, D), with gradient; D is what the last 1x1 convolution reads."""
        return torch.cat([classifier(head).weight.flatten(1) for head in self.heads])
