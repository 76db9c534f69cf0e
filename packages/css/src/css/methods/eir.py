"""Enhanced instance replay: single objects of old classes are pasted where the new pictures are background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from polymodal.errors import UserError
from torch import Tensor

from css.data.batch import Batch
from css.methods.base import StepContext
from css.methods.pl import PseudoLabels
from css.ops.distill import region_distillation
from css.ops.labels import one_hot, pseudo_label
from css.ops.losses import soft_binary_loss
from css.ops.paste import paste_batch, rank_cells_batch

if TYPE_CHECKING:
    from css.memory.bank import InstanceBank

__all__ = ["EIR", "PastePlan"]

VARIANTS = ("two_region", "new_only", "mib", "none")


@dataclass
class PastePlan:
    """Which instance goes where, one entry a paste, in the order of execution.

    Args:
        pictures: number in the batch.
        classes: channel of the pasted object.
        cells: place of the cell in the picture's ranking.
        rounds: pastes of one round are in different cells and are done together.
    """

    pictures: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


class EIR(PseudoLabels):
    """Pseudo-labels, pasted instances of old classes, instance pictures, region-specific distillation.

    Each part can be switched off, for ablation. Without memory and distillation this is ``PseudoLabels``, bit for bit.

    Args:
        threshold: least sigmoid of the old network that makes a pseudo-label; above 1 there are none.
        w_bce: weight of the binary cross-entropy.
        w_kd: weight of the distillation.
        distillation: ``two_region`` (background of the old network is new classes where these are annotated, background
            elsewhere), ``new_only`` (the first of these alone), ``mib`` (both at once everywhere), ``none``.
        paste: paste instances into new pictures.
        instance_images: every memory entry is a training picture too, on black background.
        class_combination: paste first the old classes that the old network sees in the picture; off: drawn at random.
        instance_selection: draw an entry of the class; off: always the first.
        position_selection: the cells with most background; off: cells at random.
        fill_position: further instances go to the ``next`` free cell, or all to the ``first`` (released code).
        max_pastes: most instances a picture.
        cell_share: side of a cell by the side of the picture (published: 250 of 512).
        enlarge: small instances are enlarged to the cell; off: they keep their size, larger ones shrink.
        lam: opacity of a paste; none draws it uniformly, Beta(1, 1).
        augment: instances go through a random crop (0.5 to 2 of the area) and flip of their own, as published.
        init: as in ``FineTuning``.
        init_bias: as in ``FineTuning``.

    Raises:
        UserError: an option out of its range.

    Source: Yin et al. 2025, arXiv 2503.22136, by the released code with its errors mended: all old classes can be drawn
    (the code leaves out the last), fills go to free cells, and the distillation has a finite value with one new class.
    What the code leaves undefined (distillation outside the annotated new classes) is our reading.
    """

    memory: ClassVar[Literal["none", "instances", "images"]] = "instances"

    def __init__(
        self,
        threshold: float = 0.7,
        w_bce: float = 1.0,
        w_kd: float = 5.0,
        distillation: str = "two_region",
        paste: bool = True,
        instance_images: bool = True,
        class_combination: bool = True,
        instance_selection: bool = True,
        position_selection: bool = True,
        fill_position: str = "next",
        max_pastes: int = 3,
        cell_share: float = 250 / 512,
        enlarge: bool = True,
        lam: float | None = None,
        augment: bool = True,
        init: str = "background",
        init_bias: float = -4.0,
    ) -> None:
        super().__init__(threshold, init, init_bias)
        if distillation not in VARIANTS:
            raise UserError(f"distillation={distillation!r}; expected one of {', '.join(VARIANTS)}")
        if fill_position not in ("next", "first"):
            raise UserError(f"fill_position={fill_position!r}; expected next or first")
        if not 0 < cell_share <= 1:
            raise UserError(f"cell_share={cell_share}; expected 0 < cell_share <= 1, a share of the picture's side")
        if lam is not None and not 0 <= lam <= 1:
            raise UserError(f"lam={lam}; expected an opacity, 0..1, or none for a uniform draw")
        if max_pastes < 1:
            raise UserError(f"max_pastes={max_pastes}; expected at least 1 (paste: false switches pasting off)")
        self.w_bce, self.w_kd, self.distillation = w_bce, w_kd, distillation
        self.paste, self.instance_images = paste, instance_images
        self.class_combination, self.instance_selection = class_combination, instance_selection
        self.position_selection, self.fill_position = position_selection, fill_position
        self.max_pastes, self.cell_share, self.enlarge = max_pastes, cell_share, enlarge
        self.lam, self.augment = lam, augment

    def uses_memory(self) -> bool:
        """Whether anything is replayed."""
        return self.paste or self.instance_images

    def uses_bank(self) -> bool:
        """Whether instances are pasted."""
        return self.paste

    def replays(self) -> bool:
        """Whether instances are training pictures."""
        return self.instance_images

    def loss(self, ctx: StepContext, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """``w_bce`` · binary cross-entropy of the mixed pictures + ``w_kd`` · distillation on them."""
        if ctx.old is None:
            return super().loss(ctx, batch, generator)
        images = batch.images
        labels = pseudo_label(batch.labels, ctx.old_logits(images), self.threshold)
        target = one_hot(labels, ctx.net.num_channels)
        pasted = 0
        if self.paste and ctx.bank is not None and len(ctx.bank):
            images, target, pasted = self.mixed(ctx, batch, labels, target, generator)
        distil = bool(self.w_kd) and self.distillation != "none"
        # The teacher runs before the graph is built, so that its own maps and the graph's never take memory together.
        old_logits = ctx.old_logits(images) if distil else None
        logits = ctx.net.full_logits(images)
        bce = soft_binary_loss(logits, target)
        loss, terms = self.w_bce * bce, {"bce": bce.detach(), "pasted": bce.new_tensor(float(pasted) / len(batch))}
        if old_logits is not None:
            kd = region_distillation(logits, old_logits, batch.labels, self.distillation)
            loss, terms["kd"] = loss + self.w_kd * kd, kd.detach()
        return loss, terms

    # ------------------------------------------------------------------ pasting

    @torch.no_grad()
    def mixed(
        self, ctx: StepContext, batch: Batch, labels: Tensor, target: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """Paste instances of old classes.

        Args:
            ctx: networks and sizes of the step; its bank has the instances.
            batch: pictures and ground truth.
            labels: (B, H, W) completed labels.
            target: (B, S, H, W) their one-hot form; may be written to.
            generator: of all draws.

        Returns:
            Mixed pictures, mixed targets, number of pastes.
        """
        bank, side = ctx.bank, min(labels.shape[-2:])
        assert bank is not None  # the caller has looked
        cell = int(side * self.cell_share)
        foreground = (labels != 0) & (labels != 255)
        origins, _ = rank_cells_batch(foreground, cell)  # (B, cells, 2), best first
        if not self.position_selection:
            order = torch.rand(origins.shape[:2], generator=generator).argsort(1).to(origins.device)
            origins = origins.gather(1, order[..., None].expand_as(origins))
        plan = self.plan(self.seen(labels, batch.labels, ctx.num_old), bank.slots, origins.shape[1], generator)
        if not plan.pictures:
            return batch.images, target, 0
        count = len(plan.pictures)
        entries = self.entries(bank, plan.classes, generator)
        boxes, flips = self.crops(bank, entries, generator)
        lam = torch.rand(count, generator=generator) if self.lam is None else torch.full((count,), self.lam)
        images = batch.images.clone()
        columns = [torch.tensor(column) for column in (plan.pictures, plan.classes, plan.cells, plan.rounds)]
        pictures, classes, cells, rounds = columns
        places = origins[pictures.to(origins.device), cells.to(origins.device)]
        for number in range(max(plan.rounds) + 1):
            now = (rounds == number).nonzero().flatten() if any(plan.rounds) else slice(None)
            paste_batch(
                images,
                target,
                bank,
                entries=entries[now],
                classes=classes[now],
                pictures=pictures[now],
                origins=places[now],
                cell=cell,
                lams=lam[now],
                boxes=boxes[now],
                flips=flips[now],
                enlarge=self.enlarge,
            )
        return images, target, count

    def seen(self, labels: Tensor, truth: Tensor, num_old: int) -> list[list[int]]:
        """Old classes that the old network sees in each picture and the ground truth does not have, in order."""
        if not self.class_combination:
            return [[] for _ in range(len(labels))]
        channels = num_old + 1
        found = torch.zeros(2, len(labels), 256, dtype=torch.bool, device=labels.device)
        for row, values in zip(found, (labels, truth), strict=True):
            row.scatter_(1, values.flatten(1), True)
        only = (found[0] & ~found[1])[:, 1:channels].tolist()
        return [[channel for channel, there in enumerate(row, start=1) if there] for row in only]

    def plan(
        self, seen: Sequence[Sequence[int]], slots: Mapping[int, Tensor], cells: int, generator: torch.Generator
    ) -> PastePlan:
        """Classes and cells of each picture (spec steps 3, 5, 6): those seen, filled up with others where few are seen.

        Args:
            seen: classes seen, by picture.
            slots: class -> entries of the memory.
            cells: cells of a picture.
            generator: of the draws.
        """
        plan, known = PastePlan(), sorted(slots)
        most = min(self.max_pastes, cells)
        for picture, classes in enumerate(seen):
            chosen = [c for c in classes if c in slots][:most]
            fills: list[int] = []
            if len(chosen) < 2 and known:
                picks = torch.randint(len(known), (most - len(chosen),), generator=generator)
                fills = [known[pick] for pick in picks.tolist()]
            for place, cls in enumerate([*chosen, *fills]):
                first = self.fill_position == "first" and place >= len(chosen)
                plan.pictures.append(picture)
                plan.classes.append(cls)
                plan.cells.append(0 if first else place)
                # Different cells do not touch: only pastes into one and the same cell must follow each other.
                plan.rounds.append(place if self.fill_position == "first" else 0)
        return plan

    def entries(self, bank: InstanceBank, classes: Sequence[int], generator: torch.Generator) -> Tensor:
        """An entry of the memory for each paste."""
        if self.instance_selection:
            return bank.draw(classes, generator)
        return torch.tensor([int(bank.slots[cls][0]) for cls in classes])

    def crops(self, bank: InstanceBank, entries: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crop (top, left, height, width) and flip of each instance: drawn, or the whole picture as it is."""
        if self.augment:
            return bank.augment(entries, generator)
        sizes = bank.sources[entries.to(bank.device)].cpu()
        return torch.cat([torch.zeros_like(sizes), sizes], 1), torch.zeros(len(entries), dtype=torch.bool)
