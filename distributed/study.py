"""A regression study from its configuration to its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from parallax_core.data import AttentionSample

from .config import RegressionConfig
from .engine import Row, run_local, run_ray
from .grid import points
from .point import Point
from .regression import evaluate


@dataclass(frozen=True)
class Study:
    """A study that has run. rows: one a point, in the order of the grid, whatever the engine."""

    config: RegressionConfig
    source: str | None
    rows: list[Row]


def run_regression(
    config: RegressionConfig,
    sample: AttentionSample | None = None,
    *,
    engine: Literal["ray", "local"] = "local",
    workers: int | None = None,
    progress: Callable[[int, int, Point], None] | None = None,
) -> Study:
    """Run the regression study.

    config: what to run. sample: the attention heads of its ``real`` part. engine: ``local``, this process, or
    ``ray``. workers: Ray actors, one a CPU if None. progress: called with the number of points done, of all
    points, and the point just done.
    Returns a Study. Raises PointError for the first point that fails, ValueError for a grid the sample cannot
    serve or for workers without Ray.
    """
    if engine not in ("ray", "local"):
        raise ValueError(f"engine: expected 'ray' or 'local', got {engine!r}")
    if workers is not None and (engine == "local" or workers < 1):
        raise ValueError(
            f"workers: expected a positive number and the engine 'ray', got {workers} and {engine!r}"
        )
    grid = points(config, sample)
    results = (
        run_local(evaluate, grid, sample) if engine == "local" else run_ray(evaluate, grid, sample, workers)
    )
    rows: list[Row | None] = [None] * len(grid)
    for done, (index, row) in enumerate(results, 1):
        rows[index] = row
        if progress is not None:
            progress(done, len(grid), grid[index])
    return Study(config, sample.source if sample is not None else None, rows)
