"""Local linear attention on the CPU: a probe solve followed by the Parallax reduction."""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import exchange
from ..errors import SolverError
from ..problem import Problem
from ..state import LLAState
from . import forward, probe_kernels, threads
from .tiles import tensors

# A few rows of weights are kept for all keys at a time, so this bounds memory at long lengths.
PROBE_ROWS = 24
# What the weights and the products of a slope with the keys are computed in; moments and systems are in the
# compute dtype. A slope grows with the query's distance from the keys, its products with them as the square:
# with keys 256 standard deviations off the origin float32 keeps two digits of how they differ. And a fit that
# passes through the values of a few near keys does so only by the weights that it was solved with.
WIDE = np.dtype(np.float64)
_SOLVERS = {"cholesky": probe_kernels.CHOLESKY, "cg": probe_kernels.CG, "lstsq": probe_kernels.LSTSQ}


def solve_probe(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    ridge: np.ndarray,
    solver: str,
    *,
    kernel: str = "dot",
    intercept: bool = True,
) -> np.ndarray:
    """The probe ``r = -(C_kk + ridge I)^-1 (q - kbar)``, or on raw moments without an intercept.

    ridge: float64, broadcasts to ``(B, Lq, Hq)``. Returns ``(B, Lq, Hq, D)`` in the compute dtype, 0 in rows
    that see no key, NaN in rows whose system is not finite. Raises SolverError.
    """
    probe, _, _ = _moments(
        problem, q, k, None, ridge, solver, kernel, intercept, _compute_dtype(problem, solver)
    )
    return probe


def solve_slopes(
    problem: Problem, q: np.ndarray, k: np.ndarray, ridge: np.ndarray, solver: str, adjoint: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slopes' ``u``, the solution ``y`` for a second right-hand side, and ``kbar``.

    adjoint: ``(B, Lq, Hq, D)`` in the dtype to compute in, overwritten by ``y``. Raises SolverError, also
    where C_kk at ridge 0 lacks full rank: the solution of least norm has no derivative there.
    """
    probe, (_, _, kbar), _ = _moments(problem, q, k, None, ridge, solver, "dot", True, adjoint.dtype, adjoint)
    return -probe, adjoint, kbar


def attend(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    ridge: np.ndarray,
    solver: str,
    *,
    return_state: bool = False,
):
    """Local linear attention ``(out, state)``; shapes as for the tiled loop, ridge as for the probe."""
    probe, normalisers, moments = _moments(
        problem, q, k, v if return_state else None, ridge, solver, "dot", True,
        _compute_dtype(problem, solver),
    )  # fmt: skip
    out, _ = forward.attend(problem, q, k, v, probe, dtype=WIDE)
    if not return_state:
        return out, None
    dtype = problem.compute_dtype
    m, d1, kbar = normalisers
    queries = np.ascontiguousarray(q, dtype=dtype)
    lam = np.ascontiguousarray(np.broadcast_to(ridge, problem.row_shape), dtype=dtype)
    # Where no key was seen the mean is 0 / 0; the origin of an empty state is ignored.
    k0 = np.where(d1[..., None] == 0, 0, kbar)
    wk, wv, wkk, wvk = moments
    return out, LLAState(*(x.astype(dtype, copy=False) for x in (m, d1, k0, wk, wv, wkk, wvk, queries, lam)))


def _compute_dtype(problem: Problem, solver: str) -> np.dtype:
    """What a solver computes in."""
    # What counts as rank would be lost in float32, where noise fills the directions the keys do not span.
    return np.dtype(np.float64) if solver == "lstsq" else problem.compute_dtype


def _moments(problem, q, k, v, ridge, solver, kernel, intercept, dtype, adjoint=None):
    keys_as_values = dataclasses.replace(problem, value_dim=problem.head_dim)
    kbar, state = forward.attend(keys_as_values, q, k, k, kernel=kernel, dtype=WIDE, return_state=True)
    probe = exchange.empty(kbar.shape, dtype)
    adjoint = np.zeros((0,) * 4, dtype) if adjoint is None else adjoint
    stated = v is not None
    rows, D, Dv = problem.row_shape, problem.head_dim, problem.value_dim
    shapes = ((*rows, D), (*rows, Dv), (*rows, D, D), (*rows, Dv, D))
    moments = [np.empty(shape if stated else (0,) * len(shape), dtype) for shape in shapes]
    cut = forward.plan(problem, PROBE_ROWS)
    status = np.zeros(2, np.int64)
    if len(cut.items):
        described = tensors(q, k, k if v is None else v)
        lam = np.broadcast_to(np.asarray(ridge, np.float64), rows)
        threads.run(
            probe_kernels.solve_probes, len(cut.items),
            cut.items, cut.sequences, described.table, cut.page_table, cut.page_size, cut.rows,
            int((cut.items[:, 5] - cut.items[:, 4]).max()), D, Dv, problem.group_size, problem.causal,
            problem.window_size or 0, forward.KERNELS[kernel], WIDE.type(problem.scale), intercept,
            _SOLVERS[solver], _tolerance(dtype), np.ascontiguousarray(lam), state.m, state.d1, kbar, probe,
            adjoint, status, *moments,
        )  # fmt: skip
    if status[probe_kernels.FAILED]:
        raise SolverError(_failure(solver, int(status[0]), int(status[1]) * 1e-18, float(np.min(ridge))))
    return probe, (state.m, state.d1, kbar), moments


def _tolerance(dtype: np.dtype) -> float:
    """Relative residual at which conjugate gradients stop: a few rounding units."""
    return 8 * float(np.finfo(dtype).eps)


def _failure(solver: str, rows: int, residual: float, ridge: float) -> str:
    where = f"in {rows} rows (smallest ridge {ridge:.3g})"
    if solver == "cg":
        return (
            f"cg: no convergence {where}, worst relative residual {residual:.1e}; "
            "use a larger ridge or solver='cholesky'"
        )
    if solver == "lstsq":
        return (
            f"lstsq: C_kk lacks full rank {where}, and the solution of least norm has no derivative there; "
            "use a ridge above 0"
        )
    return (
        f"cholesky: C_kk + ridge I is not numerically positive definite {where}; "
        "use a larger ridge or solver='lstsq'"
    )
