"""The files of every study's report: one HTML page, a Markdown summary, the rows and the configuration."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import parallax_core

from .study import Study

PAGE, SUMMARY, ROWS, CONFIG = "report.html", "summary.md", "rows.parquet", "config.yaml"


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from. command: what was run. engine: with its workers. seconds: of computing."""

    command: str
    engine: str
    seconds: float

    def entries(self, study: Study, packages: Sequence[str] = ()) -> dict[str, str]:
        """What the header of the report lists, by name; packages: whose versions matter beside the core's."""
        now = datetime.datetime.now(datetime.UTC)
        packages = ("numpy", "scipy", "numba", *packages, *(["ray"] if self.engine.startswith("Ray") else []))
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
        }


def write_files(
    study: Study,
    folder: Path,
    *,
    page: str,
    summary: str,
    schema: pa.Schema,
    context: Mapping[str, object],
    filters: Mapping[str, Callable[..., str]],
) -> list[Path]:
    """Write the files of a report.

    study: what ran. folder: an existing folder, which receives ``report.html``, ``summary.md``,
    ``rows.parquet`` and ``config.yaml``. page, summary: names of the templates of the first two. schema: of
    the rows. context, filters: what the templates are given, beside ``config``, the configuration's text.
    Returns the paths.
    """
    config = yaml.safe_dump(study.config.model_dump(mode="json"), sort_keys=False)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    # First what cannot be had again without another run.
    (folder / CONFIG).write_text(config, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(study.rows, schema=schema), folder / ROWS)
    for name, template in ((PAGE, page), (SUMMARY, summary)):
        text = environment.get_template(template).render(context, config=config)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (PAGE, SUMMARY, ROWS, CONFIG)]
