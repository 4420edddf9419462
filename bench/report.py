"""One table and one plot from a run of the benchmarks.

    pytest bench --benchmark-only          # keeps .benchmarks/run.json
    python -m bench.report                 # or: python -m bench.report run.json --out somewhere

Of several runs, each work is taken from the last one that has it (to repeat what was disturbed).

Writes ``<machine>.md``, ``<machine>.svg`` and ``<machine>.json`` (what the two were made of,
without single rounds) into ``bench/results``. Machines are told by processor, instruction set and
threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench.machine import file_name

__all__ = ["main"]

ORDER = (
    "delta_energy", "mcm", "energy", "14", "neg_label", "gl_mcm", "ebm", "locoop", "metrics",
    "product",
)  # fmt: skip
BASELINES = ("eager", "scikit-learn")
"""What "times faster" refers to: the first of these a group has."""

LEGEND = """\
Medians of interleaved runs in one process, the fastest run and the quartiles. *Bare product*, G\\*:
the faster of `torch.mm` and oneDNN's linear with reordered classes, on the same shape and timed in
the same rounds; in brackets the quartiles of the ratio within a round. Metrics are compared with
scikit-learn where eager is meant.
*Limit*: the arithmetic and bytes of the work at the two rates above (at the bare product's if that
was faster, at those of one thread where the work says so), for its part of the work where it is
given one; a kernel with a faster unit than the
libraries' float32 product can pass it. *Peak*: how far the high-water mark of a fresh process
rises. *Error* and *distinct*: against float64; of gradients and of several scores relative to the
largest number of each."""

Row = dict[str, Any]


def rows_of(run: dict[str, Any]) -> list[Row]:
    """The records of all benchmarks, works in reading order, implementations as they ran."""
    rows = [b["extra_info"] for b in run["benchmarks"] if "work" in b["extra_info"]]

    def place(row: Row) -> tuple[int, int]:
        first = next((i for i, p in enumerate(ORDER) if row["work"].startswith(p)), len(ORDER))
        works = list(dict.fromkeys(r["work"] for r in rows))
        return first, works.index(row["work"])

    return sorted(rows, key=place)


def lite(run: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping: the machine and one record for each benchmark."""
    return {
        "machine": run["machine_info"],
        "date": str(run["datetime"])[:10],
        "rows": rows_of(run),
    }


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs on one machine as one: a work is taken whole from the last run that has it."""
    works: dict[str, list[Row]] = {}
    for record in records:
        mine: dict[str, list[Row]] = {}
        for row in record["rows"]:
            mine.setdefault(row["work"], []).append(row)
        works |= mine
    rows = [row for of_work in works.values() for row in of_work]
    return {**records[-1], "runs": sum(r.get("runs", 1) for r in records), "rows": rows}


def kept(found: dict[str, Any]) -> str:
    """JSON with one line for each benchmark, five digits of every number."""

    def short(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.5g}")
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        return [short(v) for v in x] if isinstance(x, list) else x

    rows = ",\n".join(json.dumps(short(row), ensure_ascii=False) for row in found["rows"])
    machine = json.dumps(found["machine"], ensure_ascii=False)
    head = f'{{"machine": {machine},\n"date": "{found["date"]}", "runs": {found["runs"]},'
    return f'{head}\n"rows": [\n{rows}\n]}}\n'


# ------------------------------------------------------------------------------ table


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    lines = [
        "| work | implementation | ms | fastest; quartiles | ÷ bare product | "
        "× faster than eager | % of limit | peak MiB | max rel. error | distinct | "
        "goal: measured |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    previous = None
    for row in rows:
        low, high = row["quartiles_s"]
        cells = [
            "" if row["work"] == previous else row["work"],
            _bold(row["impl"], row["impl"] == "fastood"),
            _ms(row["median_s"]),
            f"{_ms(row['best_s'])}; {_ms(low)}–{_ms(high)}",
            _against_bare(row),
            _faster(row),
            f"{100 * row['share_of_limit']:.0f}" if row["flops"] else "",
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
            f"{row['max_rel_error']:.1e}" if "max_rel_error" in row else "",
            f"{row['distinct']} of {row['distinct_float64']}" if "distinct" in row else "",
            "; ".join(_goal(goal) for goal in row["goals"] if goal["value"] is not None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        previous = row["work"]
    return "\n".join(lines)


def _bold(text: str, really: bool) -> str:
    return f"**{text}**" if really else text


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def bare_ratio(row: Row) -> float | None:
    return row["median_s"] / row["bare_s"] if "bare_s" in row else None


def speedup(row: Row) -> float | None:
    for name in BASELINES:
        if name in row["to"]:
            return 1 / row["to"][name][0]
        if name == row["impl"]:
            return 1.0
    return None


def _against_bare(row: Row) -> str:
    value = bare_ratio(row)
    if value is None:
        return ""
    spread = row["to"].get("G*")
    return f"{value:.2f} ({spread[1]:.2f}–{spread[2]:.2f})" if spread else f"{value:.2f}"


def _faster(row: Row) -> str:
    value = speedup(row)
    return "" if value is None else f"{value:.2f}"


def _goal(goal: dict[str, Any]) -> str:
    value, least, aim, against = (goal[k] for k in ("value", "least", "aim", "against"))
    at_most, parts = goal["kind"] != "speedup", goal.get("parts", 1)
    sign = "≤" if at_most else "≥"
    what = {
        "slowdown": f"÷ {against}",
        "speedup": f"× {against}" + (f", {parts} times" if parts > 1 else ""),
        "extra us": f"µs over {against}",
        "peak MiB": "MiB",
    }[goal["kind"]]

    def verdict(bound: float) -> str:
        return "met" if (value <= bound if at_most else value >= bound) else "missed"

    text = f"{what} {sign} {least:g}: {value:.3g} {verdict(least)}"
    return text if aim is None else f"{text} (aim {aim:g} {verdict(aim)})"


def page(found: dict[str, Any], plot: str) -> str:
    machine, rows = found["machine"], found["rows"]
    packages = ", ".join(f"{name} {v}" for name, v in machine["packages"].items() if v)
    spread = statistics.median(
        (r["quartiles_s"][1] - r["quartiles_s"][0]) / r["median_s"] for r in rows
    )
    product = max(r["machine_gflops_per_s"] for r in rows)
    copy = max(r["machine_gbytes_per_s"] for r in rows)
    return "\n".join(
        [
            f"# {machine['cpu']}, {machine['threads']} threads",
            "",
            f"{found['date']}. {machine['cores']} cores, {machine['system']}; kernels of fastood "
            f"{machine['fastood']}: {machine['fastood_isa']}; torch's: {machine['torch_isa']}. "
            f"Python {machine['python']}, {packages}.",
            "",
            f"Measured limits: {product:.0f} GF/s (the fastest float32 product of the libraries), "
            f"{copy:.1f} GB/s (copy). Noise: quartiles of a call "
            f"are {100 * spread:.0f} % of its median apart (median over all calls); load average "
            f"{machine['load']:.1f} at the end."
            + (
                f" From {found['runs']} runs, each work whole from one."
                if found["runs"] > 1
                else ""
            ),
            "",
            LEGEND,
            "",
            f"![Ratios]({plot})",
            "",
            table(found),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("run", nargs="*", default=[Path(".benchmarks/run.json")], type=Path)
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path)
    parser.add_argument("--name", help="of the files, instead of the machine's")
    options = parser.parse_args(arguments)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.run]
    # a kept record can be drawn again
    found = merged([run if "rows" in run else lite(run) for run in runs])
    if not found["rows"]:
        parser.error(f"{', '.join(map(str, options.run))}: no benchmark of fastood")
    name = options.name or file_name(found["machine"])
    options.out.mkdir(parents=True, exist_ok=True)

    from bench.plot import draw

    draw(found["rows"], options.out / f"{name}.svg")
    (options.out / f"{name}.json").write_text(kept(found), encoding="utf-8")
    (options.out / f"{name}.md").write_text(page(found, f"{name}.svg"), encoding="utf-8")
    print(options.out / f"{name}.md")


if __name__ == "__main__":
    main()
