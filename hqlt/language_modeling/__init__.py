"""The language-modelling experiment: its runs, and what its tables and figures make of them."""

from hqlt.language_modeling.runs import language_runs
from hqlt.language_modeling.tables import figures, live_table, merge, tables

__all__ = ["figures", "language_runs", "live_table", "merge", "tables"]
