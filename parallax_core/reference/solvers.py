"""The solvers of one ridge system ``(A^T A + ridge I) u = b``.

``A`` is ``(n, D)``, the weighted centred keys ``sqrt(p_j) (k_j - kbar)``, so that ``A^T A = C_kk``; ``b`` is
``(D,)``; everything is float64. Each solver raises SolverError where it cannot keep its promise.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.sparse.linalg import LinearOperator, cg

from ..errors import SolverError

_EPS = np.finfo(np.float64).eps

# Far below what tests ask for, and reached by the residual that conjugate gradients update.
_CG_TOLERANCE = 1e-13
# In exact arithmetic D iterations suffice; rounding delays convergence, more so the worse the condition.
_CG_ITERATIONS_PER_DIMENSION = 100


def solve(A: np.ndarray, b: np.ndarray, ridge: float, solver: str) -> np.ndarray:
    """Solve one system by the solver of that name; NaN where its numbers are not finite or overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        # The trace bounds every entry of A^T A.
        finite = np.isfinite(np.vdot(A, A)) and np.isfinite(b).all()
    return _SOLVERS[solver](A, b, ridge) if finite else np.full(b.shape, np.nan)


def solve_cholesky(A: np.ndarray, b: np.ndarray, ridge: float) -> np.ndarray:
    """Cholesky factorisation of the matrix (LAPACK potrf, potrs).

    Departs from the textbook in one point: a pivot of which rounding has left nothing, one below ``D * eps``
    of its diagonal entry, counts as not positive, whatever sign the rounding gave it.
    """
    C = A.T @ A
    C[np.diag_indices_from(C)] += ridge
    try:
        factor, lower = cho_factor(C, check_finite=False)
        if (factor.diagonal() ** 2 <= b.size * _EPS * C.diagonal()).any():
            raise LinAlgError("a pivot vanished by rounding")
    except LinAlgError as error:
        raise SolverError(
            f"cholesky: C_kk + ridge I is not numerically positive definite at ridge {ridge:.3g} ({error}); "
            "use a larger ridge or solver='lstsq'"
        ) from error
    return cho_solve((factor, lower), b, check_finite=False)


def solve_cg(A: np.ndarray, b: np.ndarray, ridge: float) -> np.ndarray:
    """Conjugate gradients on products with A and its transpose; the matrix is never formed."""
    D = b.size
    operator = LinearOperator((D, D), matvec=lambda x: A.T @ (A @ x) + ridge * x, dtype=np.float64)
    iterations = _CG_ITERATIONS_PER_DIMENSION * D
    # The squares that conjugate gradients form of b's numbers overflow or vanish sooner than the solution.
    size = np.abs(b).max() or 1.0
    u, info = cg(operator, b / size, rtol=_CG_TOLERANCE, atol=0.0, maxiter=iterations)
    if info != 0:
        raise SolverError(
            f"cg: no convergence to a residual of {_CG_TOLERANCE:g} within {iterations} iterations at ridge "
            f"{ridge:.3g}; use a larger ridge, solver='cholesky' or solver='lstsq'"
        )
    return size * u


def solve_lstsq(A: np.ndarray, b: np.ndarray, ridge: float) -> np.ndarray:
    """The least squares solution of minimum norm, from the singular values of A.

    At a ridge of 0 the directions whose eigenvalue of ``A^T A`` is at most ``D * eps`` of the largest (whose
    singular value of A is at most ``sqrt(D * eps)`` of the largest) count as not spanned by the keys, and u
    has no part in them. The singular values of A carry twice the digits that eigenvalues of ``A^T A`` would.
    """
    D = b.size
    # The zero rows change no singular value and complete the right vectors to a basis where n < D.
    R = np.linalg.qr(np.vstack((A, np.zeros((D, D)))), mode="r")
    _, singular, right = np.linalg.svd(R)
    kept = singular > np.sqrt(D * _EPS) * singular[0] if ridge == 0 else np.ones(D, bool)
    right = right[kept]
    return right.T @ ((right @ b) / (singular[kept] ** 2 + ridge))


_SOLVERS = {"cholesky": solve_cholesky, "cg": solve_cg, "lstsq": solve_lstsq}
