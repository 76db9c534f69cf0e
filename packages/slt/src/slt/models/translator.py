"""The whole translation model: video and question in, sentence out (our reading of SSL-SSAW, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from slt.config import ModelConfig, VocabInfo
from slt.methods import FUSIONS
from slt.models.generate import generate
from slt.models.text import build_text_encoder, build_translator, check_positions, load_text_encoder, load_translator
from slt.models.visual import VisualEncoder
from slt.ops.contrastive import INITIAL_LOGIT_SCALE

if TYPE_CHECKING:
    from slt.data.collate import Batch

__all__ = ["SLTModel", "compact"]


def compact(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid tokens of each row to its front, in order.

    Position embeddings are added after fusion; without this, the position of a sign token would depend on how long
    the other questions of the batch are.

    Args:
        tokens: (batch, length, d).
        mask: (batch, length) bool, True = valid.

    Returns:
        Tokens and mask of the same shapes.
    """
    order = torch.sort(mask.to(torch.uint8), dim=1, descending=True, stable=True).indices
    return tokens.gather(1, order[..., None].expand_as(tokens)), mask.gather(1, order)


def _last_valid(mask: Tensor) -> Tensor:
    return (mask.sum(1) - 1).clamp_min(0)


def _never_empty(mask: Tensor) -> Tensor:
    """Attention over no token at all is undefined: a row without a valid token attends to its first (zero) one."""
    return torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], dim=1)


class SLTModel(nn.Module):
    """Question-based sign language translation.

    Parts: ``visual`` (frame encoder, temporal convolutions, projection), ``text_encoder`` (questions and sentences),
    ``fusion`` (SSAW or a baseline), ``translator`` (mBART encoder over fused tokens and decoder). Text encoder and
    translator share one embedding matrix.

    Args:
        config: settings of the network.
        vocab: what the tokenizer's ids mean.

    Raises:
        UserError: unknown fusion or option, or weights that do not fit.

    Source: arXiv 2509.14036, our reading; parts as in GFSLT-VLP's code.
    """

    def __init__(self, config: ModelConfig, vocab: VocabInfo) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.visual = VisualEncoder(config)
        self.text_encoder = build_text_encoder(config, vocab)
        self.uses_video = "video" in FUSIONS.info(config.fusion).tags
        self.uses_question = "question" in FUSIONS.info(config.fusion).tags
        self.fusion = FUSIONS.create(config.fusion, config.width, config.heads, **config.fusion_options)
        self.translator = build_translator(config, vocab)
        self.cls_token = nn.Parameter(torch.randn(config.width) * (config.position_std or config.init_std))
        self.video_head = nn.Linear(config.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        if config.pretrained_text is not None:
            load_text_encoder(self.text_encoder, config)
            with torch.no_grad():
                self.translator.model.shared.weight.copy_(self.text_encoder.embed_tokens.weight)
        if config.pretrained_translator is not None:
            load_translator(self.translator, config, keep_embeddings=config.pretrained_text is not None)
        self.text_encoder.embed_tokens.weight = self.translator.model.shared.weight

    def encode_video(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens of packed clips.

        Args:
            frames: (N, 3, H, W) uint8 or (N, P, 4) landmarks of all clips, one after another.
            lengths: (batch,) int64 frames per clip.

        Returns:
            Tokens (batch, Lv, d), 0 at padding, and mask (batch, Lv) bool.
        """
        tokens, mask = self.visual(frames, lengths)
        return tokens, mask

    def no_video(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """No visual tokens, (batch, 0, d): for a fusion that would not look at them."""
        rows = batch.lengths.shape[0]
        return self.cls_token.new_zeros(rows, 0, self.config.width), batch.lengths.new_zeros(rows, 0, dtype=torch.bool)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States of the text encoder.

        Args:
            ids: (batch, L) int64 encoder form ``words </s> <tag>``; L may be 0.
            mask: (batch, L) bool.

        Returns:
            (batch, L, d); 0 at padding and in rows without a token.

        Raises:
            UserError: more tokens than positions.
        """
        if ids.shape[1] == 0:
            return self.cls_token.new_zeros(ids.shape[0], 0, self.config.width)
        check_positions(ids.shape[1], self.config, "text")
        states: Tensor = self.text_encoder(input_ids=ids, attention_mask=_never_empty(mask)).last_hidden_state
        return states * mask[..., None].to(states.dtype)

    def fuse(
        self, question: Tensor, question_mask: Tensor, sign: Tensor, sign_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Join question and sign tokens.

        Args:
            question: (batch, Lq, d) states of the text encoder; Lq may be 0.
            question_mask: (batch, Lq) bool.
            sign: (batch, Lv, d) visual tokens.
            sign_mask: (batch, Lv) bool.

        Returns:
            Fused tokens, their mask, and the fusion's weights (None where it has none).
        """
        tokens, mask, weights = self.fusion(question, question_mask, sign, sign_mask)
        return tokens, mask, weights

    def encode_fused(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The translator's encoder over fused tokens.

        Args:
            tokens: (batch, L, d).
            mask: (batch, L) bool; a row without a valid token is read as one zero token.

        Returns:
            States (batch, L', d) with the valid tokens in front, and their mask.

        Raises:
            UserError: more valid tokens than positions.
        """
        if tokens.shape[1] == 0:
            tokens, mask = tokens.new_zeros(tokens.shape[0], 1, tokens.shape[2]), mask.new_zeros(mask.shape[0], 1)
        tokens, mask = compact(tokens, mask)
        if tokens.shape[1] > self.config.max_positions:
            longest = int(mask.sum(1).max())
            check_positions(longest, self.config, "question and signs of one sample")
            tokens, mask = tokens[:, :longest], mask[:, :longest]
        mask = _never_empty(mask)
        encoder = self.translator.model.encoder
        return encoder(inputs_embeds=tokens, attention_mask=mask).last_hidden_state, mask

    def translate_logits(self, tokens: Tensor, mask: Tensor, decoder_input: Tensor) -> Tensor:
        """Teacher-forced logits of the sentence.

        Args:
            tokens: (batch, L, d) fused tokens.
            mask: (batch, L) bool.
            decoder_input: (batch, Ls) int64 ``<tag> words``.

        Returns:
            (batch, Ls, vocabulary).
        """
        states, mask = self.encode_fused(tokens, mask)
        return self.decode_logits(states, mask, decoder_input)

    def restore_logits(self, states: Tensor, mask: Tensor, decoder_input: Tensor) -> Tensor:
        """Teacher-forced logits of a text from the states of its masked copy.

        Args:
            states: (batch, L, d) from ``encode_text``; L at least 1.
            mask: (batch, L) bool.
            decoder_input: (batch, Ls) int64 ``<tag> words``.

        Returns:
            (batch, Ls, vocabulary).
        """
        return self.decode_logits(states, _never_empty(mask), decoder_input)

    def decode_logits(self, states: Tensor, mask: Tensor, decoder_input: Tensor) -> Tensor:
        """Logits of the decoder attending to ``states``; the causal mask makes padding at the right harmless."""
        check_positions(decoder_input.shape[1], self.config, "text")
        hidden = self.translator.model.decoder(
            input_ids=decoder_input, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.translator.lm_head(hidden) + self.translator.final_logits_bias
        return logits

    def pool_video(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """One vector per clip: a learned token in front of the visual tokens, through the encoder and a linear map.

        Args:
            tokens: (batch, Lv, d).
            mask: (batch, Lv) bool.

        Returns:
            (batch, d).
        """
        first = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        mask = torch.cat([mask.new_ones(mask.shape[0], 1), mask], dim=1)
        states, _ = self.encode_fused(torch.cat([first, tokens], dim=1), mask)
        pooled: Tensor = self.video_head(states[:, 0])
        return pooled

    def pool_text(self, states: Tensor, mask: Tensor) -> Tensor:
        """State at the last valid position, the language tag (zeros for rows without a token).

        Args:
            states: (batch, L, d).
            mask: (batch, L) bool.

        Returns:
            (batch, d).
        """
        if states.shape[1] == 0:
            return states.new_zeros(states.shape[0], states.shape[2])
        return states[torch.arange(states.shape[0], device=states.device), _last_valid(mask)]

    def encode_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Visual tokens and mask of a batch; no tokens for a fusion that would not look at them."""
        return self.encode_video(batch.frames, batch.lengths) if self.uses_video else self.no_video(batch)

    def fuse_batch(
        self, batch: Batch, video: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fused tokens, mask and weights of a batch: text encoder, visual encoder and fusion in one call.

        Args:
            batch: clips and questions.
            video: result of ``encode_batch`` for these clips, where they are asked several questions.
        """
        sign, sign_mask = self.encode_batch(batch) if video is None else video
        limit = None if self.uses_question else 0
        ids, mask = batch.question_ids[:, :limit], batch.question_mask[:, :limit]
        return self.fuse(self.encode_text(ids, mask), mask, sign, sign_mask)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        num_beams: int = 4,
        max_new_tokens: int = 150,
        length_penalty: float = 1.0,
        video: tuple[Tensor, Tensor] | None = None,
    ) -> list[list[int]]:
        """Translate a batch by beam search.

        Args:
            batch: clips and questions.
            num_beams: beams; 1 is greedy search.
            max_new_tokens: longest output in tokens, end of sentence included.
            length_penalty: exponent of the length in the beam score; above 0 favours longer outputs.
            video: result of ``encode_batch`` for these clips, so that frames are not encoded again.

        Returns:
            Token ids of each translation, without tag, end and padding.

        Raises:
            UserError: ``max_new_tokens`` does not fit the position table.
            RuntimeError: the model is in training mode.
        """
        check_positions(max_new_tokens, self.config, "generated text (max_new_tokens)")
        if self.training:
            raise RuntimeError("generate() in training mode would apply dropout; call model.eval() first")
        tokens, mask, _ = self.fuse_batch(batch, video)
        states, mask = self.encode_fused(tokens, mask)
        return generate(
            self.translator,
            BaseModelOutput(last_hidden_state=states),
            mask,
            self.vocab,
            num_beams,
            max_new_tokens,
            length_penalty,
        )
