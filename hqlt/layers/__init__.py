"""The hybrid memory layer and its parts."""

from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.lesions import Lesion, lesion
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import MemoryState, ModelState

__all__ = ["HybridMemory", "Lesion", "MemoryState", "ModelState", "Schedule", "lesion"]
