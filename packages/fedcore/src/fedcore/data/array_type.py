"""The name ``ArrayData`` for annotations of readers, without torch.

The parser of the commands executes the ``if TYPE_CHECKING`` blocks of every module with a reader in order to resolve
annotations. A block there that names ``fedcore.data.arrays`` would load torch before the number of threads is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["ArrayData"]

if TYPE_CHECKING:
    from fedcore.data.arrays import ArrayData
else:
    ArrayData = Any
