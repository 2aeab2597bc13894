"""The figures of the regression report, as SVG text that stands in the page itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import matplotlib.lines
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figure_style import STYLE, svg
from .findings import WHERE, BiasCurve, Convergence, RealError, TradeoffCurve

# The palette of Okabe and Ito, which colour-blind readers can tell apart; markers differ as well.
COLOUR = {
    "softmax": "#D55E00",
    "lla": "#0072B2",
    "parallax-solved": "#56B4E9",
    "parallax-fitted": "#009E73",
    "global-ridge": "#CC79A7",
    "linear-attention": "#777777",
}
MARKER = {
    "softmax": "o",
    "lla": "s",
    "parallax-solved": "x",
    "parallax-fitted": "^",
    "global-ridge": "D",
    "linear-attention": "v",
}
NAME = {
    "softmax": "softmax",
    "lla": "LLA",
    "parallax-solved": "Parallax, solved probe",
    "parallax-fitted": "Parallax, fitted probe",
    "global-ridge": "global ridge",
    "linear-attention": "linear attention",
}
PLACE = {"interior": "interior", "boundary": "boundary"}
PIECEWISE_PLACE = {"interior": "segment complete", "boundary": "segment just begun"}


def error_against_n(results: Sequence[Convergence]) -> str:
    """Mean squared error against the number of keys: a column a problem, a row a place. Returns SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.55 * len(results), 6.6), layout="constrained")
        axes = figure.subplots(2, len(results), squeeze=False, sharex="col")
        for column, result in enumerate(results):
            for row, where in enumerate(WHERE):
                axis = axes[row, column]
                for curve in result.curves:
                    if curve.where != where:
                        continue
                    axis.loglog(curve.n, curve.mse, **_line(curve.estimator))
                    if curve.theory is not None and curve.estimator != "parallax-solved":
                        slope = curve.mse[-1] * (curve.n / curve.n[-1]) ** -curve.theory
                        axis.loglog(curve.n, slope, **_theory(curve.estimator))
                place = (PIECEWISE_PLACE if result.problem == "piecewise" else PLACE)[where]
                axis.set_title(f"{result.problem}, {place}")
                if column == 0:
                    axis.set_ylabel("mean squared error")
                if row == 1:
                    axis.set_xlabel("keys n")
                _plain_powers_of_two(axis, result.curves[0].n)
        _legend(figure, axes.flat, theory="rate in theory")
        return svg(figure, "error-against-n")


def tradeoff(curves: Sequence[TradeoffCurve]) -> str:
    """Squared bias, variance and their sum against the bandwidth: a row a place. Returns SVG."""
    parts = (
        ("squared bias", lambda c: c.bias2, lambda c: c.theory_bias2),
        ("variance", lambda c: c.variance, lambda c: c.theory_variance),
        ("mean squared error", lambda c: c.bias2 + c.variance, lambda c: None),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 6.2), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True, sharey="row")
        for row, where in enumerate(WHERE):
            for axis, (title, measured, expected) in zip(axes[row], parts):
                for curve in curves:
                    if curve.where != where:
                        continue
                    # An unbiased estimate of a squared bias near zero can be negative: it has no logarithm.
                    value = np.where(measured(curve) > 0, measured(curve), np.nan)
                    axis.loglog(curve.bandwidth, value, **_line(curve.estimator))
                    if expected(curve) is not None:
                        axis.loglog(curve.bandwidth, expected(curve), **_theory(curve.estimator))
                    if title == "mean squared error":
                        best = np.nanargmin(value)
                        axis.plot(
                            curve.bandwidth[best],
                            value[best],
                            "o",
                            ms=12,
                            mfc="none",
                            mec=COLOUR[curve.estimator],
                            mew=1.4,
                        )
                axis.set_title(f"{title}, {where}")
                if row == 1:
                    axis.set_xlabel("bandwidth h")
            floor = min(curve.variance.min() for curve in curves if curve.where == where)
            axes[row, 0].set_ylim(bottom=floor / 30)
        _plain_bandwidths(axes.flat)
        _legend(figure, axes.flat, theory="leading order in theory", ring="smallest error")
        return svg(figure, "tradeoff")


def bias_exponents(curves: Sequence[BiasCurve]) -> str:
    """Size of the bias against the bandwidth with its exponents, a panel a place. Returns SVG."""
    places = [where for where in reversed(WHERE) if any(curve.where == where for curve in curves)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.3 * len(places), 4.0), layout="constrained")
        for axis, where in zip(figure.subplots(1, len(places), squeeze=False)[0], places):
            for curve in curves:
                if curve.where != where:
                    continue
                p = curve.exponent
                label = f"{NAME[curve.estimator]}: p = {p.estimate:.3f}  [{p.low:.3f}, {p.high:.3f}]"
                style = _line(curve.estimator) | {"label": label, "linestyle": "none"}
                axis.loglog(curve.bandwidth, curve.bias, **style)
                axis.loglog(
                    curve.bandwidth,
                    curve.theory_bias,
                    **(_theory(curve.estimator) | {"label": f"theory: p = {curve.theory}"}),
                )
            axis.set_title(f"bias at the {where}" if where == "boundary" else "bias in the interior")
            axis.set_xlabel("bandwidth h")
            axis.set_ylabel("|bias|")
            axis.legend(loc="upper left", fontsize=8.5, handlelength=2.2)
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** 0.45)
            _plain_bandwidths([axis])
        return svg(figure, "bias-exponents")


def interior_against_boundary(results: Sequence[Convergence]) -> str:
    """Error of each estimator at the largest n, by problem, inside and at the boundary. Returns SVG."""
    with matplotlib.rc_context(STYLE):
        rows = max(len({curve.estimator for curve in result.curves}) for result in results)
        figure = Figure(figsize=(3.55 * len(results), 0.36 * rows + 1.35), layout="constrained")
        axes = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
        for axis, result in zip(axes, results):
            error = {(curve.estimator, curve.where): curve.mse[-1] for curve in result.curves}
            estimators = list(dict.fromkeys(curve.estimator for curve in result.curves))
            for y, estimator in enumerate(estimators):
                inside, edge = error[estimator, "interior"], error[estimator, "boundary"]
                axis.plot([inside, edge], [y, y], color=COLOUR[estimator], lw=3, alpha=0.45)
                axis.plot(inside, y, "o", ms=8, mfc="white", mec=COLOUR[estimator], mew=1.8)
                axis.plot(edge, y, "o", ms=8, color=COLOUR[estimator])
            axis.set_xscale("log")
            axis.set_title(f"{result.problem}, n = {max(result.curves[0].n)}")
            axis.set_xlabel("mean squared error")
            axis.set_yticks(range(len(estimators)), [NAME[estimator] for estimator in estimators])
            axis.grid(axis="y", visible=False)
            axis.set_ylim(len(estimators) - 0.5, -0.5)
        figure.legend(
            handles=[
                matplotlib.lines.Line2D(
                    [], [], ls="none", marker="o", ms=8, mfc="white", mec="#444444", mew=1.8
                ),
                matplotlib.lines.Line2D([], [], ls="none", marker="o", ms=8, color="#444444"),
            ],
            labels=["interior (piecewise: segment complete)", "boundary (piecewise: segment just begun)"],
            loc="outside lower center",
            ncols=2,
        )
        return svg(figure, "interior-against-boundary")


def real_errors(results: Sequence[RealError]) -> str:
    """Leave-one-out errors on real heads: a panel a layer, a dot a document and head. Returns SVG."""
    layers = list(dict.fromkeys(result.layer for result in results))
    estimators = list(dict.fromkeys(result.estimator for result in results))
    # Some estimators are so far off that a common scale would hide the others: they become arrows.
    limit = 1.05 * max([1.0, *(result.errors.max() for result in results if result.error.estimate < 1.5)])
    columns = min(2, len(layers))
    lines = math.ceil(len(layers) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.3 * columns, (0.38 * len(estimators) + 1.1) * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).ravel()
        for axis in axes[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes, layers):
            for result in results:
                if result.layer != layer:
                    continue
                y = estimators.index(result.estimator)
                colour = COLOUR[result.estimator]
                if result.error.estimate > limit:
                    axis.annotate(
                        f"{result.error.estimate:.1f}",
                        xy=(limit, y),
                        xytext=(-52, 0),
                        textcoords="offset points",
                        va="center",
                        ha="right",
                        fontsize=8.5,
                        color="#333333",
                        arrowprops={"arrowstyle": "->", "color": colour, "lw": 2},
                    )
                    continue
                dots = result.errors.ravel()
                axis.plot(dots, np.full(dots.size, y), "|", color=colour, alpha=0.45, ms=13, mew=1.2)
                axis.plot([result.error.low, result.error.high], [y, y], color=colour, lw=4, alpha=0.55)
                axis.plot(result.error.estimate, y, MARKER[result.estimator], color=colour, ms=8)
                axis.annotate(
                    f"{result.error.estimate:.3f}",
                    (result.error.estimate, y),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color="#333333",
                )
            axis.axvline(1, color="#999999", lw=1, ls=":")
            axis.set_xlim(0, limit)
            axis.set_title(layer)
            axis.set_xlabel("squared error / variance of the values")
            axis.set_yticks(range(len(estimators)), [NAME[estimator] for estimator in estimators])
            axis.set_ylim(len(estimators) - 0.5, -0.6)
            axis.grid(axis="y", visible=False)
        return svg(figure, "real-errors")


def _line(estimator: str) -> dict[str, object]:
    style = {"color": COLOUR[estimator], "marker": MARKER[estimator], "label": NAME[estimator]}
    if estimator == "lla":
        # Other curves lie on LLA's: drawn wide and hollow below them, it leaves both to be seen.
        return style | {"linewidth": 3.4, "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.6}
    if estimator == "parallax-solved":
        return style | {"linestyle": "--", "linewidth": 1.3, "markersize": 4.5, "zorder": 4}
    return style | {"zorder": 3}


def _theory(estimator: str) -> dict[str, object]:
    return {"color": COLOUR[estimator], "linestyle": (0, (1, 2)), "linewidth": 1.3, "zorder": 1.5}


def _legend(figure: Figure, axes: Sequence[Axes], *, theory: str, ring: str | None = None) -> None:
    handles: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    handles[theory] = matplotlib.lines.Line2D([], [], color="#444444", ls=(0, (1, 2)), lw=1.3)
    if ring:
        handles[ring] = matplotlib.lines.Line2D(
            [], [], ls="none", marker="o", ms=10, mfc="none", mec="#444444"
        )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def _plain_powers_of_two(axis: Axes, n: np.ndarray) -> None:
    shown = n[:: max(1, math.ceil(len(n) / 5))]
    axis.set_xticks(shown, [str(value) for value in shown])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _plain_bandwidths(axes: Sequence[Axes]) -> None:
    for axis in axes:
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
