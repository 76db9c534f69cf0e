"""Image replay: pseudo-labels, and stored whole pictures among the new ones."""

from __future__ import annotations

from css.methods.pl import PseudoLabels

__all__ = ["ImageReplay"]


class ImageReplay(PseudoLabels):
    """Pseudo-labels on new pictures and on stored ones, which come once an epoch with the labels of their own step.

    What a stored picture shows of other steps is background in its labels: the pseudo-labels mend that for old
    classes, for new ones nothing does. That is the weakness instance replay is an answer to. With an empty memory this
    is the method of pseudo-labels.

    Args:
        threshold: least sigmoid of the old network that makes a pseudo-label.
        init: as in ``FineTuning``.
        init_bias: as in ``FineTuning``.

    Source: our reading of the "image replay" that Yin et al. 2025, arXiv 2503.22136, argue against; they name no
    equation. Which pictures are stored follows the same rule as everywhere (balanced over classes).
    """

    memory = "images"
