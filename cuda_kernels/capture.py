"""CUDA-graph capture: what may be done beside it, and memory that lives as long as the graph."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

from cuda.bindings import driver

_C = ctypes.CDLL(None)
_C.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_C.sem_trywait.argtypes = (ctypes.c_void_p,)
# The driver runs destructors in a thread of its own at any time, after the interpreter's end too: it gets a C
# function that needs no interpreter. A sem_t is at most 32 bytes on Linux.
_SEM_POST = driver.CUhostFn(ctypes.cast(_C.sem_post, ctypes.c_void_p).value)
_SEM_SIZE = 32

# cuStreamGetCaptureInfo of CUDA 12 refuses streams whose last launch has a programmatic dependency.
_capture_info = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)


def graph_of(stream: int) -> tuple[int, driver.CUgraph]:
    """The capture that a stream is under, as a number that no other has, and the graph that it makes."""
    _, identity, graph, *_ = _check(*_capture_info(stream))
    return int(identity), graph


class GraphLifetime:
    """Tells when a graph and all that was instantiated from it are gone."""

    __slots__ = ("_semaphore",)

    def __init__(self):
        buffer = ctypes.create_string_buffer(_SEM_SIZE)
        # Never freed: a graph may outlive every Python object.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer))
        self._semaphore = ctypes.addressof(buffer)
        _C.sem_init(self._semaphore, 0, 0)

    def begin(self, graph: driver.CUgraph) -> None:
        """Tie to a graph."""
        flags = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        (owner,) = _check(*driver.cuUserObjectCreate(self._semaphore, _SEM_POST, 1, flags))
        move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        _check(*driver.cuGraphRetainUserObject(graph, owner, 1, move))

    def ended(self) -> bool:
        """Whether it is over; True once for each :meth:`begin`."""
        return _C.sem_trywait(self._semaphore) == 0


@contextmanager
def relaxed():
    """Allow this thread what a capture of any stream would forbid: allocations, the loading of modules."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (previous,) = _check(*driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        _check(*driver.cuThreadExchangeStreamCaptureMode(previous))


def _check(error, *results):
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: {driver.cuGetErrorString(error)[1].decode()}")
    return results
