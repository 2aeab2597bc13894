"""Bad input to the public operations: a clear exception that names the argument, before anything runs."""

import functools
import re

import numpy as np
import pytest

import parallax_core as plx

B, L, HQ, HKV, D, DV = 2, 6, 4, 2, 8, 5


def good(dtype=np.float32):
    shapes = {"q": (B, L, HQ, D), "r": (B, L, HQ, D), "k": (B, L, HKV, D), "v": (B, L, HKV, DV)}
    return {name: np.ones(shape, dtype) for name, shape in shapes.items()}


def attend(module, **changes):
    call = {**good(), **changes}
    arrays = [call.pop(name) for name in ("q", "r", "k", "v")]
    return module.parallax_attention(*arrays, **call)


def decode(module, **changes):
    call = {**good(), **changes}
    arrays = [call.pop(name) for name in ("q", "r", "k", "v")]
    return module.parallax_decode(*arrays, **call)


def solve(module, **changes):
    call = {**good(), "ridge": 0.1, **changes}
    arrays = [call.pop(name) for name in ("q", "r", "k", "v")]
    return module.lla_attention(arrays[0], *arrays[2:], **call)


def local(module, **changes):
    call = {**good(), "probe": None, **changes}
    arrays = [call.pop(name) for name in ("q", "r", "k", "v")]
    return module.local_attention(arrays[0], *arrays[2:], **call)


def array(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def index(*values, dtype=np.int32):
    return np.array(values, dtype)


paged = functools.partial(dict, k=array(7, 2, HKV, D), v=array(7, 2, HKV, DV))

CASES = [
    (attend, {"q": array(B, L, D)}, ValueError, "q has shape (2, 6, 8); expected 4 axes"),
    (attend, {"r": array(B, L, HQ, D + 1)}, ValueError, "r has shape (2, 6, 4, 9); expected (2, 6, 4, 8)"),
    (attend, {"k": array(B, L, HKV, D + 1)}, ValueError, "k has head size 9"),
    (attend, {"k": array(3, L, HKV, D), "v": array(3, L, HKV, D)}, ValueError, "k has batch size 3"),
    (attend, {"v": array(B, L + 1, HKV, DV)}, ValueError, "v has shape (2, 7, 2, 5); expected (2, 6, 2, Dv)"),
    (
        attend,
        {"k": array(B, L, 3, D), "v": array(B, L, 3, DV)},
        ValueError,
        "q has 4 heads; expected a multiple of 3",
    ),
    (attend, {"v": array(B, L, HKV, 0)}, ValueError, "v has head size 0"),
    (
        attend,
        {"q": array(B, L, HQ, D, dtype=np.int32)},
        TypeError,
        "q has dtype int32; expected one of float64",
    ),
    (
        attend,
        {"v": array(B, L, HKV, DV, dtype=np.float64)},
        TypeError,
        "v has dtype float64; expected float32",
    ),
    (
        attend,
        {"r": array(B, L, HQ, D, dtype=np.float16)},
        TypeError,
        "r has dtype float16; expected float32, that of q or float64",
    ),
    (attend, {"scale": np.nan}, ValueError, "scale is nan; expected a finite number"),
    (attend, {"scale": np.inf}, ValueError, "scale is inf"),
    (attend, {"scale": "1"}, TypeError, "scale must be a number"),
    (attend, {"causal": 1}, TypeError, "causal must be True or False"),
    (attend, {"window_size": 0}, ValueError, "window_size is 0; expected at least 1"),
    (attend, {"window_size": 2.0}, TypeError, "window_size must be an integer"),
    (attend, {"window_size": 4, "causal": False}, ValueError, "window_size is 4 with causal=False"),
    (attend, {"cu_seqlens": index(0, L)}, ValueError, "cu_seqlens packs sequences into a batch of 1"),
    (decode, {"cache_seqlens": index(7, 3)}, ValueError, "cache_seqlens[0] is 7; expected 0 to 6"),
    (decode, {"cache_seqlens": index(5, -1)}, ValueError, "cache_seqlens[1] is -1"),
    (decode, {"cache_seqlens": index(1, 2, 3)}, ValueError, "cache_seqlens has shape (3,); expected (2,)"),
    (decode, {"cache_seqlens": np.ones(2, np.float32)}, TypeError, "cache_seqlens has dtype float32"),
    (
        decode,
        {"cache_seqlens": index(4, 4), "cache_leftpad": index(0, 5)},
        ValueError,
        "cache_leftpad[1] is 5; expected 0 to 4",
    ),
    (decode, {"cache_leftpad": index(-1, 0)}, ValueError, "cache_leftpad[0] is -1"),
    (decode, paged(page_table=np.zeros((2, 3), np.int32)), ValueError, "page_table needs cache_seqlens"),
    (
        decode,
        paged(page_table=np.array([[0, 1], [2, 7]], np.int32), cache_seqlens=index(4, 3)),
        ValueError,
        "page_table[1, 1] is 7; expected 0 to 6",
    ),
    (
        decode,
        paged(page_table=np.array([[0, -1], [2, 7]], np.int32), cache_seqlens=index(4, 2)),
        ValueError,
        "page_table[0, 1] is -1",
    ),
    (
        decode,
        paged(page_table=np.zeros((3, 2), np.int32), cache_seqlens=index(1, 1)),
        ValueError,
        "page_table has shape (3, 2); expected (2, any)",
    ),
    (solve, {"ridge": -0.1}, ValueError, "ridge is -0.1; expected finite values of 0 or more"),
    (solve, {"ridge": np.nan}, ValueError, "ridge is nan"),
    (solve, {"ridge": 0}, ValueError, "ridge is 0 with solver='cholesky'"),
    (solve, {"ridge": 0.0, "solver": "cg"}, ValueError, "ridge is 0 with solver='cg'"),
    (solve, {"ridge": array(3)}, ValueError, "ridge has shape (3,); expected one that broadcasts"),
    (solve, {"ridge": "large"}, TypeError, "ridge must be a number"),
    (
        solve,
        {"ridge": [[1.0], [1.0, 2.0]]},
        TypeError,
        "ridge must be a number or an array of numbers, got list",
    ),
    (solve, {"ridge": array(1, dtype=np.complex128)}, TypeError, "ridge has dtype complex128; expected real"),
    (solve, {"ridge": array(1, dtype=bool)}, TypeError, "ridge has dtype bool; expected real numbers"),
    (solve, {"ridge": None}, TypeError, "ridge must be a number"),
    (solve, {"solver": "lu"}, ValueError, "solver is 'lu'; expected one of 'cholesky', 'cg', 'lstsq'"),
    (local, {"kernel": "box"}, ValueError, "kernel is 'box'"),
    (local, {"probe": "learned"}, ValueError, "probe is 'learned'"),
    (local, {"intercept": False}, ValueError, "probe is None with intercept=False"),
    (local, {"amplification": True}, ValueError, "amplification is True with probe=None"),
    (local, {"probe": "solve"}, ValueError, "ridge is None with probe='solve'"),
    (local, {"probe": "query", "ridge": 0.1}, ValueError, "ridge is given, but only probe='solve' takes one"),
    (local, {"scale": 1.0, "bandwidth": 1.0}, ValueError, "scale is 1.0 and bandwidth is 1.0"),
    (local, {"bandwidth": 0.0}, ValueError, "bandwidth is 0.0"),
    (local, {"bandwidth": 1e-160}, ValueError, "bandwidth is 1e-160"),
    (local, {"kernel": "gaussian", "scale": -1.0}, ValueError, "scale is -1.0; expected 0 or more"),
]


@pytest.mark.parametrize("module", [plx, plx.reference], ids=["public", "reference"])
@pytest.mark.parametrize("call, changes, error, message", CASES, ids=[c[3][:40] for c in CASES])
def test_bad_input_names_the_argument(module, call, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(module, **changes)


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        ([0, 3], "cu_seqlens runs from 0 to 3; expected 0 to 6"),
        ([1, 6], "cu_seqlens runs from 1 to 6"),
        ([0, 4, 2, 6], "cu_seqlens[2] is 2, less than the 4 before it"),
        ([], "cu_seqlens is empty"),
    ],
)
def test_bad_packing(cu_seqlens, message):
    x = array(1, L, 2, D)
    with pytest.raises(ValueError, match=re.escape(message)):
        plx.softmax_attention(x, x, x, cu_seqlens=np.array(cu_seqlens, np.int64))


@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_probes_may_be_wider_than_the_rest(width):
    random = np.random.default_rng(0)
    call = {name: random.standard_normal(x.shape).astype(np.float16) for name, x in good().items()}
    call["r"] = random.standard_normal(call["r"].shape).astype(width)
    o, state = attend(plx, **call, return_state=True)
    assert o.dtype == np.float16
    assert state.m.dtype == width
    expected = attend(plx.reference, **call)
    # What is computed in the probe's dtype is not rounded to half precision on the way.
    assert np.abs(state.finish() - expected).max() < 50 * np.finfo(width).eps


def test_packed_queries_and_keys_have_one_length():
    with pytest.raises(ValueError, match="cu_seqlens packs queries and keys alike"):
        plx.softmax_attention(array(1, 4, 1, 2), *[array(1, 6, 1, 2)] * 2, cu_seqlens=index(0, 4))


def test_head_sizes_above_256_are_for_the_reference():
    q, k = array(1, 3, 1, 257), array(1, 3, 1, 257)
    with pytest.raises(ValueError, match="q has head size 257; expected at most 256"):
        plx.softmax_attention(q, k, k)
    assert plx.reference.softmax_attention(q, k, k).shape == (1, 3, 1, 257)


@pytest.mark.parametrize(
    "out, error, message",
    [
        (array(B, L, HQ, D), ValueError, "out has shape (2, 6, 4, 8); expected (2, 6, 4, 5)"),
        (array(B, L, HQ, DV, dtype=np.float64), TypeError, "out has dtype float64; expected float32"),
    ],
)
def test_bad_out(out, error, message):
    with pytest.raises(error, match=re.escape(message)):
        decode(plx, out=out)


def test_out_must_be_writable_and_apart_from_the_inputs():
    out = array(B, L, HQ, DV)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        decode(plx, out=out)
    shared = np.ones((B, L, HQ, D), np.float32)
    with pytest.raises(ValueError, match="out overlaps q in memory"):
        decode(plx, q=shared, k=array(B, L, HKV, D), v=array(B, L, HKV, D), out=shared)


def test_out_is_filled_and_returned():
    out = np.full((B, L, HQ, DV), np.nan, np.float32)
    assert decode(plx, out=out) is out
    np.testing.assert_array_equal(out, decode(plx))


@pytest.mark.parametrize("empty", [{"B": 0}, {"L": 0}, {"H": 0}])
def test_axes_of_size_zero_give_empty_results(empty):
    b, length, h = empty.get("B", 2), empty.get("L", 3), empty.get("H", 1)
    q, k = array(b, length, h * 2, 4), array(b, 5, h, 4)
    for result in (
        plx.softmax_attention(q, k, k),
        plx.parallax_attention(q, q, k, k),
        plx.lla_attention(q, k, k, ridge=0.1),
        plx.parallax_decode(q, q, k, k),
    ):
        assert result.shape == q.shape


def test_no_keys_give_zeros():
    q, k = array(2, 3, 2, 4), array(2, 0, 1, 4)
    for attention in (plx.softmax_attention, functools.partial(plx.lla_attention, ridge=0.1)):
        o, state = attention(q, k, k, return_state=True)
        assert (o == 0).all()
        assert np.isneginf(state.lse).all()


def test_systems_that_cannot_be_solved_are_named_errors():
    # Two equal keys a float32 rounding apart and a ridge far below that rounding.
    k = np.random.default_rng(0).standard_normal((1, 40, 1, 8)).astype(np.float32) * 1e4
    k[..., 4:] = k[..., :4]
    with pytest.raises(plx.SolverError, match=r"cholesky.*not numerically positive definite.*lstsq"):
        plx.lla_attention(k, k, k, ridge=1e-9, scale=1e-9)
    # Three keys in eight dimensions: rounding leaves nothing of the pivots that the ridge should hold up.
    few = np.random.default_rng(1).standard_normal((1, 3, 1, 8))
    for solve in (plx.lla_attention, plx.reference.lla_attention):
        with pytest.raises(plx.SolverError, match="cholesky"):
            solve(few, few, few, ridge=1e-16, scale=0.0, causal=False)
    state = plx.lla_attention(few, few, few, ridge=1.0, scale=0.0, causal=False, return_state=True)[1]
    with pytest.raises(plx.SolverError, match="cholesky"):
        state._replace(ridge=np.full_like(state.ridge, 1e-16)).finish()
    # A spectrum over fourteen decades, against seven digits.
    k = np.random.default_rng(0).standard_normal((1, 300, 1, 64)) * np.geomspace(1e4, 1e-3, 64)
    k = k.astype(np.float32)
    with pytest.raises(plx.SolverError, match=r"cg: no convergence in \d+ rows"):
        plx.lla_attention(k, k, k, ridge=1e-9, scale=1e-12, solver="cg")


def test_rows_that_are_not_finite_are_nan_and_no_error():
    q, k, v = (np.random.default_rng(s).standard_normal((1, 5, 1, 4)) for s in range(3))
    q[0, 2] = np.nan
    for solver in ("cholesky", "cg", "lstsq"):
        o = plx.lla_attention(q, k, v, ridge=0.1, solver=solver)
        assert np.isnan(o[0, 2]).all()
        assert np.isfinite(np.delete(o, 2, axis=1)).all()
