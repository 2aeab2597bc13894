"""The report of a regression study: its page, its summary, and the schema of its rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from . import figures
from .findings import Findings, RealError
from .report_files import Provenance, write_files
from .statistics import Interval
from .study import Study

SCHEMA = pa.schema(
    [
        ("experiment", pa.string()),
        ("problem", pa.string()),
        ("estimator", pa.string()),
        ("n", pa.int64()),
        ("d", pa.int64()),
        ("bandwidth", pa.float64()),
        ("kernel", pa.string()),
        ("ridge", pa.float64()),
        ("probe_ridge", pa.float64()),
        ("noise", pa.float64()),
        ("replicates", pa.int64()),
        ("seed", pa.int64()),
        ("layer", pa.string()),
        ("heads", pa.list_(pa.int64())),
        ("interior_bias2", pa.float64()),
        ("interior_variance", pa.float64()),
        ("interior_mse", pa.float64()),
        ("boundary_bias2", pa.float64()),
        ("boundary_variance", pa.float64()),
        ("boundary_mse", pa.float64()),
        ("error", pa.float64()),
        ("interior_errors", pa.list_(pa.list_(pa.float64()))),
        ("boundary_errors", pa.list_(pa.list_(pa.float64()))),
        ("errors", pa.list_(pa.list_(pa.float64()))),
    ]
)


def write_report(study: Study, findings: Findings, folder: Path, provenance: Provenance) -> list[Path]:
    """Write the report of a study.

    study: what ran. findings: of its rows. folder: an existing folder that receives ``report.html``,
    ``summary.md``, ``rows.parquet`` and ``config.yaml``. provenance: for the header. Returns the paths.
    """
    context = {
        "entries": provenance.entries(study) | {"data": study.source or "none"},
        "findings": findings,
        "name": figures.NAME,
        "colour": figures.COLOUR,
        "figures": _figures(findings),
        "layers": list(dict.fromkeys(result.layer for result in findings.real)),
        "best": _best(findings.real),
        "rate_table": _rate_table(findings),
    }
    return write_files(
        study,
        folder,
        page="regression.html.j2",
        summary="regression.md.j2",
        schema=SCHEMA,
        context=context,
        filters={"number": _number, "rounded": _rounded, "interval": _interval},
    )


def _figures(findings: Findings) -> dict[str, str]:
    drawn = {}
    if findings.convergence:
        drawn["error"] = figures.error_against_n(findings.convergence)
        drawn["places"] = figures.interior_against_boundary(findings.convergence)
    if findings.tradeoff:
        drawn["tradeoff"] = figures.tradeoff(findings.tradeoff)
    if findings.exponents:
        drawn["exponents"] = figures.bias_exponents(findings.exponents)
    if findings.real:
        drawn["real"] = figures.real_errors(findings.real)
    return drawn


def _rate_table(findings: Findings) -> list[tuple[str, list]]:
    """For each estimator, its curve for every problem and place, None where it was not run."""
    columns = [(result, where) for result in findings.convergence for where in ("interior", "boundary")]
    estimators = dict.fromkeys(curve.estimator for result in findings.convergence for curve in result.curves)
    return [
        (
            estimator,
            [
                next((c for c in result.curves if (c.estimator, c.where) == (estimator, where)), None)
                for result, where in columns
            ],
        )
        for estimator in estimators
    ]


def _best(results: list[RealError]) -> dict[str, RealError]:
    """The result with the least error of each layer; the first of those that differ by rounding alone."""
    best: dict[str, RealError] = {}
    for result in results:
        least = best.get(result.layer)
        if least is None or result.error.estimate < least.error.estimate * (1 - 1e-6):
            best[result.layer] = result
    return best


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _rounded(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _interval(interval: Interval, digits: int = 2) -> str:
    low, estimate, high = (_rounded(x, digits) for x in (interval.low, interval.estimate, interval.high))
    return f"{estimate} [{low}, {high}]"
