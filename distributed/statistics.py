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


def bootstrap(
    statistic: Callable[[list[np.ndarray]], float],
    samples: Sequence[np.ndarray],
    *,
    paired: bool,
    resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """Percentile bootstrap of a statistic of several samples of replicates.

    statistic: of the list of samples, a number. samples: arrays whose first axis is the replicate. paired: the
    replicates of all samples are the same designs and are resampled together. resamples: how many. rng: the
    random numbers. Returns the statistic with its 95 % interval.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    samples = [np.asarray(sample) for sample in samples]
    drawn = np.empty(resamples)
    for i in range(resamples):
        if paired:
            index = rng.integers(len(samples[0]), size=len(samples[0]))
            drawn[i] = statistic([sample[index] for sample in samples])
        else:
            drawn[i] = statistic([sample[rng.integers(len(sample), size=len(sample))] for sample in samples])
    # A resample whose mean bias is exactly zero has no logarithm; it carries no exponent.
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(float(statistic(samples)), float(low), float(high))


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
    solve = np.linalg.pinv(terms)[1]

    def exponent(samples: list[np.ndarray]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(solve @ np.log(np.abs([sample.mean() for sample in samples])))

    return bootstrap(exponent, errors, paired=True, resamples=resamples, rng=rng)


def error_exponent(
    n: Sequence[int], squared_errors: Sequence[np.ndarray], *, resamples: int, rng: np.random.Generator
) -> Interval:
    """The exponent ``p`` with which the mean squared error falls, from ``log mse = a - p log n``.

    n: ``(N,)``, at least three. squared_errors: ``N`` arrays ``(replicates,)`` from independent sequences.
    resamples, rng: of the bootstrap over sequences. Returns ``p`` with its interval.
    """
    terms = np.stack([np.ones(len(n)), -np.log(n)], axis=1)
    solve = np.linalg.pinv(terms)[1]

    def exponent(samples: list[np.ndarray]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(solve @ np.log([sample.mean() for sample in samples]))

    return bootstrap(exponent, squared_errors, paired=False, resamples=resamples, rng=rng)


def mean_interval(sample: np.ndarray, *, resamples: int, rng: np.random.Generator) -> Interval:
    """The mean of a sample ``(replicates,)`` with its bootstrap interval."""
    return bootstrap(lambda samples: float(samples[0].mean()), [sample], paired=False, resamples=resamples, rng=rng)
