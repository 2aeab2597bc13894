"""Estimators side by side on the same queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import exchange
from .leave_one_out import fraction_of_variance, leave_one_out
from .mechanisms import MECHANISMS, apply_mechanism


@dataclass(frozen=True)
class Comparison:
    """How far estimators are from each other, and from the values.

    estimators: ``E`` names. outputs: by name, ``(B, Lq, Hq, Dv)`` float64. difference: ``(E, E)``, the norm
    of the difference of two outputs over the larger norm of the two. leave_one_out: ``(E,)``, the squared
    error with which the other keys and values predict each value, as a fraction of the values' variance;
    NaN for a probe that was given, which says nothing about other queries.
    """

    estimators: tuple[str, ...]
    outputs: dict[str, np.ndarray]
    difference: np.ndarray
    leave_one_out: np.ndarray


def compare(q, k, v, *, r=None, ridge=0.1, scale=None, causal=True, window_size=None) -> Comparison:
    """Evaluate softmax, LLA, Parallax, global ridge and linear attention on the same arrays.

    q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``. v: ``(B, Lk, Hkv, Dv)``. r: a probe ``(B, Lq, Hq, D)``;
    without it Parallax is left out. ridge: of LLA and of the global ridge, in squared key units. scale,
    causal, window_size: as of ``softmax_attention``; the leave-one-out error is bidirectional whatever they
    say. Arrays of any framework on the CPU; computed and returned in NumPy float64.
    Returns a Comparison. Raises what ``local_attention`` raises, and ValueError for fewer than two keys.
    Source: docs/math.md, "The family".
    """
    given = {"q": q, "k": k, "v": v} | ({} if r is None else {"r": r})
    q, k, v, *probe = (exchange.to_numpy(name, x).astype(np.float64) for name, x in given.items())
    names = tuple(name for name in MECHANISMS if name != "parallax" or probe)
    outputs = {
        name: apply_mechanism(
            name,
            q,
            k,
            v,
            ridge=ridge,
            probe=probe[0] if probe else None,
            scale=scale,
            causal=causal,
            window_size=window_size,
        )
        for name in names
    }
    difference = np.array([[_difference(outputs[a], outputs[b]) for b in names] for a in names])
    queries, keys, values, mask = leave_one_out(k, v)
    errors = [
        np.nan
        if name == "parallax"
        else fraction_of_variance(
            apply_mechanism(name, queries, keys, values, ridge=ridge, scale=scale, **mask), v
        ).mean()
        for name in names
    ]
    return Comparison(names, outputs, difference, np.array(errors))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    larger = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / larger) if larger > 0 else 0.0
