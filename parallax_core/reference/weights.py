"""Kernel scores of keys against queries, and the softmax weights they give."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist


def dot_scores(scale: float, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``s_ij = scale * q_i.k_j``, ``(rows, n)``."""
    return scale * (q @ keys.T)


def gaussian_scores(scale: float, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``s_ij = -scale/2 * |q_i - k_j|^2``, ``(rows, n)``, from the differences, so no squares cancel."""
    return -0.5 * scale * cdist(q, keys, "sqeuclidean")


class Weights(NamedTuple):
    """Softmax weights of a block of rows.

    m: the maximum score, -inf in a row that sees no key; e: ``e^(s - m)``, 0 where a key is hidden; d1: the
    sum of e; p: ``e / d1``, 0 in a row that sees no key. m and d1 are ``(rows,)``, e and p ``(rows, n)``.
    """

    m: np.ndarray
    e: np.ndarray
    d1: np.ndarray
    p: np.ndarray


def softmax_weights(scores: np.ndarray, visible: np.ndarray) -> Weights:
    """The weights of the visible keys; NaN in a row all of whose visible scores are -inf, as IEEE has it."""
    s = np.where(visible, scores, -np.inf)
    m = s.max(axis=1, initial=-np.inf)
    lost = np.isneginf(m)
    # Beside any other key, keys of score -inf weigh 0: only the normaliser says that alone they are 0 / 0,
    # so that the state of such a row merges as it should.
    e = np.where(visible, np.exp(s - np.where(lost, 0.0, m)[:, None]), 0.0)
    sees = visible.any(axis=1)
    d1 = np.where(lost & sees, np.nan, e.sum(axis=1))
    p = e / np.where(sees, d1, 1.0)[:, None]
    return Weights(m, e, d1, p)
