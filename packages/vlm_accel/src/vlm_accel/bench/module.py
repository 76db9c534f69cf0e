"""Training of the built-in model on the shared trainer: all questions about a canvas in one pass."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from polymodal.data import LengthBucketBatchSampler
from polymodal.seeding import derive
from polymodal.task import TaskModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vlm_accel.bench import world
from vlm_accel.bench.model import VISION_WIDTH, build_vlm, pixels_of
from vlm_accel.bench.settings import BuiltInConfig

__all__ = ["CanvasData", "DigitReader"]

WEIGHT_DECAY = 0.02
CLS_WEIGHT = 0.3
"""of the loss on the CLS row beside that of the answers"""


class _Layout:
    """Where the questions and answers of a canvas stand in one packed sequence.

    Image first; then question and answer of each kind, which see the image and themselves only and have the positions
    they would have alone. So one pass of the image trains four prompts, each exactly as if it stood alone.

    Attributes:
        positions: (T,) position ids. mask: (T, T) bool, who sees whom. answers: (A,) where answer tokens stand.
        spans: per kind, its slice of ``answers``.
    """

    def __init__(self) -> None:
        head = 1 + world.TOKENS
        positions, block = list(range(head)), [0] * head
        answers: list[int] = []
        self.spans: list[slice] = []
        for number, kind in enumerate(world.KINDS, start=1):
            length = len(world.answer_of(kind, 0, 0))
            first = len(positions) + 2
            self.spans.append(slice(len(answers), len(answers) + length))
            answers += range(first, first + length)
            positions += range(head, head + 2 + length)
            block += [number] * (2 + length)
        blocks = torch.tensor(block)
        causal = torch.ones(len(block), len(block), dtype=torch.bool).tril()
        self.mask = causal & ((blocks[None] == 0) | (blocks[None] == blocks[:, None]))
        self.positions = torch.tensor(positions)
        self.answers = torch.tensor(answers)

    @staticmethod
    def pack(digits: np.ndarray) -> Tensor:
        """(n, 2) digits -> (n, T) token ids."""
        rows = []
        for left, right in digits.tolist():
            row = [world.BOS, *[world.IMAGE] * world.TOKENS]
            for kind in world.KINDS:
                row += [world.IDS[kind], world.IDS["?"], *world.answer_of(kind, left, right)]
            rows.append(row)
        return torch.tensor(rows)


class DigitReader(TaskModule):
    """The model, and a head on the tower's CLS row that is used in training only.

    Without the head no gradient would reach the CLS row, whose attention many methods rank by: CLIP's own CLS row is
    trained on images too.

    Args:
        config: rate.
        seed: root seed.
    """

    mask: Tensor
    positions: Tensor
    answers: Tensor
    vlm: Any

    def __init__(self, config: BuiltInConfig, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        self.vlm = build_vlm(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "head"))
            self.head = nn.Linear(VISION_WIDTH, 20)
        layout = _Layout()
        self.spans = layout.spans
        self.register_buffer("mask", layout.mask, persistent=False)
        self.register_buffer("positions", layout.positions, persistent=False)
        self.register_buffer("answers", layout.answers, persistent=False)

    def logits(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the answer tokens (n, A, V), and of both digits by the CLS row (n, 2, 10)."""
        inner = self.vlm.model
        tower = inner.vision_tower(pixels, output_hidden_states=True)
        image = inner.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        embeds = inner.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :1], image, embeds[:, 1 + world.TOKENS :]], dim=1)
        n = len(ids)
        hidden = inner.language_model(
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=self.positions.expand(n, -1),
            attention_mask=self.mask.expand(n, 1, -1, -1),
        ).last_hidden_state
        return self.vlm.lm_head(hidden[:, self.answers - 1]), self.head(tower.pooler_output).unflatten(-1, (2, 10))

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of all answer tokens, plus that of the CLS row's digits."""
        answers, digits = self.logits(batch["pixels"], batch["ids"])
        answer = F.cross_entropy(answers.flatten(0, 1), batch["ids"][:, self.answers].flatten())
        cls = F.cross_entropy(digits.flatten(0, 1), batch["digits"].flatten())
        return answer + CLS_WEIGHT * cls, {"answer": answer.detach(), "cls": cls.detach()}

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Per canvas, which questions greedy decoding answers rightly.

        Greedy decoding gives the right answer exactly when the right token is the most likely one everywhere along it.
        """
        found = self.logits(batch["pixels"], batch["ids"])[0].argmax(-1) == batch["ids"][:, self.answers]
        right = torch.stack([found[:, span].all(1) for span in self.spans], dim=1)
        return {str(name): row for name, row in zip(batch["number"].tolist(), right.tolist(), strict=True)}

    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        """Accuracy over all questions, and by kind."""
        right = np.array(list(records.values()), dtype=float)
        return {
            "accuracy": float(right.mean()),
            **{f"accuracy_{kind}": float(right[:, number].mean()) for number, kind in enumerate(world.KINDS)},
        }

    def batch_size(self, batch: dict[str, Tensor]) -> int:
        """Canvases."""
        return len(batch["ids"])

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle."""
        decay = [p for p in self.parameters() if p.ndim > 1]
        other = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.config.lr, fused=True)
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class CanvasData(L.LightningDataModule):
    """Canvases of the built-in world; those of an epoch are the same in every epoch, in another order.

    Args:
        config: of the built-in model.
        seed: of the order.
    """

    def __init__(self, config: BuiltInConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.train_sampler: LengthBucketBatchSampler | None = None

    def setup(self, stage: str | None = None) -> None:
        """Draw the canvases."""
        if self.train_sampler is not None:
            return
        options = self.config.world
        self.parts = {"train": _tensors(options, "train", options.train), "val": _tensors(options, "val", options.val)}
        self.train_sampler = LengthBucketBatchSampler(
            [1] * options.train, batch_size=self.config.batch_size, seed=derive(self.seed, "order"), drop_last=True
        )

    def train_dataloader(self) -> Any:
        """Batches in this epoch's order."""
        assert self.train_sampler is not None
        return DataLoader(_Rows(self.parts["train"]), batch_sampler=self.train_sampler, collate_fn=_stack)

    def val_dataloader(self) -> Any:
        """Validation canvases in order."""
        return DataLoader(_Rows(self.parts["val"]), batch_size=self.config.batch_size, collate_fn=_stack)


class _Rows(Dataset[tuple[dict[str, Tensor], int]]):
    """Row numbers of a table of tensors; samplers of ours give (row, epoch)."""

    def __init__(self, table: dict[str, Tensor]) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table["ids"])

    def __getitem__(self, index: Any) -> tuple[dict[str, Tensor], int]:
        return self.table, index[0] if isinstance(index, tuple) else index


def _stack(rows: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    table, numbers = rows[0][0], torch.tensor([row for _, row in rows])
    return {name: values[numbers] for name, values in table.items()}


def _tensors(options: world.WorldOptions, split: str, count: int) -> dict[str, Tensor]:
    numbers = np.arange(count)
    drawn = world.draw_samples(options, split, numbers)
    return {
        "pixels": pixels_of(drawn.canvas),
        "ids": _Layout.pack(drawn.digits),
        "digits": torch.from_numpy(drawn.digits),
        "number": torch.from_numpy(numbers),
    }
