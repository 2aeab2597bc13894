"""The solvers of the ridge system: agreement, minimum norm, degenerate keys, failure."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import seeds

from parallax_core import reference
from parallax_core.errors import SolverError
from parallax_core.reference.solvers import solve

EPS = np.finfo(np.float64).eps
SOLVERS = ("cholesky", "cg", "lstsq")


def system(seed, n, D, rank=None):
    random = np.random.default_rng(seed)
    A = random.standard_normal((n, D)) if rank is None else _of_rank(random, n, D, rank)
    return A, random.standard_normal(D)


def _of_rank(random, n, D, rank):
    return random.standard_normal((n, rank)) @ random.standard_normal((rank, D))


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=seeds, n=st.integers(1, 12), D=st.integers(1, 8), log_ridge=st.floats(-4, 2))
def test_solvers_solve(solver, seed, n, D, log_ridge):
    A, b = system(seed, n, D)
    ridge = 10.0**log_ridge
    u = solve(A, b, ridge, solver)
    matrix = A.T @ A + ridge * np.eye(D)
    expected = np.linalg.solve(matrix, b)
    # Rounding of the matrix, n terms an entry, and conjugate gradients' residual of 1e-13, both times the
    # condition number.
    error = (1e-13 + 10 * (n + D) * EPS) * np.linalg.cond(matrix)
    assert np.linalg.norm(u - expected) <= error * np.linalg.norm(expected)


@given(seed=seeds, n=st.integers(1, 12), D=st.integers(1, 8), rank=st.integers(1, 8))
def test_lstsq_at_ridge_0_is_the_solution_of_least_norm(seed, n, D, rank):
    rank = min(rank, n, D)
    A, b = system(seed, n, D, rank)
    u = solve(A, b, 0.0, "lstsq")
    singular = np.linalg.svd(A, compute_uv=False)[:rank]
    # Singular values of A are exact to EPS of the largest; the pseudo-inverse squares their inverses.
    error = 100 * D * EPS * (singular[0] / singular[-1]) ** 3
    # Nearer the rank decision pinv and this solver need not agree.
    assume(singular[-1] >= 1e-5 * singular[0])
    expected = np.linalg.pinv(A, rcond=1e-7) @ np.linalg.pinv(A, rcond=1e-7).T @ b
    assert np.linalg.norm(u - expected) <= error * np.linalg.norm(b) / singular[-1] ** 2
    # It is the limit of small ridges on what the keys span; off it a ridge gives b / ridge.
    spanned = np.linalg.pinv(A, rcond=1e-7) @ A @ b
    ridge = 1e-9 * singular[-1] ** 2
    near = solve(A, spanned, ridge, "lstsq")
    # The neighbour differs by ridge / (s^2 + ridge) of each part; rounding off the span is divided by ridge.
    error += 2e-9 + 100 * D * EPS * singular[0] / singular[-1] / 1e-9
    assert np.linalg.norm(near - u) <= error * np.linalg.norm(b) / singular[-1] ** 2


def test_the_rank_decision_is_at_D_eps_of_the_largest_eigenvalue():
    b = np.ones(4)
    for factor, expected in ((4, 1.0), (0.25, 0.0)):
        eigenvalue = factor * 4 * EPS
        A = np.diag(np.sqrt([1.0, 1.0, 1.0, eigenvalue]))
        u = solve(A, b, 0.0, "lstsq")
        # A diagonal matrix decomposes exactly.
        np.testing.assert_allclose(u * [1, 1, 1, eigenvalue], [1, 1, 1, expected], rtol=8 * EPS)


def test_cg_forms_no_matrix():
    D = 3000
    A, b = system(0, 4, D)
    tracemalloc.start()
    solve(A, b, 0.5, "cg")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The matrix alone would be 72 MB; a few vectors of D and A itself are 0.3 MB.
    assert peak < D * D * 8 / 50


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=seeds, copies=st.integers(1, 5), ridge=st.sampled_from((1e-12, 0.1)))
def test_identical_keys_give_the_weighted_mean(solver, seed, copies, ridge):
    random = np.random.default_rng(seed)
    q, key = random.standard_normal((2, 1, 1, 1, 3))
    k = np.repeat(key, copies, axis=1)
    v = random.standard_normal((1, copies, 1, 2))
    o = reference.lla_attention(
        q, k, v, ridge=0.0 if solver == "lstsq" else ridge, solver=solver, causal=False
    )
    # C_kk is exactly 0: rounding alone, of a mean of 5 numbers below 6.
    np.testing.assert_allclose(o[0, 0, 0], v[0, :, 0].mean(axis=0), rtol=0, atol=50 * EPS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_query_at_the_mean_of_the_keys_needs_no_slope(solver):
    k = np.array([[1.0, 2.0], [-1.0, 2.0], [0.0, 3.0], [0.0, 1.0]])[None, :, None]
    q = np.array([0.0, 2.0])[None, None, None]
    v = np.arange(8.0).reshape(1, 4, 1, 2)
    options = {"scale": 0.0, "causal": False, "ridge": 0.1, "solver": solver}
    np.testing.assert_array_equal(reference.lla_probe(q, k, **options), np.zeros((1, 1, 1, 2)))
    np.testing.assert_array_equal(reference.lla_attention(q, k, v, **options)[0, 0, 0], [3.0, 4.0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_that_is_not_finite_is_nan_and_no_error(solver):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 3, 1, 2)) for _ in range(3))
    expected = reference.lla_attention(q, k, v, ridge=0.1, solver=solver)
    for bad in (np.nan, np.inf, 1e200):
        spoilt = q.copy()
        spoilt[0, 1] = bad
        o = reference.lla_attention(spoilt, k, v, ridge=0.1, solver=solver)
        np.testing.assert_array_equal(o[:, [0, 2]], expected[:, [0, 2]])
        assert np.isnan(o[:, 1]).all() or bad == 1e200
    k[0, 0] = 1e200
    assert np.isnan(reference.lla_attention(q, k, v, ridge=0.1, solver=solver, scale=0.0)[0, 1:]).all()


def test_cholesky_says_when_the_matrix_is_not_positive_definite():
    random = np.random.default_rng(0)
    k = 1e6 * random.standard_normal((1, 3, 1, 8))
    q, v = random.standard_normal((2, 1, 1, 1, 8))
    v = np.repeat(v, 3, axis=1)
    with pytest.raises(SolverError, match=r"cholesky: .* at ridge 1e-12.*larger ridge or solver='lstsq'"):
        reference.lla_attention(q, k, v, ridge=1e-12, scale=0.0, causal=False)
    o = reference.lla_attention(q, k, v, ridge=1e-12, scale=0.0, causal=False, solver="lstsq")
    assert np.isfinite(o).all()


def test_cholesky_refuses_a_pivot_that_only_rounding_left():
    """LAPACK takes the last pivot, 1 + eps - 1, as positive; none of its digits are those of the matrix."""
    A = np.array([[1.0, 1.0], [0.0, np.sqrt(EPS)]])
    with pytest.raises(SolverError, match="a pivot vanished by rounding"):
        solve(A, np.ones(2), 1e-30, "cholesky")
    # The scale of a channel is no loss of digits.
    scales = np.array([1.0, 1e-12])
    np.testing.assert_allclose(solve(np.diag(scales), scales, 1e-40, "cholesky"), 1 / scales, rtol=4 * EPS)


def test_cg_reaches_its_residual_on_a_spread_spectrum():
    """A hundred distinct eigenvalues over six decades, so that it does not end by exhausting the space."""
    D = 100
    random = np.random.default_rng(3)
    rotation = np.linalg.qr(random.standard_normal((D, D)))[0]
    A = np.diag(np.logspace(-3, 0, D)) @ rotation
    b = random.standard_normal(D)
    u = solve(A, b, 1e-9, "cg")
    residual = np.linalg.norm(A.T @ (A @ u) + 1e-9 * u - b) / np.linalg.norm(b)
    # The residual that it updates is below 1e-13; the true one also has the rounding of products with u.
    assert residual < 1e-13 + 10 * EPS * np.linalg.norm(u) / np.linalg.norm(b)


def test_cg_says_when_it_does_not_converge():
    D = 12
    hilbert = 1 / (1 + np.add.outer(np.arange(D), np.arange(D)))
    scales = 10.0 ** np.arange(D)
    with pytest.raises(SolverError, match=r"cg: no convergence .* at ridge 1e-18; use a larger ridge"):
        solve(hilbert * scales, np.ones(D), 1e-18, "cg")
