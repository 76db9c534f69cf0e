"""Padded patches of a tile: they never merge and go first (SmolVLM and Idefics3 pad small pictures)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from vlm_accel.methods.base import Reduced

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_accel.methods.base import TokenMethod, Tokens

__all__ = ["ValidFirst"]


class ValidFirst:
    """A token method that sees the valid rows of each tile only, and fills up with padded ones.

    Every tile keeps the same number of rows m, as promised by ``resolve``. A tile with v valid rows keeps min(m, v) of
    them, chosen by the method, and m - v padded ones, unchanged: nothing of a padded row flows into a valid one, and a
    valid row goes only when no padded one is left. Tiles with equal v are reduced together.

    Args:
        method: the method.
        valid: (S, N) bool rows (cells) that hold a picture; read back once per call.
    """

    def __init__(self, method: TokenMethod, valid: Tensor) -> None:
        self.method = method
        self.valid = valid
        self.counts: list[int] = valid.sum(1).tolist()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten to ``keep`` rows a tile; the rows that are valid are followed for the next step."""
        s = len(tokens.x)
        parts: list[tuple[Tensor, Reduced]] = []
        for count in sorted(set(self.counts)):
            tiles = torch.tensor([i for i, v in enumerate(self.counts) if v == count]).to(tokens.x.device)
            parts.append((tiles, self._some(tokens, tiles, count, keep)))
        self.counts = [min(count, keep) for count in self.counts]
        joined: dict[str, Any] = {}
        for name in ("x", "kept", "sizes", "assign", "weight", "key_bias"):
            given = [getattr(part, name) for _, part in parts]
            if any(one is None for one in given):
                continue
            joined[name] = given[0].new_empty(s, *given[0].shape[1:])
            for (tiles, _), one in zip(parts, given, strict=True):
                joined[name][tiles] = one.to(given[0].dtype)
        self.valid = self.valid.gather(1, joined["kept"])
        return Reduced(**joined)

    def _some(self, tokens: Tokens, tiles: Tensor, count: int, keep: int) -> Reduced:
        """Tiles with ``count`` valid rows each."""
        n = tokens.x.shape[1]
        order = (~self.valid[tiles]).sort(stable=True, dim=1).indices  # valid rows first, each kind in its order
        real, stay = order[:, :count], order[:, count : count + max(0, keep - count)]
        mine: dict[str, Any] = {
            field.name: _rows(value[tiles], real)
            for field in dataclasses.fields(tokens)
            if field.name not in ("grid", "span") and torch.is_tensor(value := getattr(tokens, field.name))
        }
        some = dataclasses.replace(tokens, **mine, span=None if tokens.span is None else tokens.span[tiles])
        if keep < count:
            reduced = self.method.reduce(some, keep)
        else:
            own = torch.arange(count, device=real.device).expand(len(tiles), -1)
            reduced = Reduced(x=some.x, kept=own, sizes=some.sizes, assign=own)
            if self.method.biases_keys and some.sizes is not None:
                reduced.key_bias = some.sizes.log()
        kept = torch.cat((real.gather(1, reduced.kept), stay), 1)
        kept, place = kept.sort(1)
        rank = place.argsort(1)  # where each row of (reduced, padded) stands among those kept
        found = Reduced(x=_rows(torch.cat((reduced.x, _rows(tokens.x[tiles], stay)), 1), place), kept=kept)
        if tokens.sizes is not None:
            sizes = some.sizes.gather(1, reduced.kept) if reduced.sizes is None else reduced.sizes  # type: ignore[union-attr]
            found.sizes = torch.cat((sizes, tokens.sizes[tiles].gather(1, stay)), 1).gather(1, place)
        if reduced.key_bias is not None:
            found.key_bias = torch.cat((reduced.key_bias, torch.zeros_like(stay, dtype=torch.float32)), 1).gather(
                1, place
            )
        if tokens.trace and reduced.assign is not None:
            m = reduced.kept.shape[1]
            went = torch.where(reduced.assign < 0, -1, rank.gather(1, reduced.assign.clamp(min=0)))
            found.assign = torch.full((len(tiles), n), -1, device=kept.device).scatter(1, real, went)
            found.assign = found.assign.scatter(1, stay, rank[:, m:])
            weight = torch.nn.functional.one_hot(reduced.kept, count) if reduced.weight is None else reduced.weight
            weight = weight.float()
            full = weight.new_zeros(len(tiles), kept.shape[1], n)
            full[:, :m].scatter_(2, real[:, None].expand(-1, m, -1), weight)
            full[:, m:].scatter_(2, stay[..., None], 1.0)
            found.weight = _rows(full, place)
        return found


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(S, N, ...) -> (S, m, ...) rows ``index`` (S, m)."""
    wide = index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, wide)
