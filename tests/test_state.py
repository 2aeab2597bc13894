"""Merging the states of parts of the keys: an exact monoid up to rounding, of one kind at a time."""

import dataclasses
import functools
import pickle

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT64, attention_cases, seeds

from parallax_core import reference
from parallax_core.state import LLAState, ParallaxState, SoftmaxState, merge_states

EPS = np.finfo(np.float64).eps
RIDGE = 0.3
# Up to five states, each within the oracle's bound, and the bound's own constants.
SAFETY = 32

kinds = pytest.mark.parametrize("operation", ["softmax", "parallax", "lla"])
STATES = {"softmax": SoftmaxState, "parallax": ParallaxState, "lla": LLAState}
full_cases = attention_cases(
    dtypes=FLOAT64, max_head_dim=4, causal=(False,), packed=(False,), scales=(None, 0.0, 1.0, 20.0)
)


def attend(operation, case, keys=slice(None), **options):
    """Output and state of a case over a part of its keys."""
    queries = (case.q, case.r) if operation == "parallax" else (case.q,)
    extra = {"ridge": RIDGE} if operation == "lla" else {}
    attention = getattr(reference, f"{operation}_attention")
    options = case.options | options
    return attention(*queries, case.k[:, keys], case.v[:, keys], return_state=True, **options, **extra)


def tolerance(operation, case):
    estimator = getattr(oracle, operation)
    if operation == "lla":
        estimator = functools.partial(estimator, ridge=np.full(case.q.shape[:3], RIDGE))
    return SAFETY * EPS * oracle.evaluate(case, estimator)[2]


def assert_same_state(a, b, bound):
    """Two states of the same keys: the same output and normaliser, whatever their origins are."""
    assert type(a) is type(b)
    assert (np.abs(a.finish() - b.finish()) <= bound).all()
    # Scores below 200 in magnitude, so that each rounding of one is below 200 EPS.
    np.testing.assert_allclose(a.lse, b.lse, rtol=0, atol=1e4 * EPS)


def parts(case, seed, number):
    """A random assignment of the keys to ``number`` parts, some of which may be empty."""
    part = np.random.default_rng(seed).integers(0, number, case.k.shape[1])
    return [np.flatnonzero(part == i) for i in range(number)]


@kinds
@given(case=full_cases, seed=seeds, number=st.integers(2, 5))
def test_merged_parts_equal_the_whole(operation, case, seed, number):
    o, whole = attend(operation, case)
    merged = functools.reduce(
        merge_states, (attend(operation, case, keys)[1] for keys in parts(case, seed, number))
    )
    assert type(merged) is STATES[operation]
    bound = tolerance(operation, case)
    assert (np.abs(merged.finish() - o) <= bound).all()
    assert_same_state(merged, whole, bound)


@kinds
@given(case=attention_cases(dtypes=FLOAT64, causal=(True,), packed=(False,)), data=st.data())
def test_a_prefix_and_a_causal_rest_equal_the_whole(operation, case, data):
    """The keys before all rows are seen by all of them; the rest stays aligned to the end."""
    shared = max(case.k.shape[1] - case.q.shape[1] + 1, 0)
    at = data.draw(st.integers(0, shared))
    case = dataclasses.replace(case, options=case.options | {"window_size": None})
    o, _ = attend(operation, case)
    _, before = attend(operation, case, slice(0, at), causal=False)
    _, after = attend(operation, case, slice(at, None))
    assert (np.abs(merge_states(before, after).finish() - o) <= tolerance(operation, case)).all()


@kinds
@given(case=full_cases, seed=seeds)
def test_merging_is_commutative_and_associative(operation, case, seed):
    a, b, c = (attend(operation, case, keys)[1] for keys in parts(case, seed, 3))
    bound = tolerance(operation, case)
    two = np.concatenate(parts(case, seed, 3)[:2])
    pair = case.with_keys_and_values(case.k[:, two], case.v[:, two])
    assert_same_state(merge_states(a, b), merge_states(b, a), tolerance(operation, pair))
    assert_same_state(merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c)), bound)


@kinds
@given(case=full_cases)
def test_an_empty_part_changes_nothing_at_all(operation, case):
    _, state = attend(operation, case)
    _, empty = attend(operation, case, slice(0, 0))
    assert np.isneginf(empty.m).all()
    assert (empty.finish() == 0).all()
    for merged in (merge_states(state, empty), merge_states(empty, state)):
        for field, x, y in zip(state._fields, merged, state):
            np.testing.assert_array_equal(x, y, err_msg=field)
    both = merge_states(empty, empty)
    assert np.isneginf(both.lse).all()
    assert (both.finish() == 0).all()


@given(case=full_cases, seed=seeds)
def test_any_shift_of_the_probe_scores_is_valid(case, seed):
    random = np.random.default_rng(seed)

    def shifted(state):
        # Rows that saw no key keep their zeros: their shift means nothing.
        t0 = random.standard_normal(state.t0.shape)
        move = state.t0 - t0
        d2, O2 = state.d2 + move * state.d1, state.O2 + move[..., None] * state.O1
        return state._replace(t0=t0, d2=d2, O2=O2)

    first, second = (shifted(attend("parallax", case, keys)[1]) for keys in parts(case, seed, 2))
    o, _ = attend("parallax", case)
    # A shift of up to 5 adds to probe scores of about as much.
    assert (np.abs(merge_states(first, second).finish() - o) <= 10 * tolerance("parallax", case)).all()


@given(case=full_cases, seed=seeds)
def test_lla_states_of_ridge_0_merge(case, seed):
    """The minimum-norm solution of merged moments is that of all keys, where rounding cannot hide a rank."""
    random = np.random.default_rng(seed)
    B, _, heads, D = case.k.shape
    k, v = random.standard_normal((B, 4 * D + 4, heads, D)), random.standard_normal((B, 4 * D + 4, heads, 2))
    case = case.with_keys_and_values(k, v)
    attention = functools.partial(
        reference.lla_attention, ridge=0.0, solver="lstsq", causal=False, scale=0.1, return_state=True
    )
    o, _ = attention(case.q, k, v)
    merged = merge_states(
        attention(case.q, k[:, : 2 * D], v[:, : 2 * D])[1], attention(case.q, k[:, 2 * D :], v[:, 2 * D :])[1]
    )
    r = reference.lla_probe(case.q, k, ridge=0.0, solver="lstsq", causal=False, scale=0.1)
    # The eigenvalues of the merged moments are exact to EPS of the largest, whose effect |u| tells.
    bound = 1e4 * EPS * (1 + np.abs(r).sum(axis=-1, keepdims=True)) ** 2
    assert (np.abs(merged.finish("lstsq") - o) <= bound).all()


def states_of(operation, q_len=2):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, n, 1, 3)) for n in (q_len, 4, 4))
    queries = (q, q) if operation == "parallax" else (q,)
    extra = {"ridge": RIDGE} if operation == "lla" else {}
    return getattr(reference, f"{operation}_attention")(*queries, k, v, return_state=True, **extra)[1]


@pytest.mark.parametrize("a, b", [("softmax", "parallax"), ("parallax", "lla"), ("lla", "softmax")])
def test_two_kinds_do_not_merge(a, b):
    names = f"a is a {STATES[a].__name__} and b is a {STATES[b].__name__}; expected two states of one kind"
    with pytest.raises(TypeError, match=names):
        merge_states(states_of(a), states_of(b))
    with pytest.raises(TypeError, match="b is a tuple; expected a SoftmaxState"):
        merge_states(states_of(a), tuple(states_of(a)))


@kinds
def test_two_shapes_or_dtypes_do_not_merge(operation):
    state = states_of(operation)
    with pytest.raises(ValueError, match=r"b\.m has shape \(1, 3, 1\); expected \(1, 2, 1\)"):
        merge_states(state, states_of(operation, q_len=3))
    narrow = type(state)(*(x.astype(np.float32) for x in state))
    with pytest.raises(TypeError, match=r"b\.m has dtype float32; expected float64"):
        merge_states(state, narrow)


@kinds
def test_states_keep_their_dtype_and_pickle(operation):
    state = states_of(operation)
    narrow = type(state)(*(x.astype(np.float32) for x in state))
    merged = pickle.loads(pickle.dumps(merge_states(narrow, narrow)))
    assert type(merged) is type(state)
    assert {x.dtype for x in merged} == {np.dtype(np.float32)}
    # The same keys twice weigh as once: float32 rounding of 4 terms, times the condition at this ridge.
    np.testing.assert_allclose(merged.finish(), state.finish(), rtol=0, atol=1e2 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(merged.lse, state.lse + np.log(2), rtol=0, atol=10 * np.finfo(np.float32).eps)


def test_a_part_whose_scores_are_all_minus_infinity_weighs_nothing():
    """Alone such a row is NaN, as IEEE has it; in the union its weights are ``exp(-inf) = 0``."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, n, 1, 3)) for n in (2, 4, 4))
    q[..., 0] = 1
    k[0, 0, 0] = (-np.inf, 0, 0)
    attention = functools.partial(reference.softmax_attention, q, causal=False, return_state=True)
    o, whole = attention(k, v)
    lost, rest = attention(k[:, :1], v[:, :1])[1], attention(k[:, 1:], v[:, 1:])[1]
    assert np.isnan(lost.lse).all()
    for merged in (merge_states(lost, rest), merge_states(rest, lost)):
        assert_same_state(merged, whole, 32 * EPS)
        np.testing.assert_allclose(merged.finish(), o, rtol=0, atol=32 * EPS)
