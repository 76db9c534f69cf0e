"""Where tokens are reduced and to how many: steps, pyramids, and the counts they lead to.

Sources: iLLaVA 3.1 (steps, rounding), LightVLM 3.2 (pyramid). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from polymodal.errors import UserError

__all__ = ["Pyramid", "Schedule", "Step", "Taper", "counts_per_layer", "expand", "pyramid", "resolve"]

Stage = Literal["vision", "llm"]


@dataclass(frozen=True)
class Step:
    """Reduce the tokens of every image (tile, frame, span) once.

    Exactly one of ``keep``, ``ratio``, ``drop``, ``drop_ratio`` is given; it acts on the count at that point.

    Args:
        stage: ``"vision"`` (between attention and MLP of that encoder block) or ``"llm"`` (before that decoder layer).
        layer: 0-based block or layer.
        keep: tokens kept.
        ratio: share kept, in (0, 1]; ``N - round(N * (1 - ratio))`` are kept, half to even.
        drop: tokens removed.
        drop_ratio: share removed, in [0, 1), rounded down.
        truncate: ``ratio`` keeps ``int(N * ratio)`` instead (PyramidDrop, LightVLM 5).

    Raises:
        UserError: not exactly one amount, an amount out of range, an unknown stage, a negative layer.
    """

    stage: Stage
    layer: int
    keep: int | None = None
    ratio: float | None = None
    drop: int | None = None
    drop_ratio: float | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        where = f"step at {self.stage} layer {self.layer}"
        if self.stage not in ("vision", "llm"):
            raise UserError(f"step with stage={self.stage!r}; use 'vision' or 'llm'")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise UserError(f"{where}: the layer must be a whole number from 0")
        if self.stage == "llm" and self.layer == 0:
            raise UserError(f"{where}: no score exists before the first layer; use layer 1 or later")
        given = [name for name in ("keep", "ratio", "drop", "drop_ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"{where}: give exactly one of keep, ratio, drop, drop_ratio (given: {given or 'none'})")
        amount = getattr(self, given[0])
        if isinstance(amount, bool) or not isinstance(amount, int if given[0] in ("keep", "drop") else int | float):
            kind = "a whole number of tokens" if given[0] in ("keep", "drop") else "a share"
            raise UserError(f"{where}: {given[0]}={amount!r}; expected {kind}")
        if self.keep is not None and self.keep < 1:
            raise UserError(f"{where}: keep={self.keep}; at least one token must stay")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(f"{where}: ratio={self.ratio}; expected a share kept in (0, 1]")
        if self.drop is not None and self.drop < 0:
            raise UserError(f"{where}: drop={self.drop}; expected 0 or more")
        if self.drop_ratio is not None and not 0 <= self.drop_ratio < 1:
            raise UserError(f"{where}: drop_ratio={self.drop_ratio}; expected a share removed in [0, 1)")

    def count(self, tokens: int, group: int = 1) -> int:
        """Tokens left of ``tokens``: within [1, tokens], a multiple of ``group`` where group > 1 (iLLaVA 3.1)."""
        if self.keep is not None:
            left = self.keep
        elif self.ratio is not None and self.truncate:
            left = int(tokens * self.ratio + 1e-9)
        elif self.ratio is not None:
            left = tokens - round(tokens * (1 - self.ratio))
        elif self.drop is not None:
            left = tokens - self.drop
        else:
            assert self.drop_ratio is not None
            removed = int(self.drop_ratio * tokens + 1e-9)
            left = tokens - removed // group * group
        left = min(tokens, max(1, left))
        return max(group, left // group * group) if group > 1 else left


@dataclass(frozen=True)
class Pyramid:
    """LLM steps that become concrete when the number of decoder layers is known; made by ``pyramid``.

    Args:
        target, layers, meaning, ratios: as in ``pyramid``.
        of: depth for which ``layers`` were published; they move to the same share of the model's depth (at least 1,
            ascending, not before ``first`` of ``steps``). None: ``layers`` are taken as they are.
        truncate: steps keep ``int(N * ratio)``.
    """

    target: float
    layers: tuple[int, ...] | None = None
    meaning: Literal["final", "mean"] = "final"
    ratios: tuple[float, ...] | None = None
    of: int | None = None
    truncate: bool = False

    def steps(self, depth: int, first: int = 1) -> list[Step]:
        """The steps for a decoder of ``depth`` layers, default ones not before layer ``first`` (LightVLM 3.2)."""
        layers = self.layers or tuple(dict.fromkeys(max(first, k) for k in (2, depth // 3, 2 * depth // 3)))
        layers = tuple(sorted(layers)) if self.of is None else _scaled(sorted(layers), self.of, depth, first)
        if layers[-1] >= depth:
            raise UserError(f"pyramid: layer {layers[-1]} is beyond the model's {depth} layers; give layers below it")
        if self.ratios is not None:
            ratios: Sequence[float] = self.ratios
        elif self.meaning == "final":
            ratios = [self.target ** (1 / len(layers))] * len(layers)
        else:
            ratios = [_mean_ratio(self.target, layers, depth)] * len(layers)
        return [
            Step("llm", layer, ratio=ratio, truncate=self.truncate) for layer, ratio in zip(layers, ratios, strict=True)
        ]


@dataclass(frozen=True)
class Taper:
    """Encoder steps that become concrete when the number of blocks is known: ``accelerate(encoder, ..., ratio=)``.

    Args:
        ratio: share of patches left at the end, in (0, 1].
        steps: number of steps; each keeps ``ratio ** (1 / steps)``.
        start: share of the depth where the first one stands (iLLaVA 7.1: 25 %).
    """

    ratio: float
    steps: int = 4
    start: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio={self.ratio}; expected a share kept in (0, 1]")

    def expand(self, depth: int, allowed: Sequence[int] | None = None) -> list[Step]:
        """Steps at consecutive blocks from ``start``; only at ``allowed`` blocks where an encoder has such a list."""
        possible = allowed or range(depth)
        blocks = [layer for layer in possible if layer >= int(self.start * depth)] or [possible[-1]]
        chosen = blocks[: self.steps]
        return [Step("vision", layer, ratio=self.ratio ** (1 / len(chosen))) for layer in chosen]


Schedule: TypeAlias = Sequence[Step | Pyramid | Taper]


def pyramid(
    target: float,
    layers: Sequence[int] | None = None,
    meaning: Literal["final", "mean"] = "final",
    ratios: Sequence[float] | None = None,
) -> list[Step | Pyramid | Taper]:
    """LLM steps that lead to ``target`` (LightVLM 3.2).

    Args:
        target: share of the image tokens, in (0, 1].
        layers: 0-based layers, ascending; default 2, L // 3, 2 L // 3 of L layers. Layer 0 is refused: no score yet.
        meaning: ``final``: share left after the last step; ``mean``: share averaged over all layers.
        ratios: one share per layer, in place of equal ones (then ``target`` is not used).

    Returns:
        a list with one element, so that it adds to other steps: ``[Step("vision", 5, ratio=.5), *pyramid(.35)]``.

    Raises:
        UserError: target or ratios out of range, layers that do not ascend, lengths that differ.
    """
    if not 0 < target <= 1:
        raise UserError(f"pyramid: target={target}; expected a share kept in (0, 1]")
    if meaning not in ("final", "mean"):
        raise UserError(f"pyramid: meaning={meaning!r}; use 'final' or 'mean'")
    if layers is not None and (not layers or list(layers) != sorted(set(layers)) or layers[0] < 1):
        raise UserError(f"pyramid: layers={list(layers)}; expected ascending layers from 1 (layer 0 has no score yet)")
    if ratios is not None:
        if layers is None or len(ratios) != len(layers):
            raise UserError("pyramid: ratios needs layers of the same length")
        if any(not 0 < ratio <= 1 for ratio in ratios):
            raise UserError(f"pyramid: ratios={list(ratios)}; expected shares in (0, 1]")
    return [Pyramid(target, tuple(layers) if layers else None, meaning, tuple(ratios) if ratios else None)]


def resolve(schedule: Iterable[Step], tokens: int, group: int = 1) -> list[int]:
    """Tokens left after each step, in order, of an image that starts with ``tokens``; nothing is run.

    Args:
        schedule: steps of one stage (or of both, where the decoder takes over the encoder's count).
        tokens: count before the first step.
        group: tokens that stay together (4 for encoders with 2 x 2 cells); applied to vision steps.

    Returns:
        one count a step.
    """
    counts = []
    for step in schedule:
        tokens = step.count(tokens, group if step.stage == "vision" else 1)
        counts.append(tokens)
    return counts


def expand(
    schedule: Schedule, vision_layers: int, llm_layers: int, allowed: Sequence[int] | None = None, first: int = 1
) -> tuple[list[Step], list[Step]]:
    """Concrete (vision steps, LLM steps), each ordered by layer, checked against the model.

    Args:
        schedule: steps, pyramids, tapers in any order.
        vision_layers: encoder blocks whose output is used (0: no encoder).
        llm_layers: decoder layers (0: no decoder).
        allowed: blocks at which the encoder may be shortened; None: all.
        first: first decoder layer of pyramids that name no layers.

    Raises:
        UserError: a layer beyond the model, two steps at one layer, a stage that the model does not have.
    """
    steps: list[Step] = []
    for part in schedule:
        if isinstance(part, Pyramid):
            steps += part.steps(llm_layers, first) if llm_layers else []
        elif isinstance(part, Taper):
            steps += part.expand(vision_layers, allowed)
        else:
            steps.append(part)
    found = {}
    for stage, depth in (("vision", vision_layers), ("llm", llm_layers)):
        mine = sorted((step for step in steps if step.stage == stage), key=lambda step: step.layer)
        layers = [step.layer for step in mine]
        if mine and not depth:
            raise UserError(f"the schedule has {stage} steps, but the model has no {stage} part; leave them out")
        if mine and layers[-1] >= depth:
            raise UserError(
                f"{stage} step at layer {layers[-1]}, but only layers 0 to {depth - 1} are used; choose an earlier one"
            )
        if len(set(layers)) != len(layers):
            raise UserError(f"two {stage} steps at one layer ({layers}); join them into one")
        if stage == "vision" and allowed is not None and not set(layers) <= set(allowed):
            raise UserError(f"vision steps at {layers}: this encoder can be shortened at {list(allowed)} only")
        found[stage] = mine
    return found["vision"], found["llm"]


def counts_per_layer(steps: Sequence[Step], tokens: int, depth: int, group: int = 1) -> list[int]:
    """Tokens that enter the attention of each of ``depth`` layers (an LLM step counts from its own layer on)."""
    counts = []
    ordered = {step.layer: step for step in steps}
    for layer in range(depth):
        step = ordered.get(layer)
        if step is not None and step.stage == "llm":
            tokens = step.count(tokens)
        counts.append(tokens)
        if step is not None and step.stage == "vision":
            tokens = step.count(tokens, group)
    return counts


def _scaled(layers: Sequence[int], of: int, depth: int, first: int) -> tuple[int, ...]:
    """``layers`` of ``of`` at the same share of ``depth``, each after the one before, none before ``first``."""
    moved: list[int] = []
    for layer in layers:
        moved.append(max(round(layer * depth / of), moved[-1] + 1 if moved else first))
    return tuple(moved)


def _mean_ratio(target: float, layers: Sequence[int], depth: int) -> float:
    """Equal ratio r with mean over layers of r ** (steps done) = target, by bisection (LightVLM 3.2)."""
    done = [sum(layer >= at for at in layers) for layer in range(depth)]
    least = sum(count == 0 for count in done) / depth
    if target < least:
        raise UserError(
            f"pyramid: a mean share of {target} cannot be reached: the layers before {layers[0]} alone give {least:.3f}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(middle**count for count in done) / depth
        low, high = (middle, high) if mean < target else (low, middle)
    return high
