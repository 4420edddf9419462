"""The results as a page: goals first, then everybody; and some lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.cases import CASES, Case
from bench.gpu.work import OURS

__all__ = ["page", "summary", "template"]

Row = dict[str, Any]

COMMAND = "bench/gpu.sh"

LEGEND = """\
GPU time: replay of a CUDA graph that runs the call on different copies of the inputs, together
2.5 times the L2 (or 96 copies), so inputs come from memory; in brackets the quartiles. Wall: calls
in a row from Python, from an idle GPU to the end of the last, per call. All implementations take
turns in one process on the same data, each is checked against float64 before. *C*: the bare product
by cuBLAS in the same precision (float32 for fp16x3), on the same shape, written to memory; of a
training step that needs three, one. *Limit*: arithmetic and bytes at the two rates above.
*Memory*: peak of a call beside inputs and outputs, of a (B, K) or (B, P, K) float16 matrix in
brackets. *Error* and *distinct scores*: against float64 on the same features; gradients relative to
the largest element; low rank: relative Frobenius norm. Eager fp32 is true float32. `published` has
the structure of the authors' code. A star marks times taken without a graph."""

UNITS = {
    "C": "GPU time ÷ C",
    "gpu us": "GPU µs",
    "wall us": "wall µs",
    "ms": "ms",
    "launches": "launches",
    "error": "error",
    "peak / logits": "memory ÷ logits",
}


def template(gpu: str) -> str:
    """The page before anything was measured: goals, and empty columns."""
    goals = [
        _cells(case.name, _goal_text(g.metric), _bound(g.metric, g.least), _bound(g.metric, g.aim),
               "", "")
        for case in CASES
        for g in case.goals
    ]  # fmt: skip
    rows = [_cells(case.name, *[""] * (len(_COLUMNS) - 1)) for case in CASES]
    return "\n".join(
        [
            f"# {gpu}",
            "",
            f"Not measured yet. `{COMMAND}` on such a machine fills this page in.",
            "",
            *_table(_GOAL_COLUMNS, goals),
            "",
            LEGEND,
            "",
            *_table(_COLUMNS, rows),
            "",
        ]
    )


def page(facts: dict[str, Any], ceilings: dict[str, float], rows: Sequence[Row]) -> str:
    known = ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None and k != "gpu")
    limits = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in ceilings.items())
    head = [
        f"# {facts.get('gpu') or 'No GPU: tiny sizes, the times mean nothing'}",
        "",
        f"{known}.",
    ]
    if limits:
        head += ["", f"Largest rates seen in this run: {limits}."]
    goals = [
        _cells(r["case"], _goal_text(g["metric"]), _bound(g["metric"], g["least"]),
               _bound(g["metric"], g["aim"]), _number(g["value"]), _verdict(g))
        for r in rows
        for g in r.get("goals", ())
    ]  # fmt: skip
    lines, previous = [], None
    for row in rows:
        lines.append(_cells("" if row["case"] == previous else row["case"], *_columns(row)))
        previous = row["case"]
    return "\n".join(
        [*head, "", *_table(_GOAL_COLUMNS, goals), "", LEGEND, "", *_table(_COLUMNS, lines), ""]
    )


def summary(facts: dict[str, Any], rows: Sequence[Row], unmeasured: Sequence[Case]) -> list[str]:
    """At most sixty lines: one for each case with its goals, then what failed."""
    head = facts.get("gpu") or "no GPU: the times mean nothing"
    lines = [f"{head}, torch {facts['torch']}, triton {facts['triton']}"]
    lines += [_line(row) for row in rows if row["variant"] == OURS and "gpu_us" in row]
    verdicts = [_verdict(g) for row in rows for g in row.get("goals", ())]
    lines.append(
        f"goals: {sum(v.startswith('met') for v in verdicts)} met, "
        f"{sum(v.startswith('missed') for v in verdicts)} missed, {verdicts.count('')} unknown"
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reason = row.get("wrong") or row.get("failed")
        if reason:
            reasons.setdefault(reason[:160], []).append(f"{row['case']} {row['variant']}")
    for reason, names in list(reasons.items())[:12]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"NOT MEASURED {names[0]}{more}: {reason}")
    if len(reasons) > 12:
        lines.append(f"NOT MEASURED for {len(reasons) - 12} other reasons: see the table")
    if unmeasured:
        lines.append(f"no time for {len(unmeasured)} cases, the first: {unmeasured[0].name}")
    return lines


def _line(row: Row) -> str:
    to = {name: 1 / r[0] for name, r in row.get("to", {}).items()}
    against = [f"{value:.1f}x {name}" for name, value in to.items() if "cuBLAS" not in name]
    goals = [
        f"{g['metric']} {_number(g['value'])} {_verdict(g)}"
        for g in row.get("goals", ())
        if "missed" in _verdict(g)
    ]
    parts = [
        f"{row['case']}: {_number(row['gpu_us'][0])} us",
        f"= {row['over_bare'][0]:.2f} C" if "over_bare" in row else "",
        f"({100 * row['share_of_limit']:.0f}% of limit)" if "share_of_limit" in row else "",
        f"wall {_number(row['wall_us'][0])};",
        " ".join(against),
        f"[{'; '.join(goals) or 'goals met'}]" if row.get("goals") else "",
    ]
    return " ".join(part for part in parts if part)


# ------------------------------------------------------------------------------ cells

_GOAL_COLUMNS = ("work", "figure", "at least", "aim", "measured", "")
_COLUMNS = (
    "work", "implementation", "precision", "GPU µs", "wall µs", "÷ C", "speed-up of fastood",
    "% of limit", "launches", "memory MiB", "max error", "distinct scores", "",
)  # fmt: skip


def _columns(row: Row) -> list[str]:
    to_ours = row.get("to", {}).get(OURS)
    peak = row.get("peak_bytes")
    share = row.get("peak_over_logits")
    return [
        f"**{row['variant']}**" if row["variant"] == OURS else row["variant"],
        row.get("precision", ""),
        _spread(row.get("gpu_us")) + ("" if row.get("captured", True) else "*"),
        _number(row["wall_us"][0]) if "wall_us" in row else "",
        _spread(row.get("over_bare")),
        f"{to_ours[0]:.2f}" if to_ours else "",
        f"{100 * row['share_of_limit']:.0f}" if "share_of_limit" in row else "",
        str(row["launches"]) if row.get("launches") else "",
        "" if peak is None else f"{peak / 2**20:.2f}" + (f" ({share:.2g})" if share else ""),
        _number(row.get("max_rel_error")),
        f"{row['distinct']} of {row['distinct_float64']}" if row.get("distinct") else "",
        row.get("wrong") or row.get("failed") or row.get("note", ""),
    ]


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    return f"{_number(values[0])} ({_number(values[1])}–{_number(values[2])})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _goal_text(metric: str) -> str:
    return f"speed-up over {metric[2:]}" if metric.startswith("x ") else UNITS[metric]


def _bound(metric: str, bound: float | None) -> str:
    sign = "≥" if metric.startswith("x ") else "≤"
    return "" if bound is None else f"{sign} {bound:g}"


def _verdict(goal: dict[str, Any]) -> str:
    value = goal["value"]
    if value is None:
        return ""
    at_most = not goal["metric"].startswith("x ")

    def met(bound: float) -> bool:
        return bool(value <= bound if at_most else value >= bound)

    said = []
    if goal["least"] is not None:
        said.append("met" if met(goal["least"]) else "missed")
    if goal["aim"] is not None:
        said.append(f"aim {'met' if met(goal['aim']) else 'missed'}")
    return ", ".join(said)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"


def _table(columns: Sequence[str], lines: Iterable[str]) -> list[str]:
    return [_cells(*columns), "|" + "---|" * len(columns), *lines]
