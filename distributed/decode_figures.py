"""The figure of the decode report, as SVG text that stands in the page itself."""

from __future__ import annotations

import matplotlib
import matplotlib.lines
from matplotlib.figure import Figure

from .decode_findings import TITLE, DecodeFindings, Row, peer_of
from .figure_style import STYLE, svg

OWN = "#0072B2"
OPERATION = {"parallax": "Parallax", "softmax": "softmax", "lla": "LLA"}
COLOUR = {
    "fa2": "#E69F00",
    "fa3": "#D55E00",
    "fla": "#CC79A7",
    "cg": "#009E73",
    "early": "#56B4E9",
    "sdpa": "#E69F00",
}
MARKER = {"fa2": "^", "fa3": "v", "fla": "D", "cg": "o", "early": "s", "sdpa": "^"}


def sizes(row: Row) -> str:
    """The sizes of a row in one line, for an axis."""
    heads = f"{row['query_heads']}"
    if row["kv_heads"] != row["query_heads"]:
        heads += f"/{row['kv_heads']}"
    pages = f" p{row['page_size']}" if row["page_size"] else ""
    return f"{row['batch']}×{heads}×{row['length']}×{row['head_size']}{pages}"


def bandwidth_fractions(findings: DecodeFindings) -> str:
    """Bytes per second as a fraction of plain reading: a panel an operation, dtype and cache. Returns SVG."""
    rows = {key: [findings.rows[place] for place in places] for key, places in findings.groups.items()}
    caches = [cache for cache in ("cold", "warm") if any(row["cache"] == cache for row in findings.rows)]
    panels = {
        (*key, cache): [row for row in group if row["cache"] == cache]
        for key, group in rows.items()
        for cache in caches
    }
    longest = [max(len(panels[*key, cache]) for cache in caches) for key in rows]
    names = [peer.name for peer in findings.peers if peer.rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(1.8 + 4.4 * len(caches), sum(0.3 * n + 0.75 for n in longest) + 0.7),
            layout="constrained",
        )
        axes = figure.subplots(
            len(rows), len(caches), squeeze=False, sharex="col",
            gridspec_kw={"height_ratios": [0.3 * n + 0.45 for n in longest]},
        )  # fmt: skip
        for axis, ((operation, dtype, cache), panel) in zip(axes.flat, panels.items()):
            if panel:
                _panel(axis, panel, names)
                axis.set_title(f"{OPERATION[operation]}, {dtype}, {cache} cache")
            else:
                axis.set_visible(False)
        for column in axes.T:
            lowest = [axis for axis in column if axis.get_visible()][-1]
            lowest.set_xlabel("bytes per second / plain read")
            lowest.tick_params(labelbottom=True)
            lowest.set_xlim(left=0)
        figure.legend(
            handles=[
                matplotlib.lines.Line2D([], [], ls="none", marker="s", ms=8, color=OWN),
                *(matplotlib.lines.Line2D([], [], **_mark(name)) for name in names),
            ],
            labels=["parallax-core", *(TITLE[name] for name in names)],
            loc="outside lower center",
            ncols=4,
        )
        return svg(figure, "bandwidth-fractions")


def _panel(axis, rows: list[Row], peers: list[str]) -> None:
    for y, row in enumerate(rows):
        axis.plot([0, row["fraction"]], [y, y], color=OWN, lw=7, alpha=0.22, solid_capstyle="butt")
        for name in peers:
            if (peer := peer_of(row, name)) is not None:
                # The same bytes in another time; the probe that softmax does not read is next to nothing.
                axis.plot(row["fraction"] * row["us"] / peer["us"], y, **_mark(name))
        axis.plot(row["fraction"], y, "s", ms=8, color=OWN, zorder=3)
    axis.axvline(1, color="#999999", lw=1, ls=":")
    axis.set_yticks(range(len(rows)), [sizes(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _mark(name: str) -> dict[str, object]:
    return {"ls": "none", "marker": MARKER[name], "ms": 6.5, "mfc": "white", "mec": COLOUR[name], "mew": 1.6}
