"""The metrics on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastood.report.metricview import AVERAGE, MetricView

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console_table", "print_results"]


def console_table(results: Mapping[str, Any], *, intervals: bool = False) -> Table:
    """A rich table: OOD sets (and their average) × scores, in percent, the best of each set bold.

    ``intervals`` adds the interval behind every value and needs a wide terminal.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = MetricView(results)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("OOD set", overflow="fold")
    table.add_column("score", no_wrap=True)
    for metric in view.metrics:
        table.add_column(f"{metric.title.replace(', ', chr(10))} {metric.arrow}", justify="right")
    for name in view.columns:
        count = view.count(name, "n_ood")
        for i, score in enumerate(view.scores):
            title = Text("")
            if i == 0:
                title = Text(name, style="bold" if name == AVERAGE else "")
            elif i == 1 and count is not None and name != AVERAGE:
                title = Text(f"{count:,} images", style="dim")
            cells = []
            for metric in view.metrics:
                cell = view.cell(name, score, metric.key)
                text = Text(cell.percent, style="bold green" if cell.best else "")
                if intervals and cell.interval:
                    text.append(f"  {cell.interval}", style="dim")
                cells.append(text)
            table.add_row(title, Text(score), *cells, end_section=i == len(view.scores) - 1)
    return table


def print_results(
    results: Mapping[str, Any], *, console: Console | None = None, intervals: bool = False
) -> None:
    """Print the table, ID accuracy, and a caution where the FPR conventions disagree."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(console_table(results, intervals=intervals))
    accuracy = (results.get("id") or {}).get("accuracy")
    if accuracy:
        line = f"ID accuracy {100 * accuracy['value']:.2f} % of {accuracy['n']:,} labelled images"
        if accuracy.get("interval"):
            low, high = (100 * x for x in accuracy["interval"])
            line += f" ({low:.1f}–{high:.1f})"
        console.print(Text(line))
    view = MetricView(results)
    found = view.reversal()
    if found is not None:
        best = "name different winners" if found.best_differs else "rank scores differently"
        console.print(
            Text(
                f"The two FPR conventions {best}: {found.by_id} is ahead of {found.by_ood} with "
                f"ID positive and behind it with OOD positive. Say which one you quote.",
                style="yellow",
            )
        )
