"""Lines of progress, ``polymodal.progress``."""

from polymodal.progress import counted

__all__ = ["counted"]
