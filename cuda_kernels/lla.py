"""Local linear attention on an NVIDIA GPU: a checked problem to a plan, a plan to launches."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallax_core.errors import BackendUnavailableError
from parallax_core.problem import BFLOAT16, Problem

from . import compiler, early_launch, tensor_map, workspace
from .launch import Launch
from .layout import Layout, Strides, has_tensor_maps, overflows_cache
from .parameters import LLA_CALL, PACK_LLA_ARRAYS, PACK_LLA_SHARED, masks_of

SM90_THREADS = {64: 256, 128: 512}
SM90_SHARED_BYTES = {64: 109568, 128: 220160}
"""By head size, the size of the kernel's own structure, which a static assertion compares."""
_IN_TURN_SHARED_BYTES = 230400
"""Of blocks that take rows in turn."""
_TWO_PASS_THREADS, _TWO_PASS_SHARED_BYTES = 128, 110592
"""Of the kernel that takes a row's keys and then its values."""
_TWO_PASS_KEYS = 640
"""Up to which it is the faster one, where rows are more than the multiprocessors; measured on an H200."""
_SM90_BLOCKS = {64: 2, 128: 1}
"""How many blocks a multiprocessor runs, by head size."""
SOLVERS = "cholesky", "cg"
_MOST_SPLITS = 32
_LARGE_CLUSTER = 8
_MOST_TOGETHER = 16
"""Blocks that solve a row's system together."""
_MAIL_WORDS = 384
"""What such a block sends at a time, at most, of 8 bytes each."""
_MOST_GATHERED, _GIVEN_BYTES, _PLACES_BYTES = 4, 34944, 4096
"""Blocks with heads of 64 of which one solves their row; what each gives it; and what is before that of all
rows. More of them are sooner sent each step's product."""
_MOST_SENDERS = 8
"""Blocks that send each other all rows of a product, which more of them add up sooner (on an H200)..."""
_ADDED_WORDS = 4
"""...in so many words a row."""
_MOST_TURNS, _IN_TURN_KEYS = 32, 2048
"""Rows that a block takes one after the other, and up to how many keys that is faster (on an H200)."""
_MOST_STEPS = 64
"""Of conjugate gradients, before the system is factored."""
_SM90_SPLIT_KEYS, _PORTABLE_SPLIT_KEYS = 512, 256
_SM90_TILE, _SMALLEST_BOX = 64, 16
"""Keys of a tile of the tuned kernel, and how many of them its copies bring at least."""
_MOST_PARTIAL_BYTES = 256 << 20
_ELEMENTS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, BFLOAT16: 2}


class Shape(NamedTuple):
    """The kernel of a call and how its rows are cut.

    splits: thread blocks that share the keys of a row; blocks: all that work on a row; rows: of a launch, all
    of them unless their partial moments take too much memory; partial_floats: of all rows of a launch. box:
    keys that the copy engine brings at a time, 0 where it is not used. mail_bytes, mail_offset: of all that
    blocks send or give each other while they run, all of them at once, and where in it those of this cut
    begin; 0 where they send nothing. turns: rows that a block takes one after the other.
    """

    source: str
    defines: tuple[tuple[str, int], ...]
    splits: int
    blocks: int
    threads: int
    shared_bytes: int
    partial_floats: int
    rows: int
    box: int = 0
    mail_bytes: int = 0
    mail_offset: int = 0
    turns: int = 1


def plan(problem: Problem, layout: Layout, ridge: float | Strides, solver: str) -> Plan:
    """Choose the kernel of a call that has keys and an output, compile it where it is new, prepare launches.

    ridge: a number, or the strides of an array along ``(B, Lq, Hq)``. Index arrays of the problem are
    described, not read. Raises BackendUnavailableError for a solver that the kernels lack, and what
    :mod:`compiler` does.
    """
    if solver not in SOLVERS:
        raise BackendUnavailableError(
            f"solver is {solver!r}; on a GPU there are {' and '.join(map(repr, SOLVERS))}"
        )
    return Plan(problem, layout, choose(problem, layout, solver), ridge)


class Plan:
    """A prepared call for arrays of one layout at any addresses; launches may come from several threads."""

    def __init__(self, problem: Problem, layout: Layout, shape: Shape, ridge: float | Strides):
        self.shape, self._device = shape, layout.device
        rows = problem.batch * problem.q_len * problem.q_heads
        self._kernel = compiler.kernel(shape.source, "lla_kernel", shape.defines, layout.device)
        self._kernel.set_shared_memory(shape.shared_bytes)
        self._room = workspace.Room(
            4 * shape.partial_floats, shape.rows if shape.partial_floats else 0, shape.mail_bytes
        )
        early = shape.box > 0 and early_launch.supported(layout.capability)
        self._launches = []
        for first in range(0, rows, shape.rows):
            grid = -(-min(shape.rows, rows - first) // shape.turns) * shape.blocks, 1, 1
            launch = Launch(
                self._kernel.function, grid, shape.threads, shape.shared_bytes, early=early,
                together=shape.mail_bytes > 0,
            )  # fmt: skip
            self._launches.append((first, launch))
        self._shares = any(self._room)
        self._state = self._slab = None  # what the record has the addresses of
        self._lock = threading.Lock()
        self._record = _record(problem, layout, shape, ridge)
        self._bytes = memoryview(self._record.view(np.uint8).reshape(-1))
        self._arguments = np.array([self._record.ctypes.data, 0], np.uint64)
        self._arguments_address = self._arguments.ctypes.data
        self._maps = tensor_map.Maps(problem, layout, 1, shape.box, 1) if shape.box else None

    def launch(self, stream: int, arrays: Sequence[int], state: Sequence[int]) -> None:
        """Launch on a stream of the current device.

        arrays, state: addresses in the order of :class:`calls.Arrays` and of an LLAState, 0 where there is no
        array.
        """
        slab = workspace.acquire(self._device, stream, self._room) if self._shares else None
        # The driver copies the argument before it returns.
        with self._lock:
            PACK_LLA_ARRAYS.pack_into(self._bytes, 0, arrays[0], *arrays[2:])
            if state is not self._state or slab is not self._slab:
                self._share(state, slab)
            if self._maps is not None:
                self._arguments[1] = self._maps.address(arrays[2], arrays[3])
            for first_row, launch in self._launches:
                self._record["first_row"] = first_row
                launch(stream, self._arguments_address)

    def _share(self, state: Sequence[int], slab: workspace.Slab | None) -> None:
        """Put the addresses of a state and of the workspace into the record, which are seldom others."""
        partials = counters = mail = 0
        if slab is not None:
            partials, counters, mail = slab.partials, slab.counters, slab.mail + self.shape.mail_offset
        PACK_LLA_SHARED.pack_into(self._bytes, PACK_LLA_ARRAYS.size, *state, partials, counters, mail)
        self._state, self._slab = state, slab


def choose(problem: Problem, layout: Layout, solver: str = "cholesky") -> Shape:
    """The tuned kernel where the call suits it, the portable one everywhere else."""
    tuned = (
        layout.capability == (9, 0)
        and problem.operation != "lla_probe"
        and problem.dtype.itemsize == 2
        and problem.head_dim == problem.value_dim
        and problem.head_dim in SM90_THREADS
        and not layout.return_state
        and has_tensor_maps(problem, layout)
        and (problem.page_size or _SM90_TILE) % _SMALLEST_BOX == 0
    )
    rows = problem.batch * problem.q_len * problem.q_heads
    if tuned:
        return _sm90(problem, layout, rows, solver)
    if solver == "cg":
        raise BackendUnavailableError(
            "solver is 'cg', which on a GPU is there for the output of lla_decode and lla_attention, in "
            "float16 or bfloat16, with heads of 64 or 128, k and v aligned to 16 bytes and pages of a "
            "multiple of 16, on compute capability 9.0"
        )
    return _portable(problem, layout, rows)


def _sm90(problem: Problem, layout: Layout, rows: int, solver: str) -> Shape:
    """Splits where rows alone leave multiprocessors idle."""
    D = problem.head_dim
    at_once = layout.multiprocessors * _SM90_BLOCKS[D]
    if layout.split_size:
        wanted = -(-problem.kv_len // max(layout.split_size, _SM90_SPLIT_KEYS))
    else:
        wanted = min(at_once // rows, -(-problem.kv_len // _SM90_SPLIT_KEYS))
    by_steps, most = solver == "cg", _MOST_SPLITS
    # A pinned size keeps a row's bits whatever batch it sits in.
    few_keys = problem.kv_len <= _TWO_PASS_KEYS and rows > layout.multiprocessors and not layout.split_size
    if by_steps and D == 128 and few_keys:
        return _two_pass(problem, rows)
    if by_steps:
        # Blocks of a pinned size may be more than run at once; then a row's bits depended on its batch.
        most = 1 if layout.split_size else _MOST_TOGETHER
    splits_log2 = max(0, min(wanted, most).bit_length() - 1)
    splits = 1 << splits_log2
    # Clusters of more than two strand multiprocessors of a full GPU: 15 of 8 blocks run at once on 132.
    large = not layout.split_size and 2 * rows * splits <= at_once
    cluster = 1 if by_steps else min(splits, _LARGE_CLUSTER if large else 2)
    # Rows whose lengths the device alone knows go to the blocks that are free.
    even = problem.cu_seqlens is None and problem.cache_seqlens is None and problem.cache_leftpad is None
    short = even and problem.kv_len <= _IN_TURN_KEYS and not layout.split_size
    in_turn = by_steps and D == 128 and short and rows > at_once
    turns = min(-(-rows // at_once), _MOST_TURNS) if in_turn else 1
    mailed = by_steps and splits > 1
    gathered = mailed and D == 64 and splits <= _MOST_GATHERED
    shared_bytes = _IN_TURN_SHARED_BYTES if in_turn else SM90_SHARED_BYTES[D]
    box = _box(problem)
    defines = _sm90_defines(problem, box) | dict(
        CLUSTER=cluster, SHARED_BYTES=shared_bytes,
        READ_ONCE=int(problem.group_size * problem.q_len == 1 and overflows_cache(problem, layout)),
        SOLVERS=(1 if gathered else splits) * by_steps, MOST_STEPS=_MOST_STEPS * by_steps,
        GATHERED=splits * gathered,
        MAIL_BYTES=(splits * _GIVEN_BYTES if gathered else _mail_bytes(splits)) * mailed,
        STEPS_ADDED_UP=int(mailed and not gathered and splits > _MOST_SENDERS),
        ROWS_IN_TURN=int(in_turn),
        MOST_TURNS=_MOST_TURNS * in_turn,
    )  # fmt: skip
    merged = 1 if gathered else splits // cluster
    floats = rows * merged * (2 * D * D + 2 * D + 4) if merged > 1 else 0
    return Shape(
        "sm90/lla.cu", tuple(defines.items()), splits, splits, SM90_THREADS[D], shared_bytes, floats,
        rows, box, *(_mail(splits_log2, layout.multiprocessors, gathered) if mailed else (0, 0)), turns,
    )  # fmt: skip


def _two_pass(problem: Problem, rows: int) -> Shape:
    """Keys, then values with the slope: a block a row, of which a multiprocessor solves two at once."""
    box = _box(problem)
    defines = _sm90_defines(problem, box) | dict(
        CLUSTER=1, SHARED_BYTES=_TWO_PASS_SHARED_BYTES, SOLVERS=1, MOST_STEPS=_MOST_STEPS, MAIL_BYTES=0
    )
    return Shape(
        "sm90/lla_two_pass.cu", tuple(defines.items()), 1, 1, _TWO_PASS_THREADS, _TWO_PASS_SHARED_BYTES,
        0, rows, box,
    )  # fmt: skip


def _box(problem: Problem) -> int:
    """Keys that a copy brings: those of a tile, or of it what lies in one page."""
    return math.gcd(_SM90_TILE, problem.page_size or _SM90_TILE)


def _sm90_defines(problem: Problem, box: int) -> dict[str, int]:
    """What every tuned kernel is compiled with."""
    return dict(
        CALL_BYTES=LLA_CALL.itemsize, HEAD_DIM=problem.head_dim, PAGED=int(problem.page_size is not None),
        BOX=box, HALF_IS_FLOAT16=int(problem.dtype != BFLOAT16), **_masks(problem),
    )  # fmt: skip


def _mail_bytes(splits: int) -> int:
    """Of a row; the size of the kernel's own structure, which a static assertion compares."""
    added = _ADDED_WORDS * (max(SM90_THREADS) if splits > _MOST_SENDERS else 1)
    lines = -(-8 * (2 * splits * _MAIL_WORDS + added + 1) // 128)
    return 128 * lines


def _mail(splits_log2: int, multiprocessors: int, gathered: bool = False) -> tuple[int, int]:
    """How much mail a device's blocks have, and where that of rows cut in ``2**splits_log2`` begins.

    Rows of one number have one place, in whatever kernel: tags count how often it was used. What blocks give
    the one of them that solves, gathered, lies behind.
    """

    def size(log2: int) -> int:
        rows = max(_SM90_BLOCKS.values()) * multiprocessors >> log2
        return rows * _mail_bytes(1 << log2)

    cuts = range(1, _MOST_TOGETHER.bit_length())
    mail = sum(map(size, cuts))
    if gathered:
        return mail + _PLACES_BYTES + _SM90_BLOCKS[64] * multiprocessors * _GIVEN_BYTES, mail
    return mail, sum(map(size, range(1, splits_log2)))


def _portable(problem: Problem, layout: Layout, rows: int) -> Shape:
    D, Dv = problem.head_dim, _value_dim(problem)
    block = 64 if max(D, Dv) <= 64 else 128
    key_blocks, value_blocks = -(-D // block), -(-Dv // block)
    blocks = key_blocks * (key_blocks + 1) // 2 + value_blocks * key_blocks
    limit = {(8, 0): 128, (9, 0): 192}.get(layout.capability, 64) << 10
    triangle = D * (D + 1) // 2
    shared = 4 * triangle <= limit
    if layout.split_size:
        wanted = -(-problem.kv_len // max(layout.split_size, _PORTABLE_SPLIT_KEYS))
    else:
        wanted = min(
            2 * layout.multiprocessors // (rows * blocks), -(-problem.kv_len // _PORTABLE_SPLIT_KEYS)
        )
    splits = max(1, min(wanted, 16))
    floats = splits * ((D + Dv) * (D + 1) + 2) + (0 if shared else triangle)
    # Several launches over the same workspace where all rows' moments would take too much of it.
    at_once = min(rows, max(1, _MOST_PARTIAL_BYTES // (4 * floats)))
    defines = dict(
        CALL_BYTES=LLA_CALL.itemsize, ELEMENT=_ELEMENTS[problem.dtype], BLOCK=block,
        PAGED=int(problem.page_size is not None), RETURN_STATE=int(layout.return_state),
        SOLVE_IN_SHARED=int(shared), PROBE=int(problem.operation == "lla_probe"), **_masks(problem),
    )  # fmt: skip
    return Shape(
        "portable/lla.cu", tuple(defines.items()), splits, splits * blocks, 256,
        4 * triangle if shared else 0, at_once * floats, at_once,
    )  # fmt: skip


def _masks(problem: Problem) -> dict[str, int]:
    """What a kernel need not look for."""
    indexed = problem.cache_seqlens is not None or problem.cache_leftpad is not None
    return dict(INDEXED=int(indexed), PACKED=int(problem.cu_seqlens is not None))


def _value_dim(problem: Problem) -> int:
    """Channels of the values, of which a probe has none."""
    return 0 if problem.operation == "lla_probe" else problem.value_dim


def _record(problem: Problem, layout: Layout, shape: Shape, ridge: float | Strides) -> np.ndarray:
    """The kernels' argument, all but the addresses and the first row."""
    record = np.zeros(1, LLA_CALL)
    fields = dict(
        q_stride=layout.q, k_stride=layout.k, v_stride=layout.v or 0, out_stride=layout.out,
        q_len=problem.q_len, kv_len=problem.kv_len, q_heads=problem.q_heads, group_size=problem.group_size,
        head_dim=problem.head_dim, value_dim=_value_dim(problem), page_size=problem.page_size or 0,
        rows=problem.batch * problem.q_len * problem.q_heads,
        splits=shape.splits, splits_log2=shape.splits.bit_length() - 1,
        blocks_at_once=layout.multiprocessors * _SM90_BLOCKS.get(problem.head_dim, 1),
        scale=problem.scale, **masks_of(problem, layout),
    )  # fmt: skip
    fields["ridge_stride" if isinstance(ridge, tuple) else "ridge_value"] = ridge
    for name, value in fields.items():
        record[name] = value
    return record
