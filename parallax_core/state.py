"""The mergeable states of a pass over the keys, their merge and their finish.

A state is what a row of queries must remember of the keys it has seen. Two states of the same rows over
two disjoint sets of keys merge to the state of the union: tiles, splits of a cache, shards and machines all
use this one merge. The type of a state is its kind.

The formulas are written with NumPy's functions, which CuPy's arrays take over where a state is on a GPU.

Source: docs/math.md, "One pass over the keys".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import exchange
from .ridge import solve_ridge


class SoftmaxState(NamedTuple):
    """State of softmax attention: the maximum score, the normaliser and the weighted sum of values.

    m, d1: ``(B, Lq, Hq)``; O1: ``(B, Lq, Hq, Dv)``. float32, or float64 for float64 inputs.
    """

    m: Any
    d1: Any
    O1: Any

    def finish(self):
        """The output ``(B, Lq, Hq, Dv)``, 0 in a row that saw no key, in the state's dtype and framework."""
        with _opened(self) as (m, d1, O1):
            return exchange.hand_back(_zero_where_empty(m, d1, _divide(O1, d1)), self.m)

    @property
    def lse(self):
        """The log-normaliser ``logsumexp_j s_j`` of each row ``(B, Lq, Hq)``, -inf in one that saw no key."""
        return _lse(self)


class ParallaxState(NamedTuple):
    """State of Parallax attention with a given probe.

    m, d1, d2, t0: ``(B, Lq, Hq)``; O1, O2: ``(B, Lq, Hq, Dv)``. ``d2`` and ``O2`` are relative to the row's
    shift ``t0`` of the probe scores. float32, or float64 for float64 inputs.
    """

    m: Any
    d1: Any
    d2: Any
    O1: Any
    O2: Any
    t0: Any

    def finish(self):
        """The output ``(B, Lq, Hq, Dv)``, 0 in a row that saw no key, in the state's dtype and framework."""
        with _opened(self) as (m, d1, d2, O1, O2, _):
            out = _divide(O1, d1) * (1 + _divide(d2, d1))[..., None] - _divide(O2, d1)
            return exchange.hand_back(_zero_where_empty(m, d1, out), self.m)

    @property
    def lse(self):
        """The log-normaliser ``logsumexp_j s_j`` of each row ``(B, Lq, Hq)``, -inf in one that saw no key."""
        return _lse(self)


class LLAState(NamedTuple):
    """State of local linear attention: weighted moments of keys and values about an origin.

    m, d1: ``(B, Lq, Hq)``; k0, wk: ``(B, Lq, Hq, D)``, the origin and ``sum w (k - k0)``;
    wv: ``(B, Lq, Hq, Dv)``, ``sum w v``; wkk: ``(B, Lq, Hq, D, D)``, ``sum w (k - k0)(k - k0)^T``;
    wvk: ``(B, Lq, Hq, Dv, D)``, ``sum w v (k - k0)^T``; q: ``(B, Lq, Hq, D)`` and ridge: ``(B, Lq, Hq)``, the
    test points and their ridge, which the solve needs once all keys were seen.
    float32, or float64 for float64 inputs.
    """

    m: Any
    d1: Any
    k0: Any
    wk: Any
    wv: Any
    wkk: Any
    wvk: Any
    q: Any
    ridge: Any

    def finish(self, solver: str = "cholesky"):
        """Solve every row's ridge system once and return the output ``(B, Lq, Hq, Dv)``.

        ``solver``: ``cholesky``, or ``lstsq`` for the minimum-norm solution that a ridge of 0 needs.
        Raises SolverError where a system is not positive definite.
        """
        if solver not in ("cholesky", "lstsq"):
            raise ValueError(f"solver is {solver!r}; expected 'cholesky' or 'lstsq'")
        with _opened(self) as (m, d1, k0, wk, wv, wkk, wvk, q, lam):
            if solver != "lstsq" and (lam == 0).any():
                raise ValueError(f"ridge is 0 with solver={solver!r}; a ridge of 0 needs solver='lstsq'")
            kbar = _divide(wk, d1)
            vbar = _divide(wv, d1)
            C_kk = _divide(wkk, d1) - kbar[..., :, None] * kbar[..., None, :]
            C_vk = _divide(wvk, d1) - vbar[..., :, None] * kbar[..., None, :]
            u = solve_ridge(C_kk, (q - k0) - kbar, lam, solver, eps=np.finfo(m.dtype).eps)
            out = vbar + np.einsum("...vk,...k->...v", C_vk, u).astype(m.dtype)
            return exchange.hand_back(_zero_where_empty(m, d1, out), self.m)

    @property
    def lse(self):
        """The log-normaliser ``logsumexp_j s_j`` of each row ``(B, Lq, Hq)``, -inf in one that saw no key."""
        return _lse(self)


State = SoftmaxState | ParallaxState | LLAState


def merge_states(a: State, b: State) -> State:
    """Merge the states of the same query rows over two disjoint sets of keys.

    a, b: two states of one kind, from the same queries, probe, scale and ridge, of one shape, dtype and
    device. Returns the state of the union, in the framework of ``a``. The merge is associative and
    commutative up to rounding, and exact where one side has seen no key. States of a *solved* probe must not
    be merged: a probe solved on a part of the keys is not that of the whole; merge LLA states instead.

    Raises TypeError where the two are of different kinds, dtypes or devices, ValueError where they differ in
    shape.
    """
    for name, state in (("a", a), ("b", b)):
        if not isinstance(state, State):
            raise TypeError(
                f"{name} is a {type(state).__name__}; expected a SoftmaxState, ParallaxState or LLAState"
            )
    if type(a) is not type(b):
        raise TypeError(
            f"a is a {type(a).__name__} and b is a {type(b).__name__}; expected two states of one kind"
        )
    with _opened(a, b) as arrays:
        xs, ys = arrays[: len(a)], arrays[len(a) :]
        for field, x, y in zip(a._fields, xs, ys):
            if x.shape != y.shape:
                raise ValueError(f"b.{field} has shape {y.shape}; expected {x.shape}, that of a.{field}")
            if x.dtype != y.dtype:
                raise TypeError(f"b.{field} has dtype {y.dtype}; expected {x.dtype}, that of a.{field}")
        a_side, b_side = type(a)(*xs), type(b)(*ys)
        merged = _MERGES[type(a)](_without_minus_inf(a_side, b_side), _without_minus_inf(b_side, a_side))
        return type(a)(*(exchange.hand_back(x, a.m) for x in merged))


def _merge_softmax(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    m, fa, fb = _factors(a.m, b.m)
    return SoftmaxState(m, _plus(fa, a.d1, fb, b.d1), _plus(fa, a.O1, fb, b.O1))


def _merge_parallax(a: ParallaxState, b: ParallaxState) -> ParallaxState:
    m, fa, fb = _factors(a.m, b.m)
    # An empty side has no shift of its own, so that the other side's comes through exactly.
    t0 = np.where(_empty(a.m, a.d1), b.t0, a.t0)
    move_a, move_b = (np.where(_empty(s.m, s.d1) | (s.t0 == t0), 0, s.t0 - t0) for s in (a, b))
    d2a, d2b = a.d2 + move_a * a.d1, b.d2 + move_b * b.d1
    O2a, O2b = a.O2 + move_a[..., None] * a.O1, b.O2 + move_b[..., None] * b.O1
    return ParallaxState(
        m,
        _plus(fa, a.d1, fb, b.d1),
        _plus(fa, d2a, fb, d2b),
        _plus(fa, a.O1, fb, b.O1),
        _plus(fa, O2a, fb, O2b),
        t0,
    )


def _merge_lla(a: LLAState, b: LLAState) -> LLAState:
    m, fa, fb = _factors(a.m, b.m)
    k0 = np.where(_empty(a.m, a.d1)[..., None], b.k0, a.k0)
    wk, wkk, wvk = zip(*(_moved(s, k0) for s in (a, b)))
    return LLAState(
        m,
        _plus(fa, a.d1, fb, b.d1),
        k0,
        _plus(fa, wk[0], fb, wk[1]),
        _plus(fa, a.wv, fb, b.wv),
        _plus(fa, wkk[0], fb, wkk[1]),
        _plus(fa, wvk[0], fb, wvk[1]),
        a.q,
        a.ridge,
    )


_MERGES = {SoftmaxState: _merge_softmax, ParallaxState: _merge_parallax, LLAState: _merge_lla}


def _moved(s: LLAState, k0: np.ndarray):
    """The moments of ``s`` about the origin ``k0`` instead of its own."""
    step = np.where(_empty(s.m, s.d1)[..., None] | (s.k0 == k0), 0, s.k0 - k0)
    d1 = s.d1[..., None]
    cross = s.wk[..., :, None] * step[..., None, :]
    wkk = s.wkk + cross + cross.swapaxes(-1, -2) + d1[..., None] * step[..., :, None] * step[..., None, :]
    return s.wk + d1 * step, wkk, s.wvk + s.wv[..., :, None] * step[..., None, :]


def _empty(m: np.ndarray, d1: np.ndarray) -> np.ndarray:
    """Rows that saw no key. A row whose visible scores are all -inf has d1 = NaN and is not empty."""
    return np.isneginf(m) & (d1 == 0)


def _without_minus_inf(a, b):
    """``a`` as an empty state in the rows where its scores are all -inf and those of ``b`` are not.

    Weights of exactly 0 against the union's; left as they are, their NaN normaliser would spread.
    """
    drop = np.isneginf(a.m) & np.isnan(a.d1) & ~np.isneginf(b.m)
    return a._replace(d1=np.where(drop, 0, a.d1))


def _factors(ma: np.ndarray, mb: np.ndarray):
    """The common maximum and the factor of each side."""
    m = np.maximum(ma, mb)
    with np.errstate(invalid="ignore"):
        # Both at -inf: the factor 1 keeps the zeros of an empty row and the NaN of one whose scores are -inf.
        fa, fb = (np.where(np.isneginf(m), 1, np.exp(x - m)).astype(m.dtype) for x in (ma, mb))
    return m, fa, fb


def _plus(fa: np.ndarray, xa: np.ndarray, fb: np.ndarray, xb: np.ndarray) -> np.ndarray:
    tail = (1,) * (xa.ndim - fa.ndim)
    return fa.reshape(fa.shape + tail) * xa + fb.reshape(fb.shape + tail) * xb


def _divide(x: np.ndarray, d1: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / d1.reshape(d1.shape + (1,) * (x.ndim - d1.ndim))


def _zero_where_empty(m: np.ndarray, d1: np.ndarray, out: np.ndarray) -> np.ndarray:
    return np.where(_empty(m, d1)[..., None], 0, out).astype(out.dtype)


def _lse(state):
    kind = type(state).__name__
    with (
        exchange.opened({f"{kind}.m": state.m, f"{kind}.d1": state.d1}) as (m, d1),
        np.errstate(divide="ignore"),
    ):
        return exchange.hand_back(m + np.log(d1), state.m)


def _opened(*states):
    """The arrays of one state or of two, all on one device, to compute with."""
    sides = [type(states[0]).__name__] if len(states) == 1 else ["a", "b"]
    return exchange.opened(
        {f"{side}.{field}": x for side, s in zip(sides, states) for field, x in zip(s._fields, s)}
    )
