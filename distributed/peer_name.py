"""The names of what the decode study times beside parallax-core's own call."""

from enum import StrEnum


class PeerName(StrEnum):
    """In configurations, options and rows; ``decode_peers`` has what they call."""

    fa2 = "fa2"
    fa3 = "fa3"
    fla = "fla"
    cg = "cg"
    early = "early"
    sdpa = "sdpa"
