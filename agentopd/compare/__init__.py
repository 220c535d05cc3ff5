"""Arms x seeds on one task stream: plan the runs, work through them, and say which differences are real."""

from agentopd.compare.export import comparison_table, write_results
from agentopd.compare.plan import Plan, PlannedRun, make_plan
from agentopd.compare.queue import work
from agentopd.compare.recorded import left_out, write_record
from agentopd.compare.records import Results
from agentopd.compare.results import everything, gather

__all__ = [
    "Plan",
    "PlannedRun",
    "Results",
    "comparison_table",
    "everything",
    "gather",
    "left_out",
    "make_plan",
    "work",
    "write_record",
    "write_results",
]
