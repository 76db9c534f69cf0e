"""The one place that sees uploads: clip, sum, noise, fixed denominator.

Algorithms make one upload a client and post-process what comes out. Whatever a client sends, it changes the sum by at
most C; whatever is missing or broken counts as a zero vector, and the noise is added all the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fedcore.reduce import Reducer

if TYPE_CHECKING:
    from fedcore.algorithm import Context, Tree
    from fedcore.engines.base import ClientResult
    from fedcore.privacy.noise import NoiseSource

__all__ = ["ClientDPMechanism", "MechanismSettings", "Span", "clip_factors", "joint_norm", "spans_of"]

ClipMode = Literal["flat", "per_layer", "official_median"]
CHUNK = 2**15
"""numbers handled at once on a CPU: as float64 they stay in the cache, which is half of the time"""
Span = tuple[str, int, int]
"""name of an upload's tensor, first and one past the last of its numbers: what one factor scales"""


@dataclass(frozen=True)
class MechanismSettings:
    """Public constants of a release.

    Args:
        clip: C, largest norm of an upload over all its numbers; infinity leaves it as it is (no guarantee).
        noise_multiplier: sigma; the noise on the sum has deviation sigma C.
        denominator: m = q N, expected cohort, by which the noisy sum is divided; never the number that reported.
        steps: K, the same for every client.
        clip_mode: ``flat``: one norm over the whole upload; ``per_layer``: C / sqrt(L) for each of L tensors, whose
            squares add up to C^2; ``official_median``: as the authors' script, every tensor of a client clipped to
            the median of its own norms, which no epsilon goes with.
        noise_location: ``server``: once on the sum; ``client``: each client of the cohort adds N(0, sigma^2 C^2 / m),
            the same sum if all report, and nothing is released where one is missing.
        tell: also count what is not private.
    """

    clip: float
    noise_multiplier: float
    denominator: float
    steps: int
    clip_mode: ClipMode = "flat"
    noise_location: Literal["server", "client"] = "server"
    tell: bool = False


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all numbers, computed in float64; NaN where one of them is not finite.

    Finite numbers whose squares overflow are measured after scaling.
    """
    kept = list(tensors)
    norm = math.sqrt(sum(_squared(t) for t in kept))
    if math.isfinite(norm):
        return norm
    if not all(bool(t.isfinite().all()) for t in kept):
        return math.nan
    largest = max(float(t.abs().max()) for t in kept if t.numel())
    scaled = [t.double() / largest for t in kept if t.numel()]
    return largest * math.sqrt(sum(_squared(t) for t in scaled))


def _squared(tensor: Tensor) -> float:
    """Sum of squares in float64."""
    if tensor.device.type != "cpu":
        return float(tensor.double().square().sum())
    total = 0.0
    for part in tensor.detach().reshape(-1).split(CHUNK):  # type: ignore[no-untyped-call]
        wide = part.double()
        total += float(wide.dot(wide))
    return total


def clip_factors(upload: Tree, spans: Sequence[Span], mode: ClipMode, clip: float) -> tuple[list[float], float] | None:
    """What each span of an upload is multiplied with, and the bound that was used.

    Args:
        upload: tensors by name.
        spans: parts of it; all numbers are in exactly one.
        mode: see ``MechanismSettings``.
        clip: C.

    Returns:
        Factors in [0, 1] and the client's bound (C, or the median of its norms); None where a number is not finite.
    """
    if mode == "flat":
        norm = joint_norm(upload.values())
        return None if math.isnan(norm) else ([_factor(norm, clip)] * len(spans), clip)
    norms = [joint_norm([upload[name].reshape(-1)[first:stop]]) for name, first, stop in spans]
    if any(math.isnan(norm) for norm in norms):
        return None
    if mode == "per_layer":
        return [_factor(norm, clip / math.sqrt(len(spans))) for norm in norms], clip
    bound = statistics.median(norms)
    return [_factor(norm, bound) for norm in norms], bound


def _factor(norm: float, bound: float) -> float:
    return 1.0 if norm <= bound else bound / norm


def spans_of(layout: Mapping[str, Tensor], parameters: Iterable[tuple[int, int]], mode: ClipMode) -> list[Span]:
    """What one factor scales: whole tensors, or the model's tensors within those that are as long as the model.

    Args:
        layout: an upload, of any values.
        parameters: (first, one past the last) number of each of the model's tensors.
        mode: of clipping.
    """
    bounds = list(parameters)
    total = bounds[-1][1] if bounds else 0
    spans: list[Span] = []
    for name, value in layout.items():
        split = mode != "flat" and value.numel() == total
        spans += [(name, first, stop) for first, stop in (bounds if split else [(0, value.numel())])]
    return spans


def _accumulate(total: Tensor, part: Tensor, factor: float) -> None:
    """``total += factor * part``, the product in float64."""
    if total.device.type != "cpu":
        total.add_(part.to(total.device), alpha=factor)
        return
    for first in range(0, total.numel(), CHUNK):
        total[first : first + CHUNK].add_(part[first : first + CHUNK].to(total.device), alpha=factor)


class ClientDPMechanism(Reducer):
    """Clips each upload, adds them up in the order of clients, adds noise once, divides by the fixed denominator.

    Sums and noise are float64; the result is cast to the uploads' own format once, at the end. An upload that is
    missing, not finite, of other names or shapes, of a client outside the cohort, or a client's second one, is a zero
    vector. ``result`` gives one release and no second one: two draws of noise on one sum would be two events.

    Args:
        settings: public constants.
        layout: an upload of any values: names, shapes, formats. Public, never taken from what clients sent.
        noise: source of the noise.
        announce: called with the number of released numbers, before noise is drawn; writes the ledger. What it raises
            ends the round, and nothing is released.
        round: index of the round.
        cohort: ids of the clients that were asked (None: any).
        spans: what one clip factor scales (default: whole tensors).
    """

    needs_reports: ClassVar[bool] = False

    def __init__(
        self,
        settings: MechanismSettings,
        layout: Tree,
        noise: NoiseSource,
        announce: Callable[[int], None],
        *,
        round: int = 0,
        cohort: Iterable[int] | None = None,
        spans: Sequence[Span] | None = None,
    ) -> None:
        super().__init__("sum", "uniform")
        self.settings, self._layout, self._noise, self._announce, self._round = settings, layout, noise, announce, round
        self._waiting = None if cohort is None else set(cohort)
        self._asked = len(self._waiting) if self._waiting is not None else None
        self._spans = list(spans) if spans is not None else spans_of(layout, [], "flat")
        self._seen: set[Any] = set()
        self._sum = {n: torch.zeros(v.shape, dtype=torch.float64, device=v.device) for n, v in layout.items()}
        self._squared_bounds = 0.0
        self._norms: list[float] = []
        self._clipped = 0
        self._over = False
        self.tells = settings.tell

    # ------------------------------------------------------------------ what clients sent

    def add(self, result: ClientResult) -> None:
        """Take the upload of a client, clipped; what cannot be used is a zero vector."""
        client = result.client.id
        if self._over or client in self._seen or (self._waiting is not None and client not in self._waiting):
            return
        self._seen.add(client)
        clipped = self._clip(result.upload)
        if clipped is None:
            return
        factors, bound = clipped
        for (name, first, stop), factor in zip(self._spans, factors, strict=True):
            if factor:
                part = result.upload[name].detach().reshape(-1)[first:stop]
                _accumulate(self._sum[name].view(-1)[first:stop], part, factor)
        self.reported += 1
        self._squared_bounds += bound * bound
        if self.settings.noise_location == "client":
            self._noise.add(list(self._sum.values()), self._share(bound), self._round, f"client {client}")
        if self.settings.tell:
            self._steps += int(result.client.steps)
            self._loss += result.loss
            self._norms.append(joint_norm(result.upload.values()))
            self._clipped += any(factor < 1 for factor in factors)

    def _clip(self, upload: Any) -> tuple[list[float], float] | None:
        """Factors of an upload; None where it is not what was asked for."""
        if not isinstance(upload, dict) or set(upload) != set(self._layout):
            return None
        for name, like in self._layout.items():
            value = upload[name]
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.shape != like.shape:
                return None
            if not value.is_floating_point():
                return None
        return clip_factors(upload, self._spans, self.settings.clip_mode, self.settings.clip)

    def _share(self, bound: float) -> float:
        """Deviation of the noise that one client adds."""
        return self.settings.noise_multiplier * bound / math.sqrt(self.settings.denominator)

    def count(self, result: ClientResult) -> None:
        """Bytes are counted where what is not private is told; errors never are."""
        if self.settings.tell:
            super().count(result)

    # ------------------------------------------------------------------ what is released

    @property
    def complete(self) -> bool:
        """Whether the noise of the sum is whole: always, unless clients add it and one is missing."""
        return self.settings.noise_location == "server" or self._asked is None or self.reported == self._asked

    def result(self) -> Tree:
        """The release: ``(sum + noise) / m`` by name.

        Raises:
            RuntimeError: a second call.
        RoundError: the noise of a client is missing.
        """
        if self._over:
            raise RuntimeError("a mechanism releases once; a second release would need a second event")
        if not self.complete:
            from fedcore.simulation import RoundError

            raise RoundError(
                f"round {self._round}: a client that adds its share of the noise is missing; none released"
            )
        self._over = True
        self._announce(sum(value.numel() for value in self._layout.values()))
        self._noise.add(list(self._sum.values()), self._deviation, self._round)
        m = self.settings.denominator
        return {name: value.div_(m).to(self._layout[name].dtype) for name, value in self._sum.items()}

    @property
    def _deviation(self) -> float:
        """Deviation of the noise on the sum that the server adds."""
        settings = self.settings
        if settings.noise_location == "client" or not settings.noise_multiplier:
            return 0.0
        if settings.clip_mode == "official_median":  # as if each client had added its share
            return settings.noise_multiplier * math.sqrt(self._squared_bounds / settings.denominator)
        return settings.noise_multiplier * settings.clip

    def context(self, ctx: Context) -> Context:
        """The round with public numbers: expected cohort m and K."""
        m: Any = self.settings.denominator  # may be a fraction
        return replace(ctx, cohort=m, steps=self.settings.steps, max_steps=self.settings.steps)

    def buffers(self) -> dict[str, Tensor]:
        """None: buffers of clients are never averaged, the model keeps those it came with."""
        return {}

    def row(self) -> dict[str, Any]:
        """Nothing; with ``tell`` loss, clients, steps, bytes, share of clipped uploads, norms: none is private."""
        if not self.settings.tell:
            return {}
        reported = max(1, self.reported)
        return {
            "loss": self._loss / reported if self.reported else math.nan,
            "clients": self.reported,
            "local_steps": self._steps,
            "comm/up_bytes": self._up,
            "comm/down_bytes": self._down,
            "unsafe/clipped": self._clipped / reported,
            "unsafe/norm_median": statistics.median(self._norms) if self._norms else 0.0,
        }
