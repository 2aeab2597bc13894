"""Which kernel runs a call of softmax or Parallax attention, in what shape; no CUDA needed to read it.

Measured on an H200 unless said otherwise; docs/gpu.md tells what was compared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from parallax_core.problem import BFLOAT16, Problem

from .layout import Layout, has_tensor_maps, overflows_cache
from .parameters import PROBLEM

STEP = 16
"""Keys that a warp takes at a time."""
WARPGROUP = 4
"""Warps that take their steps together where there are many query rows."""
MOST_SLOTS = 16
LONGEST_GRID = 65535
"""Blocks along y and z."""
MOST_STEPS = 2**31 - 1
"""Steps of a launch are numbered in 32 bits."""

EQUAL_RANGES, ALIKE, WHOLE = range(3)
"""How blocks share the work; GRID in include/shape.cuh."""

_RUN = 64
"""Half-precision channels of a row that lie together in shared memory: 128 bytes."""
_LONG_STEPS = 128
"""Of a block whose beginning and end count for little."""
_PORTABLE_BYTES = 99 * 1024
_SM90_BYTES = 227 * 1024
"""Shared memory that a block may have."""
_BLOCK_BYTES = 1024
"""That the system takes of every block beside, from sm_80 on."""
_STATIC_BYTES = 256
"""That a kernel has for its own variables, at most..."""
_BOX_BYTES = 1024
"""...or with the copy engine, whose boxes begin on multiples of that."""
_FEWEST_PARCELS = {ALIKE: {2: 8, 4: 8}, EQUAL_RANGES: {2: 16, 4: 3}}
"""By how blocks share the work and by groups of rows: parts that all blocks of an item merge faster than its
last one or a cluster does. Of fewer rows parts are small, and an early launch gains as much."""
_MOST_PARCELS = 32
"""Parts beyond which there is more to send than is saved in reading..."""
_LONG_PART = 256
"""...unless they have more keys than that."""
_KEYS_OF_WARPGROUPS = 1024
"""That a block reads for warpgroups to be faster than warps alone where all sequences are alike."""
_MOST_ITEMS = 256
"""Whose blocks send each other parcels."""
_ELEMENTS = {BFLOAT16: 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}


class Shape(NamedTuple):
    """A compiled kernel and how it is launched.

    source, defines: what the compiler takes. grid, cluster: blocks. shared_bytes: of a block. boxes: whether
    the copy engine brings keys and values, ``box`` keys and ``runs`` runs of 128 bytes (None: all) at a
    time. parts: partial results of the workspace, of ``part_floats`` floats each, and counters beside them.
    parcel_bytes: of what blocks that share an item send each other while they run, all of them at once; 0
    where they send nothing.
    """

    source: str
    defines: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]
    warps: int
    shared_bytes: int
    boxes: bool
    box: int
    runs: int | None
    heads: int
    row_blocks: int
    split_steps: int
    share: int
    surplus: int
    parts: int
    part_floats: int
    counters: int
    parcel_bytes: int


def choose(problem: Problem, layout: Layout) -> Shape:
    """The shape of a call that has an output and keys."""
    size = problem.dtype.itemsize
    rows = problem.q_len * problem.group_size
    heads = _adjacent_heads(problem, layout)
    boxes = _takes_boxes(problem, layout, heads)
    if not boxes:
        heads = 1
    half = size == 2
    channels = _round_up(problem.value_dim, 16 if half else 32) // 8
    tiles = _tiles(rows, heads, channels, half)
    varied = problem.cu_seqlens is not None or (problem.causal and problem.q_len > 1)
    step_warps = WARPGROUP if boxes and not varied and _takes_warpgroups(problem, layout, rows) else 1
    step = STEP * step_warps
    queries = 4 if tiles > 1 or rows > 2 else rows
    row_blocks = -(-rows // (4 * tiles))
    items = problem.batch * (problem.kv_heads // heads) * row_blocks
    split_steps = 0 if layout.split_size is None else layout.split_size // STEP
    indexed = _is_indexed(problem)
    steps = _steps(problem, boxes, step)
    grid = _grid(problem, row_blocks, items, split_steps, indexed, layout, heads, steps)

    # Two blocks a multiprocessor hide each other's beginnings and ends, where their registers fit.
    blocks = 2 if heads * tiles * channels <= 16 and grid != EQUAL_RANGES else 1
    most_rings = 8 // step_warps
    cluster, cuts, together = 1, 1, False
    if grid == ALIKE:
        cuts = _cuts(steps, items, most_rings, blocks * layout.multiprocessors)
        if boxes and cuts > 1:
            # Fewer blocks with deeper rings leave fewer parts to merge. Of long ones, twice as many may leave
            # fewer multiprocessors idle, which counts for more.
            fewer = _cuts(steps, items, most_rings, layout.multiprocessors)
            is_fuller = cuts * 0.99 > blocks * fewer and steps // cuts >= _LONG_STEPS
            if not is_fuller:
                blocks, cuts = 1, fewer
        together = boxes and _sends_parcels(grid, cuts, items, tiles, blocks * layout.multiprocessors)
        if together:
            cuts = min(cuts, _most_parcels(steps * step))
        elif boxes:
            cluster = _cluster(cuts, items, tiles, problem.value_dim, layout.multiprocessors)

    def plan(warps: int) -> tuple[int, int]:
        """Slots of a warp's ring, and bytes of shared memory."""
        records = heads * tiles * queries
        fixed = _fixed_bytes(problem, warps, tiles, records, heads, grid, cluster, step_warps)
        row = _row_bytes(problem, heads)
        # Without boxes rows are an odd multiple of 16 bytes apart.
        slot = step * (row if boxes or row % 32 else row + 16)
        rings = warps // step_warps
        limit = _PORTABLE_BYTES - _STATIC_BYTES
        if boxes:
            limit = (_SM90_BYTES + _BLOCK_BYTES) // blocks - _BLOCK_BYTES - _BOX_BYTES
        slots = min(MOST_SLOTS, (limit - fixed) // (rings * (slot + 8)))
        return slots, fixed + slots * rings * (slot + 8)

    warps = next(w for w in (8, 4, 2, 1) if plan(w)[0] >= 2)
    rings = warps // step_warps
    slots, shared_bytes = plan(warps)

    # Keys that the copy engine brings at a time; with many rows its instructions compete with theirs.
    box, runs = 16 if tiles == 4 else 8, None
    if step_warps > 1:
        box = step if problem.page_size is None else math.gcd(step, problem.page_size)
        runs = None if box == step else 1
    part_channels = problem.value_dim // cluster
    records = heads * tiles * queries
    grids, parts, counters = (items, 1, 1), 0, 0
    if grid == ALIKE:
        grids = cuts, problem.kv_heads // heads * row_blocks, problem.batch
        if cuts > cluster:
            parts, counters = items * cuts, items * cluster
    elif grid == EQUAL_RANGES:
        most, sharers = max(1, -(-items * steps // rings)), blocks * layout.multiprocessors
        if not split_steps:
            each = min(_cuts(steps, items, rings, sharers), _most_parcels(steps * step))
            together = boxes and _sends_parcels(grid, each, items, tiles, sharers)
            read = 2 * items * steps * step * _row_bytes(problem, heads)
            most_sharers = _most_sharers(items, read, 8 * records * problem.value_dim)
            sharers = items * each if together else min(sharers, most_sharers)
        grids = min(_even(sharers, items), most), 1, 1
        # A block shares its first item and its last.
        parts = items * -(-steps // split_steps) if split_steps else 2 * grids[0]
        counters = items
    parcel_bytes = 0
    if together:
        parcel_bytes = _parcel_bytes(parts, records, problem.value_dim)
        parts = counters = 0
    defines = {
        "ELEMENT": _ELEMENTS[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "GROUP": problem.group_size,
        "PROBE": 0 if problem.probe_dtype is None else 1 if problem.probe_dtype == problem.dtype else 2,
        "HEADS": heads,
        "TILES": tiles,
        "QUERIES": queries,
        "WARPS": warps,
        "BLOCKS": blocks,
        "SLOTS": slots,
        "GRID": grid,
        "PINNED": int(split_steps > 0),
        "INDEXED": int(indexed),
        "PACKED": int(problem.cu_seqlens is not None),
        "VARIED": int(varied),
        "PAGE_SIZE": problem.page_size or 0,
        "VECTORS": int(_vectors(problem, layout)),
        "SHARED": shared_bytes,
        "PROBLEM_BYTES": PROBLEM.itemsize,
    }
    if boxes:
        defines |= {"CLUSTER": cluster, "BOX": box, "TOGETHER": int(together), "MOST_ITEMS": _MOST_ITEMS}
        defines["READ_ONCE"] = int(row_blocks == 1 and overflows_cache(problem, layout))
        defines["WARPGROUPS"] = int(step_warps > 1)
    else:
        defines["ALIGNED"] = int(
            layout.aligned and all(d * size % 16 == 0 for d in (problem.head_dim, problem.value_dim))
        )
    return Shape(
        source="sm90/attend.cu" if boxes else "portable/attend.cu",
        defines=tuple(defines.items()),
        grid=grids,
        warps=warps,
        shared_bytes=shared_bytes,
        boxes=boxes,
        box=box,
        runs=runs,
        heads=heads,
        row_blocks=row_blocks,
        split_steps=split_steps,
        share=steps // cuts,
        surplus=steps % cuts,
        parts=parts,
        part_floats=records * (4 + _round_up(2 * part_channels, 4)),
        counters=counters,
        parcel_bytes=parcel_bytes,
    )


def _adjacent_heads(problem: Problem, layout: Layout) -> int:
    """Key heads that share a row: runs of 256 bytes are read faster than runs of 128."""
    alike = problem.head_dim == problem.value_dim == 64 and problem.dtype.itemsize == 2
    adjacent = layout.k[2] == layout.v[2] == 64
    return 2 if alike and adjacent and problem.kv_heads % 2 == 0 else 1


def _takes_boxes(problem: Problem, layout: Layout, heads: int) -> bool:
    """Whether the copy engine can bring rows of at least 256 bytes; shorter ones go faster without it.

    Its rings take the shared memory of a Hopper: GPUs of compute capability 12 have less than half of that.
    """
    if layout.capability < (9, 0) or layout.shared_bytes < _SM90_BYTES:
        return False
    if problem.dtype.itemsize != 2 or not has_tensor_maps(problem, layout):
        return False
    if any(heads * size % 64 or heads * size < 128 for size in (problem.head_dim, problem.value_dim)):
        return False
    return problem.page_size is None or problem.page_size % STEP == 0


def _most_parcels(keys: int) -> int:
    """Parts of an item of so many keys that its blocks send each other."""
    return max(_MOST_PARCELS, keys // _LONG_PART)


def _is_indexed(problem: Problem) -> bool:
    return problem.cache_seqlens is not None or problem.cache_leftpad is not None


def _takes_warpgroups(problem: Problem, layout: Layout, rows: int) -> bool:
    """Whether warpgroups take the steps, of rows that see the same keys: many of 128 channels, on a Hopper.

    A warpgroup's step takes longer than a warp's, but its sums are few, and so are sooner merged where a
    range leaves a sequence.
    """
    if layout.capability[0] != 9 or rows <= 4 or layout.split_size is not None:
        return False
    if problem.head_dim != 2 * _RUN or problem.value_dim != 2 * _RUN:
        return False
    keys = problem.batch * problem.kv_heads * problem.kv_len // layout.multiprocessors
    ragged = _is_indexed(problem) and problem.batch > 1
    return ragged or (rows > 8 and keys >= _KEYS_OF_WARPGROUPS)


def _tiles(rows: int, heads: int, channels: int, half: bool) -> int:
    """Groups of four query rows a block takes; as many as its registers hold accumulators for."""
    most = max(1, min((64 if half else 32) // (heads * channels), 4 // heads))
    return min(1 if rows <= 4 else 2 if rows <= 8 else 4, 4 if most >= 4 else 2 if most >= 2 else 1)


def _steps(problem: Problem, boxes: bool, step: int) -> int:
    """Steps of an item that sees all the keys that its lengths can give it, of ``step`` keys each."""
    first, end = 0, problem.kv_len
    if problem.causal and problem.window_size is not None:
        visible = min(end, problem.window_size + problem.q_len - 1)
        if _is_indexed(problem):  # a window may begin anywhere in a step
            return -(-visible // step) + 1
        first = max(0, end - problem.q_len + 1 - problem.window_size)
    if boxes and problem.page_size is not None:
        first = first // step * step
    return -(-(end - first) // step)


def _grid(problem, row_blocks, items, split_steps, indexed, layout, heads, steps) -> int:
    if problem.cu_seqlens is not None:
        return WHOLE
    # One sequence has one length, wherever that is.
    if split_steps or (indexed and problem.batch > 1):
        return EQUAL_RANGES if items * _round_up(steps, max(1, split_steps)) <= MOST_STEPS else WHOLE
    # Blocks of rows see ranges of their own, which only a block that has them to itself keeps to.
    if row_blocks > 1 and problem.causal and items >= layout.multiprocessors:
        return WHOLE
    inner = problem.kv_heads // heads * row_blocks
    return ALIKE if max(inner, problem.batch) <= LONGEST_GRID else WHOLE


def _cuts(steps: int, items: int, warps: int, places: int) -> int:
    """How many blocks share an item, by the time that all of them take with ``places`` of them at once.

    A block costs about as much as two steps of a warp beside its steps.
    """
    most = max(1, min(-(-steps // warps), 8 * places // items))

    def cost(cuts: int) -> float:
        return -(-items * cuts // places) * (-(-steps // cuts) / warps + 2)

    best = min(map(cost, range(1, most + 1)))
    return next(cuts for cuts in range(1, most + 1) if cost(cuts) <= 1.001 * best)


def _parcel_bytes(parts: int, records: int, value_dim: int) -> int:
    """Counts of uses, and a word of 16 bytes for every sum and two for every row; include/parcels.cuh."""
    return 8 * _MOST_ITEMS + 16 * parts * records * (2 + value_dim)


def _most_sharers(items: int, read: int, part: int) -> int:
    """Blocks among which items are still worth sharing, by the bytes that all read and that a part takes.

    A block reads about as fast as the last of an item's blocks merges what the others left.
    """
    return max(items, math.isqrt(items * read // part))


def _even(places: int, items: int) -> int:
    """As many blocks as there are places, or a little fewer: where all items are alike, none is cut askew."""
    if items <= places:
        return places // items * items
    return max((n for n in range(places - places // 16, places + 1) if items % n == 0), default=places)


def _cluster(cuts: int, items: int, tiles: int, value_dim: int, multiprocessors: int) -> int:
    """Blocks that merge through distributed shared memory.

    Clusters of more than two leave multiprocessors of a full grid without a place, and the rest of it waits.
    Two blocks are worth a cluster where that spares the parts, or halves them where they are large.
    """
    for cluster in (8, 4, 2):
        few = items * cuts <= multiprocessors // 2 if cluster > 2 else items * cuts <= multiprocessors
        gain = cluster > 2 or cuts == 2 or tiles == 4
        if few and gain and cuts % cluster == 0 and value_dim % cluster == 0:
            return cluster
    return 1


def _sends_parcels(grid: int, cuts: int, items: int, tiles: int, places: int) -> bool:
    """Whether blocks of an item send each other their parts; all run at once then, and none begins early."""
    enough = cuts >= _FEWEST_PARCELS[grid].get(tiles, math.inf)
    return enough and items <= _MOST_ITEMS and items * cuts <= places


def _vectors(problem: Problem, layout: Layout) -> bool:
    sizes = [problem.dtype.itemsize] + ([] if problem.probe_dtype is None else [problem.probe_dtype.itemsize])
    return layout.aligned_queries and all(problem.head_dim * size % 16 == 0 for size in sizes)


def _row_bytes(problem: Problem, heads: int) -> int:
    half = problem.dtype.itemsize == 2
    columns = max(
        _round_up(problem.head_dim, 16 if half else 4), _round_up(problem.value_dim, 16 if half else 32)
    )
    return heads * columns * problem.dtype.itemsize


def _fixed_bytes(problem, warps, tiles, records, heads, grid, cluster, step_warps) -> int:
    """Shared memory beside the rings and their barriers; include/shape.cuh lays it out."""
    size = problem.dtype.itemsize
    total = (
        warps * records * 16
        + _round_up(warps * records * 4, 16)
        + _round_up(warps * records * 8, 16)
        + records * 16
    )
    if grid == EQUAL_RANGES and step_warps == 1:
        value_columns = _round_up(problem.value_dim, 32)
        handed = min(value_columns, 128 // records if records < 4 else 32)
        total += warps * max(1024, records * handed * 8)
    if cluster > 1:
        total += records * (16 + 8 * problem.value_dim)
    probe = 0 if problem.probe_dtype is None else 1 if problem.probe_dtype == problem.dtype else 2
    if step_warps > 1:
        # Operands of wgmma: two rows of 128 bytes a query row, for weights and for every 64 channels.
        operand = heads * 8 * tiles * 128
        queries = max(1, probe) * problem.head_dim // _RUN * operand
        return warps // step_warps * 2 * operand + _round_up(total, 1024) + queries
    columns = _round_up(problem.head_dim, 16 if size == 2 else 4)
    array = _round_up(heads * 4 * tiles * (columns + 16 // size) - 64 // size, 128 // size) + 64 // size
    return total + (1 + probe) * array * size


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
