"""The synthetic problems are what the theory beside them assumes."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from parallax_core.distributed import theory
from parallax_core.distributed.problems import CORNER, draw, seed_sequence, synthetic_problem
from parallax_core.distributed.regression import squared_bias_and_variance


@pytest.mark.parametrize("name", ["linear", "smooth"])
@pytest.mark.parametrize("d", [1, 3])
def test_keys_fill_the_cube_and_the_boundary_query_lies_on_its_face(name, d):
    problem = synthetic_problem(name, d, seed=0)
    keys, _ = draw(problem, 2000, 0.0, seed_sequence(0, "test").spawn(1))
    x = keys[0, :, 0] - CORNER
    assert x.min() >= 0
    assert x.max() <= 1
    # Kolmogorov's 1e-6 quantile at n = 2000 is 0.06: uniform in every coordinate.
    assert all(stats.kstest(column, "uniform").statistic < 0.06 for column in x.T)
    assert problem.boundary.x[0, 0] == CORNER
    np.testing.assert_array_equal(problem.interior.x, np.full((1, d), CORNER + 0.5))


def test_the_smooth_problem_has_the_curvature_that_the_theory_uses():
    problem = synthetic_problem("smooth", 1, seed=0)
    keys, values = draw(problem, 50, 0.0, seed_sequence(0, "test").spawn(1))
    np.testing.assert_allclose(values.ravel(), np.exp(keys.ravel() - CORNER), rtol=1e-14)
    np.testing.assert_allclose(problem.boundary.truth, 1.0)


def test_every_segment_of_the_piecewise_problem_is_linear_and_no_two_are_alike():
    problem = synthetic_problem("piecewise", 4, seed=0)
    keys, values = draw(problem, 64, 0.0, seed_sequence(0, "test").spawn(1))
    keys, values = keys[0, :, 0], values[0, :, 0, 0]
    maps = [np.linalg.lstsq(keys[i : i + 16], values[i : i + 16])[0] for i in range(0, 64, 16)]
    for i, linear_map in enumerate(maps):
        segment = slice(16 * i, 16 * i + 16)
        np.testing.assert_allclose(keys[segment] @ linear_map, values[segment], atol=1e-12)
        assert all(np.abs(linear_map - other).max() > 0.1 for other in maps[:i])


def test_replicates_do_not_depend_on_how_many_there_are():
    problem = synthetic_problem("smooth", 1, seed=0)
    few = draw(problem, 10, 0.1, seed_sequence(7, "stream").spawn(3))
    many = draw(problem, 10, 0.1, seed_sequence(7, "stream").spawn(5))
    np.testing.assert_array_equal(few[0], many[0][:3])
    np.testing.assert_array_equal(few[1], many[1][:3])


def test_different_seeds_and_identities_give_different_streams():
    states = {
        tuple(seed_sequence(seed, *identity).generate_state(4))
        for seed in (0, 1)
        for identity in (("smooth", 10), ("smooth", 11), ("linear", 10))
    }
    assert len(states) == 6


def test_an_unknown_problem_is_named():
    with pytest.raises(ValueError, match=r"name: expected .* got 'cubic'"):
        synthetic_problem("cubic", 1, seed=0)


def test_squared_bias_and_variance_add_up_to_the_mean_squared_error():
    errors = np.random.default_rng(0).normal(0.3, 1, (50, 4))
    bias2, variance = squared_bias_and_variance(errors)
    np.testing.assert_allclose(bias2 + variance, np.square(errors).mean(), rtol=1e-13)


def test_squared_bias_is_unbiased():
    # Without the correction its mean would be 0.25 + 1/10; 4000 trials of 5 queries resolve 0.01.
    rng = np.random.default_rng(0)
    bias2 = [squared_bias_and_variance(rng.normal(0.5, 1, (10, 5)))[0] for _ in range(4000)]
    assert abs(np.mean(bias2) - 0.25) < 0.01


def _population(estimator, where, h, power):
    """Integral of w^power f over the uniform design, with w the estimator's equivalent kernel."""
    x0 = 0.5 if where == "interior" else 0.0

    def kernel(x):
        return np.exp(-0.5 * ((x - x0) / h) ** 2)

    moments = [
        integrate.quad(lambda x, j=j: kernel(x) * (x - x0) ** j, 0, 1, points=[x0])[0] for j in range(3)
    ]
    s0, s1, s2 = moments

    def weight(x):
        if estimator == "softmax":
            return kernel(x) / s0
        return kernel(x) * (s2 - s1 * (x - x0)) / (s0 * s2 - s1**2)

    value = np.exp if power == 1 else np.ones_like
    return integrate.quad(lambda x: weight(x) ** power * value(x), 0, 1, points=[x0])[0], math.exp(x0)


@pytest.mark.parametrize("where", ["interior", "boundary"])
@pytest.mark.parametrize("estimator", ["softmax", "lla"])
def test_theory_is_the_limit_of_the_population_bias_and_variance(estimator, where):
    h = 0.004
    smoothed, truth = _population(estimator, where, h, power=1)
    expected = theory.smooth_bias(estimator, where, np.array([h]))[0]
    # The next order is O(h) relative at the boundary and O(h^2) inside; quadrature has 1e-8 / h^2 left.
    assert abs((smoothed - truth) / expected - 1) < 0.02
    roughness, _ = _population(estimator, where, h, power=2)
    variance = theory.smooth_variance(estimator, where, np.array([h]), n=1, noise=1.0)[0]
    assert abs(roughness / variance - 1) < 1e-6


@pytest.mark.parametrize(
    "problem, estimator, where, expected",
    [
        ("smooth", "softmax", "interior", 0.8),
        ("smooth", "softmax", "boundary", 0.4),
        ("smooth", "lla", "boundary", 0.8),
        ("linear", "softmax", "boundary", 0.4),
        ("linear", "global-ridge", "boundary", 1.0),
        ("smooth", "global-ridge", "interior", None),
        ("piecewise", "lla", "interior", None),
    ],
)
def test_rates_at_the_balanced_bandwidth(problem, estimator, where, expected):
    order = theory.error_order(problem, estimator, where, rate=0.2, d=1)
    assert order == (None if expected is None else pytest.approx(expected))
