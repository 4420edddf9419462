"""The page and the figure of a search: what they say, and that the charts show it."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fastood.report import save_search_figure, write_search_report
from fastood.report.search import render_search_report
from fastood.report.searchview import SearchView
from fastood.setar.objective import METRICS, Value
from fastood.setar.picks import Pick
from fastood.setar.recipe import Recipe
from fastood.setar.run import Found
from fastood.setar.table import Row

RATIOS = (0.1, 0.2, 0.4)
NOT_NUMBERS = re.compile(r"\b(nan|inf)\b", re.IGNORECASE)
HARD = 'a <b>"c"</b> & d'


def value(objective: float, metric: str = "loss") -> Value:
    loss = objective if metric == "loss" else 2.0
    scores = {"mcm": {"auroc": objective, "aupr": 0.5, "fpr": 0.25}} if metric == "auroc" else {}
    return Value(objective, loss, loss + 1, -1.5, 0.25, 70, 0, 0, 0.75, scores)


def search_of(
    matrices: Sequence[tuple[str, str, object]],
    objectives: Sequence[Sequence[float]],
    *,
    start: float = 2.0,
    metric: str = "loss",
    order: str = "image_text",
    name: str = "tiny",
    stages: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> Found:
    """A search with these objectives of the candidates of each matrix, decided as a search does."""
    sign, best = METRICS[metric], start
    rows = [Row(0, "", 0.0, 0, value(start, metric), 0.5)]
    picks = []
    for visit, (matrix, tried) in enumerate(zip(matrices, objectives, strict=True), start=1):
        pick = Pick(*matrix, 0.0, 0)
        for ratio, objective in zip(RATIOS, tried, strict=False):
            count = round(ratio * 40)
            rows.append(Row(visit, pick.address, ratio, count, value(objective, metric), 0.25))
            if sign * (objective - best) > 0:
                best, pick = objective, replace(pick, ratio=ratio, count=count)
        picks.append(replace(pick, objective=best))
    search = {
        "plan": {"order": order, "ratios": [0, *RATIOS]},
        "objective": {
            "metric": metric,
            "score": "mcm" if metric == "auroc" else None,
            "top_k": 3,
            "weight": 0.1,
            "temperature": 100.0,
            "pred_label": False,
        },
        "partition": {"kind": "reference", "batches": [512, 488]},
        "class_names": ["cat", HARD],
        "images": {"name": "pets", "number": 1000, "digest": "abc123"},
        "templates": ["a photo of a {}"],
        "settings_from": "published for CLIP ViT-B/16, imagenet",
        "notes": list(notes),
    }
    model = {
        "name": name,
        "fingerprint": "f00",
        "dtype": "float32",
        "matrices": {pick.address: [160, 40] for pick in picks},
    } | ({"stages": list(stages)} if stages else {})
    recipe = Recipe(tuple(picks), model=model, search=search)
    final = value(best, metric)
    return Found(
        recipe, value(start, metric), final, tuple(rows), Path("recipe.json"), tuple(notes)
    )


TWO = [("image", "up", 1), ("image", "up", 0), ("text", "up", 1), ("text", "up", 0)]
LOSSES = [[2.1, 1.9, 1.8], [1.85, 1.9, 2.0], [1.75, 1.7, 1.72], [1.71, 1.8, 9.0]]


@pytest.fixture
def found() -> Found:
    return search_of(TWO, LOSSES)


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.words += data

    def of(self, kind: str) -> list[dict[str, str | None]]:
        """Attributes of elements of a class."""
        return [a for _, a in self.elements if kind in (a.get("class") or "").split()]


def numbers(path: str) -> list[tuple[float, float]]:
    """Corners of an SVG path of lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def test_the_page_says_what_was_found(found):
    page = Page(render_search_report(found))
    words = " ".join(page.words.split())
    assert "2 of 4 matrices lose singular directions" in words
    assert "The loss goes from 2.00000 to 1.70000 (lower is better)" in words
    assert "1,000 images 2 classes 13 evaluations 3.5 s" in words.replace("  ", " ")
    for text in (
        "Patch term",
        "−1.50000",
        "reference, batches of 512 and 488 images",
        "published for CLIP ViT-B/16, imagenet",
        "image tower, then text tower, from the last block",
    ):
        assert text in words
    assert "abc123" in words and "f00" in words and "a photo of a {}" in words
    settings = re.search(r"\[\[.*?\]\]", words)
    assert settings is not None
    assert json.loads(settings[0]) == [
        ["visual", "W_up", 1, 0.4],
        ["visual", "W_up", 0, 0.0],
        ["text", "W_up", 1, 0.2],
        ["text", "W_up", 0, 0.0],
    ]
    assert not NOT_NUMBERS.search(page.words)


def test_the_page_is_complete_in_itself(found, tmp_path):
    file = write_search_report(tmp_path, found)
    assert file == tmp_path / "report.html"
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "http:" not in text and "https:" not in text
    assert not [a for _, a in page.elements if a.get("src")]
    links = {a["href"] for tag, a in page.elements if tag == "a"}
    assert links <= {f"#{a['id']}" for _, a in page.elements if a.get("id")}
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_names_are_escaped():
    noted = search_of(TWO[:1], LOSSES[:1], name=HARD, notes=[f"note {HARD}"])
    noted.recipe.search["images"]["name"] = HARD
    text = render_search_report(noted)
    assert "<b>" not in text
    assert Page(text).words.count(HARD) >= 4


def test_dots_lines_and_picks(found):
    page = Page(render_search_report(found))
    (line,) = [a["d"] for a in page.of("best") if a["d"] != "M0 5H22"]
    points = numbers(line)
    assert all(b[0] >= a[0] for a, b in pairwise(points))
    heights = [y for _, y in points]
    assert heights == sorted(heights)  # down the page: lower losses
    charted = [a for a in page.of("dot") if "cx" in a and a["cx"] != "11"]
    accepted = [a for a in charted if "accepted" in a["class"]]
    assert len(charted) == 12 + 1
    places = sorted(float(a["cx"]) for a in charted)
    assert len(set(places)) == 13
    order = [places.index(float(a["cx"])) for a in accepted]
    assert order == [3, 8]  # the third candidate of the first visit, the second of the third
    for a in accepted:  # the line steps down to each
        assert (float(a["cx"]), float(a["cy"])) in points
    beyond = [a for a in charted if "beyond" in a["class"]]
    assert [places.index(float(a["cx"])) for a in beyond] == [12]
    assert "1 candidate lies beyond the axis" in " ".join(page.words.split())
    assert len(page.of("tower")) == 1


def test_best_so_far_is_monotone_and_ends_at_the_result(found):
    view = SearchView(found)
    best = [c.best for c in view.candidates]
    assert best == sorted(best, reverse=True)
    assert best[-1] == found.final.objective
    assert [c.row.key for c in view.candidates if c.accepted] == [
        (1, "image.1.up", 16),
        (3, "text.1.up", 8),
    ]
    assert [v.gain for v in view.visits] == pytest.approx([0.2, 0, 0.1, 0])
    assert [v.tried for v in view.visits] == [3, 3, 3, 3]


def test_resumed_searches_look_the_same(found):
    """Rows of a visit that was interrupted may come in any order."""
    base, *rows = found.rows
    mixed = (rows[1], rows[0], base, rows[2], *rows[5:2:-1], *rows[6:])
    assert render_search_report(replace(found, rows=mixed)) == render_search_report(found)


def test_higher_is_better():
    found = search_of(TWO, [[0.6, 0.7, 0.4]] * 4, start=0.5, metric="auroc")
    view = SearchView(found)
    best = [c.best for c in view.candidates]
    assert best == sorted(best) and best[-1] == 0.7
    assert [c.accepted for c in view.candidates] == [False, True, *[False] * 10]
    text = " ".join(Page(render_search_report(found)).words.split())
    assert "The AUROC of mcm goes from 0.50000 to 0.70000 (higher is better)" in text
    lo, hi = view.span()
    assert lo < 0.4 and hi > 0.7


@pytest.mark.parametrize("part", ["minor", "principal"])
def test_what_is_shown_for_the_authors_code_means_the_same(found, part, tmp_path):
    """Copied from the page to a file and read again."""
    recipe = replace(found.recipe, part=part)
    page = render_search_report(replace(found, recipe=recipe))
    shown = html.unescape(page.split('<pre class="command"><code>')[1].split("</code>")[0])
    file = tmp_path / "config.json"
    file.write_text(shown)
    again = Recipe.read(file)
    assert (again.part, again.lora_settings()) == (part, recipe.lora_settings())
    file.write_text(json.dumps(recipe.lora_config()))
    assert Recipe.read(file) == again


def test_nothing_accepted():
    found = search_of(TWO[:2], [[2.1, 2.2, 2.3]] * 2)
    page = Page(render_search_report(found))
    assert "No candidate is better than the model as it is" in " ".join(page.words.split())
    assert not page.of("accepted")
    (line,) = [a["d"] for a in page.of("best") if a["d"] != "M0 5H22"]
    assert len({y for _, y in numbers(line)}) == 1


@pytest.mark.parametrize("tried", [[], [1.5], [2.0]])
def test_one_candidate_or_none(tried, tmp_path):
    found = search_of([("image", "proj", None)], [tried])
    text = render_search_report(found)
    assert not NOT_NUMBERS.search(text)
    lo, hi = SearchView(found).span()
    assert math.isfinite(lo) and lo < hi
    assert save_search_figure(found, tmp_path / "figure.svg").stat().st_size > 1000


def test_bars_show_what_is_kept():
    picks = [("image", "up", (1, 1)), ("image", "up", (1, 0)), ("image", "up", (0, 0))]
    found = search_of(picks, [[1.9, 2.0, 2.0]] * 3, stages=(1, 2), order="image")
    (tower,) = SearchView(found).towers
    assert tower.places == ("0.0", "1.0", "1.1")
    assert [(bar.place, bar.kept) for bar in tower.bars] == [(2, 0.9), (1, 1.0), (0, 1.0)]
    page = Page(render_search_report(found))
    heights = [float(a["height"]) for a in page.of("column")]
    assert heights == pytest.approx([99, 110, 110])
    assert len(page.of("changed")) == 1
    assert "−10" in page.words


def test_a_classifier_has_no_text_tower_in_its_order(found):
    alone = search_of([("image", "up", 0)], [[1.9, 2.0, 2.0]])
    words = Page(render_search_report(alone)).words
    assert "image tower, from the last block" in words
    assert not any("text tower" in word for word in words)
    both = Page(render_search_report(found)).words
    assert "image tower, then text tower, from the last block" in both


def test_several_kinds_and_projections():
    picks = [("image", "proj", None), ("image", "up", 1), ("image", "q", 1), ("text", "up", 0)]
    found = search_of(picks, [[1.9]] * 4)
    image, text = SearchView(found).towers
    assert image.kinds == ("q", "up", "proj") and text.kinds == ("up",)
    assert image.places == ("0", "1", "proj")
    page = Page(render_search_report(found))
    charted = [a for a in page.of("column") if "y" in a]
    assert len(charted) == 4 and len({(a["x"], a["class"]) for a in charted}) == 4


def test_an_exhaustive_search_visits_matrices_again(found):
    matrices = TWO[:2]
    again = search_of(matrices, [[1.9, 1.8, 2.0], [1.7, 1.9, 2.0]], order="exhaustive")
    other = again.recipe.picks[1].address
    extra = [Row(1, other, ratio, round(40 * ratio), value(1.95)) for ratio in RATIOS]
    view = SearchView(replace(again, rows=(*again.rows[:4], *extra, *again.rows[4:])))
    assert [c.row.visit for c in view.candidates] == [1] * 6 + [2] * 3
    assert [c.row.key for c in view.candidates if c.accepted] == [
        (1, "image.1.up", 8),
        (2, "image.0.up", 4),
    ]
    assert not NOT_NUMBERS.search(render_search_report(view.found))


def test_a_single_visit_changes_one_matrix():
    found = search_of(TWO, [[1.9, 1.8, 1.85]] + [[1.95, 1.9, 2.5]] * 3, order="single")
    rows = tuple(replace(row, visit=min(row.visit, 1)) for row in found.rows)
    view = SearchView(replace(found, rows=rows))
    assert [v.number for v in view.visits] == [1] * 4
    assert [v.tried for v in view.visits] == [3] * 4
    assert [c.row.key for c in view.candidates if c.accepted] == [(1, "image.1.up", 8)]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figure(found, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = save_search_figure(found, tmp_path / "new" / f"figure.{suffix}")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert file.read_bytes().startswith(start)
