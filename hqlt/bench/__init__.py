"""Benchmarks: implementations side by side in one process, none of which is timed before its result is checked."""

from hqlt.bench.record import Record, markdown, save
from hqlt.bench.timing import Contender, contest

__all__ = ["Contender", "Record", "contest", "markdown", "save"]
