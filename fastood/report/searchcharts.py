"""The charts of a search: the objective along it, and what is kept of each block.

Colours come from the page's CSS classes, as in ``svg``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from fastood.report.curves import ticks
from fastood.report.page import signed
from fastood.report.searchview import KIND_NAMES, Candidate, SearchView, Tower
from fastood.report.svg import _n, _open, _path

__all__ = ["is_wide", "kept_chart", "search_chart"]


_NARROW = 16  # bars that have room beside another chart
_LABEL = 19.0  # width of a bar that has room for a number


class _Axes(NamedTuple):
    """Where things lie in the chart of a search."""

    lo: float
    hi: float
    slot: float
    """Width of a candidate."""
    left: float = 56.0
    right: float = 1048.0
    top: float = 26.0
    floor: float = 280.0

    def x(self, place: float) -> float:
        return self.left + self.slot * (place + 0.5)

    def y(self, value: float) -> float:
        inside = min(max(value, self.lo), self.hi)
        return self.top + (self.floor - self.top) * (self.hi - inside) / (self.hi - self.lo)

    def before(self, place: int) -> str:
        """The line between a candidate and the one before it."""
        return f"M{_n(self.x(place) - self.slot / 2)} {_n(self.top)}V{_n(self.floor)}"


_Numbered = Sequence[tuple[int, Candidate]]


def search_chart(view: SearchView) -> str:
    """Every candidate as a dot, the best so far as a line, accepted picks as larger dots.

    Candidates beyond the axis lie on its edge as hollow dots.
    """
    numbered = list(enumerate(view.candidates, start=1))
    lo, hi = view.span()
    empty = _Axes(lo, hi, slot=0.0)
    axes = empty._replace(slot=(empty.right - empty.left) / (len(numbered) + 1))
    out = [_open(1060, 320, "search", f"{view.objective_name} along the search")]
    for value, text in ticks(lo, hi):
        out.append(
            f'<path class="grid" d="M{_n(axes.left)} {_n(axes.y(value))}H{_n(axes.right)}"/>'
            f'<text x="{_n(axes.left - 6)}" y="{_n(axes.y(value) + 3.5)}" text-anchor="end">'
            f"{escape(text)}</text>"
        )
    out += _visits(view, numbered, axes)
    out += _towers(view, numbered, axes)
    out.append(f'<path class="axis" d="M{_n(axes.left)} {_n(axes.floor)}H{_n(axes.right)}"/>')
    out.append(f'<path class="line best" d="{_path(_steps(view, numbered, axes))}">')
    out.append("<title>best so far</title></path>")
    radius = min(2.6, max(1.2, 0.35 * axes.slot))
    for place, candidate in sorted(numbered, key=lambda item: item[1].accepted):
        value = candidate.row.value.objective
        kind = "accepted" if candidate.accepted else "tried"
        beyond = "" if lo <= value <= hi else " beyond"
        out.append(
            f'<circle class="dot {kind}{beyond}" cx="{_n(axes.x(place))}" '
            f'cy="{_n(axes.y(value))}" r="{_n(4.6 if candidate.accepted else radius)}">'
            f"<title>{escape(_named(candidate))}</title></circle>"
        )
    start = view.found.baseline.objective
    out.append(
        f'<circle class="dot start" cx="{_n(axes.x(0))}" cy="{_n(axes.y(start))}" r="4.6">'
        f"<title>the model as it is: {signed(start)}</title></circle>"
        f'<text class="title" x="{_n((axes.left + axes.right) / 2)}" y="314" '
        'text-anchor="middle">candidates in order, grouped by visit</text>'
    )
    return "".join([*out, "</svg>"])


def _steps(view: SearchView, numbered: _Numbered, axes: _Axes) -> list[tuple[float, float]]:
    """The best so far, from the model as it is."""
    level = view.found.baseline.objective
    points = [(axes.left, axes.y(level))]
    for place, candidate in numbered:
        if candidate.best != level:
            points += [(axes.x(place), axes.y(level)), (axes.x(place), axes.y(candidate.best))]
            level = candidate.best
    return [*points, (axes.right, axes.y(level))]


def _named(candidate: Candidate) -> str:
    row = candidate.row
    state = ", accepted" if candidate.accepted else ""
    return f"{row.matrix} without {row.count}: {signed(row.value.objective)}{state}"


def _visits(view: SearchView, numbered: _Numbered, axes: _Axes) -> list[str]:
    """A line before every visit, and its name where there is room."""
    one_kind = len({kind for tower in view.towers for kind in tower.kinds}) == 1
    out, free = [], 0.0
    for number, group in groupby(numbered, key=lambda item: item[1].row.visit):
        members = list(group)
        first, last = members[0][0], members[-1][0]
        out.append(f'<path class="grid" d="{axes.before(first)}"/>')
        matrices = {c.row.matrix for _, c in members}
        # of one matrix its block; of several the number of the visit
        parts = matrices.pop().split(".") if len(matrices) == 1 else ["", str(number)]
        parts = parts[:-1] if one_kind and len(parts) > 2 else parts
        name = " ".join(parts if view.order == "interleaved" else parts[1:])
        middle, room = axes.x((first + last) / 2), 5.8 * len(name) + 4
        if middle - room / 2 >= free:
            free = middle + room / 2
            out.append(
                f'<text x="{_n(middle)}" y="{_n(axes.floor + 14)}" text-anchor="middle">'
                f"{escape(name)}</text>"
            )
    return out


def _towers(view: SearchView, numbered: _Numbered, axes: _Axes) -> list[str]:
    """A line where the tower changes, and the names of towers that come one after the other."""
    if view.order in ("exhaustive", "single"):
        return []
    groups = groupby(numbered, key=lambda item: item[1].tower)
    runs = [(name, [place for place, _ in group]) for name, group in groups]
    out = [f'<path class="tower" d="{axes.before(places[0])}"/>' for _, places in runs[1:]]
    for name, places in runs if len(runs) <= 2 else ():
        out.append(
            f'<text class="title" x="{_n(axes.x((places[0] + places[-1]) / 2))}" '
            f'y="{_n(axes.top - 8)}" text-anchor="middle">{escape(name)} tower</text>'
        )
    return out


def is_wide(tower: Tower) -> bool:
    """Whether the chart of a tower needs the whole width of the page."""
    return len(tower.places) * len(tower.kinds) > _NARROW


def kept_chart(tower: Tower) -> str:
    """Bars of the share of singular directions that each block keeps."""
    left, right, top, bottom, side = 40.0, 6.0, 20.0, 36.0, 110.0
    width = 1000.0 if is_wide(tower) else 486.0
    slot = (width - left - right) / max(len(tower.places), 1)
    floor, height = top + side, top + side + bottom
    bar = min(26.0, 0.86 * slot / len(tower.kinds))
    out = [_open(width, height, "kept", f"kept share of each block of the {tower.name} tower")]
    for share in (0.0, 0.5, 1.0):
        at = floor - side * share
        out.append(
            f'<path class="grid" d="M{_n(left)} {_n(at)}H{_n(width - right)}"/>'
            f'<text x="{_n(left - 6)}" y="{_n(at + 3.5)}" text-anchor="end">{share:.0%}</text>'
        )
    for place, name in enumerate(tower.places):
        out.append(
            f'<text x="{_n(left + slot * (place + 0.5))}" y="{_n(floor + 14)}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    for item in tower.bars:
        shift = (tower.kinds.index(item.kind) - (len(tower.kinds) - 1) / 2) * bar
        at = left + slot * (item.place + 0.5) + shift
        series = tower.kinds.index(item.kind) % 8
        kind = f"column fill{series}" + (" changed" if item.changed else "")
        out.append(
            f'<rect class="{kind}" x="{_n(at - bar / 2 + 0.5)}" y="{_n(floor - side * item.kept)}" '
            f'width="{_n(bar - 1)}" height="{_n(side * item.kept)}">'
            f"<title>{escape(item.address)}: {item.kept:.1%} kept</title></rect>"
        )
        if item.changed and bar >= _LABEL:
            dropped = f"−{100 * (1 - item.kept):.0f}"
            out.append(
                f'<text class="pick" x="{_n(at)}" y="{_n(floor - side - 5)}" '
                f'text-anchor="middle">{dropped}</text>'
            )
    out.append(
        f'<text class="title" x="{_n((left + width - right) / 2)}" y="{_n(height - 4)}" '
        f'text-anchor="middle">{_axis(tower)}</text>'
    )
    return "".join([*out, "</svg>"])


def _axis(tower: Tower) -> str:
    """Of several kinds the legend says which."""
    kind = f" ({KIND_NAMES[tower.kinds[0]]})" if len(tower.kinds) == 1 else ""
    return escape(f"block, from the input{kind}")
