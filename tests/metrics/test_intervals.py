"""DeLong, bootstrap and the paired tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastood.metrics import average, compare, evaluate
from fastood.metrics.bootstrap import resample, weights
from fastood.metrics.counts import Counts, Layout
from fastood.metrics.delong import auroc_variance, components
from fastood.metrics.evaluation import statistics_of
from fastood.metrics.inputs import Pair
from fastood.metrics.normal import two_sided_p, z_of
from tests.metrics.slow import slow_delong

TIED = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=20)


def draw(rng, n, m, shift=1.0):
    return rng.normal(shift, 1, n), rng.normal(0, 1, m)


@settings(max_examples=100, deadline=None)
@given(TIED, TIED)
def test_delong_variance_is_that_of_the_full_table(a, b):
    want = slow_delong(a, b)
    assert auroc_variance(Counts.of(np.array(a), np.array(b))) == pytest.approx(
        want, rel=1e-10, abs=1e-16
    )
    found = components(Pair(np.array(a), np.array(b)))
    parts = np.var(found.id, ddof=1) / len(a) + np.var(found.ood, ddof=1) / len(b)
    assert parts == pytest.approx(want, rel=1e-10, abs=1e-16)


def test_delong_and_bootstrap_agree():
    a, b = draw(np.random.default_rng(0), 600, 400)
    variance = auroc_variance(Counts.of(a, b))
    replicates = resample(
        [Layout.of(a, b)], {"AUROC": Counts.auroc}, sizes=(600, 400), resamples=2000, seed=1
    )["AUROC"][0]
    # The standard error of a variance from 2,000 replicates is about 3 %.
    assert replicates.var() == pytest.approx(variance, rel=0.15)
    delong = evaluate(a, b, intervals="delong").intervals["AUROC"]
    boot = evaluate(a, b, intervals="bootstrap").intervals["AUROC"]
    assert boot == pytest.approx(delong, abs=0.15 * (delong[1] - delong[0]))


def test_delong_interval_covers_as_often_as_it_says():
    """500 draws at a known AUROC; 3.5 binomial standard errors around 95 % (seed fixed)."""
    rng = np.random.default_rng(2)
    truth = 0.5 * math.erfc(-1.5 / 2)  # P(N(1.5, 2) > 0)
    hits = 0
    for _ in range(500):
        low, high = evaluate(*draw(rng, 80, 60, 1.5), intervals="delong").intervals["AUROC"]
        hits += low <= truth <= high
    assert abs(hits / 500 - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 500)


def test_bootstrap_intervals_cover():
    """FPR and AUPR against their values on a large sample of the same distribution."""
    rng = np.random.default_rng(3)
    truth = evaluate(*draw(rng, 400_000, 400_000))
    hits = dict.fromkeys(truth, 0)
    for seed in range(120):
        found = evaluate(*draw(rng, 200, 200), intervals="bootstrap", resamples=200, seed=seed)
        for key, (low, high) in found.intervals.items():
            hits[key] += low <= truth[key] <= high
    # Percentile intervals of a quantile-like metric undercover a little at n = 200.
    assert all(105 <= count <= 120 for count in hits.values()), hits


@pytest.mark.parametrize("aupr", ["ap", "trapezoid"])
@pytest.mark.parametrize("decimals", [0, 6])
@pytest.mark.filterwarnings("ignore:only .* distinct values")
def test_a_weighted_count_is_the_count_of_the_drawn_images(aupr, decimals):
    """Weights instead of copies: every statistic equals that of the repeated scores."""
    rng = np.random.default_rng(4)
    a, b = rng.normal(1, 1, 30).round(decimals), rng.normal(0, 1, 25).round(decimals)
    layout, found = Layout.of(a, b), 0
    for weight in weights(30, 25, 200, seed=5):
        drawn_a, drawn_b = np.repeat(a, weight[:30]), np.repeat(b, weight[30:])
        assert (len(drawn_a), len(drawn_b)) == (30, 25)
        for tpr in (0.3, 0.95):
            for name, statistic in statistics_of(tpr, aupr).items():
                want = statistic(Counts.of(drawn_a, drawn_b))
                assert statistic(layout.counts(weight)) == pytest.approx(want, rel=1e-12), name
                found += 1
    assert found == 200 * 2 * 5


def test_bootstrap_is_seeded():
    a, b = draw(np.random.default_rng(6), 60, 50)
    one = evaluate(a, b, intervals=True, resamples=100, seed=7).intervals
    assert one == evaluate(a, b, intervals=True, resamples=100, seed=7).intervals
    assert one != evaluate(a, b, intervals=True, resamples=100, seed=8).intervals
    assert set(one) == {"AUROC", "AUPR-IN", "AUPR-OUT", "FPR95-ID", "FPR95-OOD"}
    found = evaluate(a, b, intervals=True, resamples=100)
    for key, (low, high) in found.intervals.items():
        assert 0 <= low <= found[key] <= high <= 1 and low < high
    assert evaluate(a, b).intervals == {} and evaluate(a, b).confidence is None
    wide = evaluate(a, b, intervals="delong", confidence=0.99).intervals
    assert set(wide) == {"AUROC"} and wide["AUROC"][0] < one["AUROC"][0]


def test_average_interval_shares_the_drawn_id_images():
    """Its variance is that of one bootstrap over all sets at once: ID noise does not average out,
    OOD noise does."""
    rng = np.random.default_rng(11)
    a = rng.normal(1, 1, 60)
    sets = [rng.normal(0, 1, 2000) for _ in range(4)]
    results = [evaluate(a, b, intervals=True) for b in sets]
    mean = average(results)
    assert set(mean.intervals) == set(mean) and mean.confidence == 0.95

    def width(found):
        return found.intervals["AUROC"][1] - found.intervals["AUROC"][0]

    # With few ID images nearly all noise is theirs; independent draws would halve the width.
    assert width(mean) > 0.85 * width(results[0])
    for key, (low, high) in mean.intervals.items():
        assert low <= mean[key] <= high
    swapped = [evaluate(-b, -a, intervals=True) for b in sets]  # other ID images each time
    assert average(swapped).intervals == {} and average(swapped).confidence is None
    other_seed = evaluate(a, sets[1], intervals=True, seed=1)
    assert average([results[0], other_seed]).intervals == {}
    assert average([results[0], evaluate(a, sets[1], intervals="delong")]).intervals == {}
    assert average([results[0], evaluate(a, sets[1])]).intervals == {}


def test_average_interval_does_not_share_the_ood_draws():
    """Two sets in the same order would otherwise be drawn alike, as if their noise were one."""
    rng = np.random.default_rng(12)
    a = rng.normal(1, 1, 3000)
    one, other = (np.sort(rng.normal(0, 1, 60)) for _ in range(2))
    results = [evaluate(a, b, intervals="bootstrap") for b in (one, other)]
    drawn = np.corrcoef([found.replicates["AUROC"] for found in results])[0, 1]
    assert drawn < 0.3  # 0.99 with shared draws


def test_intervals_ignore_monotone_transforms():
    a, b = draw(np.random.default_rng(13), 60, 50)
    want = evaluate(a, b, intervals=True, resamples=100)
    assert evaluate(np.exp(a), np.exp(b), intervals=True, resamples=100).intervals == want.intervals


def test_auroc_interval_at_the_borders():
    # 20 disjoint pairs all ranked right bound the AUROC, although DeLong's variance is zero.
    best = evaluate(np.arange(20.0) + 50, np.arange(30.0), intervals="delong")
    assert best.intervals["AUROC"] == pytest.approx((0.025 ** (1 / 20), 1.0))
    worst = evaluate(np.arange(20.0), np.arange(30.0) + 50, intervals="delong")
    assert worst.intervals["AUROC"] == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    with pytest.warns(UserWarning, match="equal"):
        constant = evaluate([1.0] * 5, [1.0] * 5, intervals=True)
    assert constant.intervals["AUROC"] == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least 2 ID and 2 OOD scores, got 1 and 2"):
        evaluate([1.0], [0.0, 0.5], intervals=True)


def test_normal_quantile_and_tail():
    stats = pytest.importorskip("scipy.stats")
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert z_of(confidence) == pytest.approx(stats.norm.ppf(0.5 + confidence / 2), rel=1e-12)
    for z in (-3.0, 0.0, 1.0, 12.0):
        assert two_sided_p(z) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-12)


def test_compare_finds_a_difference_and_its_sign():
    rng = np.random.default_rng(8)
    a_id, a_ood = draw(rng, 400, 300, 1.5)
    b_id, b_ood = a_id + rng.normal(0, 1.5, 400), a_ood + rng.normal(0, 1.5, 300)
    found = compare(a_id, a_ood, b_id, b_ood, resamples=300)
    back = compare(b_id, b_ood, a_id, a_ood, resamples=300)
    assert list(found) == list(evaluate(a_id, a_ood))
    for key, difference in found.items():
        assert difference.a == evaluate(a_id, a_ood)[key]
        assert difference.b == evaluate(b_id, b_ood)[key]
        assert difference.difference == difference.a - difference.b
        low, high = difference.interval
        assert -1 <= low <= difference.difference <= high <= 1
        assert difference.p < 0.05
        assert (difference.difference > 0) == (not key.startswith("FPR"))
        # Shared draws: exchanging the methods mirrors everything.
        assert back[key].p == pytest.approx(difference.p)
        assert back[key].interval == pytest.approx((-high, -low))
    assert (found["AUROC"].test, found["FPR95-ID"].test) == ("delong", "bootstrap")
    # Pairing is what makes it sharp: independent errors would be added up instead.
    se = math.sqrt(sum(auroc_variance(Counts.of(*x)) for x in ((a_id, a_ood), (b_id, b_ood))))
    assert abs(found["AUROC"].z) > 1.1 * abs(found["AUROC"].difference) / se


def test_paired_delong_is_the_covariance_formula():
    rng = np.random.default_rng(9)
    a_id, a_ood = draw(rng, 50, 40)
    b_id, b_ood = a_id + rng.normal(0, 1, 50), a_ood + rng.normal(0, 1, 40)
    va, vb = components(Pair(a_id, a_ood)), components(Pair(b_id, b_ood))
    s10, s01 = np.cov(va.id, vb.id), np.cov(va.ood, vb.ood)
    s = s10 / 50 + s01 / 40
    z = (va.id.mean() - vb.id.mean()) / math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    found = compare(a_id, a_ood, b_id, b_ood, resamples=100)["AUROC"]
    assert found.z == pytest.approx(z, rel=1e-9)
    assert found.p == pytest.approx(two_sided_p(z), rel=1e-9)


def test_equal_methods_get_p_values_that_are_not_small_too_often():
    """Two equally noisy views of the same images: rejections at .05 stay near .05."""
    rng, rejected = np.random.default_rng(10), dict.fromkeys(("AUROC", "FPR95-ID"), 0)
    for seed in range(150):
        base_id, base_ood = draw(rng, 150, 150, 1.5)
        views = [x + rng.normal(0, 0.5, 150) for x in (base_id, base_ood, base_id, base_ood)]
        found = compare(*views, resamples=200, seed=seed)
        for key in rejected:
            rejected[key] += found[key].p < 0.05
    # 150 draws at 5 %: 7.5 expected, 17 is 3.5 standard errors above.
    assert all(count <= 17 for count in rejected.values()), rejected
    assert rejected["AUROC"] >= 1


def test_compare_degenerate_and_wrong():
    a, b = [2.0, 3.0, 4.0], [0.0, 1.0, 2.5]
    same = compare(a, b, a, b, resamples=100)
    assert all((x.difference, x.p, x.interval) == (0, 1, (0, 0)) for x in same.values())
    perfect = compare([2.0, 3.0], [0.0, 1.0], [5.0, 5.0], [5.0, 5.0], resamples=100)["AUROC"]
    assert perfect.difference == 0.5 and math.isnan(perfect.p) and math.isnan(perfect.z)
    with pytest.raises(ValueError, match="same ID images, got 3 scores by a and 2 by b"):
        compare(a, b, a[:2], b)
    with pytest.raises(ValueError, match="same OOD images"):
        compare(a, b, a, b[:2])
    with pytest.raises(ValueError, match="at least 2"):
        compare(a[:1], b, a[:1], b)
    with pytest.raises(ValueError, match="tpr"):
        compare(a, b, a, b, tpr=95)
