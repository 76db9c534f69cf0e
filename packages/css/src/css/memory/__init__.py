"""What is kept of earlier steps: instances or whole pictures, in an inspectable folder."""

from css.memory.build import load_memory, make_memory
from css.memory.images import ImageMemory
from css.memory.store import InstanceMemory

__all__ = ["ImageMemory", "InstanceMemory", "load_memory", "make_memory"]
