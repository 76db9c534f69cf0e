"""How question and sign tokens meet before the translation encoder: one file a method, all called the same way.

``module(question (B, Lq, d), question_mask, sign (B, Lv, d), sign_mask) -> (tokens, mask, weights or None)``, built by
``FUSIONS.create(name, dim, num_heads, **options)``. Importing this table loads no method and no torch.
"""

from polymodal.registry import MethodInfo, Registry

__all__ = ["FUSIONS"]

_SSL_SSAW = "Liu et al. 2025, SSL-SSAW (arXiv 2509.14036)"

FUSIONS = Registry(
    "fusion",
    [
        MethodInfo(
            name="ssaw",
            target="slt.methods.ssaw:SigmoidSelfAttentionWeighting",
            paper=_SSL_SSAW,
            summary="sigmoid self-attention weighting of question and sign tokens (our reading of SSL-SSAW)",
            tags=("question", "video"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="concat",
            target="slt.methods.concat:Concat",
            paper=_SSL_SSAW,
            summary="question and sign tokens one after the other, unweighted (ablation of our reading of SSL-SSAW)",
            tags=("question", "video", "baseline"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="none",
            target="slt.methods.none:SignOnly",
            paper="Zhou et al. 2023, GFSLT-VLP (ICCV 2023)",
            summary="sign tokens alone, as in gloss-free translation without a question",
            tags=("video", "baseline"),
            fidelity="code",
        ),
        MethodInfo(
            name="question_only",
            target="slt.methods.question_only:QuestionOnly",
            paper=_SSL_SSAW,
            summary="question tokens alone, no video: what the question gives away (audit of our reading of SSL-SSAW)",
            tags=("question", "baseline", "audit"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="cross_attention",
            target="slt.methods.cross_attention:CrossAttention",
            paper=_SSL_SSAW,
            summary="sign tokens plus attention from signs to the question (baseline of our reading of SSL-SSAW)",
            tags=("question", "video", "baseline"),
            fidelity="reconstruction",
        ),
        MethodInfo(
            name="gbt",
            target="slt.methods.gbt:GatedFusion",
            paper="Gao et al. 2024, Overcoming Modality Bias in Question-Driven SLT (TCSVT 34(11):11724)",
            summary="GBT-style gated fusion of signs with the mean question (our reading; no gloss losses)",
            tags=("question", "video", "baseline"),
            fidelity="reconstruction",
        ),
    ],
)
