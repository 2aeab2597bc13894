"""Exponents and intervals recover what they are given, and cover it as often as they say."""

import numpy as np
import pytest

from parallax_core.distributed.statistics import bias_exponent, error_exponent, mean_interval

H = np.geomspace(0.01, 0.1, 10)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("where, power", [("boundary", 1), ("interior", 2)])
def test_a_power_law_with_a_next_order_term_is_recovered_exactly(p, where, power):
    bias = 3 * H**p * np.exp(-0.7 * H**power)
    errors = [np.full(5, -b) for b in bias]
    interval = bias_exponent(H, errors, where=where, resamples=100, rng=np.random.default_rng(0))
    np.testing.assert_allclose(interval, p, rtol=1e-10)


def test_the_error_exponent_of_a_power_law_is_its_power():
    n = [64, 256, 1024]
    interval = error_exponent(
        n, [np.full(4, 5.0 * m**-0.8) for m in n], resamples=100, rng=np.random.default_rng(0)
    )
    np.testing.assert_allclose(interval, 0.8, rtol=1e-10)


def test_an_error_of_exactly_zero_has_no_exponent():
    interval = error_exponent(
        [64, 256, 1024], [np.ones(4), np.zeros(4), np.ones(4)], resamples=100, rng=np.random.default_rng(0)
    )
    assert np.isnan(interval).all()


def test_intervals_cover_the_mean_at_their_level():
    # 300 intervals of level 0.95 over 60 normal replicates: the percentile bootstrap covers about 0.94, and a
    # binomial with 300 trials stays within 0.04 of that but once in a few hundred.
    rng = np.random.default_rng(0)
    covered = np.mean(
        [mean_interval(rng.normal(2, 1, 60), resamples=400, rng=rng).contains(2.0) for _ in range(300)]
    )
    assert 0.90 <= covered <= 0.98


def test_designs_shared_by_all_bandwidths_are_resampled_together():
    # A factor common to all bandwidths moves the bias and not its exponent: resampled together it cancels.
    factor = np.random.default_rng(1).lognormal(0, 0.5, 50)
    interval = bias_exponent(
        H, [h * factor for h in H], where="boundary", resamples=200, rng=np.random.default_rng(0)
    )
    # The exponent of h is 1, and so is that of every resample; rounding alone parts them.
    np.testing.assert_allclose(interval, 1, rtol=1e-10)
