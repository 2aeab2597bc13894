"""Estimators side by side on the same queries, keys and values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .leave_one_out import fraction_of_variance, leave_one_out
from .mechanisms import MECHANISMS, apply_mechanism
from .probes import ProbeFit, fit_probe, float64

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Elements of the centred keys that are held at a time, one copy of them for every row.
_CHUNK = 2**22


class ProbeDistance(NamedTuple):
    """How far a probe is from the solved one, as a fraction of the solved one's norm.

    euclidean: by the norm of all rows together. in_C_kk: by ``sqrt(r^T C_kk r)``, the spread of ``r.k_j``
    over the keys that the row attends to, which is all that a probe does. Softmax, without a probe, is 1 off.
    """

    euclidean: float
    in_C_kk: float


@dataclass(frozen=True)
class Comparison:
    """How far estimators are from each other and from the values, and how hard the rows are.

    estimators: ``E`` names. outputs: by name, ``(B, Lq, Hq, Dv)`` float64. difference: ``(E, E)``, the norm
    of the difference of two outputs over the larger norm of the two. leave_one_out: ``(E,)``, the squared
    error with which the other keys and values predict each value, as a fraction of the values' variance;
    NaN where there is none: for a probe that was given, which says nothing about other queries, and for a
    fitted one with a single sequence. rows: ``(B, n, Hq)`` float64 arrays of n rows a sequence, NaN in rows
    that see no key: ``effective_neighbours``, exp(entropy of p); ``effective_rank``, exp(entropy of the
    eigenvalues of ``C_kk`` over their sum); ``condition`` of ``C_kk``, inf where it is singular;
    ``ridge_condition``, of ``C_kk + ridge I``. probe_distance: by the name of the estimator. fit: of the
    fitted probe, or None.
    """

    estimators: tuple[str, ...]
    outputs: dict[str, np.ndarray]
    difference: np.ndarray
    leave_one_out: np.ndarray
    rows: dict[str, np.ndarray]
    probe_distance: dict[str, ProbeDistance]
    fit: ProbeFit | None = None

    def quantiles(self, name: str) -> np.ndarray:
        """The ``QUANTILES`` of an entry of ``rows``, each a value that some row has; NaN without rows."""
        values = self.rows[name][~np.isnan(self.rows[name])]
        # Interpolation would make NaN of a finite condition beside an infinite one.
        return np.quantile(values, QUANTILES, method="inverted_cdf") if values.size else np.full(5, np.nan)

    def to_dict(self) -> dict[str, object]:
        """The numbers without the arrays; None stands for NaN and, in a condition, for infinity."""
        names = self.estimators
        summary: dict[str, object] = {
            "estimators": list(names),
            "leave_one_out": {name: _number(x) for name, x in zip(names, self.leave_one_out)},
            "difference": [[float(x) for x in row] for row in self.difference],
            "rows": int(np.count_nonzero(~np.isnan(self.rows["effective_rank"]))),
            "quantiles": {
                "at": list(QUANTILES),
                **{name: [_number(x) for x in self.quantiles(name)] for name in self.rows},
            },
            "probe_distance": {
                name: {"euclidean": _number(far.euclidean), "in_C_kk": _number(far.in_C_kk)}
                for name, far in self.probe_distance.items()
            },
        }
        if self.fit is not None:
            summary["fit"] = {
                "score": [_number(x) for x in self.fit.score],
                "solver": list(self.fit.solver),
                "condition": [_number(x) for x in self.fit.condition],
            }
        return summary

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def compare(
    q, k, v, *, r=None, x=None, ridge=0.1, probe_ridge=1.0, rows=4096, scale=None, causal=True,
    window_size=None,
) -> Comparison:  # fmt: skip
    """Evaluate softmax, LLA, Parallax, global ridge and linear attention on the same arrays.

    q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``. v: ``(B, Lk, Hkv, Dv)``. r: a probe ``(B, Lq, Hq, D)``,
    compared as ``parallax``. x: ``(B, Lq, Hq, Dx)`` or ``(B, Lq, 1, Dx)``; a probe ``W_R x`` fitted to LLA's
    output is compared as ``parallax-fitted``. Its leave-one-out error is of another ``W_R``, with the key
    as ``x``, fitted to the values of the other sequences. ridge: of LLA and of the global ridge, a number in
    squared key units. probe_ridge: of the fits, as in ``fit_probe``. rows: at most so many of the rows,
    evenly spaced, are looked at for the diagnostics of ``C_kk`` and the distances of probes. scale, causal,
    window_size: as of ``softmax_attention``; the leave-one-out error is bidirectional whatever they say.
    Arrays of any framework on the CPU; computed and returned in NumPy float64.

    Returns a Comparison. Raises what ``local_attention`` and ``fit_probe`` raise, and ValueError for fewer
    than two keys and for numbers that are not finite.
    Source: docs/math.md, "The family"; effective rank: Roy and Vetterli, EUSIPCO 2007.
    """
    given = {"q": q, "k": k, "v": v} | ({} if r is None else {"r": r}) | ({} if x is None else {"x": x})
    arrays = {name: float64(name, array) for name, array in given.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected a positive integer, got {rows!r}")
    q, k, v = (arrays[name] for name in "qkv")
    options = {"scale": scale, "causal": causal, "window_size": window_size}
    outputs = {
        name: apply_mechanism(name, q, k, v, ridge=ridge, probe=arrays.get("r"), **options)
        for name in MECHANISMS
        if name != "parallax" or r is not None
    }
    probes = {} if r is None else {"parallax": arrays["r"]}
    fit = None
    if x is not None:
        fit = fit_probe(arrays["x"], q, k, v, outputs["lla"], ridge=probe_ridge, **options)
        probes["parallax-fitted"] = np.einsum("hdx,blhx->blhd", fit.W_R, _of_heads(arrays["x"], q))
        outputs["parallax-fitted"] = apply_mechanism(
            "parallax", q, k, v, probe=probes["parallax-fitted"], **options
        )
    names = tuple(outputs)
    difference = np.array([[_difference(outputs[a], outputs[b]) for b in names] for a in names])
    errors = [_leave_one_out_error(name, k, v, ridge, probe_ridge, scale) for name in names]
    diagnostics, distance = _look_at_rows(q, k, probes, ridge, rows, options)
    return Comparison(names, outputs, difference, np.array(errors), diagnostics, distance, fit)


def _of_heads(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, (*q.shape[:3], x.shape[3]))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    larger = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / larger) if larger > 0 else 0.0


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def _leave_one_out_error(name: str, k, v, ridge: float, probe_ridge: float, scale) -> float:
    if name == "parallax" or (name == "parallax-fitted" and len(k) == 1):
        return np.nan
    if name != "parallax-fitted":
        queries, keys, values, mask = leave_one_out(k, v)
        prediction = apply_mechanism(name, queries, keys, values, ridge=ridge, scale=scale, **mask)
        return float(fraction_of_variance(prediction, v).mean())
    prediction = np.empty_like(v)
    for sequence in range(len(k)):
        others = np.arange(len(k)) != sequence
        queries, keys, values, mask = leave_one_out(k[others], v[others])
        fit = fit_probe(
            queries, queries, keys, values, v[others], ridge=probe_ridge, held_out=0, scale=scale, **mask
        )
        queries, keys, values, mask = leave_one_out(k[[sequence]], v[[sequence]])
        probe = np.einsum("hdx,blhx->blhd", fit.W_R, queries)
        prediction[[sequence]] = apply_mechanism(
            "parallax", queries, keys, values, probe=probe, scale=scale, **mask
        )
    return float(fraction_of_variance(prediction, v).mean())


def _look_at_rows(q, k, probes: dict[str, np.ndarray], ridge: float, rows: int, options: dict[str, object]):
    """The ``rows`` and ``probe_distance`` of a Comparison."""
    from .attention import lla_probe
    from .reference.arguments import attention_arguments
    from .reference.rows import blocks
    from .reference.weights import dot_scores, softmax_weights

    problem, q, _, k, _ = attention_arguments("compare", q, k, None, **options)
    solved = lla_probe(q, k, ridge=ridge, solver="lstsq" if ridge == 0 else "cholesky", **options)
    count = max(1, min(problem.q_len, rows // max(1, problem.batch * problem.q_heads)))
    chosen = np.linspace(0, problem.q_len - 1, count).round().astype(int) if problem.q_len else np.arange(0)
    names = ("effective_neighbours", "effective_rank", "condition", "ridge_condition")
    found = {name: np.full((problem.batch, len(chosen), problem.q_heads), np.nan) for name in names}
    squares = {name: np.zeros((2, 2)) for name in probes}  # (off, solved) by (euclidean, in C_kk)
    for block in blocks(problem, k, None):
        batch, _, head = block.rows
        step = max(1, _CHUNK // max(1, block.keys.size))
        for first in range(0, len(chosen), step):
            at = chosen[first : first + step]
            visible = block.visible[at]
            p = softmax_weights(dot_scores(problem.scale, q[batch, at, head], block.keys), visible).p
            C_kk = _covariance(p, block.keys)
            measured = (_exp_entropy(p), *_spectrum(C_kk, ridge))
            for name, values in zip(names, measured):
                found[name][batch, first : first + step, head] = np.where(visible.any(1), values, np.nan)
            for name, probe in probes.items():
                off = probe[batch, at, head] - solved[batch, at, head]
                for which, vectors in enumerate((off, solved[batch, at, head])):
                    squares[name][which] += (
                        np.square(vectors).sum(),
                        np.einsum("ni,nij,nj->", vectors, C_kk, vectors),
                    )
    distance = {}
    for name, (off, whole) in squares.items():
        ratio = np.sqrt(np.divide(off, whole, out=np.full(2, np.nan), where=whole > 0))
        distance[name] = ProbeDistance(*map(float, ratio))
    return found, distance


def _covariance(p: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(keys):
        return np.zeros((len(p), keys.shape[1], keys.shape[1]))
    # About a key first: keys that agree then give exactly 0, where the rounding of their mean would not.
    centred = keys - keys[p.argmax(1)][:, None]
    centred -= p[:, None] @ centred
    centred *= np.sqrt(p)[:, :, None]
    return centred.swapaxes(1, 2) @ centred


def _exp_entropy(p: np.ndarray) -> np.ndarray:
    return np.exp(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1))


def _spectrum(C_kk: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.linalg.eigvalsh(C_kk)
    most = values[:, -1]
    # The rule by which a solve without a ridge decides what the keys span: docs/math.md.
    values = np.where(values > values.shape[1] * np.finfo(np.float64).eps * most[:, None], values, 0)
    least, total = values[:, 0], values.sum(1)
    rank = np.where(total > 0, _exp_entropy(values / np.where(total > 0, total, 1)[:, None]), 0)
    condition, ridge_condition = (
        np.divide(most + lam, least + lam, out=np.full(len(least), np.inf), where=least + lam > 0)
        for lam in (0.0, ridge)
    )
    return rank, condition, ridge_condition
