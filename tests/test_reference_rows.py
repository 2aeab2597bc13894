"""Every operation of the reference against the formulas row by row: masks, lengths, pages, groups, dtypes."""

import functools

import numpy as np
import oracle
import pytest
import torch
from calls import call
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import BFLOAT16, attention_cases, decode_cases, seeds

from parallax_core import reference

EPS = np.finfo(np.float64).eps
# The bound is of first order in the rounding; this is for its constants.
SAFETY = 4


def ridges(case, seed):
    """A ridge per row, from 1e-3 to 10."""
    return 10.0 ** np.random.default_rng(seed).uniform(-3, 1, case.q.shape[:3])


def answers(operation, case, seed):
    """What the reference is called with beside the case, and the row-by-row answer."""
    if operation == "lla":
        ridge = ridges(case, seed)
        return {"ridge": ridge}, oracle.evaluate(case, functools.partial(oracle.lla, ridge=ridge))
    return {}, oracle.evaluate(case, getattr(oracle, operation))


operations = pytest.mark.parametrize("operation", ["softmax", "parallax", "lla"])
# Each kind of mask and memory has examples of its own.
KINDS = {
    "whole": attention_cases(packed=(False,)),
    "packed": attention_cases(packed=(True,)),
    "cache": decode_cases(paged=(False,)),
    "pages": decode_cases(paged=(True,)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
examples = settings(max_examples=25)


@kinds
@operations
@examples
@given(data=st.data(), seed=seeds)
def test_output_and_lse_are_those_of_the_formula(operation, kind, data, seed):
    case = data.draw(KINDS[kind])
    extra, (o, lse, sensitivity) = answers(operation, case, seed)
    result, state = call(reference, operation, case, return_state=True, **extra)
    assert result.dtype == np.float64
    assert result.shape == o.shape
    tolerance = SAFETY * EPS * sensitivity
    assert (np.abs(result - o) <= tolerance).all()
    # The state's moments are sums of the same terms, rounded apart from the output's.
    assert (np.abs(state.finish() - o) <= 2 * tolerance).all()
    seen = ~np.isneginf(lse)
    np.testing.assert_array_equal(np.isneginf(state.lse), ~seen)
    # Scores below 50 in magnitude and 30 keys: each error is below 1e2 rounding units.
    np.testing.assert_allclose(state.lse[seen], lse[seen], rtol=0, atol=1e3 * EPS)


@kinds
@operations
@examples
@given(data=st.data(), seed=seeds, junk=st.sampled_from((np.nan, np.inf, -np.inf)))
def test_keys_that_no_row_sees_change_nothing(operation, kind, data, seed, junk):
    case = data.draw(KINDS[kind])
    extra = {"ridge": ridges(case, seed)} if operation == "lla" else {}
    expected = call(reference, operation, case, **extra)
    k, v = (x.copy() for x in case.keys_and_values)
    hidden = oracle.hidden_places(case)
    k[hidden] = v[hidden] = junk
    np.testing.assert_array_equal(
        call(reference, operation, case.with_keys_and_values(k, v), **extra), expected
    )


@kinds
@operations
@examples
@given(data=st.data(), seed=seeds)
def test_a_nan_key_or_value_reaches_the_rows_that_see_it_and_no_other(operation, kind, data, seed):
    case = data.draw(KINDS[kind])
    k, v = (x.copy() for x in case.keys_and_values)
    assume(k[..., 0].size > 0)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in k.shape[:3])
    extra, (o, _, sensitivity) = answers(operation, case, seed)
    poisoned = data.draw(st.sampled_from((k, v)))
    poisoned[place] = np.nan
    result = call(reference, operation, case.with_keys_and_values(k, v), **extra)
    sees = np.zeros(o.shape[:3], bool)
    for row in oracle.seen_rows(case):
        sees[row.batch, row.row, row.head] = place in row.places
    assert np.isnan(result[sees]).all()
    assert (np.abs(result - o) <= SAFETY * EPS * sensitivity)[~sees].all()


@given(case=attention_cases(), seed=seeds)
def test_parallax_with_the_solved_probe_is_lla(case, seed):
    ridge = ridges(case, seed)
    _, _, sensitivity = oracle.evaluate(case, functools.partial(oracle.lla, ridge=ridge))
    r = reference.lla_probe(case.q, case.k, ridge=ridge, **case.options)
    result = reference.parallax_attention(case.q, r, case.k, case.v, **case.options)
    expected = reference.lla_attention(case.q, case.k, case.v, ridge=ridge, **case.options)
    # r.k_j is taken about 0 and not about kbar: rounded relative to |u||k|, which the bound's spread covers.
    assert (np.abs(result - expected) <= 2 * SAFETY * EPS * sensitivity).all()
    unseen = np.ones(case.q.shape[:3], bool)
    for row in oracle.seen_rows(case):
        unseen[row.batch, row.row, row.head] = not row.places
    assert (r[unseen] == 0).all()


def test_arrays_of_a_framework_are_read_and_the_result_is_numpy():
    random = np.random.default_rng(2)
    q, r, k, v = (random.standard_normal((2, 3, 2, 4)).astype(np.float32) for _ in range(4))
    lengths = np.array([3, 1])
    for dtype, numpy_dtype in ((torch.float32, np.float32), (torch.bfloat16, BFLOAT16)):
        tensors = [torch.from_numpy(x).to(dtype) for x in (q, r, k, v)]
        arrays = [x.astype(numpy_dtype) for x in (q, r, k, v)]
        o = reference.parallax_decode(*tensors, cache_seqlens=torch.from_numpy(lengths))
        assert type(o) is np.ndarray
        np.testing.assert_array_equal(o, reference.parallax_decode(*arrays, cache_seqlens=lengths))
        o = reference.lla_attention(tensors[0], *tensors[2:], ridge=torch.tensor([0.1, 0.2]))
        expected = reference.lla_attention(arrays[0], *arrays[2:], ridge=np.array([0.1, 0.2], np.float32))
        np.testing.assert_array_equal(o, expected)


def test_decode_fills_the_given_array():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, n, 2, 3)) for n in (1, 4, 4))
    out = np.full((2, 1, 2, 3), np.nan)
    lengths = np.array([4, 0])
    for operation, extra in (("softmax", {}), ("lla", {"ridge": 0.1})):
        decode = getattr(reference, f"{operation}_decode")
        assert decode(q, k, v, cache_seqlens=lengths, out=out, **extra) is out
        np.testing.assert_array_equal(out, decode(q, k, v, cache_seqlens=lengths, **extra))
        assert (out[1] == 0).all()


@pytest.mark.parametrize(
    "out, error, message",
    [
        (np.zeros((1, 1, 1, 2), np.float32), TypeError, "out is a float32 array; expected a float64"),
        ([0.0], TypeError, "out is a list; expected a float64 NumPy array"),
        (np.zeros((1, 1, 1, 3)), ValueError, r"out has shape \(1, 1, 1, 3\); expected \(1, 1, 1, 2\)"),
        (np.broadcast_to(0.0, (1, 1, 1, 2)), ValueError, "out is read-only"),
    ],
)
def test_decode_refuses_an_array_it_cannot_fill(out, error, message):
    q = np.zeros((1, 1, 1, 2))
    with pytest.raises(error, match=message):
        reference.softmax_decode(q, q, q, out=out)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["no batch", "no queries", "no heads"]
)
def test_axes_of_size_0_give_empty_results(shape):
    B, Lq, H = shape
    q, k, v = np.zeros((B, Lq, H, 4)), np.zeros((B, 5, H, 4)), np.zeros((B, 5, H, 2))
    for o in (
        reference.softmax_attention(q, k, v),
        reference.parallax_attention(q, q, k, v),
        reference.lla_attention(q, k, v, ridge=0.1),
        reference.softmax_decode(q, k, v),
    ):
        assert o.shape == (B, Lq, H, 2)
    assert reference.lla_probe(q, k, ridge=0.1).shape == (B, Lq, H, 4)


def test_no_keys_at_all_give_zeros():
    q, k, v = np.ones((2, 3, 2, 4)), np.ones((2, 0, 1, 4)), np.ones((2, 0, 1, 5))
    for o, state in (
        reference.softmax_attention(q, k, v, return_state=True),
        reference.parallax_attention(q, q, k, v, return_state=True),
        reference.lla_attention(q, k, v, ridge=0.1, return_state=True),
    ):
        np.testing.assert_array_equal(o, np.zeros((2, 3, 2, 5)))
        np.testing.assert_array_equal(state.finish(), o)
        assert np.isneginf(state.lse).all()
        assert (state.d1 == 0).all()


def test_a_key_whose_score_is_minus_infinity_has_no_weight():
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((1, 4, 1, 3)) for _ in range(3))
    q[..., 0] = 1
    k[0, 1, 0] = (-np.inf, 0, 0)
    o, state = reference.softmax_attention(q, k, v, causal=False, return_state=True)
    others = [0, 2, 3]
    # Leaving out a term that is 0 changes at most the order of summation.
    np.testing.assert_allclose(
        o, reference.softmax_attention(q, k[:, others], v[:, others], causal=False), atol=8 * EPS
    )
    assert np.isfinite(state.lse).all()
    alone, state = reference.softmax_attention(q, k[:, 1:2], v[:, 1:2], causal=False, return_state=True)
    assert np.isnan(alone).all()
    assert np.isnan(state.lse).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": np.zeros((1, 2, 3, 4), int)}, TypeError, "q has dtype int64"),
        ({"k": np.zeros((1, 2, 3))}, ValueError, "k has shape"),
        ({"v": [1.0]}, TypeError, "v is a list"),
        ({"ridge": -1.0}, ValueError, "ridge is -1.0"),
        ({"ridge": 0.0}, ValueError, "ridge is 0 with solver='cholesky'"),
        ({"ridge": np.ones(5)}, ValueError, "ridge has shape"),
        ({"solver": "lu"}, ValueError, "solver is 'lu'"),
        ({"scale": np.inf}, ValueError, "scale is inf"),
        ({"window_size": 2, "causal": False}, ValueError, "a window needs causal=True"),
        ({"cu_seqlens": [0, 2]}, TypeError, "cu_seqlens is a list"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    x = np.zeros((1, 2, 3, 4))
    arguments = {"q": x, "k": x, "v": x, "ridge": 0.1} | change
    with pytest.raises(error, match=message):
        reference.lla_attention(**arguments)
