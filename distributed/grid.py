"""The points of a configured regression study."""

from __future__ import annotations

from collections.abc import Iterator

from parallax_core.data import AttentionSample

from .config import Convergence, Exponents, Real, RegressionConfig, Tradeoff
from .point import Point


def points(config: RegressionConfig, sample: AttentionSample | None) -> list[Point]:
    """List the points of a study, in the order of its rows.

    config: the study. sample: the attention heads, which decide the sizes of the ``kv`` points.
    Returns the points. Raises ValueError for layers or heads that the sample lacks.
    """
    listed: list[Point] = []
    for section in config.convergence:
        listed += _convergence(section, config.seed)
    if config.tradeoff is not None:
        listed += _tradeoff(config.tradeoff, config.seed)
    for section in config.exponents:
        listed += _exponents(section, config.seed)
    if config.real is not None:
        if sample is None:
            raise ValueError("real: needs a file of attention heads, got none")
        listed += _real(config.real, config.seed, sample)
    return listed


def _convergence(section: Convergence, seed: int) -> Iterator[Point]:
    shared = section.model_dump(exclude={"estimators", "n", "bandwidth"})
    for estimator in section.estimators:
        for n in section.n:
            yield Point(
                experiment="convergence",
                estimator=estimator,
                n=n,
                bandwidth=section.bandwidth.at(n),
                seed=seed,
                **shared,
            )


def _tradeoff(section: Tradeoff, seed: int) -> Iterator[Point]:
    shared = section.model_dump(exclude={"estimators", "bandwidth"})
    for estimator in section.estimators:
        for bandwidth in section.bandwidth:
            yield Point(
                experiment="tradeoff",
                problem="smooth",
                d=1,
                estimator=estimator,
                bandwidth=bandwidth,
                seed=seed,
                **shared,
            )


def _exponents(section: Exponents, seed: int) -> Iterator[Point]:
    shared = section.model_dump(exclude={"where", "estimators", "bandwidth"})
    for estimator in section.estimators:
        for bandwidth in section.bandwidth:
            yield Point(
                experiment=f"{section.where}-exponent",
                problem="smooth",
                d=1,
                estimator=estimator,
                bandwidth=bandwidth,
                seed=seed,
                **shared,
            )


def _real(section: Real, seed: int, sample: AttentionSample) -> Iterator[Point]:
    shared = section.model_dump(exclude={"estimators", "layers", "heads", "bandwidth"})
    heads = section.heads
    if heads == "all":
        heads = sample.heads
    elif isinstance(heads, int):
        heads = sample.spread(heads)
    for layer in sample.layers if section.layers == "all" else section.layers:
        chosen = sample.select(layer, tuple(heads))
        documents, n, _, d = chosen.k.shape
        if n < 2:
            raise ValueError(f"layers: leave-one-out needs two keys a document, {sample.source} has {n}")
        if documents < 2 and "parallax-fitted" in section.estimators:
            raise ValueError(
                f"estimators: parallax-fitted is fitted on other documents, and {sample.source} has 1; "
                "leave it out"
            )
        for estimator in section.estimators:
            yield Point(
                experiment="real",
                problem="kv",
                estimator=estimator,
                n=n,
                d=d,
                bandwidth=section.bandwidth or d**0.25,
                layer=layer,
                heads=chosen.numbers,
                seed=seed,
                **shared,
            )
