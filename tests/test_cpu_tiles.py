"""The CPU backend where its loops are cut: tiles of rows and keys, splits of a cache, threads."""

import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from strategies import DTYPES

import parallax_core as plx
from parallax_core.cpu import intrinsics, threads, work
from parallax_core.cpu.tiles import KEY_TILE

reference = plx.reference


def normal(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def relative_error(result, expected):
    return np.abs(result.astype(np.float64) - expected).max() / np.abs(expected).max()


# Random keys at unit scale, scores of a few units: sums over a row lose a few tens of rounding units, and
# the result is rounded to the dtype, by half a unit relative to its own size.
TOLERANCE = {np.dtype(np.float64): 2e-14, np.dtype(np.float32): 1e-5, DTYPES[2]: 1e-3, DTYPES[3]: 6e-3}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


@dtypes
@settings(max_examples=12)
@given(
    length=st.integers(1, 3 * KEY_TILE),
    extra=st.integers(0, 2 * KEY_TILE),
    group=st.sampled_from((1, 2, 3, 5)),
    head_dim=st.sampled_from((1, 7, 16, 33, 64, 130, 256)),
    value_dim=st.sampled_from((1, 5, 32, 80, 256)),
    window=st.none() | st.integers(1, 150),
    causal=st.booleans(),
)
def test_tiles_of_every_size(dtype, length, extra, group, head_dim, value_dim, window, causal):
    shapes = [(1, length, group, head_dim)] * 2 + [(1, length + extra, 1, d) for d in (head_dim, value_dim)]
    q, r, k, v = (normal(s, dtype, i) for i, s in enumerate(shapes))
    options = {"causal": causal, "window_size": window if causal else None}
    for result, expected in (
        (plx.softmax_attention(q, k, v, **options), reference.softmax_attention(q, k, v, **options)),
        (plx.parallax_attention(q, r, k, v, **options), reference.parallax_attention(q, r, k, v, **options)),
    ):
        assert relative_error(result, expected) < TOLERANCE[dtype] * np.sqrt(head_dim / 16 + 1)


@dtypes
@pytest.mark.parametrize("solver", ["cholesky", "cg", "lstsq"])
def test_lla_over_several_tiles(dtype, solver):
    q, k, v = (normal((2, 150, h, 40), dtype, h) for h in (4, 2, 2))
    for options in ({"window_size": 70}, {"causal": False}, {}):
        expected = reference.lla_attention(q, k, v, ridge=0.1, **options)
        result = plx.lla_attention(q, k, v, ridge=0.1, solver=solver, **options)
        # The condition number of C_kk + 0.1 I is about 30 here, and multiplies float32's share of the error.
        assert relative_error(result, expected) < TOLERANCE[dtype] + 30 * TOLERANCE[dtype] * (
            dtype.itemsize > 2
        )


@dtypes
def test_split_caches(dtype):
    lengths = np.array([5000, 2048, 2049, 0, 17])
    k, v = (normal((5, 5000, 2, 24), dtype, s) for s in (1, 2))
    q, r = (normal((5, 2, 6, 24), dtype, s) for s in (3, 4))
    assert lengths.max() > 2 * work.SPLIT_KEYS
    result, state = plx.parallax_decode(q, r, k, v, cache_seqlens=lengths, return_state=True)
    expected, wanted = reference.parallax_decode(q, r, k, v, cache_seqlens=lengths, return_state=True)
    assert relative_error(result, expected) < TOLERANCE[dtype] * 3  # 5000 keys: the output is small
    np.testing.assert_allclose(state.lse, wanted.lse, atol=1e-5)
    assert np.isneginf(state.lse[3]).all()
    assert (result[3] == 0).all()


def test_a_sequence_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads():
    k, v = (normal((4, 5000, 2, 24), np.float32, s) for s in (1, 2))
    q, r = (normal((4, 1, 6, 24), np.float32, s) for s in (3, 4))
    lengths = np.array([5000, 100, 3000, 2500])
    before = threads.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            threads.set_num_threads(n)
            results.append(plx.parallax_decode(q, r, k, v, cache_seqlens=lengths))
            long_q = np.repeat(q[:1], 300, axis=1)
            results[-1] = results[-1], plx.lla_attention(long_q, k[:1, :300], v[:1, :300], ridge=0.1)
    finally:
        threads.set_num_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result[0], results[0][0])
        np.testing.assert_array_equal(result[1], results[0][1])
    for b in range(4):
        alone = plx.parallax_decode(
            q[b : b + 1], r[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lengths[b : b + 1]
        )
        np.testing.assert_array_equal(alone, results[0][0][b : b + 1])


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_thread_counts_are_checked(n):
    with pytest.raises(ValueError, match=r"^n is "):
        threads.set_num_threads(n)


@dtypes
@pytest.mark.parametrize("outlier", [False, True])
def test_a_vector_added_to_all_keys_changes_nothing(dtype, outlier):
    """Against float64 of the same rounded keys: at most twice the error without an offset."""
    q, r, k, v = (normal((1, 200, 4, 64), np.float64, s) for s in range(4))
    q, r, v = (x.astype(dtype) for x in (q, r, v))

    def error(offset):
        moved = k + offset
        if outlier:
            moved[:, 0] = k[:, 0]  # the first key stays behind, as an attention sink does
        moved = moved.astype(dtype)
        expected = reference.parallax_attention(q, r, moved, v)
        return relative_error(plx.parallax_attention(q, r, moved, v), expected)

    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    # Scores grow with the offset, 16 * |q| in units of their spread: that much of the compute dtype's
    # rounding is the formula's own, in any evaluation of q.k.
    own = 16 * 64 * eps
    assert error(16.0) < 2 * error(0.0) + own
    # In exact arithmetic the outputs agree; the shifted float64 case has no rounding of keys to speak of.
    if dtype == np.float64 and not outlier:
        same = plx.parallax_attention(q, r, k + 16.0, v)
        assert relative_error(same, reference.parallax_attention(q, r, k, v)) < own


@dtypes
@pytest.mark.parametrize("kind", ["softmax", "parallax", "lla"])
def test_states_of_any_split_merge_to_the_whole(dtype, kind):
    q, r, k, v = (normal((2, 5, h, 12), dtype, h + s) for s, h in enumerate((4, 4, 2, 2)))
    k, v = (normal((2, 90, 2, 12), dtype, s) for s in (8, 9))
    lead = (q, r) if kind == "parallax" else (q,)
    options = {"causal": False, "return_state": True, **({"ridge": 0.2} if kind == "lla" else {})}
    attention = getattr(plx, f"{kind}_attention")
    expected = getattr(reference, f"{kind}_attention")(*lead, k, v, **{**options, "return_state": False})
    for cuts in ((0, 90), (0, 1, 90), (0, 0, 40, 41, 90, 90)):
        parts = [attention(*lead, k[:, a:b], v[:, a:b], **options)[1] for a, b in pairwise(cuts)]
        whole = parts[0]
        for part in parts[1:]:
            whole = plx.merge_states(whole, part)
        error = np.abs(whole.finish() - expected).max() / np.abs(expected).max()
        assert error < (1e-12 if dtype == np.float64 else 1e-4)  # states are float32 for the rest


@njit
def exponentials(tile, m):
    return intrinsics.exponentials(tile, 0, tile.size, m)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_is_accurate_to_the_last_places(dtype):
    x = np.concatenate([-np.geomspace(1e-8, 87, 4000), np.linspace(-87, 0, 5000), [0.0]]).astype(dtype)
    x = np.resize(x, (x.size // KEY_TILE + 1, KEY_TILE))
    S = x.copy()
    total = exponentials(S, dtype(0))
    expected = np.exp(x.astype(np.longdouble))
    eps = np.finfo(dtype).eps
    assert (np.abs(S - expected) / expected).max() < 2 * eps
    # Each of the 16 partial sums rounds once a vector.
    assert abs(total / expected.sum() - 1) < eps * x.size / 16
    special = np.resize(np.array([-np.inf, -1e30, np.nan, -1e3], dtype), (1, KEY_TILE))
    assert np.isnan(exponentials(special, dtype(0)))
    np.testing.assert_array_equal(special[0, :4], [0, 0, np.nan, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_that_would_be_subnormal_are_zero(dtype):
    least = np.log(np.finfo(dtype).tiny)
    x = np.resize(np.array([np.ceil(least), np.floor(least), 1.1 * least], dtype), (1, KEY_TILE))
    exponentials(x, dtype(0))
    np.testing.assert_allclose(x[0, 0], np.exp(np.ceil(least)), rtol=4 * np.finfo(dtype).eps)
    assert x[0, 1] == x[0, 2] == 0


def test_memory_does_not_grow_as_lq_times_lk():
    """In a process of its own, whose peak of resident memory is the operating system's word for it."""
    script = textwrap.dedent("""
        from pathlib import Path
        import numpy as np
        import parallax_core as plx

        def peak():  # not getrusage's, which a process inherits from its parent
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0])

        q, r, k, v = np.random.default_rng(0).standard_normal((4, 1, 8192, 1, 8)).astype(np.float32)
        small = [x[:, :64] for x in (q, r, k, v)]
        plx.parallax_attention(*small), plx.lla_attention(*small[::2], small[3], ridge=0.1)
        before = peak()
        plx.parallax_attention(q, r, k, v), plx.lla_attention(q[:, :2048], k, v, ridge=0.1)
        print(peak() - before)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kibibytes = int(run.stdout)
    # One 8192 x 8192 float32 matrix is 262144 KiB, one of 2048 x 8192 is 65536.
    assert kibibytes < 32768
