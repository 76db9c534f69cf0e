"""Joint training: what the network could reach if it saw everything at once."""

from __future__ import annotations

from css.methods.ft import FineTuning

__all__ = ["Joint"]


class Joint(FineTuning):
    """The loss of fine-tuning on the labels of all classes in a single step, whatever the task.

    Args:
        init: of no use here, there are no later steps.
        init_bias: of no use here.

    Source: the upper bound ("joint", "offline") of every paper of the field; loss as Yin et al. 2025,
    arXiv 2503.22136.
    """

    offline = True
