"""What the rows of a decode study say: how much faster than each peer, row by row and in the mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .decode_peers import PEERS

Row = dict[str, object]

COMPUTES = {peer.name: peer.computes for peer in PEERS}
TITLE = {peer.name: peer.title for peer in PEERS}


@dataclass(frozen=True)
class Comparison:
    """Time of the fastest peer over ours, for rows of one operation, dtype and kind of cache.

    computes: what the peers do. peers: their names. ratio: geometric mean over ``rows`` rows. least: the
    smallest. won: in how many ours is the faster.
    """

    operation: str
    dtype: str
    cache: str
    computes: str
    peers: list[str]
    ratio: float
    least: float
    rows: int
    won: int


@dataclass(frozen=True)
class DecodeFindings:
    """Everything that the report shows.

    ratios: for each row, by what the peers compute, the fastest peer's time over ours; None without one.
    absent: for each peer, the reasons for which it has no numbers. host_cost: microseconds from the call in
    Python to the launch, the median over the rows, of ours under the empty name and of the peers.
    """

    rows: list[Row]
    ratios: list[dict[str, float | None]]
    comparisons: list[Comparison]
    peers: list[str]
    absent: dict[str, list[str]]
    host_cost: dict[str, float]


def find_decode(rows: list[Row]) -> DecodeFindings:
    """Reduce the rows of a study to what its report shows. rows: of ``decode.measure``, one a point."""
    ratios = [{computes: _ratio(row, computes) for computes in ("softmax", "parallax")} for row in rows]
    comparisons = []
    groups = dict.fromkeys((row["operation"], row["dtype"], row["cache"]) for row in rows)
    for operation, dtype, cache in groups:
        for computes in ("softmax", "parallax"):
            chosen = [
                (row, ratio[computes])
                for row, ratio in zip(rows, ratios)
                if (row["operation"], row["dtype"], row["cache"]) == (operation, dtype, cache)
                and ratio[computes] is not None
            ]
            if not chosen:
                continue
            values = np.array([ratio for _, ratio in chosen])
            present = dict.fromkeys(
                peer["name"]
                for row, _ in chosen
                for peer in row["peers"]
                if peer["absent"] is None and COMPUTES[peer["name"]] == computes
            )
            comparisons.append(
                Comparison(
                    operation,
                    dtype,
                    cache,
                    computes,
                    list(present),
                    float(np.exp(np.log(values).mean())),
                    float(values.min()),
                    len(values),
                    int((values > 1).sum()),
                )
            )
    named = dict.fromkeys(peer["name"] for row in rows for peer in row["peers"])
    absent = {
        name: list(
            dict.fromkeys(
                peer["absent"]
                for row in rows
                for peer in row["peers"]
                if peer["name"] == name and peer["absent"] is not None
            )
        )
        for name in named
    }
    host = {"": [row["host_us"] for row in rows]} | {
        name: [peer["host_us"] for row in rows if (peer := peer_of(row, name)) is not None] for name in named
    }
    measured = {name: [cost for cost in costs if cost is not None] for name, costs in host.items()}
    return DecodeFindings(
        rows,
        ratios,
        comparisons,
        list(named),
        {name: reasons for name, reasons in absent.items() if reasons},
        {name: float(np.median(costs)) for name, costs in measured.items() if costs},
    )


def peer_of(row: Row, name: str) -> Row | None:
    """The numbers of a peer in a row, None where it has none."""
    found = (peer for peer in row["peers"] if peer["name"] == name and peer["absent"] is None)
    return next(found, None)


def _ratio(row: Row, computes: str) -> float | None:
    times = [
        peer["us"] for peer in row["peers"] if peer["absent"] is None and COMPUTES[peer["name"]] == computes
    ]
    return min(times) / row["us"] if times else None
