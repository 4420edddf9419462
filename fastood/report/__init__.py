"""Results for people: the report page, tables for console and papers, the per-image table.

Importing it imports neither matplotlib nor jinja2 nor pyarrow.
"""

from fastood.report.console import console_table, print_results
from fastood.report.export import to_csv, to_latex, to_markdown
from fastood.report.figure import save_figure
from fastood.report.html import write_report
from fastood.report.importers import openood_npz, setar_csv
from fastood.report.search import save_search_figure, write_search_report
from fastood.report.table import ScoreTable

__all__ = [
    "ScoreTable",
    "console_table",
    "openood_npz",
    "print_results",
    "save_figure",
    "save_search_figure",
    "setar_csv",
    "to_csv",
    "to_latex",
    "to_markdown",
    "write_report",
    "write_search_report",
]
