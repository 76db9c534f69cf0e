"""Any backbone of timm as a feature extractor, under a small neck; extra ``polymodal-css[timm]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError, did_you_mean
from polymodal.weights import load_tensors
from torch import Tensor, nn

from css.models.base import FeatureExtractor, Features
from css.models.deeplab import conv_norm_relu
from css.models.heads import kaiming
from css.models.network import CSSNet
from css.models.probe import probe
from css.models.weights import fill

__all__ = ["Fusion", "TimmExtractor"]

# Transformers with positions take pictures of any size only where one of these asks for it.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class Fusion(nn.Module):
    """Feature maps of several sizes to one of the first's: 1x1 convolution of each, bilinear, concatenated, 3x3.

    Args:
        inputs: channels of each map, the largest map first.
        width: channels D of the result.
    """

    def __init__(self, inputs: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.levels = nn.ModuleList(conv_norm_relu(channels, width) for channels in inputs)
        self.fuse = conv_norm_relu(len(inputs) * width, width, 3)
        kaiming(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, inputs[k], h_k, w_k) -> (B, width, h_0, w_0)."""
        size = maps[0].shape[-2:]
        parts = [CSSNet.upsample(level(one), size) for level, one in zip(self.levels, maps, strict=True)]
        fused: Tensor = self.fuse(torch.cat(parts, dim=1))
        return fused


class TimmExtractor(FeatureExtractor):
    """A backbone of timm with ``features_only``; its levels from the output stride on are fused to 256 channels.

    ``stages`` are all its levels, as timm gives them (mostly after an activation).

    Args:
        name: timm's name, such as ``resnet18`` or ``convnext_tiny``.
        weights: file with timm's weights of that model (its classifier is left out); None: random.
        output_stride: pixels of the image a pixel of the features; backbones without such a level take their next.

    Raises:
        UserError: timm is missing, does not know the name, has no features of that model, or the weights do not fit.
    """

    def __init__(self, name: str, *, weights: str | Path | None = None, output_stride: int = 16) -> None:
        super().__init__()
        tensors = None if weights is None else load_tensors(weights)
        if tensors is not None:
            # features_only drops what no feature needs, so only the whole model can tell whether a file fits.
            whole = _create(name)
            fill(whole, tensors, weights or "", f"timm's {name}", skip=_classifiers(whole))
            tensors = whole.state_dict()
        self.backbone = _create(name, features_only=True, tensors=tensors)
        info = self.backbone.feature_info
        strides, channels = list(info.reduction()), list(info.channels())
        fine_enough = [k for k, stride in enumerate(strides) if stride >= output_stride]
        self._used = fine_enough or [len(strides) - 1]
        self.out_channels = 256
        self.neck = Fusion([channels[k] for k in self._used], self.out_channels)
        layout = getattr(self.backbone, "output_fmt", "NCHW")
        self._channels_last = getattr(layout, "value", layout) == "NHWC"
        self.stride = probe(self, f"timm:{name}")

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) -> features (B, 256, H / stride, W / stride) and all levels."""
        stages = list(self.backbone(x))
        if self._channels_last:
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]
        return Features(self.neck([stages[k] for k in self._used]), stages)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's."""
        parameters: Iterator[nn.Parameter] = self.backbone.parameters()
        return parameters

    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """The fusion's."""
        return self.neck.parameters()


def _create(name: str, *, features_only: bool = False, tensors: dict[str, Tensor] | None = None) -> Any:
    """A model of timm, without a download."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"network timm:{name} needs timm: pip install 'polymodal-css[timm]'") from error
    if not timm.is_model(name.partition(".")[0]):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"timm {timm.__version__} has no model {name!r}; {hint}timm.list_models() has them all")
    options: dict[str, Any] = {"features_only": True} if features_only else {}
    if tensors is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": tensors}}
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(name, **({"pretrained": False} | options | any_size))
        except TypeError as error:
            if not any_size:
                raise UserError(f"timm cannot build {name}: {error}") from error
        except (RuntimeError, AttributeError, AssertionError, ValueError, NotImplementedError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"timm has no features of {name}: {reason}; take a backbone with several levels") from error
    raise AssertionError


def _classifiers(model: Any) -> tuple[str, ...]:
    """Beginnings of the names of the classifier's weights."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{one}." for one in ((names,) if isinstance(names, str) else names))
