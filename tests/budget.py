"""What rounding may do to a row of the output on a GPU, from the sizes of the numbers that go into it.

A row is ``o = sum_j p_j (1 + c - t_j) v_j``. Relative to ``N = sum_j p_j (1 + |t_j - c|) |v_j|``:

- half precision: the two weights of a key are rounded once each, to ``2^-9`` (bfloat16) or ``2^-12``
  (float16) of their size, and so is the output, where the shift of the probe scores is not further from ``c``
  than the scores are spread; twice that covers shifts that are;
- float32: a score carries ``2^-24`` of the sum of its products' sizes, several times over for their order; it
  becomes a relative error of a weight, or where it is a probe score of the correction. Sums over the keys add
  a few roundings more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

UNIT = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 0.0}


class Budget(NamedTuple):
    """Bounds of the norm of the output's error and of the log-normaliser's, ``(B, Lq, Hq)``."""

    output: np.ndarray
    lse: np.ndarray


def budget(case, operation: str) -> Budget:
    """case: of ``strategies``, in NumPy. Rows that see no key, or see what is not finite, have any bound."""
    q = case.q.astype(np.float64)
    r = case.r.astype(np.float64) if operation == "parallax" else np.zeros_like(q)
    B, Lq, Hq, D = q.shape
    scale = case.options.get("scale")
    scale = D**-0.5 if scale is None else scale
    unit = UNIT[case.q.dtype.name]
    output, lse = np.zeros((B, Lq, Hq)), np.zeros((B, Lq, Hq))
    for b in range(B):
        K, V = (_positions(case, x, b) for x in case.keys_and_values)
        seen = _seen(case, b, len(K))
        for h in range(Hq):
            kh, vh = K[:, h // (Hq // K.shape[1])], V[:, h // (Hq // K.shape[1])]
            with np.errstate(all="ignore"):
                scores = np.where(seen, scale * (q[b, :, h] @ kh.T), -np.inf)
                p = np.exp(scores - scores.max(axis=1, initial=-1e300, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                t = r[b, :, h] @ kh.T
                c = np.where(seen, p * t, 0).sum(axis=1, keepdims=True)
                norms = np.linalg.norm(vh, axis=-1)
                N = np.where(seen, p * (1 + np.abs(t - c)) * norms, 0).sum(axis=1)
                largest = np.abs(np.where(seen.any(0)[:, None], kh, 0)).max(axis=0, initial=0)
                weight = abs(scale) * (np.abs(q[b, :, h]) @ largest)
                probe = np.abs(r[b, :, h]) @ largest
                top = np.where(seen.any(0), norms, 0).max(initial=0)
                wide = 2.0**-21 * ((4 + weight) * N + probe * top)
                output[b, :, h] = 4 * unit * N + wide + 1e-30
                lse[b, :, h] = 2 * unit + 2.0**-21 * (4 + weight)
    return Budget(output, lse)


def solved_budget(case, ridge: np.ndarray) -> np.ndarray:
    """Bounds of the norm of the error of local linear attention's output, ``(B, Lq, Hq)``.

    Its row is Parallax's at the probe ``-u`` that it solves for, with that row's ``N``. Rounding the keys
    moves ``u`` as well, by at most the root of the system's condition, since they enter it as their own
    square; in float32 the moments themselves are rounded, which is worth the condition, and their
    factorisation as much again. ridge: ``(B, Lq, Hq)``.
    """
    q = case.q.astype(np.float64)
    B, Lq, Hq, D = q.shape
    scale = case.options.get("scale")
    scale = D**-0.5 if scale is None else scale
    unit = UNIT[case.q.dtype.name]
    bound = np.zeros((B, Lq, Hq))
    for b in range(B):
        K, V = (_positions(case, x, b) for x in case.keys_and_values)
        seen = np.broadcast_to(_seen(case, b, len(K)), (Lq, len(K)))
        for h in range(Hq):
            kh, vh = K[:, h // (Hq // K.shape[1])], V[:, h // (Hq // K.shape[1])]
            norms = np.linalg.norm(vh, axis=-1)
            largest = np.abs(np.where(seen.any(0)[:, None], kh, 0)).max(axis=0, initial=0)
            for i in range(Lq):
                if not seen[i].any():
                    continue
                keys, lam = kh[seen[i]], ridge[b, i, h]
                scores = scale * (keys @ q[b, i, h])
                p = np.exp(scores - scores.max())
                p /= p.sum()
                centred = keys - p @ keys
                C = (p[:, None] * centred).T @ centred
                u = np.linalg.solve(C + lam * np.eye(D), q[b, i, h] - p @ keys)
                N = p @ ((1 + np.abs(centred @ u)) * norms[seen[i]])
                condition = 1 + np.trace(C) / lam
                weight = abs(scale) * (np.abs(q[b, i, h]) @ largest)
                bound[b, i, h] = N * (4 * unit * condition**0.5 + 2.0**-20 * (4 + weight + condition)) + 1e-30
    return bound


def _positions(case, x: np.ndarray, b: int) -> np.ndarray:
    """Keys or values of a sequence by position, 0 where its page does not exist."""
    table = case.options.get("page_table")
    if table is None:
        return x[b].astype(np.float64)
    pages = table[b]
    there = (pages >= 0) & (pages < len(x))
    found = np.where(there[:, None, None, None], x[np.where(there, pages, 0)].astype(np.float64), 0)
    return found.reshape(-1, *x.shape[2:])


def _seen(case, b: int, keys: int) -> np.ndarray:
    """Which keys each query sees, ``(Lq, keys)``."""
    options, Lq = case.options, case.q.shape[1]
    i, j = np.arange(Lq)[:, None], np.arange(keys)[None, :]
    window = options.get("window_size")
    if options.get("cu_seqlens") is not None:
        sequence = np.searchsorted(options["cu_seqlens"], np.arange(keys), side="right")
        seen, newest = sequence[:, None] == sequence[None, :], i
    else:
        lengths, pad = options.get("cache_seqlens"), options.get("cache_leftpad")
        end = keys if lengths is None else int(lengths[b])
        seen = (j < end) & (j >= (0 if pad is None else int(pad[b])))
        newest = end - Lq + i
    if options.get("causal", True):
        seen = seen & (j <= newest)
        if window is not None:
            seen = seen & (newest - j < window)
    return seen
