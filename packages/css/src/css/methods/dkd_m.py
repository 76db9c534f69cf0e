"""DKD-M: DKD with stored pictures in the training set."""

from __future__ import annotations

from css.methods.dkd import DKD

__all__ = ["DKDM"]


class DKDM(DKD):
    """DKD whose later steps see each stored picture once an epoch; with an empty memory it is DKD.

    The first term knows the step's own classes alone: in a stored picture all is a negative example for them. The
    picture's old classes are held by distillation.

    Args:
        pos_weight: see ``DKD``.
        later_pos_weight: see ``DKD``.
        logits: see ``DKD``.
        positive: see ``DKD``.
        negative: see ``DKD``.
        auxiliary: see ``DKD``.

    Source: Baek et al. 2022 (NeurIPS), arXiv 2210.05941, and the released code: 100 pictures for VOC, 300 for ADE20K,
    balanced over classes.
    """

    memory = "images"
