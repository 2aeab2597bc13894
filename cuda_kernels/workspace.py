"""Device memory that launches share: partial results of splits, the counters that say who comes last, and
what blocks that run at once send each other, mail or parcels.

One slab a stream, since launches of one stream follow one another, and one for each stream of a graph under
capture, since graphs may run beside one another. Counters, mail and parcels are zeroed once: the last block
to arrive sets counters back, and what is sent is told from what was sent before by its tags.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict, deque
from collections.abc import MutableMapping
from typing import NamedTuple

import cupy
from cupy.cuda import runtime

from . import capture

MOST_STREAMS = 64
"""Streams whose slab is kept at most."""
MOST_POLLED = 64
"""Graphs asked at a time whether they are gone."""

_ALIGNMENT = 256
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_LEGACY = 1  # cudaStreamLegacy, the default stream; 0 means it too


class Room(NamedTuple):
    """How much of each there is, or is asked for: bytes but for the counters."""

    partial_bytes: int
    counters: int
    mail_bytes: int = 0
    parcel_bytes: int = 0


class Slab(NamedTuple):
    """Room for counters, mail, parcels and partial results, one behind the other in one allocation."""

    counters: int
    mail: int
    parcels: int
    partials: int
    room: Room

    def holds(self, needed: Room) -> bool:
        # A launch asks: attributes of tuples and a generator would take it half a microsecond.
        partial_bytes, counters, mail_bytes, parcel_bytes = self.room
        partials, counted, mail, parcels = needed
        return (
            partials <= partial_bytes
            and counted <= counters
            and mail <= mail_bytes
            and parcels <= parcel_bytes
        )


_lock = threading.Lock()
# By device, of its default stream, which is there forever.
_of_default: dict[int, Slab] = {}
# By stream, whose handle may be another stream's tomorrow: its number never is.
_slabs: OrderedDict[tuple[int, int], Slab] = OrderedDict()
# Slabs that were outgrown. Another thread may be about to launch with one, so none is freed; they grow by
# doubling, so that all of them together are no larger than the one in use.
_outgrown: dict[int | tuple[int, int], list[Slab]] = {}
# Slabs of graphs by device, capture and stream; all that are held; by device, those of graphs that are gone.
_captured: dict[tuple[int, int, int], Slab] = {}
_held: deque[tuple[tuple[int, int, int], Slab, capture.GraphLifetime]] = deque()
_idle: dict[int, list[tuple[Slab, capture.GraphLifetime]]] = {}
_zeroing: dict[int, cupy.cuda.Stream] = {}


def acquire(device: int, stream: int, needed: Room) -> Slab:
    """A slab for one launch: scratch, zeroed 32-bit counters, mail and parcels, zero before their first use.

    device: the current one; stream: the one that the launch goes to. The kernel must leave the counters zero.
    Raises MemoryError where the device has no room.
    """
    if stream <= _LEGACY:
        # No capture takes it: nothing to ask the driver.
        slab = _of_default.get(device)
        if slab is None or not slab.holds(needed):
            slab = _grown(_of_default, device, device, needed)
        return slab
    if runtime.streamIsCapturing(stream):
        # A stream under capture has no number to be asked for, but keeps its handle until the capture ends.
        return _for_graph(device, stream, needed)
    key = device, _number(stream)
    try:
        _slabs.move_to_end(key)
        slab = _slabs[key]
    except KeyError:
        slab = None
    if slab is None or not slab.holds(needed):
        slab = _grown(_slabs, key, device, needed)
    return slab


@functools.cache
def _cu_stream_get_id():
    function = ctypes.CDLL("libcuda.so.1").cuStreamGetId
    function.argtypes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulonglong)
    return function


def _number(stream: int) -> int:
    """A stream's number, which no other stream ever has; by ctypes in half a microsecond."""
    number = ctypes.c_ulonglong()
    error = _cu_stream_get_id()(stream, ctypes.byref(number))
    if error:
        raise RuntimeError(f"cuStreamGetId: CUDA error {error} for stream {stream:#x}")
    return number.value


def _grown(slabs: MutableMapping, key, device: int, needed: Room) -> Slab:
    """A stream's first slab, or its next."""
    with _lock:
        slab = slabs.get(key)
        if slab is not None and slab.holds(needed):
            return slab
        if slab is None:
            if len(_slabs) >= MOST_STREAMS:
                _forget_oldest()
        else:
            _outgrown.setdefault(key, []).append(slab)
            needed = Room(*map(max, needed, slab.room))
            needed = needed._replace(partial_bytes=max(needed.partial_bytes, 2 * slab.room.partial_bytes))
        slabs[key] = _allocate(device, needed)
        return slabs[key]


def _for_graph(device: int, stream: int, needed: Room) -> Slab:
    identity, graph = capture.graph_of(stream)
    key = device, identity, stream
    with _lock:
        slab = _captured.get(key)
        if slab is not None and slab.holds(needed):
            return slab
        _collect_ended()
        idle = _idle.setdefault(device, [])
        fitting = [entry for entry in idle if entry[0].holds(needed)]
        if fitting:
            slab, lifetime = min(fitting, key=lambda entry: entry[0].room.partial_bytes)
            idle.remove((slab, lifetime))
        else:
            slab, lifetime = _allocate(device, needed), capture.GraphLifetime()
        lifetime.begin(graph)
        _held.append((key, slab, lifetime))
        _captured[key] = slab
        return slab


def _collect_ended() -> None:
    for _ in range(min(len(_held), MOST_POLLED)):
        key, slab, lifetime = _held.popleft()
        if not lifetime.ended():
            _held.append((key, slab, lifetime))
            continue
        if _captured.get(key) is slab:
            del _captured[key]
        _idle.setdefault(key[0], []).append((slab, lifetime))


def _allocate(device: int, needed: Room) -> Slab:
    counter_bytes, partial_bytes = _rounded(4 * needed.counters), _rounded(needed.partial_bytes)
    mail_bytes, parcel_bytes = _rounded(needed.mail_bytes), _rounded(needed.parcel_bytes)
    zeroed = counter_bytes + mail_bytes + parcel_bytes
    size = zeroed + partial_bytes
    with capture.relaxed():
        try:
            address = runtime.malloc(size)
        except runtime.CUDARuntimeError as error:
            if error.status == _OUT_OF_MEMORY:
                raise MemoryError(f"CUDA device {device} has no {size} bytes of workspace left") from error
            raise
        # Not on the launch's own stream, which may be under capture: the graph must not zero them again.
        zeroing = _zeroing.get(device)
        if zeroing is None:
            zeroing = _zeroing[device] = cupy.cuda.Stream(non_blocking=True)
        runtime.memsetAsync(address, 0, zeroed, zeroing.ptr)
        zeroing.synchronize()
    return Slab(
        address,
        address + counter_bytes,
        address + counter_bytes + mail_bytes,
        address + zeroed,
        Room(partial_bytes, counter_bytes // 4, mail_bytes, parcel_bytes),
    )


def _forget_oldest() -> None:
    """Free the slabs of the older half of the streams, once all work that may use them is done."""
    try:
        with capture.relaxed():
            for device in {device for device, _ in _slabs}:
                with cupy.cuda.Device(device):
                    runtime.deviceSynchronize()
    except runtime.CUDARuntimeError:
        return  # a capture under way forbids it: a later call will
    for _ in range(len(_slabs) // 2):
        key, slab = _slabs.popitem(last=False)
        for old in (slab, *_outgrown.pop(key, ())):
            runtime.free(old.counters)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
