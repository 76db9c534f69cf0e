"""Settings of the model and its losses. Plain dataclasses without torch; defaults are the published setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from polymodal.errors import UserError

__all__ = ["LossConfig", "ModelConfig", "VocabInfo"]


@dataclass
class ModelConfig:
    """The network: frame encoder, temporal convolutions, text encoder, fusion, translator.

    Defaults follow GFSLT-VLP's code (ResNet-18, mBART text encoder of 12 layers, translator of 3 + 3 layers).
    """

    backbone: Literal["resnet18", "tiny", "pose", "features"] = "resnet18"
    """frame encoder: resnet18 (224 px), tiny (small frames, CPU), pose (landmarks), features (from a cache)"""
    backbone_weights: str | None = None
    """file with ImageNet weights of torchvision's resnet18 (.pth or .safetensors); empty: random"""
    pose_landmarks: int = 0
    """landmarks per frame (backbone pose only; 0: as the data has)"""
    pose_width: int = 128
    """width of the landmark network"""
    padding: Literal["gfslt", "vac"] = "gfslt"
    """temporal padding by repeated edge frames: gfslt gives ceil(T/4)+1 tokens, vac ceil(T/4)"""
    sign_proj_norm: Literal["ln", "bn"] = "ln"
    """normalisation after the projection of visual tokens"""
    frames_per_pass: int = 512
    """largest number of frames in one call of the frame encoder in evaluation"""
    checkpoint_frames: bool = False
    """recompute the frame encoder in the backward pass: less memory, one more forward"""
    width: int = 1024
    """model width d"""
    text_layers: int = 12
    """layers of the text encoder"""
    text_heads: int = 16
    """attention heads of the text encoder"""
    text_activation: Literal["gelu", "relu"] = "gelu"
    """activation in the text encoder"""
    text_scale_embedding: bool = True
    """multiply token embeddings of the text encoder by sqrt(d), as mBART-cc25 does"""
    encoder_layers: int = 3
    """encoder layers of the translator"""
    decoder_layers: int = 3
    """decoder layers of the translator"""
    heads: int = 8
    """attention heads of translator and fusion"""
    ffn: int = 4096
    """width of the feed-forward layers"""
    activation: Literal["relu", "gelu"] = "relu"
    """activation in the translator"""
    scale_embedding: bool = False
    """multiply token embeddings of the decoder by sqrt(d)"""
    dropout: float = 0.1
    """dropout of text encoder and translator, 0..1"""
    init_std: float = 0.02
    """standard deviation of initial linear and embedding weights"""
    position_std: float | None = None
    """standard deviation of initial position tables (empty: init_std)"""
    max_positions: int = 1024
    """longest token sequence of any encoder or decoder"""
    fusion: str = "ssaw"
    """how question and sign tokens meet: ssaw, concat, none, question_only, cross_attention, gbt"""
    fusion_options: dict[str, Any] = field(default_factory=dict)
    """options of the fusion, e.g. {mode: attention} for ssaw"""
    pretrained_text: str | None = None
    """folder with an mBART checkpoint for text encoder and embeddings (see slt.tokenizer.trim_vocabulary)"""
    pretrained_translator: str | None = None
    """folder with an mBART checkpoint of encoder_layers + decoder_layers for the translator"""

    def __post_init__(self) -> None:
        for name, heads in (("heads", self.heads), ("text_heads", self.text_heads)):
            if heads < 1 or self.width % heads:
                raise UserError(
                    f"width={self.width} is not a multiple of {name}={heads}; choose {name} that divides width"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout}; expected 0 <= dropout < 1")


@dataclass
class LossConfig:
    """Weights of the loss terms; stage 1 aligns, stage 2 translates."""

    contrastive: Literal["infonce", "gfslt", "multi"] = "infonce"
    """contrastive target: infonce, gfslt (softened KL), multi (equal sentences are positives)"""
    w_vs: float = 1.0
    """weight of the pair video - sentence"""
    w_vq: float = 0.5
    """weight of the pair video - question (ours)"""
    w_qs: float = 0.0
    """weight of the pair question - sentence (ours)"""
    lambda_ssl: float = 1.0
    """stage 1: weight of restoring masked questions and sentences"""
    restore_questions: bool = True
    """stage 1: restore questions too (false: sentences only, as GFSLT-VLP)"""
    restore_smoothing: float = 0.2
    """label smoothing of restoration"""
    detach_text_encoder: bool = True
    """restoration trains the decoder only"""
    ssl_every: int = 1
    """restoration in every so many steps (the code: 5)"""
    label_smoothing: float = 0.2
    """stage 2: label smoothing of translation"""
    lambda_q: float = 0.1
    """stage 2: weight of restoring masked questions (ours)"""
    lambda_c: float = 0.0
    """stage 2: weight of the contrastive terms (ours)"""
    lambda_triplet: float = 0.0
    """stage 2: weight of the question triplet loss (GBT-style baseline: 1)"""

    def __post_init__(self) -> None:
        if self.ssl_every < 1:
            raise UserError(f"ssl_every={self.ssl_every}; expected at least 1 (1: every step)")
        for name in ("label_smoothing", "restore_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)}; expected 0 <= {name} < 1")


@dataclass(frozen=True)
class VocabInfo:
    """What the model must know about a tokenizer."""

    size: int
    """number of token ids"""
    pad_id: int
    """fills short rows"""
    eos_id: int
    """ends a text"""
    tag_id: int
    """language tag: last token of an encoded text, first token of a generated one"""
    special_ids: tuple[int, ...] = ()
    """ids that are never generated (padding, mask, unknown, begin, tags)"""
    sha: str = ""
    """fingerprint of the tokenizer; a checkpoint of another vocabulary is refused"""
