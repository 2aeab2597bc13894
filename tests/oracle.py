"""The formulas of docs/math.md, one row at a time in extended precision, sharing no code with the package.

Each estimator takes one query and the keys and values it sees, and gives the output with a bound on what
rounding may do to it: to first order, an implementation that works at the rounding unit ``eps`` is within
``eps * sensitivity`` of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

WIDE = np.longdouble


class Answer(NamedTuple):
    o: np.ndarray
    lse: float
    sensitivity: float


class Row(NamedTuple):
    batch: int
    row: int
    head: int
    places: list[tuple[int, int, int]]
    """Where the seen keys lie in k and v: (batch, position, head), or (page, place, head)."""


def seen_rows(case) -> Iterator[Row]:
    """Every row of a case of ``strategies`` with the keys it sees."""
    options = case.options
    k = case.keys_and_values[0]
    B, Lq, Hq, _ = case.q.shape
    cu_seqlens, table = options.get("cu_seqlens"), options.get("page_table")
    seqlens, leftpad = options.get("cache_seqlens"), options.get("cache_leftpad")
    for b in range(B):
        for i in range(Lq):
            if cu_seqlens is not None:
                n = max(n for n in range(len(cu_seqlens) - 1) if cu_seqlens[n] <= i)
                first, end = int(cu_seqlens[n]), int(cu_seqlens[n + 1])
                newest = i
            else:
                first = 0 if leftpad is None else int(leftpad[b])
                end = k.shape[1] if table is None else table.shape[1] * k.shape[1]
                end = end if seqlens is None else int(seqlens[b])
                newest = end - Lq + i
            for h in range(Hq):
                group = Hq // k.shape[2]
                places = []
                for j in range(first, end):
                    if options.get("causal", True):
                        if j > newest:
                            continue
                        if options.get("window_size") is not None and newest - j >= options["window_size"]:
                            continue
                    if table is None:
                        places.append((b, j, h // group))
                    else:
                        size = k.shape[1]
                        places.append((int(table[b, j // size]), j % size, h // group))
                yield Row(b, i, h, places)


def evaluate(case, estimator: Callable[..., Answer]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, log-normaliser and sensitivity of a case by ``estimator(q, r, K, V, scale, row)``."""
    k, v = case.keys_and_values
    B, Lq, Hq, D = case.q.shape
    o, lse = np.zeros((B, Lq, Hq, v.shape[-1])), np.full((B, Lq, Hq), -np.inf)
    sensitivity = np.zeros((B, Lq, Hq, 1))
    scale = case.options.get("scale")
    scale = 1 / np.sqrt(D) if scale is None else scale
    for row in seen_rows(case):
        if row.places:
            at = row.batch, row.row, row.head
            K, V = (np.array([x[place] for place in row.places]).astype(WIDE) for x in (k, v))
            o[at], lse[at], sensitivity[at] = estimator(
                case.q[at].astype(WIDE), case.r[at].astype(WIDE), K, V, scale, at
            )
    return o, lse, sensitivity


def weights(scores: np.ndarray) -> tuple[np.ndarray, float]:
    w = np.exp(scores - scores.max())
    return w / w.sum(), scores.max() + np.log(w.sum())


def softmax(q, r, K, V, scale, at=None) -> Answer:
    p, lse = weights(scale * (K @ q))
    return Answer(p @ V, lse, _weight_error(q, K, scale) * np.abs(V).max())


def parallax(q, r, K, V, scale, at=None) -> Answer:
    p, lse = weights(scale * (K @ q))
    t = K @ r
    o = (p * (1 + p @ t - t)) @ V
    largest = np.abs(r) @ np.abs(K).max(axis=0)
    return Answer(o, lse, _weight_error(q, K, scale) * (1 + 4 * largest) * np.abs(V).max())


def lla(q, r, K, V, scale, at=None, *, ridge) -> Answer:
    """``ridge``: positive, an array of shape ``(B, Lq, Hq)``."""
    p, lse = weights(scale * (K @ q))
    lam = float(ridge[at])
    kbar = p @ K
    A = np.sqrt(p)[:, None] * (K - kbar)
    matrix = A.T @ A + WIDE(lam) * np.eye(q.size)
    u = solve(matrix, q - kbar)
    t = (K - kbar) @ u
    # A perturbation of the system's entries by eps of the key's size moves u by the condition number.
    condition = np.linalg.cond(matrix.astype(float))
    spread = (1 + np.abs(K).max()) ** 2 / lam
    largest = np.linalg.norm(u.astype(float)) * np.linalg.norm(np.abs(K - kbar).max(axis=0).astype(float))
    sensitivity = _weight_error(q, K, scale) * (condition + spread) * (1 + largest) * np.abs(V).max()
    return Answer((p * (1 + t)) @ V, lse, sensitivity)


def solve(matrix: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Gaussian elimination with partial pivoting: NumPy's own has no extended precision."""
    a, x = matrix.astype(WIDE), b.astype(WIDE)
    n = len(x)
    for c in range(n):
        pivot = c + int(np.argmax(np.abs(a[c:, c])))
        a[[c, pivot]], x[[c, pivot]] = a[[pivot, c]], x[[pivot, c]]
        for row in range(c + 1, n):
            factor = a[row, c] / a[c, c]
            a[row] -= factor * a[c]
            x[row] -= factor * x[c]
    for c in reversed(range(n)):
        x[c] = (x[c] - a[c, c + 1 :] @ x[c + 1 :]) / a[c, c]
    return x


def hidden_places(case) -> np.ndarray:
    """Which keys no row sees: True of the shape ``k.shape[:3]``."""
    hidden = np.ones(case.keys_and_values[0].shape[:3], bool)
    for row in seen_rows(case):
        for place in row.places:
            hidden[place] = False
    return hidden


def _weight_error(q, K, scale) -> float:
    """Relative error of the sums over keys, in rounding units.

    A score of D products carries D + 2 rounding errors of its terms, which the exponential turns into
    relative errors of a weight and of the normaliser; the sums over n keys add n more each.
    """
    n, D = K.shape
    terms = abs(scale) * (np.abs(q) @ np.abs(K).max(axis=0))
    return float(2 * ((D + 2) * terms + 2 * n + 4))
