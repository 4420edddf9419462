"""Beta and binomial arithmetic against scipy."""

from __future__ import annotations

import pytest

from fastood.calibration.beta import beta_cdf, beta_interval, quantile_ranks

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    ("a", "b"),
    [(1, 1), (0.5, 0.5), (90, 10), (1, 500), (19, 1), (47501, 2500), (950_001, 50_000), (3, 1e5)],
)
def test_beta(a, b):
    for probability in (1e-6, 0.025, 0.3, 0.5, 0.975, 1 - 1e-6):
        x = stats.beta.ppf(probability, a, b)
        # lgamma loses digits at large arguments: 1e6 costs about nine of them.
        assert beta_cdf(x, a, b) == pytest.approx(probability, rel=1e-8, abs=1e-12)
    for confidence in (0.5, 0.95, 0.999):
        want = stats.beta.interval(confidence, a, b)
        assert beta_interval(a, b, confidence) == pytest.approx(want, rel=1e-8, abs=1e-10)
    assert (beta_cdf(-0.1, a, b), beta_cdf(0, a, b), beta_cdf(1, a, b)) == (0, 0, 1)


@pytest.mark.parametrize("n", [1, 10, 50, 99, 1000, 50_000])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_ranks_are_the_tightest_that_cover(n, share, confidence):
    lower, upper = quantile_ranks(n, share, confidence)
    tail = (1 - confidence) / 2
    binomial = stats.binom(n, share)
    assert 0 <= lower < upper <= n + 1
    assert binomial.cdf(lower - 1) <= tail < binomial.cdf(lower)
    assert binomial.cdf(upper - 1) >= 1 - tail
    assert upper == 1 or binomial.cdf(upper - 2) < 1 - tail
