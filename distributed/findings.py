"""What the rows of a regression study say: curves, exponents with intervals, and the real-data table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from . import theory
from .config import RegressionConfig
from .problems import seed_sequence
from .statistics import Interval, bias_exponent, error_exponent, mean_interval

WHERE = ("interior", "boundary")


@dataclass(frozen=True)
class ErrorCurve:
    """Mean squared error against the number of keys, with the fitted exponent."""

    estimator: str
    where: str
    n: np.ndarray
    mse: np.ndarray
    exponent: Interval
    theory: float | None


@dataclass(frozen=True)
class Convergence:
    """The error curves of one problem. rate: of the bandwidth, ``h = c n^-rate``."""

    problem: str
    d: int
    noise: float
    constant: float
    rate: float
    replicates: int
    curves: list[ErrorCurve]


@dataclass(frozen=True)
class TradeoffCurve:
    """Squared bias and variance against the bandwidth, with their leading orders."""

    estimator: str
    where: str
    bandwidth: np.ndarray
    bias2: np.ndarray
    variance: np.ndarray
    theory_bias2: np.ndarray | None
    theory_variance: np.ndarray | None


@dataclass(frozen=True)
class BiasCurve:
    """Size of the bias against the bandwidth, with the fitted and the expected exponent."""

    estimator: str
    where: str
    bandwidth: np.ndarray
    bias: np.ndarray
    theory_bias: np.ndarray
    exponent: Interval
    theory: int
    n: int
    replicates: int


@dataclass(frozen=True)
class RealError:
    """Leave-one-out error of one estimator on one layer; the interval resamples documents and heads."""

    layer: str
    estimator: str
    error: Interval
    errors: np.ndarray
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows."""

    convergence: list[Convergence]
    tradeoff: list[TradeoffCurve]
    exponents: list[BiasCurve]
    real: list[RealError]


def find(config: RegressionConfig, rows: list[dict[str, object]]) -> Findings:
    """Reduce the rows of a study to what its report shows.

    config: of the study. rows: of ``regression.evaluate``, one a point. Returns Findings.
    """

    def rng(*identity: object) -> np.random.Generator:
        return np.random.default_rng(seed_sequence(config.seed, "bootstrap", *identity))

    convergence = []
    for section in config.convergence:
        group = _where(
            rows, experiment="convergence", problem=section.problem, d=section.d, noise=section.noise
        )
        curves = [
            _error_curve(_where(group, estimator=estimator), where, section.bandwidth.rate, config, rng)
            for where in WHERE
            for estimator in section.estimators
        ]
        convergence.append(
            Convergence(
                section.problem,
                section.d,
                section.noise,
                section.bandwidth.constant,
                section.bandwidth.rate,
                section.replicates,
                curves,
            )
        )
    tradeoff = [
        _tradeoff_curve(_where(rows, experiment="tradeoff", estimator=estimator), where)
        for where in WHERE
        for estimator in (config.tradeoff.estimators if config.tradeoff else ())
    ]
    exponents = [
        _bias_curve(
            _where(rows, experiment=f"{section.where}-exponent", estimator=estimator),
            section.where,
            config,
            rng,
        )
        for section in config.exponents
        for estimator in section.estimators
    ]
    real = [_real_error(row, config, rng) for row in _where(rows, experiment="real")]
    return Findings(convergence, tradeoff, exponents, real)


def _where(rows: Iterable[dict[str, object]], **fields: object) -> list[dict[str, object]]:
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def _column(rows: list[dict[str, object]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _error_curve(rows, where: str, rate: float, config: RegressionConfig, rng) -> ErrorCurve:
    first, n = rows[0], _column(rows, "n")
    squared = [np.square(row[f"{where}_errors"]).mean(axis=1) for row in rows]
    exponent = error_exponent(
        n, squared, resamples=config.resamples, rng=rng("error", first["problem"], where)
    )
    expected = theory.error_order(first["problem"], first["estimator"], where, rate, first["d"])
    return ErrorCurve(first["estimator"], where, n, _column(rows, f"{where}_mse"), exponent, expected)


def _tradeoff_curve(rows, where: str) -> TradeoffCurve:
    first, h = rows[0], _column(rows, "bandwidth")
    bias = theory.smooth_bias(first["estimator"], where, h)
    return TradeoffCurve(
        first["estimator"],
        where,
        h,
        _column(rows, f"{where}_bias2"),
        _column(rows, f"{where}_variance"),
        None if bias is None else bias**2,
        theory.smooth_variance(first["estimator"], where, h, first["n"], first["noise"]),
    )


def _bias_curve(rows, where: str, config: RegressionConfig, rng) -> BiasCurve:
    first, h = rows[0], _column(rows, "bandwidth")
    errors = [np.asarray(row[f"{where}_errors"])[:, 0] for row in rows]
    exponent = bias_exponent(
        h, errors, where=where, resamples=config.resamples, rng=rng("bias", first["estimator"], where)
    )
    return BiasCurve(
        first["estimator"],
        where,
        h,
        np.abs([error.mean() for error in errors]),
        np.abs(theory.smooth_bias(first["estimator"], where, h)),
        exponent,
        theory.bias_order(first["estimator"], where),
        first["n"],
        first["replicates"],
    )


def _real_error(row, config: RegressionConfig, rng) -> RealError:
    errors = np.asarray(row["errors"])
    interval = mean_interval(errors.ravel(), resamples=config.resamples, rng=rng("real", row["layer"]))
    return RealError(row["layer"], row["estimator"], interval, errors, tuple(row["heads"]))
