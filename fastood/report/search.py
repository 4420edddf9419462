"""The report of a SeTAR search: one HTML file, and a figure for papers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastood._version import __version__
from fastood.atomic import replacing, write_text
from fastood.report.page import number, options, render_page, signed
from fastood.report.searchcharts import is_wide, kept_chart, search_chart
from fastood.report.searchview import KIND_NAMES, METRIC_NAMES, SearchView, Tower

if TYPE_CHECKING:
    from fastood.setar.objective import Value
    from fastood.setar.run import Found

__all__ = ["render_search_report", "save_search_figure", "write_search_report"]

_ORDERS = {
    "image_text": "image tower, then text tower, from the last block",
    "text_image": "text tower, then image tower, from the last block",
    "image": "image tower, from the last block",
    "text": "text tower, from the last block",
    "interleaved": "block by block from the last, image then text",
    "exhaustive": "at each visit all matrices not yet decided",
    "single": "one visit to all matrices",
}


@dataclass(frozen=True)
class _Line:
    """A number before and after the search, as text."""

    name: str
    before: str
    after: str
    arrow: str = ""
    unit: str = ""


def write_search_report(path: str | os.PathLike[str], found: Found) -> Path:
    """Write ``report.html``: the objective along the search, what is kept, picks and provenance.

    Like the report of an evaluation the page makes no request, has no script, and escapes all text
    from data.

    Args:
        path: the file to write, or a folder, which gets ``report.html``.
        found: what a search returned.
    Returns:
        The path written.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "report.html"
    return write_text(target, render_search_report(found))


def render_search_report(found: Found) -> str:
    """The page of :func:`write_search_report` as text."""
    view = SearchView(found)
    lo, hi = view.span()
    return render_page(
        "search.html",
        version=__version__,
        fingerprint=view.recipe.model.get("fingerprint"),
        view=view,
        before=found.baseline,
        after=found.final,
        time=_duration(view.seconds),
        cards=_cards(view),
        values=_values(view),
        beyond=sum(not lo <= c.row.value.objective <= hi for c in view.candidates),
        chart=search_chart(view),
        towers=[_tower(tower) for tower in view.towers],
        settings=_settings(view),
        facts=_facts(view),
        sources=_sources(view),
    )


def _tower(tower: Tower) -> dict[str, Any]:
    return {
        "name": tower.name,
        "chart": kept_chart(tower),
        "wide": is_wide(tower),
        "kinds": [KIND_NAMES[kind] for kind in tower.kinds],
    }


def _settings(view: SearchView) -> str:
    """The authors' list, a pick a line; in a configuration if not the weakest are dropped."""
    config = view.recipe.lora_config()
    text = "[" + ",\n ".join(json.dumps(setting) for setting in config["lora_settings"]) + "]"
    if view.recipe.part == "minor":
        return text
    part = json.dumps(config["lora_svd_init_type"])
    return f'{{"lora_svd_init_type": {part},\n"lora_settings":\n{text}}}'


def _cards(view: SearchView) -> list[_Line]:
    """Four numbers: the objective first."""
    terms = ["cross_entropy", "patches"] if view.metric == "loss" else ["loss", "ood_share"]
    return [_objective(view), *(_line(view, name) for name in [*terms, "accuracy"])]


def _values(view: SearchView) -> list[_Line]:
    names = ["loss", "cross_entropy", "patches", "ood_share", "accuracy"]
    lines = [_line(view, name) for name in names]
    found = view.found
    lines += [
        _Line(name, f"{a:,}", f"{b:,}")
        for name, a, b in (
            ("OOD patches, number", found.baseline.ood_patches, found.final.ood_patches),
            ("batches without OOD patch", found.baseline.empty_batches, found.final.empty_batches),
            ("ties at the k-th logit", found.baseline.ties, found.final.ties),
        )
    ]
    for name in METRIC_NAMES if view.score else ():
        pair = [_metric(value, view.score, name) for value in (found.baseline, found.final)]
        if pair[0] is not None or pair[1] is not None:
            texts = ("–" if x is None else signed(x) for x in pair)
            lines.append(_Line(f"{METRIC_NAMES[name]} of {view.score}", *texts))
    return lines


def _metric(value: Value, score: str | None, name: str) -> float | None:
    return (value.scores.get(score or "") or {}).get(name)


def _objective(view: SearchView) -> _Line:
    name = view.objective_name
    return _Line(
        name[0].upper() + name[1:],
        signed(view.found.baseline.objective),
        signed(view.found.final.objective),
        "↑" if view.sign > 0 else "↓",
    )


_ROWS = {
    "loss": ("Loss", "↓"),
    "cross_entropy": ("Cross-entropy", "↓"),
    "patches": ("Patch term", "↓"),
    "ood_share": ("OOD patches", ""),
    "accuracy": ("Accuracy", "↑"),
}


def _line(view: SearchView, field: str) -> _Line:
    name, arrow = _ROWS[field]
    before, after = (getattr(value, field) for value in (view.found.baseline, view.found.final))
    if field in ("ood_share", "accuracy"):
        return _Line(name, f"{100 * before:.2f} %", f"{100 * after:.2f}", arrow, "%")
    return _Line(name, signed(before), signed(after), arrow)


def _facts(view: SearchView) -> dict[str, Any]:
    """How was searched."""
    search = view.search
    plan, partition = search.get("plan") or {}, search.get("partition") or {}
    batches = list(partition.get("batches") or ())
    objective = dict(search.get("objective") or {})
    kinds = list(dict.fromkeys(pick.kind for pick in view.recipe.picks))
    order = view.order
    if order in ("image_text", "text_image") and len(view.towers) == 1:  # a classifier has no text
        order = view.towers[0].name
    return {
        "order": _ORDERS.get(order, order),
        "matrices": ", ".join(KIND_NAMES[kind] for kind in kinds),
        "ratios": ", ".join(f"{ratio:g}" for ratio in plan.get("ratios") or ()),
        "directions dropped": view.recipe.part,
        "seed": view.recipe.seed,
        "objective": options({k: v for k, v in objective.items() if v is not None}),
        "its settings": search.get("settings_from"),
        "partition": f"{partition.get('kind', '')}, {_batches(batches)}" if batches else None,
        "evaluations": number(len(view.found.rows)),
        "time": _duration(view.seconds),
    }


def _batches(sizes: list[int]) -> str:
    """Equal ones and a rest."""
    last = sizes[-1] != sizes[0]
    full = len(sizes) - last
    text = f"{full} × {sizes[0]:,}" if full > 1 else f"{sizes[0]:,}"
    text += f" and {sizes[-1]:,}" if last else ""
    return f"{'batches' if len(sizes) > 1 else 'one batch'} of {text} images"


def _sources(view: SearchView) -> dict[str, Any]:
    model, images = view.recipe.model, view.search.get("images") or {}
    return {
        "model": model.get("name"),
        "fingerprint": model.get("fingerprint"),
        "dtype": model.get("dtype"),
        "images": images.get("name"),
        "number": images.get("number"),
        "digest of images": images.get("digest"),
        "fastood": view.recipe.fastood,
        "recipe": None if view.found.file is None else view.found.file.name,
    }


def _duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def save_search_figure(found: Found, path: str | os.PathLike[str], *, dpi: int = 200) -> Path:
    """Save the objective along the search (top) and the kept share of each block (bottom).

    Args:
        found: what a search returned.
        path: the file; its suffix chooses the format (png, pdf, svg).
        dpi: dots per inch of a bitmap.
    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastood.report.figure import STYLE

    view = SearchView(found)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        # A figure of its own, not pyplot's: no global state, no window, safe in threads.
        figure = Figure(figsize=(6.8, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        columns = max(len(view.towers), 1)
        grid = figure.add_gridspec(2, columns, height_ratios=(3, 2))
        _draw_search(figure.add_subplot(grid[0, :]), view)
        for column, tower in enumerate(view.towers):
            _draw_kept(figure.add_subplot(grid[1, column]), tower)
        with replacing(target) as temporary:
            suffix = target.suffix.lstrip(".") or "png"
            figure.savefig(temporary, format=suffix, dpi=dpi)
    return target


def _draw_search(axis: Any, view: SearchView) -> None:
    from fastood.report.figure import LINES

    lo, hi = view.span()
    places = range(1, len(view.candidates) + 1)
    values = [c.row.value.objective for c in view.candidates]
    shown = [min(max(value, lo), hi) for value in values]
    axis.plot(places, shown, ".", color=LINES[6], alpha=0.6, markersize=3, label="candidate")
    best = [view.found.baseline.objective, *(c.best for c in view.candidates)]
    axis.step(range(len(best)), best, where="post", color=LINES[0], linewidth=1.1, label="best")
    accepted = [place for place, c in zip(places, view.candidates, strict=True) if c.accepted]
    if accepted:
        picked = [values[place - 1] for place in accepted]
        axis.plot(accepted, picked, "o", color=LINES[0], markersize=4, label="accepted")
    for place, one, next_ in zip(places, view.candidates, view.candidates[1:], strict=False):
        if one.tower != next_.tower and view.order in ("image_text", "text_image"):
            axis.axvline(place + 0.5, color=LINES[6], linewidth=0.7, linestyle=(0, (3, 3)))
    axis.set(xlabel="candidate", ylabel=view.objective_name, xlim=(-1, len(best)), ylim=(lo, hi))
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_kept(axis: Any, tower: Tower) -> None:
    from fastood.report.figure import LINES

    width = 0.8 / len(tower.kinds)
    for i, kind in enumerate(tower.kinds):
        bars = [bar for bar in tower.bars if bar.kind == kind]
        shift = (i - (len(tower.kinds) - 1) / 2) * width
        places = [bar.place + shift for bar in bars]
        axis.bar(places, [bar.kept for bar in bars], width * 0.9, color=LINES[i], label=kind)
    axis.set_title(f"{tower.name} tower")
    axis.set(xlabel="block", ylabel="kept", ylim=(0, 1.02), xlim=(-0.6, len(tower.places) - 0.4))
    every = max(1, -(-len(tower.places) // 12))
    axis.set_xticks(range(0, len(tower.places), every), tower.places[::every])
    if len(tower.kinds) > 1:
        axis.legend(loc="lower left")
