"""The figure of a comparison of estimators."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .compare import Comparison


def save_comparison(results: dict[str, Comparison], path: Path) -> None:
    """Draw comparisons, a row a layer: leave-one-out errors on the left, pairwise differences on the right.

    results: by the name of the layer. path: of the figure; its suffix chooses the format.
    Raises OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 2.7 * len(results)), layout="constrained")
    for (errors, differences), (layer, result) in zip(
        figure.subplots(len(results), 2, squeeze=False), results.items()
    ):
        rows = np.arange(len(result.estimators))
        errors.barh(rows, result.leave_one_out, color="#0072B2")
        # An estimator that is far off the scale must not flatten the others.
        limit = 1.15 * max(1.0, *(error for error in result.leave_one_out if error <= 2))
        for row, error in zip(rows, result.leave_one_out):
            inside = error <= limit
            errors.annotate(
                f"{error:.3f}" if inside else f"{error:.3g} →",
                (min(error, limit), row),
                xytext=(4 if inside else -4, 0),
                textcoords="offset points",
                va="center",
                ha="left" if inside else "right",
                color="black" if inside else "white",
            )
        errors.set(
            xlim=(0, 1.12 * limit),
            yticks=rows,
            yticklabels=result.estimators,
            title=f"{layer}: leave-one-out error",
        )
        errors.invert_yaxis()
        errors.spines[["top", "right"]].set_visible(False)
        errors.set_xlabel("squared error / variance of the values")
        image = differences.imshow(result.difference, cmap="cividis", vmin=0)
        for i in rows:
            for j in rows:
                value = result.difference[i, j]
                dark = value < 0.6 * result.difference.max()
                differences.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        differences.set(
            xticks=rows, yticks=rows, yticklabels=result.estimators, title="relative difference of outputs"
        )
        differences.set_xticks(rows, result.estimators, rotation=30, ha="right")
        figure.colorbar(image, ax=differences, shrink=0.85)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format=path.suffix[1:])
    os.replace(unfinished, path)
