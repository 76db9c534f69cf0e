"""Networks: visual encoder, mBART parts, the translation model (``slt.models.translator.SLTModel``)."""
