"""The CPU backend against the formulas row by row: masks, lengths, pages, groups, dtypes."""

import functools

import numpy as np
import oracle
import pytest
from calls import call
from hypothesis import given
from hypothesis import strategies as st
from strategies import BFLOAT16, attention_cases, decode_cases, seeds

import parallax_core as plx

# The oracle's bound is of first order in the rounding; this is for its constants and for tiles that are
# summed apart.
SAFETY = 8
cases = st.one_of(attention_cases(), decode_cases())
operations = pytest.mark.parametrize("operation", ["softmax", "parallax", "lla"])


def unit(dtype):
    """The rounding unit of a result: half the spacing at 1, and its smallest number."""
    if dtype == BFLOAT16:
        return 2.0**-8, 2.0**-133
    info = np.finfo(dtype)
    return float(info.eps) / 2, float(info.smallest_subnormal)


def compute_eps(dtype):
    return np.finfo(np.float64 if dtype == np.float64 else np.float32).eps


def answers(operation, case, seed):
    if operation == "lla":
        # From 0.1 up: below it float32 moments of a few near keys leave nothing of the oracle's first order.
        ridge = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, case.q.shape[:3])
        return {"ridge": ridge}, oracle.evaluate(case, functools.partial(oracle.lla, ridge=ridge))
    return {}, oracle.evaluate(case, getattr(oracle, operation))


@operations
@given(case=cases, seed=seeds)
def test_output_and_lse_are_those_of_the_formula(operation, case, seed):
    extra, (o, lse, sensitivity) = answers(operation, case, seed)
    result, state = call(plx, operation, case, return_state=True, **extra)
    dtype, eps = case.q.dtype, compute_eps(case.q.dtype)
    assert result.dtype == dtype
    assert result.shape == o.shape
    half, smallest = unit(dtype)
    computed = SAFETY * eps * sensitivity
    wide = result.astype(np.float64)
    assert (np.abs(wide - o) <= computed + half * (np.abs(o) + computed) + smallest).all()
    assert state.m.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert (np.abs(state.finish() - o) <= 2 * computed).all()
    seen = ~np.isneginf(lse)
    np.testing.assert_array_equal(np.isneginf(state.lse), ~seen)
    # Scores below 50 in magnitude and 30 keys: each error is below 1e2 rounding units.
    np.testing.assert_allclose(state.lse[seen], lse[seen], rtol=0, atol=1e3 * eps)


@operations
@given(case=cases, seed=seeds, junk=st.sampled_from((np.nan, np.inf, -np.inf)))
def test_keys_that_no_row_sees_change_nothing(operation, case, seed, junk):
    extra = {"ridge": 0.3} if operation == "lla" else {}
    expected = call(plx, operation, case, **extra)
    k, v = (x.copy() for x in case.keys_and_values)
    hidden = oracle.hidden_places(case)
    k[hidden] = v[hidden] = junk
    result = call(plx, operation, case.with_keys_and_values(k, v), **extra)
    np.testing.assert_array_equal(result, expected)


@operations
@given(case=cases, data=st.data())
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(operation, case, data):
    k, v = (x.copy() for x in case.keys_and_values)
    if k[..., 0].size == 0:
        return
    extra = {"ridge": 0.3} if operation == "lla" else {}
    place = tuple(data.draw(st.integers(0, n - 1)) for n in k.shape[:3])
    expected = call(plx, operation, case, **extra)
    data.draw(st.sampled_from((k, v)))[place] = np.nan
    result = call(plx, operation, case.with_keys_and_values(k, v), **extra)
    sees = np.zeros(result.shape[:3], bool)
    for row in oracle.seen_rows(case):
        sees[row.batch, row.row, row.head] = place in row.places
    assert np.isnan(result[sees].astype(np.float64)).all()
    np.testing.assert_array_equal(result[~sees], expected[~sees])


@given(case=attention_cases(packed=(False,), min_length=1))
def test_solved_probe_gives_local_linear_attention(case):
    r = plx.lla_probe(case.q, case.k, ridge=0.2, **case.options)
    assert r.dtype == (np.float64 if case.q.dtype == np.float64 else np.float32)
    expected = plx.lla_attention(case.q, case.k, case.v, ridge=0.2, **case.options)
    # The same solve, and the same reduction where that is in float64.
    result = plx.parallax_attention(case.q, r.astype(np.float64), case.k, case.v, **case.options)
    np.testing.assert_array_equal(result, expected)
    narrow = plx.parallax_attention(case.q, r, case.k, case.v, **case.options)
    _, _, sensitivity = oracle.evaluate(type(case)(**{**vars(case), "r": r}), oracle.parallax)
    half, smallest = unit(case.q.dtype)
    wide = result.astype(np.float64)
    computed = SAFETY * compute_eps(case.q.dtype) * sensitivity
    # Both results are rounded to their dtype.
    bound = computed + 2 * half * (np.abs(wide) + computed) + smallest
    assert (np.abs(narrow.astype(np.float64) - wide) <= bound).all()


@given(case=cases)
def test_softmax_is_parallax_with_a_probe_of_zero(case):
    zero = type(case)(**{**vars(case), "r": np.zeros_like(case.r)})
    softmax, parallax = call(plx, "softmax", case), call(plx, "parallax", zero)
    np.testing.assert_array_equal(softmax, parallax)  # every probe score is an exact zero
