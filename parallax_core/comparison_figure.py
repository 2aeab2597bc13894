"""The figure of a comparison of estimators."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .compare import Comparison

# The palette of Okabe and Ito, which colour-blind readers can tell apart; line styles differ as well.
_BLUE, _VERMILION = "#0072B2", "#D55E00"


def save_comparison(results: dict[str, Comparison], path: Path) -> None:
    """Draw comparisons, two rows a layer: errors and differences, neighbours and rank, condition.

    results: by the name of the layer. path: of the figure; its suffix chooses the format.
    Raises OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2 * len(results)), layout="constrained")
    panels = figure.subplots(2 * len(results), 2, squeeze=False).reshape(-1, 4)
    for (errors, differences, counts, conditions), (layer, result) in zip(panels, results.items()):
        _draw_errors(errors, result)
        errors.set_title(f"{layer}: leave-one-out error", loc="left")
        _draw_differences(differences, result)
        rows = result.rows
        _draw_shares(
            counts, {"neighbours": rows["effective_neighbours"], "rank of C_kk": rows["effective_rank"]}
        )
        counts.set_xlabel("effective number, exp(entropy)")
        _draw_shares(conditions, {"C_kk": rows["condition"], "C_kk + ridge I": rows["ridge_condition"]})
        conditions.set_xlabel("condition, largest / least eigenvalue")
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format=path.suffix[1:])
    os.replace(unfinished, path)


def _draw_errors(axes, result: Comparison) -> None:
    rows = np.arange(len(result.estimators))
    measured = np.nan_to_num(result.leave_one_out)
    # An estimator that is far off the scale must not flatten the others.
    limit = 1.15 * max(1.0, *(error for error in measured if error <= 2))
    axes.barh(rows, measured, color=_BLUE)
    for row, error in zip(rows, result.leave_one_out):
        inside = not error > limit
        text = "not measured" if np.isnan(error) else f"{error:.3f}" if inside else f"{error:.3g} →"
        axes.annotate(
            text,
            (min(np.nan_to_num(error), limit), row),
            xytext=(4 if inside else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if inside else "right",
            color="black" if inside else "white",
        )
    labels = [
        f"{name}\nprobe {result.probe_distance[name].in_C_kk:.2f} off"
        if name in result.probe_distance
        else name
        for name in result.estimators
    ]
    axes.set(xlim=(0, 1.12 * limit), yticks=rows, yticklabels=labels)
    axes.set_xlabel("squared error / variance of the values")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes, result: Comparison) -> None:
    rows = np.arange(len(result.estimators))
    image = axes.imshow(result.difference, cmap="cividis", vmin=0)
    for i in rows:
        for j in rows:
            value = result.difference[i, j]
            dark = value < 0.6 * result.difference.max()
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    axes.set_title("relative difference of outputs", loc="left")
    axes.set_yticks(rows, result.estimators)
    axes.set_xticks(rows, result.estimators, rotation=30, ha="right")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def _draw_shares(axes, measured: dict[str, np.ndarray]) -> None:
    """The share of the rows at or below each value; rows without a finite one keep the curve below 1."""
    for (name, values), colour, style in zip(measured.items(), (_BLUE, _VERMILION), ("-", "--")):
        values = np.sort(values[~np.isnan(values)])
        finite = values[np.isfinite(values)]
        if not finite.size:
            axes.plot([], [], style, color=colour, label=f"{name}: all infinite")
            continue
        # 200 points draw what a thousand rows would.
        at = np.unique(np.linspace(0, len(finite) - 1, 200).round().astype(int))
        axes.step(finite[at], (at + 1) / len(values), style, where="post", color=colour, label=name)
    axes.set(xscale="log", ylim=(0, 1.02), ylabel="share of rows")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.99))
