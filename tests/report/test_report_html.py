import copy
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastood.report import ScoreTable, write_report
from fastood.report.html import render_report
from fastood.report.metricview import MetricView, percent
from fastood.report.thumbs import data_uri, preview

SECTIONS = {
    "summary",
    "metrics",
    "distributions",
    "gallery",
    "accuracy",
    "thresholds",
    "provenance",
    "glossary",
    "overall",
    "by-set",
    "skipped",
    "reversal",
    "warnings",
    "score-options",
    "image-sets",
}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        (self.styles if self._inside == "style" else self.text).append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def ids(self) -> set[str]:
        return {a["id"] for _, a in self.elements if a.get("id")}


@pytest.fixture(scope="module")
def html(sample) -> str:
    return render_report(sample.results, sample.table, open_image=sample.open_image)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_every_part_is_there(page):
    assert page.ids() >= SECTIONS
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert sum(t == tag for t, _ in page.elements) == 1, tag
    links = {a["href"][1:] for t, a in page.elements if t == "a"}
    assert links <= page.ids()


def test_nothing_is_requested_from_anywhere(html, page):
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "use", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}:
                assert value is not None and value.startswith(("data:", "#")), (tag, name, value)
            if name == "style":
                assert "url" not in (value or "")
    css = "".join(page.styles)
    assert "url(" not in css and "@import" not in css
    policies = [a for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    policy = policies[0]["content"] or ""
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert "script-src" not in policy and "http" not in policy
    assert not re.findall(r"https?://", html)


def test_names_are_escaped_and_shown_whole(html, page, sample):
    assert "<script" not in html and "onerror=alert(1)>" not in html
    nasty = sample.results["prompts"]["class_names"][-1]
    assert nasty.startswith("<script>") and nasty in page.words
    assert "far: textures & <i>shapes</i>" in page.words
    assert "a picture of <b>{}</b>" in page.words
    assert "<img src=x onerror=alert(1)>.jpg" in page.words


def test_awkward_file_names_reach_the_gallery_unharmed(sample):
    table = sample.table
    scores = table.scores["mcm"].copy()
    nasty = sample.table.path[:5].tolist()
    assert nasty[0].startswith("<script>")
    scores[:5] = -1  # now the most OOD-looking ID images
    changed = ScoreTable.from_columns(
        set=table.set,
        role=table.role,
        path=table.path,
        scores={**table.scores, "mcm": scores},
        class_name=table.class_name,
        predicted=table.predicted,
    )
    text = render_report(sample.results, changed, open_image=sample.open_image, score="mcm")
    titles = [a.get("title") for t, a in Page(text).elements if t == "figure"]
    for name in nasty:
        assert name in titles
    assert "<script" not in text


def test_numbers_are_the_results_in_percent(page, sample):
    for row in sample.results["metrics"]:
        for key in ("AUROC", "FPR95-ID", "FPR95-OOD", "AUPR-IN", "AUPR-OUT"):
            assert f"{100 * row[key]:.2f}" in page.words
            low, high = row["intervals"][key]
            assert f"{100 * low:.1f}–{100 * high:.1f}" in page.words
    accuracy = sample.results["id"]["accuracy"]["value"]
    assert f"{100 * accuracy:.2f}" in page.words


def test_both_fpr_conventions_are_named_and_explained(page):
    assert page.words.count("FPR95, ID positive") >= 3
    assert page.words.count("FPR95, OOD positive") >= 3
    assert "share of OOD images that slip through" in page.words
    assert "share of ID images rejected by mistake" in page.words


def test_provenance_is_complete(page, sample):
    results = sample.results
    for text in (
        results["model"]["fingerprint"],
        results["prompts"]["digest"],
        results["command"],
        "a photo of a {}.",
        "tau = 0.01, c = 2",
        "in-distribution",
        "2.30.0",
        "/data/clothing/test",
        "image file is truncated (12 bytes missing)",
        "cannot identify image",
        *results["notes"],
        *results["warnings"],
        *results["prompts"]["warnings"],
    ):
        assert text in page.words, text
    assert "2 files skipped" in page.words


def test_pictures_and_placeholders(page, sample):
    images = [a for t, a in page.elements if t == "img"]
    frames = [a for t, a in page.elements if a.get("class") == "frame"]
    assert len(frames) == 12 * 3
    assert 0 < len(images) < len(frames)  # some files are gone, one does not decode
    assert all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in images)


def test_accessible(page):
    assert all("scope" in a for t, a in page.elements if t == "th")
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert next(a for t, a in page.elements if t == "html")["lang"] == "en"


def test_best_values_are_marked(html, sample):
    view = MetricView(sample.results)
    for metric in view.metrics:
        cells = {s: view.cell("average", s, metric.key) for s in view.scores}
        choose = max if metric.higher_is_better else min
        top = choose(c.value for c in cells.values())
        assert {s for s, c in cells.items() if c.best} == {
            s for s, c in cells.items() if c.value == top
        }
    assert len(re.findall(r'class="best"', html)) >= len(view.metrics)


def test_one_set_has_one_table(build):
    one = build(n_id=60, sets=1)
    text = Page(render_report(one.results, one.table))
    assert "by-set" not in text.ids() and "overall" in text.ids()
    assert "average" not in text.words.lower().replace("averaged", "")


def test_sparse_results_still_make_a_page(sample):
    results = copy.deepcopy(sample.results)
    results["id"]["accuracy"] = None
    results["id"]["skipped"] = []
    results["thresholds"] = {}
    results["command"] = None
    results["notes"] = results["warnings"] = []
    results["prompts"]["warnings"] = []
    for row in results["metrics"]:
        row["intervals"] = {}
        row["AUPR-IN"] = float("nan")
    table = sample.table
    bare = ScoreTable.from_columns(
        set=table.set, role=table.role, path=table.path, scores=table.scores
    )
    text = Page(render_report(results, bare))
    assert "No file was skipped" in text.words
    assert not {"thresholds", "warnings"} & text.ids()
    assert "nan" not in text.words.lower().split()
    assert not [t for t, _ in text.elements if t == "img"]


def test_scores_that_are_not_finite_do_not_break_the_page(sample):
    scores = {k: v.copy() for k, v in sample.table.scores.items()}
    scores["mcm"][:3] = [np.nan, np.inf, -np.inf]
    scores["energy"][:] = 7.0
    table = sample.table
    broken = ScoreTable.from_columns(
        set=table.set, role=table.role, path=table.path, scores=scores, predicted=table.predicted
    )
    text = render_report(sample.results, broken, score="mcm")
    assert "1 ID not a number" in text and "1 ID right of the axis" in text


def test_failing_pictures_never_fail_the_report(sample):
    def gone(set_name, path):
        raise RuntimeError("archive closed")

    text = Page(render_report(sample.results, sample.table, open_image=gone))
    assert not [t for t, _ in text.elements if t == "img"]
    assert sum(a.get("class") == "frame" for _, a in text.elements) == 36


def test_big_evaluations_stay_small(build):
    names = {f"s{i}": {"name": "mcm", "options": {}, "higher": "id"} for i in range(8)}
    big = build(n_id=3000, sets=5, scores=names)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")  # the worst case for a JPEG
    text = render_report(big.results, big.table, open_image=lambda *_: out.getvalue())
    assert text.count("data:image/jpeg") == 72
    assert len(text) < 3_000_000
    assert len(re.sub(r"data:image/jpeg[^\"]*", "", text)) < 600_000


def test_written_file(sample, tmp_path):
    named = write_report(sample.results, sample.table, tmp_path / "a" / "page.html", top=2)
    assert named == tmp_path / "a" / "page.html"
    assert named.read_text("utf-8").lstrip().startswith("<!DOCTYPE html>")
    assert write_report(sample.results, sample.table, tmp_path).name == "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"]


def test_a_file_name_that_is_not_utf8_is_written_visibly(sample, tmp_path):
    results = copy.deepcopy(sample.results)
    results["id"]["skipped"][0]["path"] = "caf\udce9.jpg"
    file = write_report(results, sample.table, tmp_path / "r.html")
    assert "caf\\udce9.jpg" in file.read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "results: expected schema 1, got 2"),
        ({"metrics": []}, "results: expected at least one row in 'metrics'"),
    ],
)
def test_wrong_results_are_refused(sample, change, message):
    with pytest.raises(ValueError, match=message):
        render_report({**sample.results, **change}, sample.table)
    with pytest.raises(ValueError, match=r"score: expected one of .* got 'nope'"):
        render_report(sample.results, sample.table, score="nope")
    with pytest.raises(ValueError, match="top: expected 0 or more"):
        render_report(sample.results, sample.table, top=-1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_every_mode_become_small_jpegs(mode):
    import base64

    format_ = {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    image = Image.new("L", (400, 300), 90)
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 60000, 120000).reshape(300, 400).astype(np.uint16))
    else:
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, format_)
    uri = data_uri(out.getvalue())
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    assert decoded.format == "JPEG" and decoded.mode == "RGB" and decoded.size == (128, 96)


def test_transparency_becomes_white_and_rubbish_none():
    import base64

    out = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(out, "PNG")
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(out.getvalue()).split(",", 1)[1])))
    assert decoded.size == (20, 20) and min(decoded.getpixel((10, 10))) > 250
    assert preview(lambda *_: b"rubbish", "a", "b") is None
    assert preview(lambda *_: None, "a", "b") is None


def test_percent():
    assert percent(0.90857) == "90.86" and percent(1.0, 1) == "100.0"
    assert percent(None) == percent(float("nan")) == "–"


def test_threshold_shares_are_counted_strictly_below(sample):
    from fastood.report.context import thresholds

    table = ScoreTable.from_columns(
        set=["a"] * 4 + ["b"] * 2,
        role=["id"] * 4 + ["ood"] * 2,
        path=list("123456"),
        scores={"s": np.array([0.1, 0.2, 0.3, 0.4, 0.2, 0.1], dtype=np.float32)},
    )
    row = {"set": "b", "score": "s", "n_id": 4, "n_ood": 2, "AUROC": 0.8}
    view = MetricView({"metrics": [row]})
    at = float(np.float32(0.2))
    line = thresholds(view, table, {"s": {"threshold": at, "tpr": 0.75, "n": 4}})[0]
    assert (line["kept"], line["caught"]) == (0.75, [0.5])  # at the threshold is kept
    above = thresholds(view, table, {"s": {"threshold": np.nextafter(at, 1).item()}})[0]
    assert (above["kept"], above["caught"]) == (0.5, [1.0])
