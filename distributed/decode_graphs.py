"""Timing on a GPU: CUDA graphs of many calls, by PyTorch or by CuPy, so that no launch from Python counts."""

from __future__ import annotations

import functools
import statistics
import time

from .decode_timing import WARM_UP, round_calls

HOST_CALLS = 300
# Seconds of calls before those: a processor that waited for the device comes to its clock in milliseconds.
HOST_WARM_UP = 0.01

# Of waiting on the device before a turn: more than the host takes to launch its graph. That is some 30
# microseconds, which an idle device would spend after the first event.
BUSY_NANOSECONDS = 300_000
_WAIT = r"""
extern "C" __global__ void wait(long long nanoseconds) {
    long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - begin < nanoseconds);
}
"""

# Far more than an L2 holds, and the same for every point, whose fractions are of what the memory can do.
READ_BYTES = 1 << 30
# 512 threads with 8 loads of 16 bytes in flight each: as many as it takes to cover the latency of HBM.
_THREADS, _LOADS, _WIDTH = 512, 8, 16
_READ = r"""
extern "C" __global__ void read_all(const uint4* from, unsigned int* sink) {
    const uint4* mine = from + (size_t)blockIdx.x * (THREADS * LOADS) + threadIdx.x;
    uint4 part[LOADS];
    #pragma unroll
    for (int i = 0; i < LOADS; ++i) part[i] = mine[i * THREADS];
    unsigned int sum = 0;
    #pragma unroll
    for (int i = 0; i < LOADS; ++i) sum += part[i].x ^ part[i].y ^ part[i].z ^ part[i].w;
    if (sum == 0x9e3779b9u) *sink = sum;  // hardly ever, but the compiler has to keep the loads
}
"""


class _GraphTimer:
    """What the two frameworks have in common."""

    def calls(self, nbytes, caches):
        return round_calls(nbytes, caches, turn=2e-3, floor=5e-6, bandwidth=4e12, least=20, most=200)

    def read(self, caches):
        """A kernel that does nothing but read; the same memory for every point."""
        from parallax_core.gpu_exchange import stream_at

        kernel, source, sink = _reader()
        blocks = READ_BYTES // (_THREADS * _LOADS * _WIDTH)

        def read() -> None:
            with stream_at(self._current_stream()):
                kernel((blocks,), (_THREADS,), (source, sink))

        return self.prepare([read], 4), READ_BYTES

    def _keep_busy(self, stream: int) -> None:
        """Let a stream wait, so that what is timed next is in its queue as it begins. stream: an address."""
        from parallax_core.gpu_exchange import stream_at

        with stream_at(stream):
            _waiter()((1,), (1,), (BUSY_NANOSECONDS,))

    def host(self, function):
        """The median of single calls: the queue of launches is empty before the first and deeper than all."""
        end = time.perf_counter() + HOST_WARM_UP
        while time.perf_counter() < end:
            function()
        self._synchronize()
        taken = []
        for _ in range(HOST_CALLS):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        self._synchronize()
        return statistics.median(taken)


class TorchTimer(_GraphTimer):
    """Captures calls by PyTorch, whose allocator then keeps their memory for the graph."""

    def prepare(self, functions, calls):
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # compilers, workspaces, autotuners: nothing that a capture could hold
                functions[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                functions[i % len(functions)]()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def turn() -> float:
            self._keep_busy(self._current_stream())
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) * 1e-3 / calls

        turn.functions = functions  # the graph has the addresses of their arrays, and keeps none of them
        return turn

    def _synchronize(self):
        import torch

        torch.cuda.synchronize()

    def _current_stream(self):
        import torch

        return torch.cuda.current_stream().cuda_stream


class CupyTimer(_GraphTimer):
    """Captures calls by CuPy, whose memory pool serves the capture from blocks that the warm-up left free."""

    def prepare(self, functions, calls):
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.get_current_stream().synchronize()
        with stream:
            for _ in range(WARM_UP):
                functions[0]()
            stream.synchronize()
            stream.begin_capture()
            for i in range(calls):
                functions[i % len(functions)]()
            graph = stream.end_capture()
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()

        def turn() -> float:
            self._keep_busy(stream.ptr)
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            return cupy.cuda.get_elapsed_time(start, stop) * 1e-3 / calls

        turn.functions = functions
        return turn

    def _synchronize(self):
        import cupy

        cupy.cuda.Device().synchronize()

    def _current_stream(self):
        import cupy

        return cupy.cuda.get_current_stream().ptr


@functools.cache
def _waiter():
    import cupy

    return cupy.RawKernel(_WAIT, "wait")


@functools.cache
def _reader():
    import cupy

    defines = (f"-DTHREADS={_THREADS}", f"-DLOADS={_LOADS}")
    source = cupy.arange(READ_BYTES // 4, dtype=cupy.uint32)
    source *= cupy.uint32(2654435761)  # numbers that memory could not compress
    return cupy.RawKernel(_READ, "read_all", options=defines), source, cupy.zeros(1, cupy.uint32)
