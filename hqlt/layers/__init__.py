"""The hybrid memory layer and its parts."""

from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import MemoryState, ModelState

__all__ = ["HybridMemory", "MemoryState", "ModelState", "Schedule"]
