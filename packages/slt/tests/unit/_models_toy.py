"""A tiny vocabulary, model settings and batches for the tests of models and losses."""

from __future__ import annotations

import torch
from slt.config import ModelConfig
from slt.data.collate import Batch, Collate, Sample
from slt.tokenizer import Tokenizer

WORDS = ["regen", "schnee", "wind", "sonne", "nebel", "frost", "heute", "morgen", "nachts", "norden", "süden", "alpen"]


def synthetic_model_config(**changes) -> ModelConfig:
    """The measured setting of the synthetic world; tests that do not learn make it narrower."""
    settings = {
        "backbone": "tiny",
        "width": 64,
        "text_layers": 2,
        "text_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "heads": 4,
        "ffn": 256,
        "init_std": 0.125,
        "scale_embedding": True,
        "position_std": 0.5,
        "max_positions": 64,
    }
    return ModelConfig(**{**settings, **changes})


def small_config(**changes) -> ModelConfig:
    return synthetic_model_config(**{"width": 16, "ffn": 32, "text_layers": 1, "decoder_layers": 1, **changes})


def tokenizer() -> Tokenizer:
    return Tokenizer.build("word", [" ".join(WORDS), "wie wird das wetter"], "de_DE")


def samples(lengths=(9, 4, 13, 6), questions=("wie wird das wetter", "", "wird regen", "das"), size=12, seed=0):
    """Clips of noise with sentences of 1 to 4 words; one sample for each length."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for number, frames in enumerate(lengths):
        picked = torch.randint(len(WORDS), (1 + number % 4,), generator=random).tolist()
        sentence = " ".join(WORDS[i] for i in picked)
        question = questions[number % len(questions)]
        pixels = torch.randint(0, 256, (frames, 3, size, size), generator=random, dtype=torch.uint8)
        masked = [*question.split()[:-1], "<mask>"] if question else []
        rows.append(Sample(f"clip{number}", question, sentence, pixels, tuple(masked), tuple(sentence.split())))
    return rows


def batch(rows=None, tok: Tokenizer | None = None) -> Batch:
    return Collate(tok or tokenizer())(rows if rows is not None else samples())
