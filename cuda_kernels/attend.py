"""Softmax and Parallax attention on an NVIDIA GPU: a checked problem to a plan, a plan to launches."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from parallax_core.problem import Problem

from . import compiler, early_launch, heuristics, tensor_map, workspace
from .heuristics import Shape
from .launch import Launch
from .layout import Layout, most_bytes
from .parameters import ARRAYS, PACK_ARRAYS, PACK_SHARED, PROBLEM, masks_of

_MOST_BYTES_EARLY = 1 << 30
"""Of keys and values: beside reading more a launch is nothing, and with 2 GiB it took 1.5 % longer."""


def plan(problem: Problem, layout: Layout) -> Plan:
    """Choose the kernel of a call that has keys and an output, compile it where it is new, prepare launches.

    Index arrays of the problem are described, not read. Raises what :mod:`compiler` does: CompilationError,
    BackendUnavailableError.
    """
    shape = heuristics.choose(problem, layout)
    kernel = compiler.kernel(shape.source, "attend_kernel", shape.defines, layout.device)
    kernel.set_shared_memory(shape.shared_bytes)
    return Plan(problem, layout, shape, kernel)


class Plan:
    """A prepared call for arrays of one layout at any addresses; launches may come from several threads."""

    def __init__(self, problem: Problem, layout: Layout, shape: Shape, kernel: compiler.Kernel):
        self.shape = shape
        self._kernel, self._device = kernel, layout.device
        early = early_launch.supported(layout.capability) and most_bytes(problem) <= _MOST_BYTES_EARLY
        self._launch = Launch(
            kernel.function, shape.grid, 32 * shape.warps, shape.shared_bytes, early=early,
            together=shape.parcel_bytes > 0,
        )  # fmt: skip
        self._room = workspace.Room(
            4 * shape.parts * shape.part_floats, shape.counters, parcel_bytes=shape.parcel_bytes
        )
        self._shares = any(self._room)
        self._state = self._slab = None  # what the record has the addresses of
        self._lock = threading.Lock()
        self._record = _record(problem, layout, shape)
        self._arguments = np.array([self._record.ctypes.data, 0], np.uint64)
        self._arguments_address = self._arguments.ctypes.data
        self._bytes = memoryview(self._record.view(np.uint8).reshape(-1))
        copies = shape.heads, shape.box, shape.runs
        self._maps = tensor_map.Maps(problem, layout, *copies) if shape.boxes else None

    def launch(self, stream: int, arrays: Sequence[int], state: Sequence[int]) -> None:
        """Launch on a stream of the current device.

        arrays, state: addresses in the order of :class:`calls.Arrays` and of a ParallaxState, 0 where there
        is no array.
        """
        slab = workspace.acquire(self._device, stream, self._room) if self._shares else None
        # The driver copies the arguments before it returns.
        with self._lock:
            PACK_ARRAYS.pack_into(self._bytes, 0, *arrays[:ARRAYS])
            if state is not self._state or slab is not self._slab:
                self._share(state, slab)
            if self._maps is not None:
                self._arguments[1] = self._maps.address(arrays[2], arrays[3])
            self._launch(stream, self._arguments_address)

    def _share(self, state: Sequence[int], slab: workspace.Slab | None) -> None:
        """Put the addresses of a state and of the workspace into the record, which are seldom others."""
        partials = counters = 0
        if slab is not None:
            partials = slab.parcels if self._room.parcel_bytes else slab.partials
            counters = slab.counters
        PACK_SHARED.pack_into(self._bytes, PACK_ARRAYS.size, *state, partials, counters)
        self._state, self._slab = state, slab


def _record(problem: Problem, layout: Layout, shape: Shape) -> np.ndarray:
    """The kernel's argument, all but the addresses."""
    record = np.zeros(1, PROBLEM)
    fields = dict(
        q_stride=layout.q, k_stride=layout.k, v_stride=layout.v, out_stride=layout.out,
        batch=problem.batch, q_len=problem.q_len, kv_len=problem.kv_len, q_heads=problem.q_heads,
        kv_heads=problem.kv_heads,
        row_blocks=shape.row_blocks, split_steps=shape.split_steps, share=shape.share, surplus=shape.surplus,
        scale_log2=problem.scale * math.log2(math.e), **masks_of(problem, layout),
    )  # fmt: skip
    if layout.r is not None:
        fields["r_stride"] = layout.r
    for name, value in fields.items():
        record[name] = value
    return record
