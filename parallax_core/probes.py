"""Fitting a learned probe ``r = W_R x`` by least squares."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np

from . import exchange
from .errors import SolverError
from .problem import DTYPES

SOLVERS = ("auto", "normal", "lsmr")

# Half of float64's digits survive the normal equations up to here; they square the design's condition.
WELL_CONDITIONED = float(np.finfo(np.float64).eps) ** -0.5
# A normal matrix of so many unknowns takes 128 MiB and about a second to factorise.
MOST_FACTORISED = 4096

_LSMR_TOLERANCE = 1e-12
_LSMR_ITERATIONS = 10_000
# Divided by its root, the rounding of the design must stay below the tolerance: a direction that the rows do
# not determine would otherwise be solved for.
_PRECONDITIONER_SHIFT = 1e-5
_LSMR_CONVERGED = (0, 1, 2, 4, 5)
# Elements of the outer products that are held at a time while the normal matrix is summed.
_CHUNK = 2**24


class ProbeFit(NamedTuple):
    """A fitted probe matrix, and how well one fitted without the held-out rows predicts these.

    W_R: ``(Hq, D, Dx)``, an array of x's framework, float64 for float64 x and float32 for any other; the
    probe is ``r[b, i, h] = W_R[h] @ x[b, i, h]``. score: ``(Hq,)`` NumPy float64, the part of softmax's
    squared error on the held-out rows that the probe removes: 1 is exact, 0 no better than softmax, below 0
    worse; NaN where no row was held out or softmax makes no error. solver: ``"normal"`` or ``"lsmr"`` for
    each head. condition: ``(Hq,)`` NumPy float64, the estimated condition (1-norm) of the normal matrix with
    its ridge; inf where it is singular, NaN where it was not formed.
    """

    W_R: Any
    score: np.ndarray
    solver: tuple[str, ...]
    condition: np.ndarray


def fit_probe(x, q, k, v, target, *, ridge=0.0, held_out=0.2, solver="auto", **options) -> ProbeFit:
    """Fit the ``W_R`` of ``r = W_R x`` that makes Parallax predict a target, one matrix a head.

    The output ``vbar - C_vk W_R x`` is linear in ``W_R``, so this is one linear regression a head: the mean
    over rows of ``|target - vbar + C_vk W_R x|^2`` plus ``ridge |W_R|^2`` is minimised.

    x: ``(B, Lq, Hq, Dx)``, what the probe is computed from, of any width ``Dx``, or ``(B, Lq, 1, Dx)`` for
    all heads. q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``. v: ``(B, Lk, Hkv, Dv)``, ``Hq`` a multiple of
    ``Hkv``. target: ``(B, Lq, Hq, Dv)``. Each of any framework on the CPU; float64, float32, float16 or
    bfloat16; computed in float64. ridge: 0 or more, in squared units of the target, the keys and x together.
    held_out: the fraction of the sequences, the last ones, that the score is measured on (of the rows where
    there is one sequence); 0 measures none and saves the second fit. ``W_R`` itself is fitted to all rows.
    solver: ``normal``, Cholesky of the normal matrix; ``lsmr``, which multiplies by the design and never
    forms it; ``auto``, the first where its condition leaves half of float64's digits and it has at most 4096
    unknowns, otherwise the second. Without a ridge, ``lsmr`` gives the solution of least norm. options:
    kernel, scale or bandwidth and masks of ``local_attention``, those that the probe will be used with.

    Returns a ProbeFit. Raises ValueError for shapes that do not fit, numbers that are not finite, and a
    ridge of 0 with fewer equations (``min(D, Dv)`` a row) than the ``D * Dx`` unknowns of a head; TypeError
    for dtypes and for what is no CPU array; SolverError where a solver fails.
    Source: arXiv 2605.29157; LSMR: Fong and Saunders, arXiv 1006.0758; docs/math.md.
    """
    given = {"x": x, "q": q, "k": k, "v": v, "target": target}
    arrays = {name: float64(name, array) for name, array in given.items()}
    _check_arrays(arrays)
    _check_options(ridge, held_out, solver)
    inputs, q, k, v, target = arrays.values()
    B, Lq, Hq, _ = q.shape
    held = _held_rows(B, Lq, held_out)
    _check_equations(int((~held).sum()), q.shape[3], v.shape[3], inputs.shape[3], ridge)
    heads = []
    for head in range(Hq):
        own = slice(head, head + 1)
        of_key = slice(head * k.shape[2] // Hq, head * k.shape[2] // Hq + 1)
        vbar, C_vk = covariances(q[:, :, own], k[:, :, of_key], v[:, :, of_key], **options)
        features = inputs[:, :, head if inputs.shape[2] > 1 else 0].reshape(B * Lq, -1)
        C_vk = C_vk.reshape(B * Lq, *C_vk.shape[3:])
        residual = (vbar - target[:, :, own]).reshape(B * Lq, -1)
        score = np.nan
        if held.any():
            W_R, _, _ = _fit(features[~held], C_vk[~held], residual[~held], ridge, solver)
            score = _removed(W_R, features[held], C_vk[held], residual[held])
        heads.append((*_fit(features, C_vk, residual, ridge, solver), score))
    matrices, solvers, conditions, scores = zip(*heads)
    W_R = np.stack(matrices).astype(np.float64 if _is_float64(x) else np.float32)
    return ProbeFit(exchange.hand_back(W_R, like=x), np.array(scores), solvers, np.array(conditions))


def covariances(q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and covariance of values with keys, as one softmax attention over their products.

    q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``. v: ``(B, Lk, Hkv, Dv)``; NumPy arrays. options: as of
    ``local_attention``.
    Returns ``vbar`` ``(B, Lq, Hq, Dv)`` and ``C_vk`` ``(B, Lq, Hq, Dv, D)``, float64.
    Source: docs/math.md, "Attention as regression at test time".
    """
    from . import reference

    q, k, v = (np.asarray(array, dtype=np.float64) for array in (q, k, v))
    D, Dv = k.shape[-1], v.shape[-1]
    # About the mean key: raw products of keys with a common offset would cancel.
    centred = k - k.mean(1, keepdims=True)
    products = (v[..., :, None] * centred[..., None, :]).reshape(*v.shape[:3], Dv * D)
    means = reference.local_attention(q, k, np.concatenate([v, centred, products], -1), probe=None, **options)
    vbar, kbar, second = np.split(means, [Dv, Dv + D], axis=-1)
    return vbar, second.reshape(*vbar.shape, D) - vbar[..., :, None] * kbar[..., None, :]


def float64(name: str, x: Any) -> np.ndarray:
    """A CPU array of any framework as a float64 NumPy array; TypeError for what is none and other dtypes."""
    exchange.device(name, x)
    array = exchange.to_numpy(name, x)
    if array.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    return array.astype(np.float64, copy=False)


def _is_float64(x: Any) -> bool:
    return exchange.to_numpy("x", x).dtype == np.float64


def _fit(x: np.ndarray, C_vk: np.ndarray, residual: np.ndarray, ridge: float, solver: str):
    """``W_R (D, Dx)`` of one head, the solver used and the condition.

    x: ``(rows, Dx)``. C_vk: ``(rows, Dv, D)``. residual: ``(rows, Dv)``.
    """
    import scipy.linalg.lapack  # not at the top: an import of the package should not wait for it

    with np.errstate(over="ignore"):
        if not np.isfinite(np.vdot(C_vk, C_vk) * np.vdot(x, x) + np.vdot(residual, residual)):
            raise SolverError("fit_probe: squares of x, C_vk or the target overflow float64; scale them down")
    shape = C_vk.shape[2], x.shape[1]
    unknowns = shape[0] * shape[1]
    condition, preconditioner = np.nan, None
    if solver == "normal" or (solver == "auto" and unknowns <= MOST_FACTORISED):
        gram, moment = _normal_equations(x, C_vk, residual)
        shift = _PRECONDITIONER_SHIFT * gram.diagonal().max()
        gram[np.diag_indices_from(gram)] += ridge
        norm = np.abs(gram).sum(0).max()
        factor, failed = scipy.linalg.lapack.dpotrf(gram, lower=1)
        reciprocal = 0.0 if failed else scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0]
        condition = 1 / reciprocal if reciprocal > 0 else np.inf
        if solver == "normal" and failed:
            raise SolverError(
                f"normal: the normal matrix is not numerically positive definite at ridge {ridge:.3g}; "
                "use a larger ridge or solver='lsmr'"
            )
        if solver == "normal" or condition <= WELL_CONDITIONED:
            solution, _ = scipy.linalg.lapack.dpotrs(factor, moment.ravel(), lower=1)
            return solution.reshape(shape), "normal", condition
        gram[np.diag_indices_from(gram)] += shift
        factor, failed = scipy.linalg.lapack.dpotrf(gram, lower=1)
        preconditioner = None if failed else factor
    solution = _lsmr(x, C_vk, residual, ridge, preconditioner)
    return solution.reshape(shape), "lsmr", condition


def _normal_equations(x: np.ndarray, C_vk: np.ndarray, residual: np.ndarray):
    # The normal matrix is a sum of Kronecker products (C'C) x (x x'): one product of (D*D, rows) and
    # (rows, Dx*Dx) matrices, which never forms the (rows*Dv, D*Dx) design.
    rows, D, Dx = len(x), C_vk.shape[2], x.shape[1]
    summed = np.zeros((D * D, Dx * Dx))
    step = max(1, _CHUNK // (D * D + Dx * Dx))
    for first in range(0, rows, step):
        C, features = C_vk[first : first + step], x[first : first + step]
        CtC = np.matmul(C.swapaxes(1, 2), C).reshape(-1, D * D)
        xxt = (features[:, :, None] * features[:, None, :]).reshape(-1, Dx * Dx)
        summed += CtC.T @ xxt
    gram = summed.reshape(D, D, Dx, Dx).swapaxes(1, 2).reshape(D * Dx, D * Dx) / rows
    return gram, np.einsum("nec,ne->nc", C_vk, residual).T @ x / rows


def _lsmr(x: np.ndarray, C_vk: np.ndarray, residual: np.ndarray, ridge: float, factor: np.ndarray | None):
    """LSMR on the design stacked on the ridge, right-preconditioned by a Cholesky factor of its square.

    What the factor adds to the square is a multiple of the identity, so that among the solutions that fit
    alike the one of least norm in the factor's measure is also the one of least norm.
    """
    from scipy.linalg import solve_triangular
    from scipy.sparse.linalg import LinearOperator, lsmr

    (rows, Dv, D), Dx = C_vk.shape, x.shape[1]
    root, weight = np.sqrt(rows), np.sqrt(ridge)

    def unscaled(y, transposed):
        if factor is None:
            return y
        return solve_triangular(factor, y, lower=True, trans=0 if transposed else 1, check_finite=False)

    def multiply(y):
        w = unscaled(y.ravel(), transposed=False)
        probe = x @ w.reshape(D, Dx).T
        return np.concatenate([np.matmul(C_vk, probe[:, :, None]).ravel() / root, weight * w])

    def multiply_transposed(z):
        errors = z[: rows * Dv].reshape(rows, 1, Dv)
        along = np.matmul(errors, C_vk)[:, 0].T @ x / root
        return unscaled(along.ravel() + weight * z[rows * Dv :], transposed=True)

    design = LinearOperator(
        (rows * Dv + D * Dx, D * Dx), matvec=multiply, rmatvec=multiply_transposed, dtype=np.float64
    )
    right = np.concatenate([residual.ravel() / root, np.zeros(D * Dx)])
    y, reason, *_ = lsmr(
        design, right, atol=_LSMR_TOLERANCE, btol=_LSMR_TOLERANCE, conlim=0, maxiter=_LSMR_ITERATIONS
    )
    if reason not in _LSMR_CONVERGED:
        raise SolverError(
            f"lsmr: no convergence to a relative residual of {_LSMR_TOLERANCE:g} within "
            f"{_LSMR_ITERATIONS} iterations at ridge {ridge:.3g}; use a larger ridge"
        )
    return unscaled(y, transposed=False)


def _removed(W_R: np.ndarray, x: np.ndarray, C_vk: np.ndarray, residual: np.ndarray) -> float:
    left = residual - np.matmul(C_vk, (x @ W_R.T)[:, :, None])[:, :, 0]
    total = np.square(residual).sum()
    return float(1 - np.square(left).sum() / total) if total > 0 else np.nan


def _held_rows(B: int, Lq: int, fraction: float) -> np.ndarray:
    """Which of the ``B * Lq`` rows are held out: whole sequences, since rows of one share their keys."""
    held = np.zeros((B, Lq), bool)
    if fraction > 0:
        units = held if B > 1 else held.T
        if len(units) < 2:
            raise ValueError(f"held_out: {fraction!r} of one row leaves none to fit on; expected 0")
        units[-min(len(units) - 1, max(1, round(fraction * len(units)))) :] = True
    return held.ravel()


def _check_arrays(arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (B, L, H, D), got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
    x, q, k, v, target = arrays.values()
    if 0 in q.shape or x.shape[3] == 0:
        raise ValueError(f"x: expected at least one row and one feature, got x {x.shape} and q {q.shape}")
    if x.shape[:2] != q.shape[:2] or x.shape[2] not in (1, q.shape[2]):
        raise ValueError(f"x: expected shape {(*q.shape[:3], 'Dx')} to match q, got {x.shape}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: expected B, a divisor of Hq, and D to match q {q.shape}, got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape {(*k.shape[:3], 'Dv')} to match k, got {v.shape}")
    if target.shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(
            f"target: expected shape {(*q.shape[:3], v.shape[3])} to match q and v, got {target.shape}"
        )


def _check_options(ridge, held_out, solver) -> None:
    if not (isinstance(ridge, numbers.Real) and np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge: expected a finite number of 0 or more, got {ridge!r}")
    if not (isinstance(held_out, numbers.Real) and 0 <= held_out < 1):
        raise ValueError(f"held_out: expected a number from 0 to below 1, got {held_out!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")


def _check_equations(rows: int, D: int, Dv: int, Dx: int, ridge: float) -> None:
    # C_vk has rank min(D, Dv) at most, so that is what a row can say about W_R.
    if ridge == 0 and rows * min(D, Dv) < D * Dx:
        raise ValueError(
            f"ridge: 0 needs as many equations as unknowns, got {rows} rows to fit on with {min(D, Dv)} "
            f"equations each for {D} x {Dx} unknowns a head; expected more rows or a positive ridge"
        )
