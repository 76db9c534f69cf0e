"""Classifiers of transformers from a local folder, as modules that return logits; extra ``polymodal-fedcore[hf]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from polymodal.errors import UserError
from polymodal.paths import require_files
from polymodal.weights import has_weights, quiet_transformers
from torch import Tensor, nn

__all__ = ["HFImages", "HFText", "hf_model"]

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError)
_NEW = ("classifier", "score", "pooler", "pre_classifier", "head")
"""first or last parts of names that a folder of a plain encoder need not have"""


class HFText(nn.Module):
    """A sequence classifier on the readers' token ids alone: mask and token types are found from them.

    As in every text of this package, 0 is padding and the tokenizer's id ``i`` is stored as ``i + 1``.

    Args:
        model: a sequence classifier of transformers.
        padding: the tokenizer's id of the padding.
        separator: the tokenizer's id that ends a text, where the model has token types; None: all tokens are of type 0.
    """

    def __init__(self, model: nn.Module, padding: int, separator: int | None) -> None:
        super().__init__()
        self.model = model
        self.padding, self.separator = padding, separator

    def forward(self, ids: Tensor) -> Tensor:
        """(B, length) stored ids, padded at the end -> logits (B, num_classes)."""
        mask = ids != 0
        ids = torch.where(mask, ids.long() - 1, self.padding)
        more = {}
        if self.separator is not None:
            ends = (ids == self.separator).long()
            # 0 up to and including the first separator, 1 from there on
            more["token_type_ids"] = (((ends.cumsum(dim=1) - ends) > 0) & mask).long()
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **more).logits
        return logits


class HFImages(nn.Module):
    """A picture classifier.

    Args:
        model: a picture classifier of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> logits (B, num_classes)."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def hf_model(
    folder: str | Path, *, num_classes: int, input_shape: tuple[int, ...], vocabulary: int = 0, **options: Any
) -> nn.Module:
    """A classifier of transformers with the folder's weights, or random ones where it has none.

    Args:
        folder: local folder with ``config.json``; nothing is downloaded. Weights may be a plain encoder's: then the
            classifier is new.
        num_classes: outputs; 1 for a regression.
        input_shape: (length,) of token ids, or (channels, height, width).
        vocabulary: number of stored ids of the data, padding included; the model must know all but that.
        options: values of the configuration, e.g. ``hidden_dropout_prob``.

    Raises:
        UserError: transformers is missing, the folder is no such model, or the data does not fit.
    """
    folder = Path(folder).expanduser()
    require_files(folder, ["config.json"], f"model hf:{folder}", "give a local folder with a model of transformers")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(f"model hf:{folder} needs transformers: pip install 'polymodal-fedcore[hf]'") from error
    text = len(input_shape) == 1
    made = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
    model = _create(transformers, made, folder, {"num_labels": num_classes, **options})
    if not text:
        adapter: nn.Module = HFImages(model)
    else:
        known = int(getattr(model.config, "vocab_size", 0))
        if vocabulary - 1 > known:
            raise UserError(
                f"hf:{folder} knows {known} token ids, the data has {vocabulary - 1}; give its tokenizer:"
                f" --data.tokenizer {folder}"
            )
        adapter = HFText(model, *_special(transformers, model.config, folder))
    _try(adapter, folder, input_shape)
    return adapter


def _create(transformers: Any, made: Any, folder: Path, options: dict[str, Any]) -> nn.Module:
    common = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, **common, **options)
            unknown = [name for name in options if name not in ("num_labels",) and not hasattr(config, name)]
            if unknown:
                raise ValueError(f"its configuration has no {', '.join(unknown)}")
            if not has_weights(folder):
                model: nn.Module = made.from_config(config)
                return model
            model, info = made.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **common,
            )
    except _FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"transformers cannot build a classifier of {folder}: {reason}") from error
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    lost = [name for name in lost if not any(part in _NEW for part in name.split("."))]
    if lost:
        raise UserError(
            f"hf:{folder}: its weights are not those of its config.json: {len(lost)} tensors are missing or of another"
            f" shape ({', '.join(sorted(lost)[:2])}); fetch the folder again"
        )
    return model


def _special(transformers: Any, config: Any, folder: Path) -> tuple[int, int | None]:
    """Ids of padding, and of the separator where the model has token types."""
    padding, separator = config.pad_token_id, getattr(config, "sep_token_id", None)
    typed = int(getattr(config, "type_vocab_size", 0) or 0) > 1
    if padding is None or (typed and separator is None):
        from fedcore.data.text_ids import load_tokenizer

        tokenizer = load_tokenizer(folder)
        padding = tokenizer.pad_token_id if padding is None else padding
        separator = tokenizer.sep_token_id
        config.pad_token_id = padding
    return int(padding), int(separator) if typed and separator is not None else None


def _try(adapter: nn.Module, folder: Path, shape: tuple[int, ...]) -> None:
    """One pass, so that a shape that does not fit ends here."""
    inputs = torch.zeros(2, *shape, dtype=torch.long if len(shape) == 1 else torch.float32)
    adapter.eval()
    try:
        with torch.no_grad():
            adapter(inputs)
    except _FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{folder} does not take inputs of shape {shape}: {reason}") from error
    adapter.train()
