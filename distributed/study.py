"""Studies from their configuration to their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from parallax_core.data import AttentionSample

from .config import RegressionConfig
from .decode import Options, measure
from .decode_config import DecodeConfig, decode_points
from .decode_point import DecodePoint
from .engine import Row, Share, check_engine, run
from .grid import points
from .point import Point
from .regression import evaluate


@dataclass(frozen=True)
class Study:
    """A study that has run. rows: one a point, in the order of the grid, whatever the engine."""

    config: RegressionConfig | DecodeConfig
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

    config: what to run. sample: the attention heads of its ``real`` part. engine, workers, progress: as for
    ``engine.run``; a worker takes one CPU.
    Returns a Study. Raises PointError for the first point that fails, ValueError for a grid the sample cannot
    serve or for workers without Ray.
    """
    check_engine(engine, workers)
    rows = run(evaluate, points(config, sample), sample, engine=engine, workers=workers, progress=progress)
    return Study(config, sample.source if sample is not None else None, rows)


def run_decode(
    config: DecodeConfig,
    device: Literal["gpu", "cpu"],
    *,
    engine: Literal["ray", "local"] = "local",
    workers: int | None = None,
    progress: Callable[[int, int, DecodePoint], None] | None = None,
) -> Study:
    """Run the decode study.

    config: what to run. device: where its points are measured, and so which of its grids. engine, workers,
    progress: as for ``engine.run``; a worker takes a GPU, or all CPUs of a node, so that no two points that
    are timed share them.
    Returns a Study. Raises PointError for the first point that fails, ValueError for an empty grid or for
    workers without Ray.
    """
    check_engine(engine, workers)
    share = Share(cpus=1, gpus=1) if device == "gpu" else Share(cpus=None)
    rows = run(
        measure,
        decode_points(config, device),
        Options.of(config, device),
        engine=engine,
        workers=workers,
        share=share,
        progress=progress,
    )
    return Study(config, None, rows)
