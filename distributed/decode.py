"""The decode study's one function: a point in, a row out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import numpy as np

import parallax_core

from . import decode_peers
from .decode_arrays import DecodeProblem, Framework, build, framework
from .decode_config import DecodeConfig
from .decode_point import DecodePoint
from .decode_timing import in_turns, least_disturbed, timer
from .peer_name import PeerName
from .point import PointError

# Keys and values that the float64 reference looks at, at most, but at least one head: 256 MiB of it.
REFERENCE_NUMBERS = 1 << 25


class Options(NamedTuple):
    """How the points of a study are measured. rotation: bytes. The rest as in DecodeConfig."""

    device: Literal["gpu", "cpu"]
    rounds: int
    seconds: float
    rotation: int
    host_cost: bool
    fa3: str | None
    peers: tuple[str, ...] = tuple(PeerName)

    @classmethod
    def of(cls, config: DecodeConfig, device: Literal["gpu", "cpu"]) -> Options:
        """The options of a study. device: where it is measured."""
        rotation = config.rotation << 20
        peers = tuple(config.peers)
        return cls(device, config.rounds, config.seconds, rotation, config.host_cost, config.fa3, peers)


def measure(point: DecodePoint, options: Options) -> dict[str, object]:
    """Time one operation on one cache, its peers in turns with it, and compare with the float64 reference.

    point: what is measured. options: how.
    Returns the point's fields, with the shape's own, and ``device``, ``framework``; ``us``, ``us_low``,
    ``us_high``, the median of the microseconds a call takes and its quartiles over ``rounds`` turns of
    ``calls`` calls; ``bytes_read`` of a call, ``bytes_per_second``, ``read_bandwidth`` of a plain read in the
    same turns, and ``fraction``, the quotient of the two; ``error``, the norm of the difference from the
    reference over the reference's, on ``error_rows`` rows; ``host_us``, from the call in Python to the
    launch; and ``peers``, a list of the same for each peer, with ``absent``, the reason, where it has no
    numbers.
    Raises PointError, which names the point.
    """
    try:
        arrays = framework(options.device)
        try:
            measured = _measured(point, arrays, options)
        finally:
            arrays.release()
        return point.model_dump(exclude={"shape"}) | point.shape._asdict() | measured
    except Exception as error:
        raise PointError(f"{point.label}: {type(error).__name__}: {error}") from error


def _measured(point: DecodePoint, arrays: Framework, options: Options) -> dict[str, object]:
    problem = build(point, arrays, options.rotation)
    clock = timer(arrays)
    calls = clock.calls(point.bytes_read, len(problem.caches))
    rows = _ReferenceRows(point, problem)
    host = options.host_cost and point.cache == "warm"
    turns, passes, errors, absent = {}, {}, {}, {}

    @contextmanager
    def competing(name: str) -> Iterator[None]:
        """A peer that is absent or refuses is part of the row; of our own call every error is the row's."""
        try:
            yield
        except Exception as error:
            if not name:
                raise
            reason = str(error).strip().partition("\n")[0]
            is_known = isinstance(error, decode_peers.UnavailableError)
            absent[name] = reason if is_known else f"{type(error).__name__}: {reason}"

    def enter(name: str, computes: str, call: decode_peers.Call, early: bool) -> None:
        functions = [lambda k=k, v=v: call(k, v) for k, v in problem.caches]

        def make_pass() -> float | None:
            with competing(name), _launches(arrays, early):
                return None if name in absent else clock.host(functions[0])

        with _launches(arrays, early):
            errors[name] = rows.error(computes, functions[0]())
            turns[name] = clock.prepare(functions, calls)
        passes[name] = make_pass

    enter("", point.operation, _own_call(point, problem), early=False)
    peers = [peer for peer in decode_peers.peers_of(point, arrays.on_gpu) if peer.name in options.peers]
    for peer in peers:
        with competing(peer.name):
            early = peer.bind is None
            call = _own_call(point, problem) if early else peer.bind(problem, options.fa3)
            enter(peer.name, peer.computes or point.operation, call, early)
    seconds = least_disturbed(passes) if host else dict.fromkeys(passes)
    measured = {
        name: {"error": errors[name], "host_us": None if seconds[name] is None else 1e6 * seconds[name]}
        for name in passes
    }
    read, read_bytes = clock.read(problem.caches)
    present = {name: turn for name, turn in turns.items() if name not in absent}
    taken = in_turns(present | {"read": read}, options.rounds, options.seconds)
    bandwidth = read_bytes / float(np.median(taken["read"]))
    own = _times(taken[""])
    speed = point.bytes_read / (own["us"] * 1e-6)
    return {
        "device": arrays.device,
        "framework": arrays.name,
        "rounds": len(taken[""]),
        "calls": calls,
        **own,
        "bytes_read": point.bytes_read,
        "bytes_per_second": speed,
        "read_bandwidth": bandwidth,
        "fraction": speed / bandwidth,
        "error_rows": rows.count,
        **measured[""],
        "peers": [
            {"name": peer.name, "absent": absent[peer.name]}
            if peer.name in absent
            else {"name": peer.name, **_times(taken[peer.name]), **measured[peer.name], "absent": None}
            for peer in peers
        ],
    }


def _times(seconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75]) * 1e6
    return {"us": float(median), "us_low": float(low), "us_high": float(high)}


def _launches(arrays: Framework, early: bool) -> AbstractContextManager[None]:
    """Inside, our launches begin while the ones ahead of them end, or do not."""
    if not arrays.on_gpu:
        return nullcontext()
    from parallax_core.cuda_kernels import early_launch

    return early_launch.allow(early)


def _own_call(point: DecodePoint, problem: DecodeProblem) -> decode_peers.Call:
    q, r, paged = problem.q, problem.r, problem.paged
    if point.operation == "parallax":
        return lambda k, v: parallax_core.parallax_decode(q, r, k, v, **paged)
    if point.operation == "softmax":
        return lambda k, v: parallax_core.softmax_decode(q, k, v, **paged)
    return lambda k, v: parallax_core.lla_decode(q, k, v, ridge=problem.ridge, **paged)


class _ReferenceRows:
    """The rows that are compared with the reference: some sequences and key heads, evenly spread."""

    def __init__(self, point: DecodePoint, problem: DecodeProblem):
        B, Hq, Hkv, L, D = point.shape
        self._point = point
        pairs = max(1, REFERENCE_NUMBERS // (2 * L * D))
        self._sequences = _spread(B, pairs)
        kv_heads = _spread(Hkv, max(1, pairs // len(self._sequences)))
        group = Hq // Hkv
        self._heads = [head * group + i for head in kv_heads for i in range(group)]
        self.count = len(self._sequences) * len(self._heads)
        to_float64 = problem.framework.float64
        self._q, self._r = (to_float64(x)[self._sequences][:, :, self._heads] for x in (problem.q, problem.r))

        def sequence(x, number: int) -> np.ndarray:
            if problem.page_table is None:
                return to_float64(x[number][:, kv_heads])
            pages = to_float64(x[problem.page_table[number]][:, :, kv_heads])
            return pages.reshape(-1, *pages.shape[2:])[:L]

        self._k, self._v = (np.stack([sequence(x, n) for n in self._sequences]) for x in problem.caches[0])
        self._outputs: dict[str, np.ndarray] = {}
        self._to_float64 = to_float64

    def error(self, operation: str, o: object) -> float:
        """Norm of the difference from the reference over the reference's. o: an operation's output."""
        expected = self._reference(operation)
        B, Hq, _, _, D = self._point.shape
        chosen = self._to_float64(o).reshape(B, Hq, D)[self._sequences][:, self._heads]
        return float(np.linalg.norm(chosen - expected) / np.linalg.norm(expected))

    def _reference(self, operation: str) -> np.ndarray:
        if operation not in self._outputs:
            attend: Callable = getattr(parallax_core.reference, f"{operation}_decode")
            probe = (self._r,) if operation == "parallax" else ()
            ridge = {"ridge": self._point.ridge} if operation == "lla" else {}
            self._outputs[operation] = attend(self._q, *probe, self._k, self._v, **ridge)[:, 0]
        return self._outputs[operation]


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spread, the last one included where there are several."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
