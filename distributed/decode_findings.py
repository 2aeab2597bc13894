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
class Competitor:
    """What is said of a peer, or of ours under the empty name.

    rows: with numbers. error: the largest. host_us: microseconds from the call in Python to its launch, the
    median over the rows, None where it was not measured. absent: the reasons for which rows have no numbers.
    """

    name: str
    rows: int
    error: float | None
    host_us: float | None
    absent: list[str]


@dataclass(frozen=True)
class DecodeFindings:
    """Everything that the report shows.

    ratios: for each row, by what the peers compute, the fastest peer's time over ours; None without one.
    groups: for each operation and dtype, the places of its rows. own, peers: of all rows.
    """

    rows: list[Row]
    ratios: list[dict[str, float | None]]
    groups: dict[tuple[str, str], list[int]]
    comparisons: list[Comparison]
    own: Competitor
    peers: list[Competitor]


def find_decode(rows: list[Row]) -> DecodeFindings:
    """Reduce the rows of a study to what its report shows. rows: of ``decode.measure``, one a point."""
    ratios = [{computes: _ratio(row, computes) for computes in ("softmax", "parallax")} for row in rows]
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row["operation"], row["dtype"]), []).append(place)
    comparisons = []
    for (operation, dtype), places in groups.items():
        for cache in dict.fromkeys(rows[place]["cache"] for place in places):
            for computes in ("softmax", "parallax"):
                chosen = [
                    place
                    for place in places
                    if rows[place]["cache"] == cache and ratios[place][computes] is not None
                ]
                if not chosen:
                    continue
                values = np.array([ratios[place][computes] for place in chosen])
                names = dict.fromkeys(
                    peer["name"] for place in chosen for peer in _present(rows[place], computes)
                )
                mean = float(np.exp(np.log(values).mean()))
                least, won = float(values.min()), int((values > 1).sum())
                comparisons.append(
                    Comparison(operation, dtype, cache, computes, list(names), mean, least, len(values), won)
                )
    named = dict.fromkeys(peer["name"] for row in rows for peer in row["peers"])
    peers = [
        _competitor(name, [peer for row in rows for peer in row["peers"] if peer["name"] == name])
        for name in named
    ]
    return DecodeFindings(rows, ratios, groups, comparisons, _competitor("", rows), peers)


def peer_of(row: Row, name: str) -> Row | None:
    """The numbers of a peer in a row, None where it has none."""
    found = (peer for peer in row["peers"] if peer["name"] == name and peer["absent"] is None)
    return next(found, None)


def _present(row: Row, computes: str) -> list[Row]:
    return [peer for peer in row["peers"] if peer["absent"] is None and COMPUTES[peer["name"]] == computes]


def _ratio(row: Row, computes: str) -> float | None:
    times = [peer["us"] for peer in _present(row, computes)]
    return min(times) / row["us"] if times else None


def _competitor(name: str, numbers: list[Row]) -> Competitor:
    present = [each for each in numbers if each.get("absent") is None]
    costs = [each["host_us"] for each in present if each["host_us"] is not None]
    return Competitor(
        name,
        len(present),
        max((each["error"] for each in present), default=None),
        float(np.median(costs)) if costs else None,
        list(dict.fromkeys(each["absent"] for each in numbers if each.get("absent") is not None)),
    )
