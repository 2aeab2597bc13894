"""Leave-one-out regression of values on keys: every key asks the others for its own value."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class LeaveOneOut(NamedTuple):
    """Arguments of any estimator with which query ``i`` is key ``i`` and sees every key but itself.

    q: ``(B, n, H, D)``. k: ``(B, 2n - 1, H, D)``. v: ``(B, 2n - 1, H, Dv)``. mask: keyword arguments.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: dict[str, object]


def leave_one_out(k: np.ndarray, v: np.ndarray) -> LeaveOneOut:
    """Arrange keys and values so that a causal window leaves out exactly the key that asks.

    The sequence is written twice, less its last key: row ``i`` ends at position ``i + n - 1`` and a window of
    ``n - 1`` begins at ``i + 1``, so it holds every key once but key ``i``.

    k: ``(B, n, H, D)`` with ``n >= 2``. v: ``(B, n, H, Dv)``. Returns a LeaveOneOut.
    Raises ValueError for other shapes.
    """
    k, v = np.asarray(k), np.asarray(v)
    if k.ndim != 4 or k.shape[1] < 2:
        raise ValueError(f"k: expected shape (B, n, H, D) with n >= 2, got {k.shape}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape {(*k.shape[:3], 'Dv')} to match k, got {v.shape}")
    n = k.shape[1]
    return LeaveOneOut(
        k,
        np.concatenate([k, k[:, :-1]], axis=1),
        np.concatenate([v, v[:, :-1]], axis=1),
        {"causal": True, "window_size": n - 1},
    )


def fraction_of_variance(prediction: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared error of a prediction as a fraction of the values' variance about their mean.

    prediction, v: ``(B, n, H, Dv)``. Returns ``(B, H)`` float64; 1 is the error of the mean itself.
    """
    v = np.asarray(v, dtype=np.float64)
    error = np.square(np.asarray(prediction, dtype=np.float64) - v).sum((1, 3))
    return error / np.square(v - v.mean(1, keepdims=True)).sum((1, 3))
