"""The files of a regression report: one HTML page, a Markdown summary, the rows and the configuration."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import parallax_core

from . import figures
from .findings import Findings, RealError
from .statistics import Interval
from .study import Study

PAGE, SUMMARY, ROWS, CONFIG = "report.html", "summary.md", "rows.parquet", "config.yaml"

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


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from. command: what was run. engine: with its workers. seconds: of computing."""

    command: str
    engine: str
    seconds: float

    def entries(self, study: Study) -> dict[str, str]:
        """What the header of the report lists, by name."""
        now = datetime.datetime.now(datetime.UTC)
        packages = ("numpy", "scipy", "numba", *(["ray"] if self.engine.startswith("Ray") else []))
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        python = f"Python {platform.python_version()}"
        return {
            "command": self.command,
            "date": now.strftime("%Y-%m-%d %H:%M UTC"),
            "versions": f"parallax-core {parallax_core.__version__}, {python}, {versions}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "engine": f"{self.engine}, {self.seconds:.0f} s",
            "points": f"{len(study.rows)}",
            "seed": str(study.config.seed),
            "data": study.source or "none",
        }


def write_report(study: Study, findings: Findings, folder: Path, provenance: Provenance) -> list[Path]:
    """Write the report of a study.

    study: what ran. findings: of its rows. folder: an existing folder that receives ``report.html``,
    ``summary.md``, ``rows.parquet`` and ``config.yaml``. provenance: for the header. Returns the paths.
    """
    context = {
        "entries": provenance.entries(study),
        "findings": findings,
        "name": figures.NAME,
        "colour": figures.COLOUR,
        "config": yaml.safe_dump(study.config.model_dump(mode="json"), sort_keys=False),
        "figures": _figures(findings),
        "layers": list(dict.fromkeys(result.layer for result in findings.real)),
        "best": _best(findings.real),
        "rate_table": _rate_table(findings),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "rounded": _rounded, "interval": _interval}
    for name in (PAGE, SUMMARY):
        text = environment.get_template(f"{name}.j2").render(context)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / CONFIG).write_text(context["config"], encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(study.rows, schema=SCHEMA), folder / ROWS)
    return [folder / name for name in (PAGE, SUMMARY, ROWS, CONFIG)]


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
