"""Question-based, gloss-free sign language translation: our reading of SSL-SSAW (arXiv 2509.14036).

The pieces take and return plain tensors and strings; each is imported when first used, so that ``import slt`` is free.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slt.audit import audit_report
    from slt.data.base import Item, SLTData
    from slt.methods.ssaw import SigmoidSelfAttentionWeighting
    from slt.metrics import bleu, chrf, rouge_l, scores, signatures
    from slt.models.translator import SLTModel
    from slt.module import SLTModule
    from slt.ops.contrastive import contrastive_loss
    from slt.ops.corrupt import omit_last
    from slt.ops.lengths import padded_length, token_length
    from slt.tokenizer import Tokenizer

__version__ = "0.1.0"

_EXPORTS = {
    "Item": "slt.data.base",
    "SLTData": "slt.data.base",
    "SLTModel": "slt.models.translator",
    "SLTModule": "slt.module",
    "SigmoidSelfAttentionWeighting": "slt.methods.ssaw",
    "Tokenizer": "slt.tokenizer",
    "audit_report": "slt.audit",
    "bleu": "slt.metrics",
    "chrf": "slt.metrics",
    "contrastive_loss": "slt.ops.contrastive",
    "omit_last": "slt.ops.corrupt",
    "padded_length": "slt.ops.lengths",
    "rouge_l": "slt.metrics",
    "scores": "slt.metrics",
    "signatures": "slt.metrics",
    "token_length": "slt.ops.lengths",
}

__all__ = [
    "Item",
    "SLTData",
    "SLTModel",
    "SLTModule",
    "SigmoidSelfAttentionWeighting",
    "Tokenizer",
    "__version__",
    "audit_report",
    "bleu",
    "chrf",
    "contrastive_loss",
    "omit_last",
    "padded_length",
    "rouge_l",
    "scores",
    "signatures",
    "token_length",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'slt' has no attribute {name!r}")
