"""Prompt learning for missing modalities on a frozen CLIP.

Not here yet: this package holds no method so far.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
