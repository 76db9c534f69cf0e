"""SegFormer and UperNet of transformers from a local folder; extra ``polymodal-css[hf]``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.weights import has_weights, load_tensors, quiet_transformers
from torch import Tensor, nn

from css.models.base import FeatureExtractor, Features
from css.models.probe import probe

__all__ = ["HFExtractor"]

_CLASSES = {"segformer": "SegformerForSemanticSegmentation", "upernet": "UperNetForSemanticSegmentation"}
_FAULTS = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError)
_CLASSIFIERS = ("decode_head.classifier.", "auxiliary_head.", "classifier.")


class HFExtractor(FeatureExtractor):
    """Encoder and decode head of SegFormer or UperNet; our heads take the place of its classifier.

    ``stages`` are the encoder's feature maps (after their normalisation layers; there is no activation).

    Args:
        folder: local folder with ``config.json``, and weights if it has some; nothing is ever downloaded.
        weights: file with weights to be used instead of the folder's. Weights, of the folder or the file, are those
            of the whole model or of its encoder alone (ImageNet); classifiers in them are left out.

    Raises:
        UserError: transformers is missing, the folder is no such model, or the weights do not fit.
    """

    def __init__(self, folder: str | Path, *, weights: str | Path | None = None) -> None:
        super().__init__()
        folder = Path(folder).expanduser()
        kind = _kind(folder)
        model = _create(folder, kind, None if weights is None else Path(weights))
        self.backbone: nn.Module = model.segformer if kind == "segformer" else model.backbone
        self.neck: nn.Module = model.decode_head
        self.out_channels = int(model.decode_head.classifier.in_channels)
        model.decode_head.classifier = nn.Identity()
        self._hidden = kind == "segformer"
        self.stride = probe(self, f"hf:{folder}")

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) -> features (B, D, h, w) and the encoder's maps."""
        if self._hidden:
            stages = self.backbone(x, output_hidden_states=True).hidden_states
        else:
            stages = self.backbone(x).feature_maps
        return Features(self.neck(stages), list(stages))

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's."""
        return self.backbone.parameters()

    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """The decode head's."""
        return self.neck.parameters()


def _kind(folder: Path) -> str:
    """``segformer`` or ``upernet``, as ``config.json`` says."""
    path = folder / "config.json"
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"hf:{folder}: cannot read {path}; give a local folder with a SegFormer or UperNet of transformers"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; fetch the model's folder again") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in _CLASSES:
        raise UserError(f"{path}: model_type {kind!r}; expected {' or '.join(_CLASSES)}")
    if any(_asks_for_download(level) for level in (settings, settings.get("backbone_config") or {})):
        raise UserError(f"{path} takes its backbone from the internet; give backbone_config with all its sizes instead")
    return str(kind)


def _asks_for_download(settings: dict[str, Any]) -> bool:
    return bool(settings.get("use_pretrained_backbone") or settings.get("backbone"))


def _create(folder: Path, kind: str, weights: Path | None) -> Any:
    """The model with its weights: those of the file, or the folder's, or random ones."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(f"network hf:{folder} needs transformers: pip install 'polymodal-css[hf]'") from error
    from huggingface_hub.errors import StrictDataclassError  # a setting of the wrong type

    model_class = getattr(transformers, _CLASSES[kind])
    options = {"local_files_only": True}
    tensors = None if weights is None else load_tensors(weights)
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, **options)
            if tensors is None and not has_weights(folder):
                return model_class(config)
            model, info = model_class.from_pretrained(
                None if tensors is not None else folder,
                config=config,
                state_dict=tensors,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                **options,
            )
    except (*_FAULTS, StrictDataclassError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"transformers cannot build the {kind} of {folder}: {reason}") from error
    _refuse_misses(info, f"{weights or folder}", f"the {kind} of {folder / 'config.json'}", model)
    return model


def _refuse_misses(info: dict[str, Any], source: str, what: str, model: nn.Module) -> None:
    """What was not found, left over or of another shape, apart from classifiers and a whole absent decode head."""
    head = {name for name in model.state_dict() if name.startswith("decode_head.")}
    missing = {name for name in info["missing_keys"] if not name.startswith(_CLASSIFIERS)}
    if head - set(info["missing_keys"]) <= {name for name in head if name.endswith("num_batches_tracked")}:
        missing -= head
    found = {
        "missing": sorted(missing),
        "unknown": sorted(name for name in info["unexpected_keys"] if not name.startswith(_CLASSIFIERS)),
        "of another shape": sorted(name for name, *_ in info["mismatched_keys"] if not name.startswith(_CLASSIFIERS)),
    }
    problems = [f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in found.items() if names]
    if problems:
        raise UserError(f"weights of {source} are not {what}: {'; '.join(problems)}; give those of that network")
