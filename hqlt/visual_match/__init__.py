"""The experiment on passive visual match: its runs, and what its tables and figures make of them."""

from hqlt.visual_match.runs import visual_match_runs
from hqlt.visual_match.tables import figures, live_table, merge, tables

__all__ = ["figures", "live_table", "merge", "tables", "visual_match_runs"]
