"""The report of a decode study: its page, its summary, and the schema of its rows."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pyarrow as pa

from . import decode_figures
from .decode_findings import COMPUTES, TITLE, DecodeFindings, peer_of
from .report_files import Provenance, write_files
from .study import Study

_TIMES = [("us", pa.float64()), ("us_low", pa.float64()), ("us_high", pa.float64())]
_PEER = pa.struct(
    [
        ("name", pa.string()),
        *_TIMES,
        ("error", pa.float64()),
        ("host_us", pa.float64()),
        ("absent", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("operation", pa.string()),
        ("batch", pa.int64()),
        ("query_heads", pa.int64()),
        ("kv_heads", pa.int64()),
        ("length", pa.int64()),
        ("head_size", pa.int64()),
        ("dtype", pa.string()),
        ("page_size", pa.int64()),
        ("cache", pa.string()),
        ("ridge", pa.float64()),
        ("seed", pa.int64()),
        ("device", pa.string()),
        ("framework", pa.string()),
        ("rounds", pa.int64()),
        ("calls", pa.int64()),
        *_TIMES,
        ("bytes_read", pa.int64()),
        ("bytes_per_second", pa.float64()),
        ("read_bandwidth", pa.float64()),
        ("fraction", pa.float64()),
        ("error", pa.float64()),
        ("error_rows", pa.int64()),
        ("host_us", pa.float64()),
        ("peers", pa.list_(_PEER)),
    ]
)
# Whose versions a reader of the numbers wants to know, where they are installed.
PACKAGES = ("torch", "triton", "fla-core", "cupy-cuda12x", "cupy-cuda13x")


def write_decode_report(
    study: Study, findings: DecodeFindings, folder: Path, provenance: Provenance
) -> list[Path]:
    """Write the report of a decode study.

    study: what ran. findings: of its rows. folder: an existing folder that receives ``report.html``,
    ``summary.md``, ``rows.parquet`` and ``config.yaml``. provenance: for the header. Returns the paths.
    """
    devices = ", ".join(dict.fromkeys(row["device"] for row in study.rows))
    reads = sorted(row["read_bandwidth"] for row in study.rows)
    least, median, most = (speed(reads[place]) for place in (0, len(reads) // 2, -1))
    context = {
        "entries": provenance.entries(study, [name for name in PACKAGES if _installed(name)])
        | {"device": devices, "plain read": f"{median}, the median of the points; {least} to {most}"},
        "findings": findings,
        "own_colour": decode_figures.OWN,
        "colour": decode_figures.COLOUR,
        "operation": decode_figures.OPERATION,
        "sizes": decode_figures.sizes,
        "computes": COMPUTES,
        "title": TITLE,
        "peer_of": peer_of,
        "figure": decode_figures.bandwidth_fractions(findings),
    }
    return write_files(
        study,
        folder,
        page="decode.html.j2",
        summary="decode.md.j2",
        schema=SCHEMA,
        context=context,
        filters={"us": microseconds, "speed": speed, "ratio": ratio, "error": error, "title_of": TITLE.get},
    )


def microseconds(value: float | None) -> str:
    """A time for a table cell, three digits or all before the point."""
    return "-" if value is None else f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def speed(bytes_per_second: float) -> str:
    """A speed with its unit."""
    giga = bytes_per_second * 1e-9
    return f"{giga * 1e-3:.2f} TB/s" if giga >= 1000 else f"{giga:.3g} GB/s"


def ratio(value: float | None) -> str:
    """A quotient of times."""
    return "-" if value is None else f"{value:.2f}"


def error(value: float | None) -> str:
    """A relative error."""
    return "-" if value is None else f"{value:.1e}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
