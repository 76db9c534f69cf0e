"""Networks: visual encoder, mBART parts, the translation model."""

from slt.models.translator import SLTModel

__all__ = ["SLTModel"]
