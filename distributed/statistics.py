"""Bootstrap intervals over replicates, and the exponents fitted to errors and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low

    def contains(self, value: float) -> bool:
        """Whether the interval covers the value."""
        return self.low <= value <= self.high


def bootstrap_means(
    statistic: Callable[[np.ndarray], np.ndarray],
    samples: Sequence[np.ndarray],
    *,
    paired: bool,
    resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """Percentile bootstrap of a statistic of the means of several samples of replicates.

    statistic: maps means ``(..., S)`` to ``(...)``; NaN where it is not defined. samples: ``S`` arrays
    ``(replicates,)``. paired: the replicates of all samples are the same designs and are resampled together.
    resamples: how many. rng: the random numbers.
    Returns the statistic with its 95 % interval, NaN where the statistic itself is.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    estimate = float(statistic(np.array([sample.mean() for sample in samples])))
    if np.isnan(estimate):
        return Interval(estimate, np.nan, np.nan)
    drawn = np.empty((resamples, len(samples)))
    index = None
    for i, sample in enumerate(samples):
        if index is None or not paired:
            index = rng.integers(len(sample), size=(resamples, len(sample)))
        drawn[:, i] = sample[index].mean(axis=1)
    low, high = np.nanpercentile(statistic(drawn), [2.5, 97.5])
    return Interval(estimate, float(low), float(high))


def bias_exponent(
    bandwidth: Sequence[float],
    errors: Sequence[np.ndarray],
    *,
    where: str,
    resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """The exponent ``p`` of the bias as the bandwidth shrinks, from ``log |bias| = a + p log h + b h^c``.

    The last term is the next order of the bias: ``c = 1`` at a boundary; ``c = 2`` in the interior, where odd
    moments of the kernel vanish. Without it curvature would count as exponent.

    bandwidth: ``(H,)``, at least four. errors: ``H`` arrays ``(replicates,)`` of prediction less truth on
    the same designs. where: ``interior`` or ``boundary``. resamples, rng: of the bootstrap over designs.
    Returns ``p`` with its interval.
    """
    h = np.asarray(bandwidth, dtype=np.float64)
    terms = np.stack([np.ones_like(h), np.log(h), h if where == "boundary" else h**2], axis=1)
    return bootstrap_means(_log_slope(terms), errors, paired=True, resamples=resamples, rng=rng)


def error_exponent(
    n: Sequence[int], squared_errors: Sequence[np.ndarray], *, resamples: int, rng: np.random.Generator
) -> Interval:
    """The exponent ``p`` with which the mean squared error falls, from ``log mse = a - p log n``.

    n: ``(N,)``, at least three. squared_errors: ``N`` arrays ``(replicates,)`` from independent sequences.
    resamples, rng: of the bootstrap over sequences. Returns ``p`` with its interval.
    """
    terms = np.stack([np.ones(len(n)), -np.log(n)], axis=1)
    return bootstrap_means(_log_slope(terms), squared_errors, paired=False, resamples=resamples, rng=rng)


def mean_interval(sample: np.ndarray, *, resamples: int, rng: np.random.Generator) -> Interval:
    """The mean of a sample ``(replicates,)`` with its bootstrap interval."""
    return bootstrap_means(lambda means: means[..., 0], [sample], paired=False, resamples=resamples, rng=rng)


def _log_slope(terms: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The second coefficient of the least-squares fit of ``log |means|`` to the columns of ``terms``."""
    solve = np.linalg.pinv(terms)[1]

    def slope(means: np.ndarray) -> np.ndarray:
        # A mean of exactly zero has no logarithm, and a fit that meets one no slope.
        logarithm = np.log(np.abs(means), out=np.full(means.shape, np.nan), where=means != 0)
        return logarithm @ solve

    return slope
