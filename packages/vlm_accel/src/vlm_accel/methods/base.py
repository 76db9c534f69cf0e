"""What a method is: a frozen dataclass of its options with up to three abilities.

* ``TokenMethod``: shortens the tokens of images at a step, inside the encoder and/or inside the decoder.
* ``FeatureMethod``: shortens what the encoder gives to the decoder, once, after the encoder.
* ``CacheMethod``: says which cache entries go.

A class may have several (LightVLM is a TokenMethod and a CacheMethod). No method knows a model: engines
(``vlm_accel.encoders``, ``vlm_accel.llm``) hand it tensors and act on what it returns. All rows of a batch have the
same number of tokens, and all keep the same number: batched gathers, no loop over samples, no host synchronisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vlm_accel.budget import KVBudget
    from vlm_accel.schedule import Schedule, Step

__all__ = [
    "CacheMethod",
    "CacheView",
    "FeatureMethod",
    "Features",
    "Method",
    "Reduced",
    "ScoreKind",
    "TokenMethod",
    "Tokens",
    "Trace",
]

ScoreKind = Literal["received", "cls", "lse", "last", "self", "text", "none"]
Trace = bool | Literal["assign"]


@dataclass
class Tokens:
    """Tokens of S spans (images, tiles, frames, or runs of image tokens in a prompt) at one step.

    Where an encoder has cells of g tokens (2 x 2 mergers), one row is one **cell**: x is (S, N / g, g * D), scores are
    the means over the cell, and whatever linear thing a method does acts slot by slot.

    Args:
        x: (S, N, D).
        stage: ``"vision"`` or ``"llm"``.
        layer: block or layer of the step.
        scores: (S, N) float32, higher = keep, of the kind that ``TokenMethod.score(stage)`` asked for; None for
            ``"none"``.
        sizes: (S, N) float32, source tokens that a row stands for (all 1 at first).
        index: (S, N) int64, where the row stood among the image's N_0 tokens; -1 for rows that a method appended.
        grid: (height, width) of the N_0 tokens; None where there is none.
        keys: (S, N, H, d) this block's keys, head by head, where ``TokenMethod.needs_keys``.
        queries: (S, N, H, d) likewise.
        seed: of the whole acceleration; draws are functions of (seed, stage, layer, span), never of call order.
        span: (S,) int64 number of the span within its model call, for such draws.
        prefix: rows in front of these that are never touched (ToMe's split into even and odd counts them).
        trace: whether ``Reduced.assign`` and ``.weight`` are wanted; ``"assign"``: only the former, which costs little.
    """

    x: Tensor
    stage: str
    layer: int
    scores: Tensor | None = None
    sizes: Tensor | None = None
    index: Tensor | None = None
    grid: tuple[int, int] | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    seed: int = 0
    span: Tensor | None = None
    prefix: int = 0
    trace: Trace = False


@dataclass
class Reduced:
    """What a step leaves.

    Args:
        x: (S, M, D), dtype of the input.
        kept: (S, M) int64, ascending: the input row whose position each output row has.
        sizes: (S, M) float32; None: the method keeps no sizes (the engine gathers the old ones).
        assign: (S, N) int64 in [0, M), or -1 for a row that went nowhere; only with ``trace`` (else None allowed).
        weight: (S, M, N) float32, rows sum to 1 where the rule is a mean; only with ``trace``. None
            beside an ``assign``: every row is the input row in ``kept`` (nothing merged), or ``trace`` is ``"assign"``.
        key_bias: (S, M) float32 added to the attention logits of each key in later blocks (ToMe's log sizes), or None.

    Unpacks in this order: ``tokens, kept, assign, sizes, weight, key_bias = ops.recycle(x, scores, keep)``.
    """

    x: Tensor
    kept: Tensor
    sizes: Tensor | None = None
    assign: Tensor | None = None
    weight: Tensor | None = None
    key_bias: Tensor | None = None

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.x, self.kept, self.assign, self.sizes, self.weight, self.key_bias

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts())

    def __len__(self) -> int:
        return 6

    def __getitem__(self, at: int) -> Any:
        return self._parts()[at]


@dataclass
class Features:
    """What the encoder knows of I images when it is done, for a ``FeatureMethod``.

    Args:
        x: (I, N, D) features that go on to the projector (prefix rows taken off).
        cls_attention: {block: (I, H, N)} attention of the CLS row (softmax over all rows), for the blocks that
            ``FeatureMethod.blocks(depth, used)`` named; without a CLS row: the mean attention received, as (I, H, N).
        keys, queries: {block: (I, N, H, d)}, the CLS row taken off, for the same blocks where ``needs_keys``.
        cls_query: {block: (I, H, d)} the CLS row's query (PruMerge's unsplit attention), or the mean query.
        cls_key: {block: (I, H, d)} the CLS row's key, or None.
        grid: (height, width) of the N patches.
        groups: which rows belong to one picture: for anyres models the list of (base row, tile rows, tiles (h, w)),
            None where every row is a picture by itself.
        has_cls: whether there is a CLS row.
        seed, trace: as in ``Tokens``.
    """

    x: Tensor
    cls_attention: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    cls_query: dict[int, Tensor] = field(default_factory=dict)
    cls_key: dict[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    groups: list[tuple[int, list[int], tuple[int, int]]] | None = None
    has_cls: bool = True
    seed: int = 0
    trace: bool = False


class Method:
    """Base of all methods; subclasses are frozen dataclasses of options, one file each."""

    stages: ClassVar[tuple[str, ...]] = ()

    def schedule(self) -> Schedule:
        """Steps when the user gives none; [] where the method needs none."""
        return []

    def kv(self) -> KVBudget | None:
        """Cache budget when the user gives none; None: the cache is left alone."""
        return None


class TokenMethod(Method, ABC):
    """A method that shortens tokens at steps. ``stages`` says where it can: any of ``"vision"``, ``"llm"``."""

    stages: ClassVar[tuple[str, ...]] = ("vision", "llm")
    needs_keys: ClassVar[bool] = False
    #: sets ``Reduced.key_bias``: later blocks of an encoder add it to the logits of their keys (ToMe)
    biases_keys: ClassVar[bool] = False
    #: allows keep = 0 (text-only)
    may_empty: ClassVar[bool] = False
    #: the score needs the decoder layer itself: the engine calls ``llm_scores(view)`` (SparseVLM, PACT)
    own_llm_scores: ClassVar[bool] = False

    def score(self, stage: str) -> ScoreKind:
        """Which importance score the engine computes for ``stage`` (iLLaVA 3.2, LightVLM 3.3)."""
        return "received" if stage == "vision" else "last"

    def left(self, step: Step, tokens: int, group: int = 1) -> int:
        """Tokens that ``reduce`` leaves of ``tokens`` at ``step``."""
        return step.count(tokens, group)

    @abstractmethod
    def reduce(self, tokens: Tokens, keep: int) -> Reduced:
        """Shorten ``tokens`` to ``keep`` rows; never called with keep = N (that is the identity, no copy)."""

    def llm_scores(self, view: Any) -> Tensor:
        """(B, t) float32 scores from a ``vlm_accel.llm.scores.LayerView``; only with ``own_llm_scores``."""
        raise NotImplementedError(f"{type(self).__name__} says own_llm_scores and has to define llm_scores")


class FeatureMethod(Method, ABC):
    """A method that shortens the encoder's features once. ``ratio`` or a fixed count is an option of the class."""

    stages: ClassVar[tuple[str, ...]] = ("features",)
    needs_keys: ClassVar[bool] = False
    #: the method acts on projected features (D of the decoder) instead of the encoder's
    after_projector: ClassVar[bool] = False

    def blocks(self, depth: int, used: int) -> tuple[int, ...]:
        """Blocks whose attention and keys it wants; ``used`` is the block whose output the model reads."""
        return (used,)

    def count(self, tokens: int) -> int | None:
        """Rows it leaves of ``tokens``, where that is known beforehand; None: depends on the picture."""
        return None

    @abstractmethod
    def select(self, features: Features) -> list[Reduced]:
        """One ``Reduced`` per image, each with S = 1 (counts may differ between images)."""


@dataclass
class CacheView:
    """One decoder layer's cache when it is to be compressed.

    Args:
        layer: decoder layer; depth: number of layers.
        keys, values: (B, K, n, d), keys as cached (rotated).
        queries: (B, H, w, d) the last w queries, rotated; H is a multiple of K (groups of query heads).
        query_index: (B, w) int64, logical position of each query; -1: a query of padding, which counts for nothing.
            None: they are the queries of the last w entries.
        valid: (B, K, n) bool, False for padding.
        index: (B, K, n) int64, logical position of each entry (-1 for padding).
        image: (B, K, n) bool, entry of an image token.
        scaling: of the attention logits.
        budget: what may be kept.
        entries: b, how many entries stay in this layer now.
        softcap: cap of the attention logits, ``cap * tanh(logits / cap)`` (Gemma 2); None: none.
        state: dict of this layer that lives as long as the cache (H2O's sums); reordered with the beams by the engine
            where its values are tensors with B in front.
        module, hidden, kwargs: the attention module, its input and its keyword arguments (kvpress-like scorers).
        prefill: True for the compression right after the prefill.
        seed: of random controls.
    """

    layer: int
    depth: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    valid: Tensor
    index: Tensor
    image: Tensor
    scaling: float
    budget: KVBudget
    state: dict[str, Any] = field(default_factory=dict)
    module: Any = None
    hidden: Tensor | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    prefill: bool = False
    seed: int = 0
    query_index: Tensor | None = None
    entries: int = 0
    softcap: float | None = None


class CacheMethod(Method, ABC):
    """A method that says which cache entries go."""

    stages: ClassVar[tuple[str, ...]] = ("cache",)
    #: compress once after the prefill and never again (SnapKV, PyramidKV, AdaKV)
    once: ClassVar[bool] = False
    #: compress at every decoding step (TOVA)
    every_step: ClassVar[bool] = False
    #: the engine feeds each prefill and decode query to ``observe`` (H2O's running sums)
    observes: ClassVar[bool] = False
    #: the score needs ``view.queries``; without it none are made
    needs_queries: ClassVar[bool] = True
    #: the score is the same for every head of a layer: one set of entries serves all, whatever ``per_head`` says
    same_for_heads: ClassVar[bool] = False

    def kv(self) -> KVBudget | None:
        """Half of the prefill length."""
        from vlm_accel.budget import KVBudget

        return KVBudget.ratio(0.5)

    def adapt(self, budget: KVBudget) -> KVBudget:
        """The budget that the method works with when the user gives ``budget`` (PyramidKV spreads it over layers)."""
        return budget

    @abstractmethod
    def entry_scores(self, view: CacheView) -> Tensor:
        """(B, K, n) float32, higher = keep; the engine then sets invalid to -inf, protected to +inf, keeps the top.

        Tensors (B, K, n) that the method puts into ``view.state`` are gathered with the entries.
        """

    def moved(self, view: CacheView, rows: Tensor, layer: Any) -> None:
        """Entries ``rows`` of ``view`` are what ``layer`` (a TrackedLayer) now holds (StreamingLLM may turn keys)."""

    def observe(self, view: CacheView) -> None:
        """Take note in ``view.state`` of queries that are new since the last call (``view.queries``), each once.

        Called before entries go, so every query is seen with all the entries that it attended to.
        """
