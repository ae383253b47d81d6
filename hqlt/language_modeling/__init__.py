"""Experiments with language models: their runs, and what tables and figures make of them."""

from hqlt.language_modeling.documents import document_runs
from hqlt.language_modeling.runs import language_runs
from hqlt.language_modeling.tables import figures, live_table, merge, tables

__all__ = ["document_runs", "figures", "language_runs", "live_table", "merge", "tables"]
