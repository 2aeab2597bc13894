"""Slabs of device memory by stream, on a device that only counts what it gives."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from parallax_core.cuda_kernels import capture, workspace
from parallax_core.cuda_kernels.workspace import MOST_STREAMS, Room, acquire

SMALL, LARGE = Room(1000, 10), Room(5000, 20, 300, 700)


@pytest.fixture
def memory(monkeypatch):
    """What is allocated, by address; streams are numbered by their handles."""
    held, addresses = {}, itertools.count(1 << 20, 1 << 20)

    def malloc(size):
        address = next(addresses)
        held[address] = size
        return address

    def zero(address, value, size, stream):
        assert value == 0
        assert size <= held[address]

    runtime = SimpleNamespace(
        malloc=malloc, free=held.pop, memsetAsync=zero, streamIsCapturing=lambda stream: False,
        deviceSynchronize=lambda: None, CUDARuntimeError=workspace.runtime.CUDARuntimeError,
    )  # fmt: skip
    monkeypatch.setattr(workspace, "runtime", runtime)
    monkeypatch.setattr(workspace, "_number", lambda stream: stream)
    monkeypatch.setattr(workspace, "_zeroing", {0: SimpleNamespace(ptr=0, synchronize=lambda: None)})
    monkeypatch.setattr(workspace.cupy.cuda, "Device", nullcontext)
    monkeypatch.setattr(capture, "relaxed", nullcontext)
    for name in ("_of_default", "_outgrown", "_captured", "_idle"):
        monkeypatch.setattr(workspace, name, {})
    monkeypatch.setattr(workspace, "_slabs", type(workspace._slabs)())
    return held


@pytest.mark.parametrize("streams", [(0, 1), (77, 77)], ids=["the default stream", "another"])
def test_a_stream_keeps_its_slab_until_it_needs_a_larger_one(memory, streams):
    first, again = (acquire(0, stream, SMALL) for stream in streams)
    assert first is again
    larger = acquire(0, streams[0], LARGE)
    assert larger.holds(LARGE)
    assert larger.holds(SMALL)
    assert acquire(0, streams[1], SMALL) is larger
    # Of the first, another thread may be about to launch with it.
    assert len(memory) == 2


def test_nothing_in_a_slab_lies_on_anything_else(memory):
    slab = acquire(0, 0, LARGE)
    places = sorted(
        (start, start + size)
        for start, size in zip(
            (slab.counters, slab.mail, slab.parcels, slab.partials),
            (4 * LARGE.counters, LARGE.mail_bytes, LARGE.parcel_bytes, LARGE.partial_bytes),
        )
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(start % 256 == 0 for start, _ in places)
    ((address, size),) = memory.items()
    assert places[0][0] == address
    assert places[-1][1] <= address + size


@pytest.mark.parametrize("field", range(4))
def test_a_slab_holds_no_more_than_it_has(field):
    room = [100, 100, 100, 100]
    slab = workspace.Slab(0, 0, 0, 0, Room(*room))
    assert slab.holds(Room(*room))
    room[field] += 1
    assert not slab.holds(Room(*room))


def test_slabs_of_old_streams_are_freed_but_not_that_of_the_default_stream(memory):
    default = acquire(0, 0, SMALL)
    for stream in range(2, MOST_STREAMS + 3):
        acquire(0, stream, SMALL)
    assert len(memory) == 1 + MOST_STREAMS // 2 + 1
    assert default.counters in memory
    assert acquire(0, 0, SMALL) is default


def test_streams_and_devices_have_slabs_of_their_own(memory):
    workspace._zeroing[1] = workspace._zeroing[0]
    slabs = [acquire(device, stream, SMALL) for device in (0, 1) for stream in (0, 5, 6)]
    assert len({slab.counters for slab in slabs}) == 6
