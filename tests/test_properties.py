"""What the estimators must reproduce, and what must not change them."""

import functools

import numpy as np
import oracle
import pytest
from calls import call
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT64, attention_cases, decode_cases, seeds

import parallax_core as plx

EPS = np.finfo(np.float64).eps
RIDGE = 0.3
# Twice the bound's own constants: two results are compared, each within the bound.
SAFETY = 8

backends = pytest.mark.parametrize("backend", [plx.reference, plx], ids=["reference", "cpu"])
operations = pytest.mark.parametrize("operation", ["softmax", "parallax", "lla"])
# float64 throughout: the inputs are moved, and rounding them to their dtype would be the larger change.
cases = attention_cases(dtypes=FLOAT64, max_head_dim=4)
full_cases = attention_cases(dtypes=FLOAT64, max_head_dim=4, causal=(False,), packed=(False,), min_length=1)


def compute(backend, operation, case):
    return call(backend, operation, case, **({"ridge": RIDGE} if operation == "lla" else {}))


def tolerance(operation, *compared):
    """What rounding may change between the results of several cases, ``(B, Lq, Hq, 1)``."""
    estimator = getattr(oracle, operation)
    if operation == "lla":
        estimator = functools.partial(estimator, ridge=np.full(compared[0].q.shape[:3], RIDGE))
    return SAFETY * EPS * sum(oracle.evaluate(case, estimator)[2] for case in compared)


def assert_close(result, expected, bound):
    assert (np.abs(result - expected) <= bound).all()


@backends
@operations
@given(case=full_cases, seed=seeds)
def test_the_order_of_keys_does_not_matter(backend, operation, case, seed):
    order = np.random.default_rng(seed).permutation(case.k.shape[1])
    moved = case.with_keys_and_values(case.k[:, order], case.v[:, order])
    assert_close(
        compute(backend, operation, moved), compute(backend, operation, case), tolerance(operation, case)
    )


@backends
@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("outlier", [False, True], ids=["all keys alike", "one key apart"])
@given(
    case=st.one_of(cases, decode_cases(dtypes=FLOAT64)), seed=seeds, size=st.sampled_from((1.0, 16.0, 256.0))
)
def test_a_vector_added_to_all_keys_of_a_head_changes_nothing(backend, operation, outlier, case, seed, size):
    random = np.random.default_rng(seed)
    k, v = case.keys_and_values
    if outlier and k.shape[1]:
        k = k.copy()
        k[:, 0] += 16 * random.standard_normal(k.shape[2:])
    # Halves added to integers over 2^20 stay exact, so that the keys are the same to the last bit.
    k = np.round(k * 2**20) / 2**20
    offset = np.round(size * random.standard_normal(k.shape[2:]))
    case, moved = case.with_keys_and_values(k, v), case.with_keys_and_values(k + offset, v)
    assert_close(
        compute(backend, operation, moved),
        compute(backend, operation, case),
        tolerance(operation, case, moved),
    )


@backends
@operations
@given(case=cases, seed=seeds)
def test_a_rotation_of_queries_probes_and_keys_changes_nothing(backend, operation, case, seed):
    D = case.q.shape[-1]
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]
    moved = type(case)(case.q @ rotation, case.r @ rotation, case.k @ rotation, case.v, case.options)
    assert_close(
        compute(backend, operation, moved),
        compute(backend, operation, case),
        tolerance(operation, case, moved),
    )


@backends
@operations
@given(case=cases, seed=seeds, size=st.integers(1, 4))
def test_a_linear_map_of_the_values_maps_the_output(backend, operation, case, seed, size):
    linear = np.random.default_rng(seed).standard_normal((case.v.shape[-1], size))
    moved = case.with_keys_and_values(case.k, case.v @ linear)
    bound = tolerance(operation, moved) + tolerance(operation, case) * np.abs(linear).sum(axis=0)
    assert_close(compute(backend, operation, moved), compute(backend, operation, case) @ linear, bound)


@backends
@operations
@given(case=cases, seed=seeds)
def test_constant_values_are_reproduced_where_a_key_is_seen(backend, operation, case, seed):
    constant = np.random.default_rng(seed).standard_normal(case.v.shape[-1])
    case = case.with_keys_and_values(case.k, np.broadcast_to(constant, case.v.shape))
    sees = ~np.isneginf(oracle.evaluate(case, oracle.softmax)[1])
    expected = np.where(sees[..., None], constant, 0)
    assert_close(compute(backend, operation, case), expected, tolerance(operation, case))


@backends
@given(case=cases, seed=seeds)
def test_lla_of_the_values_is_a_linear_function_exactly_as_the_ridge_goes_to_0(backend, case, seed):
    """``v = W k + c``: the error is ``ridge * (C_kk + ridge I)^-1 (q - kbar)``, and 0 at a ridge of 0."""
    random = np.random.default_rng(seed)
    D = case.q.shape[-1]
    # Enough keys of each head that any row sees a set that spans the space.
    B, _, heads, _ = case.k.shape
    k = random.standard_normal((B, 2 * D + 2, heads, D))
    W, c = random.standard_normal((D, 3)), random.standard_normal(3)
    v = k @ W + c
    expected = case.q @ W + c
    for ridge, solver in ((1e-10, "cholesky"), (1e-10, "lstsq"), (0.0, "lstsq")):
        o = backend.lla_attention(case.q, k, v, ridge=ridge, solver=solver, causal=False)
        r = backend.lla_probe(case.q, k, ridge=ridge, solver=solver, causal=False)
        # ridge * |u| by the formula above, and rounding divided by the smallest eigenvalue that |u| shows.
        bound = (ridge + 1e3 * EPS) * (1 + np.abs(r).sum(axis=-1, keepdims=True)) ** 2
        assert_close(o, expected, bound * (1 + np.abs(W).sum() + np.abs(c).sum()))


@backends
@given(case=cases)
def test_the_papers_form_of_lla_agrees(backend, case):
    """Second moment about q, unnormalised weights: docs/math.md, "Attention as regression at test time"."""

    def uncentred(q, r, K, V, scale, at):
        w = np.exp(scale * (K @ q))
        d = K - q
        omega, mu = w.sum(), w @ d
        rho = oracle.solve((w[:, None] * d).T @ d + RIDGE * omega * np.eye(q.size), mu)
        o = (w * (1 - d @ rho)) @ V / (omega - mu @ rho)
        return oracle.Answer(o, np.log(omega), 0.0)

    expected, _, _ = oracle.evaluate(case, uncentred)
    assert_close(compute(backend, "lla", case), expected, tolerance("lla", case))


@backends
@given(case=cases)
def test_softmax_is_parallax_without_a_probe(backend, case):
    still = type(case)(case.q, np.zeros_like(case.r), case.k, case.v, case.options)
    # The same operations on the same numbers, but for terms that are exactly 0.
    np.testing.assert_array_equal(compute(backend, "parallax", still), compute(backend, "softmax", still))


@backends
@given(case=cases)
def test_lla_goes_to_softmax_as_the_ridge_grows(backend, case):
    result = call(backend, "lla", case, ridge=1e12)
    # |C_vk u| <= |v| |k|^2 |q - kbar| / ridge, with numbers of at most 6 standard deviations in 4 dimensions.
    assert_close(result, compute(backend, "softmax", case), 1e-12 * 6 * (2 * 6 * 2) ** 3)
