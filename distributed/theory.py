"""Leading-order bias, variance and rates of local constant and local linear regression, Gaussian kernel."""

from __future__ import annotations

import math

import numpy as np

# Moments of the half-normal distribution: what a boundary leaves of the kernel.
_M1 = math.sqrt(2 / math.pi)
_M3 = 2 * _M1


def smooth_bias(estimator: str, where: str, bandwidth: np.ndarray) -> np.ndarray | None:
    """Leading-order bias on the smooth problem, ``f(x) = exp(x)`` with keys uniform on ``[0, 1]``.

    estimator: ``softmax`` (local constant) or ``lla`` (local linear); others have no theory here. where:
    ``interior``, ``x = 1/2``: ``h^2 f''/2`` for both; ``boundary``, ``x = 0``: ``h f' m_1`` for local
    constant and ``h^2 (f''/2) (1 - m_1 m_3) / (1 - m_1^2)`` for local linear, with half-normal moments
    ``m``. bandwidth: ``(H,)``. Returns ``(H,)`` or None.
    Source: Fan and Gijbels, Local Polynomial Modelling (1996), section 3.2.
    """
    h = np.asarray(bandwidth, dtype=np.float64)
    if estimator not in ("softmax", "lla"):
        return None
    if where == "interior":
        return h**2 * math.exp(0.5) / 2
    if estimator == "softmax":
        return h * _M1
    return h**2 / 2 * (1 - _M1 * _M3) / (1 - _M1**2)


def smooth_variance(
    estimator: str, where: str, bandwidth: np.ndarray, n: int, noise: float
) -> np.ndarray | None:
    """Leading-order variance there, ``noise^2 R / (n h)`` with ``R`` the integral of the squared kernel.

    At a boundary ``R`` is that of the half kernel, and of its equivalent kernel for local linear.
    estimator, where, bandwidth: as in ``smooth_bias``. n: keys. noise: standard deviation of the values.
    Returns ``(H,)`` or None.
    """
    if estimator not in ("softmax", "lla"):
        return None
    if where == "interior":
        roughness = 1 / (2 * math.sqrt(math.pi))
    elif estimator == "softmax":
        roughness = 1 / math.sqrt(math.pi)
    else:
        # of (1 - m_1 u) 2 phi(u) / (1 - m_1^2) over u > 0
        integral = math.sqrt(math.pi) / 2 - _M1 + _M1**2 * math.sqrt(math.pi) / 4
        roughness = 2 / math.pi * integral / (1 - _M1**2) ** 2
    return noise**2 * roughness / (n * np.asarray(bandwidth, dtype=np.float64))


def bias_order(estimator: str, where: str) -> int:
    """The power of the bandwidth in the bias of ``softmax`` or ``lla``."""
    return 1 if estimator == "softmax" and where == "boundary" else 2


def error_order(problem: str, estimator: str, where: str, rate: float, d: int) -> float | None:
    """The power of ``1/n`` in the mean squared error when the bandwidth is ``c n^-rate``.

    It is the slower of squared bias, ``2 p rate`` with ``p`` the bias order, and variance, ``1 - d rate``.
    problem: ``linear`` or ``smooth``; others have no theory here. estimator: the probe-solving Parallax has
    LLA's, global ridge has 1 where it is well specified. Returns the power or None.
    """
    variance = 1 - d * rate
    if problem == "linear" and estimator == "global-ridge":
        return 1.0
    if problem not in ("linear", "smooth") or estimator not in ("softmax", "lla", "parallax-solved"):
        return None
    # A linear function has no curvature, and the keys no slope in density: only softmax's boundary is biased.
    if problem == "linear" and not (estimator == "softmax" and where == "boundary"):
        return variance
    return min(2 * bias_order("softmax" if estimator == "softmax" else "lla", where) * rate, variance)
