"""Each named mechanism is its point of the family: the table of docs/math.md, "The family"."""

import functools

import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import FLOAT64, attention_cases, seeds

from parallax_core import reference

EPS = np.finfo(np.float64).eps
# The sensitivities of the oracle are of first order; this is for their constants.
SAFETY = 4

cases = attention_cases(dtypes=FLOAT64, max_head_dim=4)
uniform_cases = attention_cases(dtypes=FLOAT64, max_head_dim=4, scales=(0.0,))


def family(case, **options):
    return reference.local_attention(case.q, case.k, case.v, **(case.options | options))


def mechanism(name, case, **options):
    """One of the reference's named global estimators, which take no scale."""
    masks = {key: value for key, value in case.options.items() if key != "scale"}
    return getattr(reference, name)(case.q, case.k, case.v, **masks, **options)


def assert_within(result, expected, sensitivity, safety=SAFETY):
    assert (np.abs(result - expected) <= safety * EPS * sensitivity).all()


def ridges(case, seed):
    return 10.0 ** np.random.default_rng(seed).uniform(-3, 1, case.q.shape[:3])


def lla_answer(case, ridge):
    return oracle.evaluate(case, functools.partial(oracle.lla, ridge=ridge))


@given(case=attention_cases())
def test_softmax_is_the_point_without_a_probe(case):
    o, _, sensitivity = oracle.evaluate(case, oracle.softmax)
    assert_within(family(case, probe=None), o, sensitivity)


@given(case=attention_cases())
def test_parallax_is_the_point_of_a_given_probe(case):
    o, _, sensitivity = oracle.evaluate(case, oracle.parallax)
    assert_within(family(case, probe=case.r), o, sensitivity)


@given(case=attention_cases(), seed=seeds)
def test_lla_is_the_point_of_the_solved_probe(case, seed):
    ridge = ridges(case, seed)
    o, _, sensitivity = lla_answer(case, ridge)
    for solver in ("cholesky", "cg", "lstsq"):
        # Conjugate gradients stop at a residual of 1e-13, 450 rounding units.
        safety = 450 if solver == "cg" else SAFETY
        assert_within(family(case, probe="solve", ridge=ridge, solver=solver), o, sensitivity, safety)


@given(case=cases, seed=seeds)
def test_lla_in_the_papers_form_is_the_point_of_the_uncentred_probe_with_amplification(case, seed):
    ridge = ridges(case, seed)
    rho = np.zeros(case.q.shape)

    def uncentred_probe(q, r, K, V, scale, at):
        w = np.exp(scale * (K @ q))
        d = K - q
        rho[at] = oracle.solve((w[:, None] * d).T @ d + ridge[at] * w.sum() * np.eye(q.size), w @ d)
        return oracle.Answer(np.zeros(V.shape[1]), 0.0, 0.0)

    oracle.evaluate(case, uncentred_probe)
    o, _, sensitivity = lla_answer(case, ridge)
    # rho is rounded to float64 and 1 - alpha = 1 / (1 + x), x = |q - kbar|^2 over the ridge, cancels to a
    # small number: 1 + x is lost of the precision, on top of the condition of the system.
    largest = 1 + (np.abs(case.q).max(initial=0) + np.abs(case.k).max(initial=0)) ** 2 * 4 / ridge[..., None]
    assert_within(family(case, probe=rho, amplification=True), o, sensitivity * largest)


@given(case=uniform_cases, seed=seeds)
def test_ridge_regression_at_the_query_is_the_point_of_scale_0(case, seed):
    """Least squares with an intercept and a penalised slope, solved as one stacked system."""
    ridge = ridges(case, seed)
    _, _, sensitivity = lla_answer(case, ridge)

    def regression(q, r, K, V, scale, at):
        n, D = K.shape
        penalty = np.sqrt(n * ridge[at]) * np.eye(D)
        design = np.block([[np.ones((n, 1)), K.astype(float)], [np.zeros((D, 1)), penalty]])
        labels = np.vstack((V.astype(float), np.zeros((D, V.shape[1]))))
        fitted = np.linalg.lstsq(design, labels, rcond=None)[0]
        return oracle.Answer(np.concatenate(([1.0], q.astype(float))) @ fitted, 0.0, 0.0)

    expected, _, _ = oracle.evaluate(case, regression)
    # NumPy's solution has errors of its own, by a decomposition of D + 1 columns.
    assert_within(family(case, probe="solve", ridge=ridge), expected, sensitivity, safety=25 * SAFETY)


@given(seed=seeds, D=st.integers(1, 4), extra=st.integers(4, 9))
def test_ordinary_least_squares_at_the_query_is_the_point_of_scale_0_and_ridge_0(seed, D, extra):
    random = np.random.default_rng(seed)
    n = 2 * D + extra
    q, k, v = (random.standard_normal(shape) for shape in ((1, 3, 1, D), (1, n, 1, D), (1, n, 1, 2)))
    design = np.column_stack((np.ones(n), k[0, :, 0]))
    fitted = np.linalg.lstsq(design, v[0, :, 0], rcond=None)[0]
    expected = np.column_stack((np.ones(3), q[0, :, 0])) @ fitted
    o = reference.local_attention(q, k, v, probe="solve", ridge=0.0, solver="lstsq", scale=0.0, causal=False)
    # Rounding times the condition number of the normal equations.
    bound = 100 * EPS * np.linalg.cond(design) ** 2 * (1 + np.abs(expected).max())
    np.testing.assert_allclose(o[0, :, 0], expected, rtol=0, atol=bound)


@given(case=uniform_cases, seed=seeds)
def test_mesanet_is_the_solved_point_of_scale_0_without_intercept(case, seed):
    ridge = ridges(case, seed)

    def mesanet(q, r, K, V, scale, at):
        G, H = V.T @ K, K.T @ K
        u = oracle.solve(H + len(K) * ridge[at] * np.eye(q.size), q)
        condition = 1 + np.abs(K).max() ** 2 * q.size / ridge[at]
        step = np.abs(u) @ np.abs(K).max(axis=0) * np.abs(V).max()
        return oracle.Answer(G @ u, 0.0, float((4 * len(K) + 4 * q.size) * condition * step))

    o, _, sensitivity = oracle.evaluate(case, mesanet)
    point = family(case, probe="solve", ridge=ridge, intercept=False)
    assert_within(point, o, sensitivity)
    assert_within(mechanism("global_ridge_attention", case, ridge=ridge), o, sensitivity)


@given(case=uniform_cases)
def test_linear_attention_is_the_query_point_of_scale_0_without_intercept(case):
    def linear(q, r, K, V, scale, at):
        terms = np.abs(K) @ np.abs(q) @ np.abs(V)
        return oracle.Answer((K @ q) @ V / len(K), 0.0, float((q.size + len(K) + 4) * terms.max() / len(K)))

    o, _, sensitivity = oracle.evaluate(case, linear)
    assert_within(family(case, probe="query", intercept=False), o, sensitivity)
    assert_within(mechanism("linear_attention", case), o, sensitivity)


@given(case=cases)
def test_the_query_probe_is_the_negative_query(case):
    for intercept in (True, False):
        np.testing.assert_array_equal(
            family(case, probe="query", intercept=intercept),
            family(case, probe=-case.q, intercept=intercept),
        )


@given(case=cases)
def test_without_intercept_a_probe_reads_the_raw_moments(case):
    def raw(q, r, K, V, scale, at):
        p, lse = oracle.weights(scale * (K @ q))
        sensitivity = oracle.parallax(q, r, K, V, scale).sensitivity
        return oracle.Answer(-(p * (K @ r)) @ V, lse, sensitivity)

    o, _, sensitivity = oracle.evaluate(case, raw)
    assert_within(family(case, probe=case.r, intercept=False), o, sensitivity)


@given(case=cases)
def test_amplification_divides_the_part_of_the_probe(case):
    def amplified(q, r, K, V, scale, at):
        p, lse = oracle.weights(scale * (K @ q))
        plain, _, sensitivity = oracle.parallax(q, r, K, V, scale)
        vbar = p @ V
        alpha = r @ (p @ K - q)
        size = np.abs(r) @ (np.abs(K).max(axis=0) + np.abs(q))
        growth = (1 + size) ** 2 / min(1, abs(1 - alpha)) ** 2
        return oracle.Answer(vbar + (plain - vbar) / (1 - alpha), lse, float(sensitivity * growth))

    o, _, sensitivity = oracle.evaluate(case, amplified)
    assert_within(family(case, probe=case.r, amplification=True), o, sensitivity)


@given(case=cases, bandwidth=st.sampled_from((0.5, 2.0, 3.0)))
def test_a_bandwidth_is_a_scale(case, bandwidth):
    for kernel in ("dot", "gaussian"):
        options = {"probe": case.r, "kernel": kernel}
        by_bandwidth = family(case, scale=None, bandwidth=bandwidth, **options)
        np.testing.assert_array_equal(by_bandwidth, family(case, **options | {"scale": 1 / bandwidth**2}))


# scale <= 0 is left out: the Gaussian kernel takes none below 0, and at 0 both are uniform.
@given(case=attention_cases(dtypes=FLOAT64, max_head_dim=4, scales=(None, 0.3, 1.0)), probe=st.booleans())
def test_the_kernels_agree_where_the_keys_have_one_norm(case, probe):
    k = 1.5 * case.k / np.linalg.norm(case.k, axis=-1, keepdims=True)
    case = case.with_keys_and_values(k, case.v)
    estimator = oracle.parallax if probe else oracle.softmax
    _, _, sensitivity = oracle.evaluate(case, estimator)
    probe = case.r if probe else None
    # The distances carry |q|^2 + |k|^2 beside the product, and normalising leaves 1.5^2 by a rounding each.
    largest = 1 + (np.abs(case.q) ** 2).sum(axis=-1, keepdims=True) + 3
    dot, gaussian = (family(case, probe=probe, kernel=kernel) for kernel in ("dot", "gaussian"))
    assert_within(dot, gaussian, sensitivity * largest)


@given(case=uniform_cases, seed=seeds)
def test_the_kernels_agree_at_scale_0(case, seed):
    for options in ({"probe": None}, {"probe": "solve", "ridge": ridges(case, seed)}):
        np.testing.assert_array_equal(
            family(case, kernel="dot", **options), family(case, kernel="gaussian", **options)
        )


@given(case=attention_cases(dtypes=FLOAT64, max_head_dim=4, scales=(0.3, 1.0)), seed=seeds)
def test_the_gaussian_kernel_weighs_by_distance(case, seed):
    """On any keys: the formula itself, and LLA with these weights."""
    ridge = ridges(case, seed)

    def gaussian(q, r, K, V, scale, at):
        # The kernel is a dot kernel of keys with the coordinate -|k|^2 / 2 against queries with a 1.
        K1 = np.column_stack((K, -(K**2).sum(axis=1) / 2))
        p, _ = oracle.weights(scale * (K1 @ np.append(q, 1)))
        u = oracle.solve(((K - p @ K) * p[:, None]).T @ (K - p @ K) + ridge[at] * np.eye(q.size), q - p @ K)
        o = p @ V + (p * ((K - p @ K) @ u)) @ V
        squares = scale * ((np.abs(q) + np.abs(K)) ** 2).sum(axis=1).max()
        dot = oracle.lla(q, r, K, V, scale, at, ridge=ridge)
        # A system with other weights has a condition that the ridge bounds.
        condition = (1 + np.abs(K).max() ** 2 * q.size / ridge[at]) ** 2 * (1 + np.abs(q - p @ K).max())
        return oracle.Answer(o, 0.0, float((dot.sensitivity + squares * np.abs(V).max()) * condition))

    o, _, sensitivity = oracle.evaluate(case, gaussian)
    assert_within(family(case, probe="solve", ridge=ridge, kernel="gaussian"), o, sensitivity)


@given(case=attention_cases(), junk=st.sampled_from((np.nan, np.inf)))
def test_keys_that_no_row_sees_change_no_point(case, junk):
    k, v = case.k.copy(), case.v.copy()
    hidden = oracle.hidden_places(case)
    k[hidden] = v[hidden] = junk
    spoilt = case.with_keys_and_values(k, v)
    points = (
        {"probe": None},
        {"probe": "query", "intercept": False},
        {"probe": "solve", "ridge": 0.1},
        {"probe": case.r, "amplification": True},
    )
    for point in points:
        for kernel, scale in (("dot", None), ("gaussian", 0.5)):
            options = {**point, "kernel": kernel, "scale": scale}
            np.testing.assert_array_equal(family(spoilt, **options), family(case, **options))
    for name, options in (("linear_attention", {}), ("global_ridge_attention", {"ridge": 0.1})):
        np.testing.assert_array_equal(mechanism(name, spoilt, **options), mechanism(name, case, **options))


@given(case=cases, data=st.data())
def test_the_keys_of_other_rows_change_no_point(case, data):
    """Hidden from some rows alone: those must not see that such a key or its value is NaN."""
    rows = [row for row in oracle.seen_rows(case) if row.places]
    assume(rows)
    chosen = data.draw(st.sampled_from(rows))
    k, v = np.full_like(case.k, np.nan), np.full_like(case.v, np.nan)
    for place in chosen.places:
        k[place], v[place] = case.k[place], case.v[place]
    spoilt = case.with_keys_and_values(k, v)
    at = chosen.batch, chosen.row, chosen.head
    _, _, sensitivity = lla_answer(case, np.full(case.q.shape[:3], 0.1))
    for point in ({"probe": None}, {"probe": "query", "intercept": False}, {"probe": "solve", "ridge": 0.1}):
        for kernel, scale in (("dot", case.options["scale"]), ("gaussian", 0.0)):
            options = {**point, "kernel": kernel, "scale": scale}
            # The same terms in another order of summation, well within LLA's bound.
            difference = np.abs(family(spoilt, **options)[at] - family(case, **options)[at])
            assert (difference <= 1e3 * EPS * (1 + sensitivity[at])).all()
    for name, options in (("linear_attention", {}), ("global_ridge_attention", {"ridge": 0.1})):
        difference = np.abs(mechanism(name, spoilt, **options)[at] - mechanism(name, case, **options)[at])
        assert (difference <= 1e3 * EPS * (1 + sensitivity[at])).all()


def test_a_large_scale_picks_one_key():
    k = np.array([[1.0, 0.0], [0.9, 0.2], [4.0, 3.0]])[None, :, None]
    v = np.array([[1.0], [2.0], [3.0]])[None, :, None]
    q = np.array([[0.9, 0.25]])[None, :, None]
    options = {"probe": None, "scale": 1e5, "causal": False}
    # The others' weights are below exp(-100): the nearest key, and the key of the largest product.
    assert reference.local_attention(q, k, v, kernel="gaussian", **options) == 2.0
    assert reference.local_attention(q, k, v, kernel="dot", **options) == 3.0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"probe": "key"}, ValueError, "probe is 'key'; expected None, 'query', 'solve' or an array"),
        ({"probe": 3.0}, TypeError, "r is a float"),
        ({"probe": np.zeros((1, 2, 1, 2))}, ValueError, "r has shape"),
        ({"probe": None, "intercept": False}, ValueError, "probe is None with intercept=False"),
        ({"probe": None, "amplification": True}, ValueError, "amplification is True with probe=None"),
        (
            {"probe": "query", "intercept": False, "amplification": True},
            ValueError,
            "amplification is True with intercept=False",
        ),
        ({"probe": "query", "intercept": 1}, TypeError, "intercept must be True or False"),
        ({"probe": "solve"}, ValueError, "ridge is None with probe='solve'"),
        ({"probe": "query", "ridge": 0.1}, ValueError, "ridge is given, but only probe='solve' takes one"),
        ({"probe": "solve", "ridge": 0.0}, ValueError, "a ridge of 0 needs solver='lstsq'"),
        ({"probe": None, "kernel": "laplace"}, ValueError, "kernel is 'laplace'"),
        (
            {"probe": None, "kernel": "gaussian", "scale": -1.0},
            ValueError,
            "scale is -1.0; expected 0 or more",
        ),
        ({"probe": None, "scale": 1.0, "bandwidth": 1.0}, ValueError, "give one of them"),
        ({"probe": None, "bandwidth": 0.0}, ValueError, "bandwidth is 0.0; expected a positive number"),
        ({"probe": None, "bandwidth": "wide"}, TypeError, "bandwidth must be a number"),
    ],
)
def test_options_that_exclude_each_other_are_named(options, error, message):
    x = np.zeros((1, 3, 1, 2))
    with pytest.raises(error, match=message):
        reference.local_attention(x, x, x, **options)
