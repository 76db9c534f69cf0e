"""Inputs of the slt benchmarks: clip lengths, frames of PHOENIX's size, models, batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from slt.config import VocabInfo

PHOENIX_FRAMES = 116
"""Mean number of frames of a PHOENIX-2014T clip."""


def mixed_lengths(clips: int, longest: int = 300) -> list[int]:
    """Clip lengths spread as in weather forecasts: log-normal around 108 frames, at least 16, scaled to ``longest``."""
    draws = np.random.default_rng(0).lognormal(np.log(108), 0.45, clips).clip(16, 300)
    return [max(2, round(float(x) * longest / 300)) for x in draws]


def synthetic_config(*options: str) -> Any:
    """The configuration of plain ``slt-train`` with options."""
    from polymodal.cli import parse_config
    from slt.data import READERS
    from slt.settings import SLTConfig

    arguments = ["--config", "synthetic", *options]
    config = parse_config(SLTConfig, arguments, prog="benchmark", presets="slt", choices={"data": READERS})
    config.data.prepare()
    return config


def translator(width: int, layers: int, tokens: int, vocabulary: int) -> tuple[Any, VocabInfo]:
    """An mBART translator with random weights that never ends a sentence, so that all runs write ``tokens`` tokens."""
    import torch
    from slt.config import ModelConfig, VocabInfo
    from slt.models.text import build_translator

    vocab = VocabInfo(size=vocabulary, pad_id=0, eos_id=1, tag_id=2, special_ids=(0, 2))
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="tiny",
        width=width,
        heads=8,
        text_heads=8,
        ffn=4 * width,
        encoder_layers=layers,
        decoder_layers=layers,
        max_positions=max(64, tokens + 8),
    )
    model = build_translator(config, vocab).eval()
    model.final_logits_bias[0, vocab.eos_id] = -1e9
    return model, vocab


def prefix_search(
    model: Any, states: torch.Tensor, mask: torch.Tensor, vocab: VocabInfo, beams: int, tokens: int
) -> list[list[int]]:
    """Beam search that decodes the whole prefix again at every token (for sentences that do not end early)."""
    import torch

    batch = states.shape[0]
    states, mask = states.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)
    ids = torch.full((batch * beams, 1), vocab.tag_id, device=states.device)
    scores = torch.zeros(batch, beams, device=states.device)
    scores[:, 1:] = -1e9
    banned = sorted({vocab.pad_id, vocab.tag_id, *vocab.special_ids})
    with torch.no_grad():
        for _ in range(tokens):
            hidden = model.model.decoder(
                input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
            ).last_hidden_state[:, -1]
            logits = model.lm_head(hidden) + model.final_logits_bias
            logits[:, banned] = -torch.inf
            total = scores.view(-1, 1) + logits.log_softmax(-1)
            scores, best = total.view(batch, -1).topk(beams)
            rows = (best // logits.shape[1] + beams * torch.arange(batch, device=best.device)[:, None]).view(-1)
            ids = torch.cat([ids[rows], (best % logits.shape[1]).view(-1, 1)], 1)
    return [row[1:] for row in ids[::beams].tolist()]


def frames_of_forecast(count: int) -> Iterator[np.ndarray]:
    """Frames (260, 210, 3) uint8: a shaded background, a moving figure of soft blobs, camera noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:260, 0:210].astype(np.float32)
    background = np.stack([60 + 0.3 * y, 90 + 0.2 * x, 130 - 0.2 * y], -1)
    for number in range(count):
        frame = background.copy()
        for part, (speed, size) in enumerate(((0.0, 45.0), (0.11, 16.0), (0.17, 16.0))):
            cx, cy = 105 + 60 * np.sin(speed * number + part) * (part > 0), 110 + 45 * part
            blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2))[..., None]
            frame += blob * np.array([150, 90, 60], dtype=np.float32)
        yield (frame + rng.normal(0, 2, frame.shape)).clip(0, 255).astype(np.uint8)


def write_clip(folder: Path, frames: int) -> None:
    """A clip of PNG files."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number, frame in enumerate(frames_of_forecast(frames), start=1):
        Image.fromarray(frame).save(folder / f"images{number:04d}.png")


@contextmanager
def phoenix_folder(sizes: Sequence[int], frames: int) -> Iterator[Path]:
    """A data set in PHOENIX-2014T's layout with clips of 210 x 260 pixels; ``sizes`` are train, dev and test."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "PHOENIX-2014-T"
        manual = home / "annotations" / "manual"
        manual.mkdir(parents=True)
        first: Path | None = None
        for split, size in zip(("train", "dev", "test"), sizes, strict=True):
            rows = ["name|video|start|end|speaker|orth|translation"]
            folder = home / "features" / "fullFrame-210x260px" / split
            folder.mkdir(parents=True)
            for number in range(size):
                name = f"clip-{split}-{number}"
                if first is None:
                    first = folder / name
                    write_clip(first, frames)
                else:
                    (folder / name).mkdir(parents=True)
                    for path in first.iterdir():
                        (folder / name / path.name).hardlink_to(path)
                rows.append(f"{name}|{name}/*.png|-1|-1|S|W|am tag {number} regen und wind")
            (manual / f"PHOENIX-2014-T.{split}.corpus.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        yield home
