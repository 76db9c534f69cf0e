"""Which pictures may go into an instance memory: those where every class is one connected region. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from css.task import IGNORE

if TYPE_CHECKING:
    import numpy as np

__all__ = ["admissible"]


def admissible(label: np.ndarray, connectivity: int = 4) -> bool:
    """Whether each class of a label has exactly one connected component, so that a region is one instance.

    Args:
        label: (H, W) uint8 at full resolution, 0 background, 255 ignored.
        connectivity: 4 (sides) or 8 (sides and corners).

    Returns:
        True where it holds for every class; a label without any class is True.

    Raises:
        ValueError: another connectivity.

    Source: Yin et al. 2025, instance memory; the authors' code looks at a randomly cropped label, this at the whole.
    """
    import numpy as np
    from scipy import ndimage

    if connectivity not in (4, 8):
        raise ValueError(f"connectivity={connectivity}; expected 4 or 8 neighbours")
    structure = np.ones((3, 3)) if connectivity == 8 else None
    boxes = ndimage.find_objects(np.where(label == IGNORE, 0, label))
    for channel, box in enumerate(boxes, start=1):
        if box is not None and ndimage.label(label[box] == channel, structure)[1] != 1:
            return False
    return True
