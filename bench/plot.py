"""The plot of a run: how far each implementation is from the bare product, and from eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

STYLES = {  # colour, marker; fastood last, so that it lies on top
    "published": ("#8c6d31", "s"),
    "eager": ("#7f7f7f", "o"),
    "eager in float32": ("#7f7f7f", "o"),
    "compile": ("#4c78a8", "^"),
    "reference": ("#b0b0b0", "D"),
    "pytorch-ood": ("#72a36c", "v"),
    "scikit-learn": ("#e0a030", "P"),
    "torch.mm in blocks": ("#4c78a8", "<"),
    "oneDNN in blocks": ("#72a36c", ">"),
    "fastood unprepared": ("#f0a58f", "o"),
    "fastood": ("#d1402b", "o"),
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One line for each work: time over that of the bare product, and speed relative to eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from bench.report import bare_ratio, speedup

    works = list(dict.fromkeys(row["work"] for row in rows))
    style = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "fastood"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 2, sharey=True, figsize=(10.5, 1.3 + 0.3 * len(works)), layout="constrained"
        )
        shown: dict[str, Any] = {}
        for name, (colour, marker) in STYLES.items():
            own = name == "fastood"
            for axis, value_of in zip(axes, (bare_ratio, speedup), strict=True):
                points = [(value_of(r), works.index(r["work"])) for r in rows if r["impl"] == name]
                points = [(x, y) for x, y in points if x is not None]
                if not points:
                    continue
                handle = axis.scatter(
                    *zip(*points, strict=True),
                    s=46 if own else 26,
                    color=colour,
                    marker=marker,
                    linewidths=0,
                    zorder=4 if own else 3,
                )
                if name != "eager in float32":
                    shown.setdefault(name, handle)
        for axis, title in zip(
            axes,
            (
                "time ÷ bare product (left is better)",
                "× faster than eager (metrics: scikit-learn)",
            ),
            strict=True,
        ):
            axis.set_xscale("log", base=2)
            axis.axvline(1, color="#404040", linewidth=0.9, zorder=2)
            axis.set_title(title, fontsize=8.5, loc="left")
            axis.grid(axis="both", color="#e6e6e6", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(length=0)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
        axes[0].set_yticks(range(len(works)), works)
        axes[0].set_ylim(len(works) - 0.5, -0.5)
        names = list(reversed(shown))
        figure.legend(
            [shown[n] for n in names], names, loc="outside lower center", ncols=len(names),
            frameon=False, handletextpad=0.1, columnspacing=1.0,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
