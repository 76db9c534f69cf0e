"""Methods: one file each. Created by ``create(name, **options)``; importing this table loads no method and no torch.

Tags: ``tier1`` to ``tier3`` and ``control`` (how the project ranks them), then where a method acts: ``vision`` (inside
the encoder), ``features`` (once, after the encoder), ``llm`` (inside the decoder), ``cache``.
"""

from typing import Any

from polymodal.registry import MethodInfo, Registry

__all__ = ["METHODS", "create"]

_ILLAVA = "Hu et al. 2024, iLLaVA (arXiv 2412.06263)"
_LIGHTVLM = "Hu et al. 2025, LightVLM (arXiv 2509.00419)"
_VISPRUNER = "Zhang et al. 2024, {} (arXiv 2412.01818)"
_CONTROL = "control of iLLaVA and LightVLM (arXiv 2412.06263, 2509.00419)"
_CACHE_CONTROL = "control of LightVLM (arXiv 2509.00419)"


def _row(
    name: str, target: str, paper: str, summary: str, tags: tuple[str, ...], fidelity: Any = "paper"
) -> MethodInfo:
    return MethodInfo(name, f"vlm_accel.methods.{target}", paper, summary, tags, fidelity)


_TIER1 = [
    _row(
        "rank1",
        "rank1:Rank1",
        _ILLAVA,
        "the least attended fold into one of them (first version)",
        ("tier1", "vision", "llm"),
        "code",
    ),
    _row(
        "recycle",
        "recycle:Recycle",
        _ILLAVA,
        "the least attended flow into a few kept ones",
        ("tier1", "vision", "llm"),
        "code",
    ),
    _row(
        "shift", "shift:Shift", _ILLAVA, "the last token folds into its neighbour", ("tier1", "vision", "llm"), "code"
    ),
    _row("drop", "drop:Drop", _ILLAVA, "the least attended are deleted", ("tier1", "vision", "llm"), "code"),
    _row(
        "lightvlm",
        "lightvlm:LightVLM",
        _LIGHTVLM,
        "pyramid of merging in the decoder, cache window in decoding",
        ("tier1", "llm", "vision", "cache"),
        "reconstruction",
    ),
    _row("random", "random:Random", _CONTROL, "keeps a seeded random choice", ("control", "vision", "llm")),
    _row("stride", "stride:Stride", _CONTROL, "keeps tokens at even distances", ("control", "vision", "llm")),
    _row("pool", "pool:Pool", _CONTROL, "averages neighbours on the patch grid", ("control", "vision", "llm")),
    _row(
        "text_only",
        "text_only:TextOnly",
        _CONTROL,
        "drops all image tokens at one layer: the floor",
        ("control", "llm"),
    ),
]

_TIER2 = [
    _row(
        "fastv",
        "fastv:FastV",
        "Chen et al. 2024, FastV (arXiv 2403.06764)",
        "after layer 2 the least attended are dropped",
        ("tier2", "llm"),
    ),
    _row(
        "pyramiddrop",
        "pyramiddrop:PyramidDrop",
        "Xing et al. 2024, PyramidDrop (arXiv 2410.17247)",
        "drops half at each of three layers",
        ("tier2", "llm"),
        "code",
    ),
    _row(
        "sparsevlm",
        "sparsevlm:SparseVLM",
        "Zhang et al. 2024, SparseVLM (arXiv 2410.04417)",
        "text raters choose, some of the rest are clustered",
        ("tier2", "llm"),
        "code",
    ),
    _row(
        "tome",
        "tome:ToMe",
        "Bolya et al. 2022, ToMe (arXiv 2210.09461)",
        "most similar pairs merge, attention counts sizes",
        ("tier2", "vision"),
        "code",
    ),
    _row(
        "visionzip",
        "visionzip:VisionZip",
        "Yang et al. 2024, VisionZip (arXiv 2412.04467)",
        "dominant tokens by class attention, the rest into contexts",
        ("tier2", "features"),
        "code",
    ),
    _row(
        "snapkv",
        "snapkv:SnapKV",
        "Li et al. 2024, SnapKV (arXiv 2404.14469)",
        "after the prefill keeps what its last queries attend to",
        ("tier2", "cache"),
        "code",
    ),
    _row(
        "h2o",
        "h2o:H2O",
        "Zhang et al. 2023, H2O (arXiv 2306.14048)",
        "keeps heavy hitters of all queries so far and the recent",
        ("tier2", "cache"),
    ),
    _row(
        "streaming_llm",
        "streaming_llm:StreamingLLM",
        "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453)",
        "keeps the first and the last entries",
        ("tier2", "cache"),
    ),
]

_TIER3 = [
    _row(
        "evit",
        "evit:EViT",
        "Liang et al. 2022, EViT (arXiv 2202.07800)",
        "inattentive tokens fuse into one",
        ("tier3", "vision"),
    ),
    _row(
        "prumerge",
        "prumerge:PruMerge",
        "Shang et al. 2024, LLaVA-PruMerge (arXiv 2403.15388)",
        "outliers of class attention stay and gather neighbours",
        ("tier3", "features"),
        "code",
    ),
    _row(
        "prumerge_plus",
        "prumerge_plus:PruMergePlus",
        "Shang et al. 2024, LLaVA-PruMerge+ (arXiv 2403.15388)",
        "PruMerge plus tokens at even distances",
        ("tier3", "features"),
        "code",
    ),
    _row(
        "hired",
        "hired:HiRED",
        "Arif et al. 2024, HiRED (arXiv 2408.10945)",
        "splits a budget over the tiles of a picture",
        ("tier3", "features"),
        "code",
    ),
    _row(
        "fastervlm",
        "fastervlm:FasterVLM",
        _VISPRUNER.format("FasterVLM"),
        "top tokens by class attention of the last block",
        ("tier3", "features"),
    ),
    _row(
        "vispruner",
        "vispruner:VisPruner",
        _VISPRUNER.format("VisPruner"),
        "half by class attention, half by being unlike the others",
        ("tier3", "features"),
        "code",
    ),
    _row(
        "divprune",
        "divprune:DivPrune",
        "Alvar et al. 2025, DivPrune (arXiv 2503.02175)",
        "the subset whose members are farthest apart",
        ("tier3", "features"),
        "code",
    ),
    _row(
        "pact",
        "pact:PACT",
        "Dhouib et al. 2025, PACT (arXiv 2504.08966)",
        "unimportant tokens go, the rest are clustered",
        ("tier3", "llm"),
        "reconstruction",
    ),
    _row(
        "tova",
        "tova:TOVA",
        "Oren et al. 2024, TOVA (arXiv 2401.06104)",
        "each step drops what the last query attends to least",
        ("tier3", "cache"),
    ),
    _row(
        "pyramidkv",
        "pyramidkv:PyramidKV",
        "Cai et al. 2024, PyramidKV (arXiv 2406.02069)",
        "SnapKV with more entries in early layers",
        ("tier3", "cache"),
        "code",
    ),
    _row(
        "adakv",
        "adakv:AdaKV",
        "Feng et al. 2024, Ada-KV (arXiv 2407.11550)",
        "heads of a layer compete for its entries",
        ("tier3", "cache"),
        "code",
    ),
    _row(
        "window_kv",
        "window_kv:WindowKV",
        _LIGHTVLM,
        "LightVLM's cache rule by itself: attention of the last queries",
        ("tier1", "cache"),
        "reconstruction",
    ),
    _row("random_kv", "random_kv:RandomKV", _CACHE_CONTROL, "keeps seeded random entries", ("control", "cache")),
    _row("recent_kv", "recent_kv:RecentKV", _CACHE_CONTROL, "keeps the last entries", ("control", "cache")),
]

METHODS = Registry("method", [*_TIER1, *_TIER2, *_TIER3])


def create(name: str, **options: Any) -> Any:
    """The method called ``name`` with its options (UserError for an unknown name or option)."""
    return METHODS.create(name, **options)
