"""The estimators of the regression study, applied to one set of sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallax_core.mechanisms import apply_mechanism
from parallax_core.probes import covariances, fit_probe


class Sequences(NamedTuple):
    """Queries, keys and values of one call, with the answers where they are known.

    q: ``(B, Lq, H, D)``. k, v: ``(B, Lk, H, D)`` and ``(B, Lk, H, Dv)``. target: ``(B, Lq, H, Dv)`` or None.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    target: np.ndarray | None = None


def predict(
    estimator: str,
    sequences: Sequences,
    *,
    ridge: float,
    probe_ridge: float,
    training: Sequences | None = None,
    **options,
) -> np.ndarray:
    """Predict the value at every query.

    estimator: a name of ``point.Estimator``. sequences: what is predicted; its target is not looked at.
    ridge: of the solved probes. probe_ridge: of the fit of ``W_R``. training: other sequences, with
    targets, on which ``parallax-fitted`` fits ``W_R`` (``x`` is the query). options: bandwidth, kernel and
    masks.
    Returns ``(B, Lq, H, Dv)``, float64.
    """
    q, k, v, _ = sequences
    if estimator == "parallax-solved":
        kbar, C_kk = covariances(q, k, k, **options)
        system = C_kk + ridge * np.eye(q.shape[-1])
        if ridge == 0:  # the minimum-norm solution; the covariance is a difference, good to some 1e-13
            inverse = np.linalg.pinv(system, rcond=1e-12, hermitian=True)
            probe = -np.einsum("...ij,...j->...i", inverse, q - kbar)
        else:
            probe = -np.linalg.solve(system, (q - kbar)[..., None])[..., 0]
        return apply_mechanism("parallax", q, k, v, probe=probe, **options)
    if estimator == "parallax-fitted":
        fit = fit_probe(training.q, *training[:3], training.target, ridge=probe_ridge, held_out=0, **options)
        probe = np.einsum("hdx,blhx->blhd", fit.W_R, q)
        return apply_mechanism("parallax", q, k, v, probe=probe, **options)
    return apply_mechanism(estimator, q, k, v, ridge=ridge, **options)
