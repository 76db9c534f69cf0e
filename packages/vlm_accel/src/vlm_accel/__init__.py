"""Training-free acceleration of vision-language models.

Not here yet: this package holds no method so far.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
