"""Results for people: the report page, tables for console and papers, the per-image table.

Names load on first use: importing this package imports neither matplotlib nor jinja2 nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ScoreTable": "fastood.report.table",
    "console_table": "fastood.report.console",
    "openood_npz": "fastood.report.importers",
    "print_results": "fastood.report.console",
    "save_figure": "fastood.report.figure",
    "setar_csv": "fastood.report.importers",
    "to_csv": "fastood.report.export",
    "to_latex": "fastood.report.export",
    "to_markdown": "fastood.report.export",
    "write_report": "fastood.report.html",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fastood.report' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
