"""The report of a run: one self-contained HTML file; and the same for a retention matrix alone."""

from agentopd.report.curves import write_curves_page
from agentopd.report.page import build_report, write_retention_page

__all__ = ["build_report", "write_curves_page", "write_retention_page"]
