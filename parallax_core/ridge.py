"""The batched ridge systems of local linear attention, ``(C + ridge I) u = b``."""

from __future__ import annotations

import numpy as np

from .errors import SolverError


def solve_ridge(C: np.ndarray, b: np.ndarray, ridge: np.ndarray, solver: str, eps: float) -> np.ndarray:
    """Solve ``(C + ridge I) u = b`` for symmetric positive semidefinite ``C``, in float64.

    C: ``(..., D, D)``; b: ``(..., D)``; ridge: ``(...)``; solver: ``cholesky`` or ``lstsq``, the minimum-norm
    solution with eigenvalues below ``D * eps`` of the largest counted as zero; eps: the rounding unit of the
    numbers in ``C``. Returns ``(..., D)`` float64, NaN in rows that are not finite.
    Raises SolverError where ``C + ridge I`` is not numerically positive definite.
    """
    D = C.shape[-1]
    u = np.full_like(b, np.nan, dtype=np.float64)
    finite = np.isfinite(C).all((-1, -2)) & np.isfinite(b).all(-1)
    if not finite.any():
        return u
    C64, b64, lam = (
        C[finite].astype(np.float64),
        b[finite].astype(np.float64),
        ridge[finite].astype(np.float64),
    )
    if solver == "lstsq":
        values, vectors = np.linalg.eigh(C64)
        values = np.maximum(values, 0)
        kept = values > D * eps * values[:, -1:]
        coefficients = np.einsum("nij,ni->nj", vectors, b64)
        # With a ridge every direction counts; without one those that the keys do not span get 0.
        shifted = values + lam[:, None]
        coefficients = np.where(
            kept | (lam[:, None] > 0), coefficients / np.where(shifted > 0, shifted, 1), 0
        )
        u[finite] = np.einsum("nij,nj->ni", vectors, coefficients)
        return u
    shifted = C64.copy()
    shifted.reshape(-1, D * D)[:, :: D + 1] += lam[:, None]
    try:
        factor = np.linalg.cholesky(shifted)
        pivots, entries = (np.diagonal(x, axis1=1, axis2=2) for x in (factor, shifted))
        # On a GPU a factorisation that fails leaves a pivot that is no positive number.
        if not ((pivots > 0) & (pivots**2 > D * eps * entries)).all():
            raise np.linalg.LinAlgError("a pivot vanished by rounding")
    except np.linalg.LinAlgError as error:
        raise SolverError(
            f"cholesky: C_kk + ridge I is not numerically positive definite at ridge {float(lam.min()):.3g}; "
            "use a larger ridge or solver='lstsq'"
        ) from error
    y = np.linalg.solve(factor, b64[..., None])
    u[finite] = np.linalg.solve(factor.swapaxes(-1, -2), y)[..., 0]
    return u
