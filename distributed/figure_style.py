"""How the figures of reports look, and their SVG text, which stands in the page itself."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG text. name: what makes its ids its own in a page."""
    # Salted with the figure's name, the ids are the same in every run and no two figures of a page share one.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
