"""mBART parts from transformers: the text encoder and the translator, sharing one table of token embeddings."""

from __future__ import annotations

from typing import Any

import torch
from polymodal.errors import UserError
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration
from transformers.models.mbart.modeling_mbart import MBartEncoder

from slt.config import ModelConfig, VocabInfo
from slt.models.weights import load_folder, read_config

__all__ = ["build_text_encoder", "build_translator", "check_positions", "load_text_encoder", "load_translator"]

# Setting of an mBART network -> our option for it; a checkpoint folder's config.json must agree with these.
TEXT_SETTINGS = {
    "d_model": "width",
    "encoder_layers": "text_layers",
    "encoder_attention_heads": "text_heads",
    "encoder_ffn_dim": "ffn",
    "activation_function": "text_activation",
    "scale_embedding": "text_scale_embedding",
    "max_position_embeddings": "max_positions",
}
TRANSLATOR_SETTINGS = {
    "d_model": "width",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_attention_heads": "heads",
    "decoder_attention_heads": "heads",
    "encoder_ffn_dim": "ffn",
    "decoder_ffn_dim": "ffn",
    "activation_function": "activation",
    "scale_embedding": "scale_embedding",
    "max_position_embeddings": "max_positions",
}


def _mbart_config(config: ModelConfig, vocab: VocabInfo, settings: dict[str, str]) -> MBartConfig:
    options: dict[str, Any] = {key: getattr(config, option) for key, option in settings.items()}
    return MBartConfig(
        vocab_size=vocab.size,
        dropout=config.dropout,
        init_std=config.init_std,
        pad_token_id=vocab.pad_id,
        eos_token_id=vocab.eos_id,
        bos_token_id=None,
        decoder_start_token_id=vocab.tag_id,
        forced_eos_token_id=None,
        **options,
    )


def _draw_positions(table: nn.Embedding, std: float | None) -> None:
    """Draw a position table anew where it has a standard deviation of its own."""
    if std is not None:
        nn.init.normal_(table.weight, std=std)


def build_text_encoder(config: ModelConfig, vocab: VocabInfo) -> MBartEncoder:
    """The encoder of questions and sentences, with random weights."""
    encoder = MBartEncoder(_mbart_config(config, vocab, TEXT_SETTINGS))
    _draw_positions(encoder.embed_positions, config.position_std)
    return encoder


def build_translator(config: ModelConfig, vocab: VocabInfo) -> MBartForConditionalGeneration:
    """Encoder over fused tokens and decoder with a tied output layer, with random weights."""
    model = MBartForConditionalGeneration(_mbart_config(config, vocab, TRANSLATOR_SETTINGS))
    _draw_positions(model.model.encoder.embed_positions, config.position_std)
    _draw_positions(model.model.decoder.embed_positions, config.position_std)
    return model


def check_positions(tokens: int, config: ModelConfig, what: str) -> None:
    """Refuse a sequence longer than the position table.

    Raises:
        UserError: ``tokens`` exceeds ``max_positions``.
    """
    if tokens > config.max_positions:
        raise UserError(
            f"{what}: {tokens} tokens, but the model has {config.max_positions} positions; "
            f"shorten it or train with max_positions={tokens} or more"
        )


def _checked_folder(folder: str, settings: dict[str, str], config: ModelConfig) -> dict[str, Tensor]:
    found = read_config(folder)
    for key, option in settings.items():
        if key in found and found[key] != getattr(config, option):
            raise UserError(
                f"{folder}/config.json has {key}={found[key]}, the model {option}={getattr(config, option)}; "
                f"set {option}={found[key]}"
            )
    return load_folder(folder)


def _load(module: nn.Module, tensors: dict[str, Tensor], folder: str) -> None:
    """Fill every parameter of ``module``; what is missing or of another shape is reported, never skipped."""
    target = module.state_dict()
    missing = sorted(set(target) - set(tensors))
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(target)} tensors, first {missing[0]}; is it mBART?")
    for name, value in target.items():
        if tensors[name].shape != value.shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(value.shape)}; "
                "use the tokenizer of that folder and the width of its config.json"
            )
    module.load_state_dict({name: tensors[name].to(value.dtype) for name, value in target.items()})


def load_text_encoder(encoder: MBartEncoder, config: ModelConfig) -> None:
    """Load the text encoder (and its token embeddings) from ``config.pretrained_text``.

    Raises:
        UserError: settings or shapes differ, or tensors are missing; the message names the first.
    """
    folder = str(config.pretrained_text)
    found = _checked_folder(folder, TEXT_SETTINGS, config)
    tensors = {}
    for name, value in found.items():
        name = name.removeprefix("model.")
        if name.startswith("encoder."):
            tensors[name.removeprefix("encoder.")] = value
        elif name == "shared.weight":
            tensors["embed_tokens.weight"] = value
    _load(encoder, tensors, folder)


def load_translator(model: MBartForConditionalGeneration, config: ModelConfig, keep_embeddings: bool) -> None:
    """Load the translator from ``config.pretrained_translator``.

    Args:
        model: the translator.
        config: settings with the folder's path.
        keep_embeddings: the token embeddings have come from another checkpoint already and stay.

    Raises:
        UserError: settings or shapes differ, or tensors are missing; the message names the first.
    """
    folder = str(config.pretrained_translator)
    found = _checked_folder(folder, TRANSLATOR_SETTINGS, config)
    tensors = {"model." + name.removeprefix("model."): value for name, value in found.items()}
    bias = tensors.pop("model.final_logits_bias", torch.zeros_like(model.final_logits_bias))
    tensors["final_logits_bias"] = torch.zeros_like(model.final_logits_bias) if keep_embeddings else bias
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    shared = [model.model.shared.weight.detach()] if keep_embeddings else [tensors[n] for n in names if n in tensors]
    if shared:
        tensors |= dict.fromkeys((*names, "lm_head.weight"), shared[0])
    _load(model, tensors, folder)
