"""Small inline SVG charts.

Colours and weights come from the page's CSS classes, so charts follow dark mode and print. Text in
a chart is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from fastood.report.curves import Histogram, ticks

__all__ = ["histogram_chart", "range_chart", "roc_chart"]


def _n(value: float) -> str:
    """A coordinate with one decimal and no trailing zero: small files, sharp lines."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _open(width: float, height: float, kind: str, label: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-label="{escape(label)}">'
    )


def histogram_chart(
    data: Histogram, *, label: str, threshold: float | None = None, threshold_name: str = ""
) -> str:
    """Two overlaid step histograms, ID and OOD, with an optional threshold line."""
    width, height, left, right, top, bottom = 330.0, 128.0, 4.0, 4.0, 16.0, 20.0
    lo, hi = float(data.edges[0]), float(data.edges[-1])
    peak = max(float(data.id_share.max()), float(data.ood_share.max()), 1e-12)
    floor = height - bottom

    def x(value: float) -> float:
        return left + (width - left - right) * ((value - lo) / (hi - lo))

    def steps(shares: np.ndarray) -> list[tuple[float, float]]:
        points = [(x(lo), floor)]
        for i, share in enumerate(shares):
            y = floor - (floor - top) * float(share) / peak
            points += [(x(float(data.edges[i])), y), (x(float(data.edges[i + 1])), y)]
        return [*points, (x(hi), floor)]

    out = [_open(width, height, "hist", label)]
    for name, shares in (("ood", data.ood_share), ("id", data.id_share)):
        line = _path(steps(shares))
        out.append(f'<path class="area {name}" d="{line}Z"/><path class="edge {name}" d="{line}"/>')
    out.append(f'<path class="axis" d="M{_n(left)} {_n(floor)}H{_n(width - right)}"/>')
    for value, text in ticks(lo, hi):
        at = x(value)
        anchor = "start" if at < left + 14 else "end" if at > width - right - 14 else "middle"
        out.append(
            f'<path class="axis" d="M{_n(at)} {_n(floor)}v4"/>'
            f'<text x="{_n(at)}" y="{_n(height - 4)}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    if threshold is not None and np.isfinite(threshold):
        inside = min(max(threshold, lo), hi)
        at = x(inside)
        beyond = "" if inside == threshold else " beyond"
        name = f"{threshold_name}{' (off the axis)' if beyond else ''}".strip()
        anchor, shift = ("end", -4) if at > width / 2 else ("start", 4)
        out.append(
            f'<g class="threshold{beyond}"><path d="M{_n(at)} {_n(floor)}V4"/>'
            f'<text x="{_n(at + shift)}" y="12" text-anchor="{anchor}">{escape(name)}</text></g>'
        )
    return "".join([*out, "</svg>"])


def roc_chart(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]], *, label: str, tpr: float = 0.95
) -> str:
    """ROC curves of several scores over each other, with the line of the wanted TPR.

    ``curves`` holds (name, OOD accepted, ID accepted); the n-th gets the CSS classes of series n.
    """
    size, left, bottom, top, right = 310.0, 48.0, 38.0, 8.0, 12.0
    side = size - left - right

    def x(value: float) -> float:
        return left + side * float(value)

    def y(value: float) -> float:
        return top + side * (1 - float(value))

    height = top + side + bottom
    out = [_open(size, height, "roc", label)]
    for step in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(
            f'<path class="grid" d="M{_n(x(step))} {_n(y(0))}V{_n(y(1))}'
            f'M{_n(x(0))} {_n(y(step))}H{_n(x(1))}"/>'
            f'<text x="{_n(x(step))}" y="{_n(y(0) + 13)}" text-anchor="middle">{step:.0%}</text>'
            f'<text x="{_n(x(0) - 5)}" y="{_n(y(step) + 3.5)}" text-anchor="end">{step:.0%}</text>'
        )
    out.append(f'<path class="chance" d="M{_n(x(0))} {_n(y(0))}L{_n(x(1))} {_n(y(1))}"/>')
    out.append(
        f'<g class="threshold"><path d="M{_n(x(0))} {_n(y(tpr))}H{_n(x(1))}"/>'
        f'<text x="{_n(x(1) - 4)}" y="{_n(y(tpr) + 11)}" text-anchor="end">'
        f"{100 * tpr:g}% of ID kept</text></g>"
    )
    for i, (name, accepted_ood, accepted_id) in reversed(list(enumerate(curves))):
        points = zip(accepted_ood, accepted_id, strict=True)
        line = _path((x(a), y(b)) for a, b in points)
        out.append(f'<path class="line series{i % 8} dash{i // 8 % 3}" d="{line}">')
        out.append(f"<title>{escape(name)}</title></path>")
    out.append(
        f'<text class="title" x="{_n(x(0.5))}" y="{_n(height - 6)}" text-anchor="middle">'
        "OOD images accepted</text>"
        f'<text class="title" transform="translate(11 {_n(y(0.5))}) rotate(-90)" '
        'text-anchor="middle">ID images accepted</text>'
    )
    return "".join([*out, "</svg>"])


def range_chart(
    value: float | None,
    *,
    low: float | None,
    high: float | None,
    parts: Sequence[float],
    span: tuple[float, float],
    label: str,
) -> str:
    """A number line: the interval as a bar, the value as a dot, its parts (the sets) as ticks."""
    width, height, pad = 120.0, 14.0, 5.0
    lo, hi = span
    scale = (width - 2 * pad) / (hi - lo) if hi > lo else 0.0

    def x(number: float) -> float:
        return pad + scale * (min(max(number, lo), hi) - lo)

    mid = height / 2
    out = [_open(width, height, "range", label)]
    out.append(f'<path class="rail" d="M{_n(pad)} {_n(mid)}H{_n(width - pad)}"/>')
    for part in parts:
        out.append(f'<path class="part" d="M{_n(x(part))} {_n(mid - 4)}v8"/>')
    if low is not None and high is not None:
        out.append(f'<path class="bar" d="M{_n(x(low))} {_n(mid)}H{_n(x(high))}"/>')
    if value is not None:
        out.append(f'<circle cx="{_n(x(value))}" cy="{_n(mid)}" r="3.5"/>')
    return "".join([*out, "</svg>"])
