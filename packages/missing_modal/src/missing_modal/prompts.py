"""Deep correlated prompts (DCP 3.2, 3.3): what they are, how they are made, how they get in front of the tokens.

``CorrelatedPrompts`` knows no classifier and no backbone: give it a tower's tokens at block 0 (``enter``) and its rows
in front of each later block (``before``). ``BakedPrompts`` does the same from stored tables.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from missing_modal.draws import Draws
from missing_modal.patterns import IMAGE_TEXT, all_masks

__all__ = ["BakedPrompts", "CorrelatedPrompts", "DynamicAttention", "PatternParameter", "PromptTables"]

PatternParams: TypeAlias = Literal["auto", "table", "additive"]
#: patterns of more modalities than this share parameters (2^M - 1 entries of a table become too many)
LARGEST_TABLE = 4


class PatternParameter(nn.Module):
    """One tensor per pattern.

    ``table``: an entry for each of the 2^M - 1 patterns, exact DCP with two modalities (complete, image, text in this
    order). ``additive``: an entry for each modality; a pattern's tensor is the mean over what it has (DCP 3.7).

    Args:
        draw: of the initial values, N(0, 0.02^2).
        name: of the draw.
        modalities: in the order of the bits.
        shape: of a pattern's tensor.
        kind: ``auto`` is ``table`` up to four modalities.
        trained: False keeps the values as a buffer.
    """

    def __init__(
        self,
        draw: Draws,
        name: str,
        modalities: Sequence[str],
        shape: Sequence[int],
        kind: str = "auto",
        trained: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("auto", "table", "additive"):
            raise UserError(f"pattern_params={kind!r}; expected auto, table or additive")
        self.additive = kind == "additive" or (kind == "auto" and len(modalities) > LARGEST_TABLE)
        self.order = {mask: place for place, mask in enumerate(all_masks(modalities))} if not self.additive else {}
        value = draw.normal(name, len(modalities) if self.additive else len(self.order), *shape)
        self.value: Tensor
        if trained:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self, masks: Sequence[int]) -> Tensor:
        """(T, *shape) for T patterns."""
        if not self.additive:
            return torch.stack([self.value[self.order[mask]] for mask in masks])
        # One product: a batch of six modalities has dozens of patterns, each of which would be some small operations.
        held = [[float(mask >> place & 1) / mask.bit_count() for place in range(len(self.value))] for mask in masks]
        shares = torch.tensor(held, dtype=self.value.dtype, device=self.value.device)
        with torch.autocast(self.value.device.type, enabled=False):  # means keep their digits
            return (shares @ self.value.flatten(1)).view(len(held), *self.value.shape[1:])


class DynamicAttention(nn.Module):
    """A_m: attention with one head from the queries of a pattern to the tokens of a sample (DCP 3.4).

    With one head the keys need not be made: the score of token x is x . u with u = W_k^T (W_q Q + b_q) / sqrt(d),
    as the key bias adds the same to each score, and values and output are affine in the mixture of tokens. So the d x d
    maps act on n queries and n mixtures instead of all S tokens. The parameters are those of ``nn.MultiheadAttention``.

    Args:
        width: d.
        draw: of the initial values: ``in_proj`` Xavier-uniform, biases zero, ``out_proj`` torch's default.
        name: of the draw.
    """

    def __init__(self, width: int, draw: Draws, name: str) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(draw.xavier(f"{name}.in_proj", 3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = draw.linear(f"{name}.out_proj", width, width)
        nn.init.zeros_(self.out_proj.bias)

    def probe(self, queries: Tensor) -> Tensor:
        """(T, n, d) queries -> (T, n, d) vectors u whose product with a token is its score."""
        weight_q, weight_k, _ = self.in_proj_weight.chunk(3)
        asked = nn.functional.linear(queries, weight_q, self.in_proj_bias[: weight_q.shape[0]])
        return (asked @ weight_k) / math.sqrt(weight_q.shape[0])

    def forward(self, mixed: Tensor) -> Tensor:
        """(b, n, d) mixtures of tokens -> (b, n, d) dynamic prompts."""
        *_, weight_v = self.in_proj_weight.chunk(3)
        values = nn.functional.linear(mixed, weight_v, self.in_proj_bias[-weight_v.shape[0] :])
        out: Tensor = self.out_proj(values)
        return out

    def affine(self) -> tuple[Tensor, Tensor]:
        """(d, d) matrix and (d,) shift that do the same as ``forward``: mixture @ matrix^T + shift."""
        *_, weight_v = self.in_proj_weight.chunk(3)
        bias_v = self.in_proj_bias[-weight_v.shape[0] :]
        return self.out_proj.weight @ weight_v, self.out_proj.weight @ bias_v + self.out_proj.bias


@dataclass
class PromptTables:
    """What depends on the pattern alone; by modality, T patterns each.

    Args:
        deep: correlated prompts V_0 .. V_{J_m - 1}, (T, n, d) each; empty where switched off.
        common: (T, n, d) or None.
        probe: (T, n, d) of the dynamic prompts, or None.
    """

    deep: list[list[Tensor]]
    common: list[Tensor | None]
    probe: list[Tensor | None]


class _Rows(nn.Module):
    """How prompts get in front of tokens: [correlated | common | dynamic | tokens] (DCP 3.4)."""

    #: rows in front of the tokens, by modality
    counts: list[int]

    @abstractmethod
    def tables(self, masks: Sequence[int]) -> PromptTables:
        """Tables of T patterns."""

    @abstractmethod
    def mixture(self, modality: int, mixed: Tensor) -> Tensor:
        """(b, n, d) mixtures of tokens -> dynamic prompts."""

    def rows(self, modality: int) -> int:
        """Rows that ``enter`` gives."""
        return self.counts[modality]

    def enter(self, modality: int, tokens: Tensor, which: Tensor, tables: PromptTables) -> Tensor | None:
        """Rows in front of block 0.

        Args:
            modality: its index.
            tokens: (b, S, d) before block 0, positions added, **all** S positions, padding included.
            which: (b,) int64 into the patterns of ``tables``.
            tables: of this step.

        Returns:
            (b, rows, d) in the tokens' dtype, or None where there are none.
        """
        parts = [tables.deep[modality][0].index_select(0, which)] if tables.deep[modality] else []
        common, probe = tables.common[modality], tables.probe[modality]
        if common is not None:
            parts.append(common.index_select(0, which))
        if probe is not None:
            parts.append(self.dynamic(modality, tokens, probe.index_select(0, which)))
        return torch.cat([part.to(tokens.dtype) for part in parts], dim=1) if parts else None

    def dynamic(self, modality: int, tokens: Tensor, probe: Tensor) -> Tensor:
        """(b, S, d) tokens, (b, n, d) probes -> (b, n, d) dynamic prompts; the softmax in float32 at least."""
        scores = probe.to(tokens.dtype) @ tokens.transpose(1, 2)
        share = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        mixed = share.to(tokens.dtype) @ tokens
        return self.mixture(modality, mixed.to(probe.dtype))

    def before(self, modality: int, block: int, h: Tensor, which: Tensor, tables: PromptTables) -> Tensor:
        """(b, R, d) rows in front of ``block`` >= 1: the correlated ones replaced while block < J_m."""
        deep = tables.deep[modality]
        if block >= len(deep):
            return h
        fresh = deep[block].index_select(0, which).to(h.dtype)
        return torch.cat([fresh, h[:, fresh.shape[1] :]], dim=1)


class CorrelatedPrompts(_Rows):
    """The prompt learner of DCP for M modalities.

    Of the L rows in front of each tower's tokens the first third is *correlated*: at each of J blocks a function of the
    prompts of all modalities one block below, the second third *common*: made for all towers from one source per
    pattern, the last third *dynamic*: an attention from queries of the pattern to the sample's own tokens.

    Args:
        widths: d_m by modality, in order; two bare numbers are image and text.
        length: L, rows in all; divisible by three (each group has L / 3). 0: no prompts at all, plain towers.
        depth: J, blocks that get fresh correlated prompts; 1 = the first only.
        blocks: of each tower, in order; a tower with fewer than J gets J_m = min(J, blocks), while the recursion runs
            J steps; one without blocks gets nothing. Default: J each.
        reduction: r, width of the generators' hidden layer is D // r (F) and d_c // r (G).
        correlated, common, dynamic: which groups there are; without a group its rows are gone, L shrinks.
        dynamic_queries: ``param``: trained. ``frozen``: drawn and stored as a buffer, as the released code in effect.
        init: ``independent``: each F_{m,j} is drawn for itself. ``official``: the J copies of a modality start equal.
        pattern_params: see ``PatternParameter``.
        seed: of all initial values.

    Raises:
        UserError: a length that is not divisible by three, a depth below one, an unknown choice.

    Source: Hu et al. 2024 (arXiv 2410.06558), released code; more than two modalities are our reading (DCP 3.7).
    Deviations: queries are trained by default (the code holds them as plain tensors), keys are not formed (exact, see
    ``DynamicAttention``). The source of the common prompts has the width of ``text``, without a text that of the last
    modality.
    """

    def __init__(
        self,
        widths: Mapping[str, int] | Sequence[int],
        length: int,
        depth: int,
        *,
        blocks: Sequence[int] | None = None,
        reduction: int = 16,
        correlated: bool = True,
        common: bool = True,
        dynamic: bool = True,
        dynamic_queries: str = "param",
        init: str = "independent",
        pattern_params: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.modalities, self.widths = _named(widths)
        _check(length, depth, reduction, dynamic_queries, init)
        self.n, self.depth = length // 3, depth
        blocks = [depth] * len(self.widths) if blocks is None else list(blocks)
        self.depths = [min(depth, count) for count in blocks]
        on = self.n > 0
        draw = Draws(seed, "dcp")
        self.has_correlated, self.has_common, self.has_dynamic = (
            on and group for group in (correlated, common, dynamic)
        )
        groups = self.has_correlated + self.has_common + self.has_dynamic
        self.counts = [self.n * groups if reach else 0 for reach in self.depths]
        if self.has_correlated:
            self._build_correlated(draw, reduction, init)
        if self.has_common:
            self._build_common(draw, reduction, pattern_params)
        if self.has_dynamic:
            self._build_dynamic(draw, pattern_params, dynamic_queries == "param")

    @property
    def num_prefix_tokens(self) -> dict[str, int]:
        """Prompt rows in front of each tower's own tokens (CLS is the row after them)."""
        return dict(zip(self.modalities, self.counts, strict=True))

    def _build_correlated(self, draw: Draws, reduction: int, init: str) -> None:
        total = sum(self.widths)
        hidden = max(total // reduction, 1)
        #: (2, n, d_m): observed, missing
        self.static = nn.ParameterList(
            nn.Parameter(draw.normal(f"static.{name}", 2, self.n, width))
            for name, width in zip(self.modalities, self.widths, strict=True)
        )
        self.generators = nn.ModuleList()
        for name, width, reach in zip(self.modalities, self.widths, self.depths, strict=True):
            steps = nn.ModuleList()
            # A shorter tower takes nothing from the last step, and nothing comes after it.
            for step in range(self.depth if reach == self.depth else self.depth - 1):
                part = f"F.{name}" if init == "official" else f"F.{name}.{step}"
                first, second = draw.linear(f"{part}.in", total, hidden), draw.linear(f"{part}.out", hidden, width)
                steps.append(nn.Sequential(nn.LayerNorm(total), first, nn.GELU(), second))
            self.generators.append(steps)

    def _build_common(self, draw: Draws, reduction: int, kind: str) -> None:
        source = self.widths[self.modalities.index("text")] if "text" in self.modalities else self.widths[-1]
        hidden = max(source // reduction, 1)
        self.common = PatternParameter(draw, "common", self.modalities, (self.n, source), kind)
        self.common_maps = nn.ModuleList(
            nn.Sequential(
                draw.linear(f"G.{name}.in", source, hidden), nn.GELU(), draw.linear(f"G.{name}.out", hidden, width)
            )
            if reach
            else nn.Identity()
            for name, width, reach in zip(self.modalities, self.widths, self.depths, strict=True)
        )

    def _build_dynamic(self, draw: Draws, kind: str, trained: bool) -> None:
        self.queries, self.attention = nn.ModuleList(), nn.ModuleList()
        for name, width, reach in zip(self.modalities, self.widths, self.depths, strict=True):
            if not reach:
                self.queries.append(nn.Identity())
                self.attention.append(nn.Identity())
                continue
            shape = (self.n, width)
            self.queries.append(PatternParameter(draw, f"queries.{name}", self.modalities, shape, kind, trained))
            self.attention.append(DynamicAttention(width, draw, f"A.{name}"))

    def tables(self, masks: Sequence[int]) -> PromptTables:
        """Prompts of T patterns (bit masks, see ``patterns.to_mask``); needs no input, once a step."""
        nothing: list[Tensor | None] = [None] * len(self.widths)
        deep = self._recursion(masks) if self.has_correlated else [[] for _ in self.widths]
        common, probe = list(nothing), list(nothing)
        if self.has_common:
            source = self.common(masks)
            common = [
                make(source) if reach else None for make, reach in zip(self.common_maps, self.depths, strict=True)
            ]
        for place, attention in enumerate(self.attention if self.has_dynamic else ()):
            if isinstance(attention, DynamicAttention):
                probe[place] = attention.probe(self.queries[place](masks))
        return PromptTables(deep, common, probe)

    def _recursion(self, masks: Sequence[int]) -> list[list[Tensor]]:
        """Correlated prompts by modality and block: every modality from all modalities one block below."""
        state = [
            torch.stack([static[0 if mask >> place & 1 else 1] for mask in masks])
            for place, static in enumerate(self.static)
        ]
        deep: list[list[Tensor]] = [[] for _ in state]
        for step in range(self.depth):
            joined = torch.cat(state, dim=-1)
            made = [
                steps[step](joined) if step < len(steps) else None
                for steps in self.generators
                if isinstance(steps, nn.ModuleList)
            ]
            for place, rows in enumerate(made):
                if rows is not None and step < self.depths[place]:
                    deep[place].append(rows)
            state = [rows for rows in made if rows is not None]
        return deep

    def mixture(self, modality: int, mixed: Tensor) -> Tensor:
        """(b, n, d) mixtures of tokens -> dynamic prompts, by the modality's attention."""
        out: Tensor = self.attention[modality](mixed)
        return out

    @torch.no_grad()
    def bake(self, masks: Sequence[int]) -> BakedPrompts:
        """The same prompts as stored tables, for inference (exact, DCP 8)."""
        maps = [
            attention.affine() if isinstance(attention, DynamicAttention) else None
            for attention in (self.attention if self.has_dynamic else [None] * len(self.widths))
        ]
        return BakedPrompts(self.counts, masks, self.tables(masks), maps)


class BakedPrompts(_Rows):
    """Prompts as tables: no generator is left. It gives what the ``CorrelatedPrompts`` it was baked from gave.

    Args:
        counts: rows by modality.
        masks: patterns of the tables.
        tables: of these patterns.
        maps: by modality the affine map of the dynamic prompts, ((d, d), (d,)), or None.
    """

    def __init__(
        self,
        counts: Sequence[int],
        masks: Sequence[int],
        tables: PromptTables,
        maps: Sequence[tuple[Tensor, Tensor] | None],
    ) -> None:
        super().__init__()
        self.counts, self.masks = list(counts), list(masks)
        self.reach = [len(deep) for deep in tables.deep]
        for place, deep in enumerate(tables.deep):
            stored = {f"deep_{place}": torch.stack(deep) if deep else None}
            stored |= {f"common_{place}": tables.common[place], f"probe_{place}": tables.probe[place]}
            matrix, shift = maps[place] or (None, None)
            stored |= {f"matrix_{place}": matrix, f"shift_{place}": shift}
            for name, value in stored.items():
                self.register_buffer(name, None if value is None else value.detach().clone())

    def tables(self, masks: Sequence[int]) -> PromptTables:
        """Stored tables of T patterns (UserError for a pattern that was not baked)."""
        lost = [mask for mask in masks if mask not in self.masks]
        if lost:
            raise UserError(f"no prompts were exported for pattern {lost[0]:b}; export all patterns")
        places = [self.masks.index(mask) for mask in masks]

        def pick(name: str) -> Tensor | None:
            value: Tensor | None = getattr(self, name)
            return None if value is None else value[places]

        deep = [
            [self.get_buffer(f"deep_{place}")[block][places] for block in range(reach)]
            for place, reach in enumerate(self.reach)
        ]
        every = range(len(self.reach))
        return PromptTables(
            deep, [pick(f"common_{place}") for place in every], [pick(f"probe_{place}") for place in every]
        )

    def mixture(self, modality: int, mixed: Tensor) -> Tensor:
        """(b, n, d) mixtures of tokens -> dynamic prompts, by the stored affine map."""
        matrix, shift = self.get_buffer(f"matrix_{modality}"), self.get_buffer(f"shift_{modality}")
        return nn.functional.linear(mixed, matrix, shift)


def _named(widths: Mapping[str, int] | Sequence[int]) -> tuple[tuple[str, ...], list[int]]:
    if isinstance(widths, Mapping):
        return tuple(widths), list(widths.values())
    if len(widths) != len(IMAGE_TEXT):
        raise UserError(f"{len(widths)} widths without names; give a mapping from modality to width")
    return IMAGE_TEXT, list(widths)


def _check(length: int, depth: int, reduction: int, dynamic_queries: str, init: str) -> None:
    if length < 0 or length % 3:
        raise UserError(
            f"prompt length {length}; expected a multiple of three (correlated, common, dynamic), such as 36"
        )
    if depth < 1 or reduction < 1:
        raise UserError(f"prompt depth {depth}, reduction {reduction}; both start at 1")
    if dynamic_queries not in ("param", "frozen"):
        raise UserError(f"dynamic_queries={dynamic_queries!r}; expected param or frozen")
    if init not in ("independent", "official"):
        raise UserError(f"init={init!r}; expected independent or official")
