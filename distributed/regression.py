"""The regression study's one function: a point in, a row out."""

from __future__ import annotations

import numpy as np

from parallax_core.data import AttentionSample
from parallax_core.leave_one_out import fraction_of_variance, leave_one_out

from .estimators import Sequences, predict
from .point import Point, PointError
from .problems import Problem, Queries, draw, seed_sequence, synthetic_problem

TRAINING_SEQUENCES = 16
TRAINING_QUERIES = 32


def evaluate(point: Point, sample: AttentionSample | None = None) -> dict[str, object]:
    """Evaluate one point; the row depends on the point and the sample alone.

    point: what to evaluate. sample: the attention heads that a ``kv`` point reads.
    Returns the point's fields and, for ``interior`` and ``boundary`` queries, ``*_bias2``, ``*_variance``
    and ``*_mse`` (their sum) with the signed ``*_errors`` ``(replicates, queries)`` they come from; for
    ``kv``, ``error``, the squared error as a fraction of the values' variance, with ``errors``
    ``(documents, heads)``.
    Raises PointError, which names the point.
    """
    try:
        measured = _real(point, sample) if point.problem == "kv" else _synthetic(point)
    except Exception as error:
        raise PointError(f"{point.label}: {type(error).__name__}: {error}") from error
    return point.model_dump() | measured


def squared_bias_and_variance(errors: np.ndarray) -> tuple[float, float]:
    """Split the mean squared error over replicates; the two add up to it exactly.

    errors: ``(replicates, queries)``, prediction less truth. The variance is unbiased, and the squared bias
    is free of the variance of the mean, so it can come out below zero where the bias is too small to see.
    Returns both, averaged over the queries.
    """
    variance = errors.var(axis=0, ddof=1)
    bias2 = np.square(errors.mean(axis=0)) - variance / len(errors)
    return float(bias2.mean()), float(variance.mean())


def _synthetic(point: Point) -> dict[str, object]:
    problem = synthetic_problem(point.problem, point.d, point.seed)
    # Estimators and bandwidths share the sequences of a problem, so that their differences are theirs alone.
    identity = (point.problem, point.n, point.d, point.noise)
    streams = seed_sequence(point.seed, *identity).spawn(point.replicates)
    keys, values = draw(problem, point.n, point.noise, streams)
    training = None
    if point.estimator == "parallax-fitted":
        training = _training(problem, point, seed_sequence(point.seed, "training", *identity))
    measured: dict[str, object] = {}
    for where in ("interior", "boundary"):
        queries: Queries = getattr(problem, where)
        seen = max(2, round(point.n * queries.seen))
        q = np.broadcast_to(queries.x[:, None, :], (point.replicates, len(queries.x), 1, point.d))
        predictions = predict(
            point.estimator,
            Sequences(q, keys[:, :seen], values[:, :seen]),
            ridge=point.ridge,
            probe_ridge=point.probe_ridge,
            training=training,
            bandwidth=point.bandwidth,
            kernel=point.kernel,
            causal=False,
        )
        errors = predictions[:, :, 0, 0] - queries.truth
        bias2, variance = squared_bias_and_variance(errors)
        measured |= {
            f"{where}_bias2": bias2,
            f"{where}_variance": variance,
            f"{where}_mse": float(np.square(errors).mean()),
            f"{where}_errors": errors.tolist(),
        }
    return measured


def _training(problem: Problem, point: Point, stream: np.random.SeedSequence) -> Sequences:
    context, question = stream.spawn(2)
    keys, values = draw(problem, point.n, point.noise, context.spawn(TRAINING_SEQUENCES))
    queries, targets = draw(problem, TRAINING_QUERIES, point.noise, question.spawn(TRAINING_SEQUENCES))
    return Sequences(queries, keys, values, targets)


def _real(point: Point, sample: AttentionSample | None) -> dict[str, object]:
    if sample is None:
        raise ValueError("sample: a kv point needs the attention heads it reads, got None")
    chosen = sample.select(point.layer, point.heads)
    k, v = chosen.k, chosen.v
    documents = len(k)

    def sequences(rows: list[int]) -> tuple[Sequences, dict[str, object]]:
        q, keys, values, mask = leave_one_out(k[rows], v[rows])
        return Sequences(q, keys, values, v[rows]), mask

    predictions = np.empty_like(v)
    # A fitted probe has never seen the document it predicts; the others have nothing to fit.
    folds = (
        [[row] for row in range(documents)] if point.estimator == "parallax-fitted" else [[*range(documents)]]
    )
    for fold in folds:
        held_out, mask = sequences(fold)
        others = [row for row in range(documents) if row not in fold]
        predictions[fold] = predict(
            point.estimator,
            held_out._replace(target=None),
            ridge=point.ridge,
            probe_ridge=point.probe_ridge,
            training=sequences(others)[0] if others else None,
            bandwidth=point.bandwidth,
            kernel=point.kernel,
            **mask,
        )
    errors = fraction_of_variance(predictions, v)
    return {"error": float(errors.mean()), "errors": errors.tolist()}
