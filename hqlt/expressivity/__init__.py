"""The expressivity experiment: its runs, and what its tables and figures make of them."""

from hqlt.expressivity.distance import WITHOUT, distance_figures, distance_tables
from hqlt.expressivity.runs import expressivity_runs
from hqlt.expressivity.tables import figures, live_table, merge, selected, summary_table, tables

__all__ = [
    "WITHOUT",
    "distance_figures",
    "distance_tables",
    "expressivity_runs",
    "figures",
    "live_table",
    "merge",
    "selected",
    "summary_table",
    "tables",
]
