import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fastood.report.curves import histogram, roc_points, ticks
from fastood.report.svg import histogram_chart, range_chart, roc_chart


def test_histogram_shares_are_of_all_images():
    rng = np.random.default_rng(0)
    data = histogram(rng.normal(0, 1, 4000), rng.normal(3, 1, 500))
    for side, n, shares in ((0, 4000, data.id_share), (1, 500, data.ood_share)):
        outside = data.below[side] + data.above[side]
        assert shares.sum() * n + outside == pytest.approx(n)


def test_far_outliers_are_counted_not_drawn():
    rng = np.random.default_rng(1)
    pos, neg = rng.normal(0, 1, 2000), rng.normal(-2, 1, 2000)
    pos[:2], neg[:3] = 1e6, [-np.inf, -1e9, np.nan]
    data = histogram(pos, neg)
    assert -8 < data.edges[0] < data.edges[-1] < 8
    assert data.above[0] >= 2 and data.below[1] >= 2 and data.invalid == (0, 1)
    seen = data.ood_share.sum() * 2000 + data.below[1] + data.above[1] + data.invalid[1]
    assert seen == pytest.approx(2000)


def test_nothing_is_cut_from_an_ordinary_range():
    rng = np.random.default_rng(2)
    data = histogram(rng.uniform(0, 1, 3000), rng.uniform(0.5, 1.5, 3000))
    assert data.below == data.above == (0, 0)


@pytest.mark.parametrize(
    ("pos", "neg"),
    [
        ([0.5] * 9, [0.5] * 4),
        ([0.0], [0.0]),
        ([1.0], [2.0]),
        ([], [1.0]),
        ([], []),
        ([np.nan], [np.inf]),
        ([1e300, -1e300], [0.0, 1e308]),
        ([1e-40, 2e-40], [3e-40]),
        ([12345.678, 12345.679], [12345.68]),
    ],
)
def test_degenerate_scores_still_draw(pos, neg):
    pos, neg = np.array(pos, dtype=float), np.array(neg, dtype=float)
    data = histogram(pos, neg)
    assert np.isfinite(data.edges).all() and (np.diff(data.edges) >= 0).all()
    fpr, tpr = roc_points(pos, neg)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    for chart in (
        histogram_chart(data, label="<x>", threshold=0.5, threshold_name="&"),
        roc_chart([("<a>", fpr, tpr)], label='"q"'),
    ):
        ElementTree.fromstring(chart)
        assert "nan" not in chart and "inf" not in chart


def test_roc_matches_counting_with_ties():
    rng = np.random.default_rng(3)
    pos, neg = rng.integers(0, 9, 60), rng.integers(-3, 6, 50)
    fpr, tpr = roc_points(pos, neg)
    expected = {(0.0, 0.0)}
    expected |= {((neg >= t).mean(), (pos >= t).mean()) for t in np.unique([*pos, *neg])}
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) == expected
    area = ((tpr[1:] + tpr[:-1]) / 2 * np.diff(fpr)).sum()
    wins = (pos[:, None] > neg).mean() + 0.5 * (pos[:, None] == neg).mean()
    assert area == pytest.approx(wins)


def test_thinned_roc_keeps_exact_points_and_ends():
    rng = np.random.default_rng(4)
    pos, neg = rng.normal(1, 1, 20_000), rng.normal(0, 1, 30_000)
    fpr, tpr = roc_points(pos, neg, limit=200)
    full = set(zip(*(x.tolist() for x in roc_points(pos, neg, limit=10**9)), strict=True))
    assert len(fpr) <= 200
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) <= full
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
    assert max(np.diff(fpr).max(), np.diff(tpr).max()) < 0.02


@pytest.mark.parametrize(
    ("lo", "hi", "labels"),
    [
        (0.0, 1.0, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (-4.2, 4.1, ["−4", "−2", "0", "2", "4"]),
        (0.00103, 0.00127, ["0.00105", "0.00110", "0.00115", "0.00120", "0.00125"]),
        (1e-5, 5e-5, ["1e−5", "2e−5", "3e−5", "4e−5", "5e−5"]),
    ],
)
def test_ticks_are_round_and_inside(lo, hi, labels):
    places = ticks(lo, hi)
    assert [text for _, text in places] == labels
    assert all(lo - 1e-12 <= p <= hi + 1e-12 for p, _ in places)


def test_ticks_of_nothing():
    assert ticks(1.0, 1.0) == [] and ticks(0.0, float("inf")) == []


def test_range_chart_stays_inside():
    chart = range_chart(0.5, low=-3.0, high=9.0, parts=[0.1], span=(0.0, 1.0), label="x")
    root = ElementTree.fromstring(chart)
    assert root.find("circle").attrib["cx"] == "60"
    assert "M5 7H115" in chart
