"""Frozen towers, a method's prompts, a linear head: the loop over towers and blocks (DCP 3.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from missing_modal.draws import bare_linear
from missing_modal.methods.base import Context, Method
from missing_modal.patterns import all_masks

if TYPE_CHECKING:
    from torch import Tensor

    from missing_modal.backbones.base import Tower
    from missing_modal.batch import Batch

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """logits = W [f_1; ...; f_M] + b over features of frozen towers with prompts; a missing modality's feature is zero.

    The towers are no submodules: they never get into ``state_dict`` or an optimizer, and are never changed. A method
    that fine-tunes trains copies of them (``tuned``).

    Args:
        towers: in the order of the modalities.
        method: options of a method.
        classes: outputs C of the head.
        seed: of the initial values.
        cut: leave out the token rows behind the batch's last end of text in causal towers (exact, DCP 8).
        skip: leave out the tower of a missing modality (exact, DCP 3.4); False runs it on placeholders: for tests and
            the benchmark.

    Source: Hu et al. 2024 (arXiv 2410.06558), released code (DCP 3.4): features without L2 normalisation or scale.
    """

    def __init__(
        self, towers: Sequence[Tower], method: Method, classes: int, seed: int = 0, cut: bool = True, skip: bool = True
    ) -> None:
        super().__init__()
        self._towers = tuple(towers)
        self._running = self._towers
        self.tuned = nn.ModuleList()
        if method.tunes_towers:
            copies = [tower.tuned() for tower in towers]
            self._running = tuple(copy for copy, _ in copies)
            self.tuned.extend(module for _, module in copies)
        modalities = [tower.spec.name for tower in towers]
        specs = tuple(tower.spec for tower in towers)
        self.context = Context(specs, tuple(all_masks(modalities)), seed)
        self.prompter = method.build(self.context)
        features = sum(spec.features for spec in specs)
        self.head = bare_linear(features, classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=draw)
            self.head.bias.zero_()
        self.cut = cut
        self.skip = skip

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The frozen towers."""
        return self._towers

    @property
    def num_prefix_tokens(self) -> dict[str, int]:
        """Rows in front of each tower's own tokens."""
        return {tower.spec.name: self.prompter.rows(number) for number, tower in enumerate(self._towers)}

    def forward(self, batch: Batch) -> Tensor:
        """(B, C) logits in float32."""
        logits, _ = self.with_tables(batch)
        return logits

    def with_tables(self, batch: Batch) -> tuple[Tensor, Any]:
        """Logits, and the method's tables of this step (for its penalty)."""
        features, tables = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits, tables

    def features(self, batch: Batch) -> tuple[Tensor, Any]:
        """(B, sum of e) fused features, and the tables."""
        found, rows, tables = self._found(batch)
        return self.prompter.fuse(found, rows, batch.masks), tables

    def _found(self, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor], Any]:
        """Features of the towers that ran, the samples they belong to, and the tables."""
        present = sorted(set(batch.masks))
        tables = self.prompter.tables(present)
        place = {mask: number for number, mask in enumerate(present)}
        found: dict[int, Tensor] = {}
        rows: dict[int, Tensor] = {}
        for number, tower in enumerate(self._running):
            x, at, samples = self._inputs(number, tower, batch)
            if x is None:
                continue
            which = torch.tensor([place[batch.masks[sample]] for sample in samples], device=x.device)
            given = batch.rows.get(tower.spec.name, ())
            length = batch.lengths.get(tower.spec.name) if len(samples) == len(given) else None
            found[number] = self.prompter.finish(number, self._run(number, tower, x, which, tables, length))
            rows[number] = at
        if not self.skip and not self.prompter.encodes_missing:
            found, rows = self._only_present(found, rows, batch)
        return found, rows, tables

    def _inputs(self, number: int, tower: Tower, batch: Batch) -> tuple[Tensor | None, Tensor, list[int]]:
        """Inputs of the tower, the samples they belong to (device), and the same on the host."""
        name = tower.spec.name
        have = [sample for sample, mask in enumerate(batch.masks) if mask >> number & 1]
        lack = [sample for sample, mask in enumerate(batch.masks) if not mask >> number & 1]
        x = batch.inputs.get(name)
        if (self.skip and not self.prompter.encodes_missing) or not lack:
            return (x if have else None), batch.rows.get(name, torch.empty(0, dtype=torch.long)), have
        held = tower.placeholder(len(lack))
        if x is not None and len(have):
            held = held.to(x.device, x.dtype)
            x = torch.cat([x, held])
        else:
            x = held.to(self.head.weight.device)
        at = torch.tensor(have + lack, device=x.device)
        return x, at, have + lack

    def _only_present(
        self, found: dict[int, Tensor], rows: dict[int, Tensor], batch: Batch
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Features of placeholders taken out again: they count for nothing."""
        kept, at = {}, {}
        for number, one in found.items():
            count = sum(mask >> number & 1 for mask in batch.masks)
            if count:
                kept[number], at[number] = one[:count], rows[number][:count]
        return kept, at

    def _run(self, number: int, tower: Tower, x: Tensor, which: Tensor, tables: Any, length: int | None) -> Tensor:
        """(b, ...) inputs -> (b, d) the row that is read at the end; ``length`` as the data module knows it."""
        tokens = tower.embed(x)
        if tower.spec.depth == 0:
            return tokens
        inserted = self.prompter.enter(number, tokens, which, tables)
        end = tower.pool_rows(x)
        if self.cut and tower.causal and (length := tower.length(x) if length is None else length) is not None:
            tokens = tokens[:, :length]
        h = tokens if inserted is None else torch.cat([inserted.to(tokens.dtype), tokens], dim=1)
        mask = tower.mask(h.shape[1], h)
        for block in range(tower.spec.depth):
            if block:
                seen = h.shape[1]
                h = self.prompter.before(number, block, h, which, tables)
                mask = mask if h.shape[1] == seen else tower.mask(h.shape[1], h)
            extra = self.prompter.extra(number, block, which, tables)
            if extra is not None:
                extra = extra[0].to(h.dtype), extra[1].to(h.dtype)
            h = tower.block(block, h, mask, extra)
        return h[torch.arange(len(h), device=h.device), end + (h.shape[1] - tokens.shape[1])]

    def prepare(self, batches: Iterable[Batch]) -> None:
        """What a method wants to know of the training set before training: nothing but for mean imputation.

        Args:
            batches: one pass over the training set, on the model's device.
        """
        if not self.prompter.wants_means:
            return
        sums = [torch.zeros(spec.features, dtype=torch.float64) for spec in self.context.towers]
        counts = [0] * len(sums)
        with torch.no_grad():
            for batch in batches:
                found, _, _ = self._found(batch)
                for number, one in found.items():
                    sums[number] += one.double().sum(0).cpu()
                    counts[number] += len(one)
        self.prompter.set_means([total / max(count, 1) for total, count in zip(sums, counts, strict=True)])
