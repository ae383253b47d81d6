"""Text on disk as tokens that a trainer reads: preparation, checking, and batches."""

from hqlt.data.loader import PACKINGS, Batch, Loader, rows_for_evaluation
from hqlt.data.shards import TokenShards

__all__ = ["PACKINGS", "Batch", "Loader", "TokenShards", "rows_for_evaluation"]
