"""The choice of a kernel's shape; it needs neither a GPU nor a compiler."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax_core.cuda_kernels import heuristics
from parallax_core.cuda_kernels.layout import Layout
from parallax_core.problem import BFLOAT16, Problem

HALVES = BFLOAT16, np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
MULTIPROCESSORS = 132
CACHE_BYTES = 50 << 20
OWN_BYTES = {False: 256, True: 1024}
"""Shared memory of a kernel's own variables, by whether the copy engine brings the keys."""
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""That a block may have."""


class Described:
    """An index array of which only the shape is known."""

    def __init__(self, *shape):
        self.shape = shape


def call_of(
    batch=1, q_len=1, q_heads=8, kv_heads=8, kv_len=512, head_dim=128, value_dim=None, *, dtype=BFLOAT16,
    probe_dtype=BFLOAT16, causal=True, window_size=None, lengths=False, page_size=None, packed=0,
    split_size=None, capability=(9, 0), aligned=True, heads_first=False,
    operation="parallax_decode", return_state=False,
):  # fmt: skip
    """The problem of a call and how its arrays lie."""
    value_dim = head_dim if value_dim is None else value_dim
    problem = Problem(
        operation, batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim, dtype, probe_dtype,
        head_dim**-0.5, causal, window_size,
        cu_seqlens=Described(packed + 1) if packed else None,
        cache_seqlens=Described(batch) if lengths else None,
        page_table=Described(batch, kv_len // page_size) if page_size else None, page_size=page_size,
    )  # fmt: skip

    def strides(heads, length, size):
        rows = (size, length * size) if heads_first else (heads * size, size)
        return length * heads * size, *rows

    layout = Layout(
        device=0, capability=capability, multiprocessors=MULTIPROCESSORS, cache_bytes=CACHE_BYTES,
        shared_bytes=SHARED_KIB[capability] << 10,
        q=strides(q_heads, q_len, head_dim),
        r=None if probe_dtype is None else strides(q_heads, q_len, head_dim),
        k=strides(kv_heads, kv_len, head_dim), v=strides(kv_heads, kv_len, value_dim),
        out=strides(q_heads, q_len, value_dim), aligned=aligned, aligned_queries=aligned, index_bits={},
        return_state=return_state, split_size=split_size, num_pages=batch * 8 if page_size else None,
    )  # fmt: skip
    return problem, layout


def shape_of(**call):
    """The problem of a call and the shape chosen for it."""
    problem, layout = call_of(**call)
    return problem, heuristics.choose(problem, layout)


@st.composite
def calls(draw):
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    dtype = draw(st.sampled_from((*HALVES, FLOAT32)))
    packed = draw(st.sampled_from((0, 0, 0, 3)))
    page_size = None if packed else draw(st.sampled_from((None, None, 1, 16, 64, 100, 256)))
    length = draw(st.integers(1, 5000))
    q_len = length if packed else draw(st.integers(1, 40))
    causal = draw(st.booleans()) if packed or page_size is None else True
    return dict(
        batch=1 if packed else draw(st.integers(1, 200)), q_len=q_len, q_heads=kv_heads * group,
        kv_heads=kv_heads, kv_len=length if page_size is None else page_size * draw(st.integers(1, 20)),
        head_dim=draw(st.integers(1, 256) | st.sampled_from((64, 128))),
        value_dim=draw(st.none() | st.integers(1, 256) | st.sampled_from((64, 128))), dtype=dtype,
        probe_dtype=draw(st.sampled_from((None, dtype, FLOAT32))), causal=causal,
        window_size=draw(st.none() | st.integers(1, 6000)) if causal else None,
        lengths=not packed and (page_size is not None or draw(st.booleans())), page_size=page_size,
        packed=packed, split_size=None if packed else draw(st.sampled_from((None, None, 16, 128, 1024))),
        capability=draw(st.sampled_from(((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)))),
        aligned=draw(st.booleans()), heads_first=draw(st.booleans()),
    )  # fmt: skip


@given(calls())
def test_every_call_has_a_shape_within_the_limits_of_its_device(call):
    problem, shape = shape_of(**call)
    defines = dict(shape.defines)
    half = problem.dtype.itemsize == 2
    # With what the kernel has for itself; the compiled ones are asked in test_cuda_kernels.py.
    block = shape.shared_bytes + OWN_BYTES[shape.boxes]
    assert block <= SHARED_KIB[call["capability"]] * 1024
    assert not shape.boxes or defines["BLOCKS"] * (block + 1024) <= 228 * 1024
    assert defines["SLOTS"] >= 2, "a ring of one slot never copies ahead"
    assert shape.boxes <= (half and problem_fits_boxes(call))
    x, y, z = shape.grid
    assert 1 <= x < 2**31
    assert 1 <= y <= 65535
    assert 1 <= z <= 65535
    rows = 4 * defines["TILES"]
    assert shape.row_blocks == math.ceil(problem.q_len * problem.group_size / rows)
    # Accumulators of a lane: two sums of every channel, and no more registers than a thread has.
    channels = math.ceil(problem.value_dim / (16 if half else 32)) * (2 if half else 4)
    assert 2 * shape.heads * defines["TILES"] * channels <= 128
    cluster = defines.get("CLUSTER", 1)
    assert x % cluster == 0
    assert cluster == 1 or problem.value_dim % cluster == 0


def problem_fits_boxes(call):
    takes = (9, 0) <= call["capability"] < (12, 0)
    return takes and call["aligned"] and (call["page_size"] or 16) % 16 == 0


@given(calls())
def test_the_cuts_of_an_item_are_all_of_its_steps(call):
    problem, shape = shape_of(**call)
    defines = dict(shape.defines)
    if defines["GRID"] != heuristics.ALIKE:
        return
    cuts = shape.grid[0]
    assert 0 <= shape.surplus < cuts
    steps = shape.share * cuts + shape.surplus
    first = 0
    if problem.causal and problem.window_size is not None:
        first = max(0, problem.kv_len - problem.q_len + 1 - problem.window_size)
    if shape.boxes and problem.page_size:
        first = first // 16 * 16
    assert 16 * (steps - 1) < problem.kv_len - first <= 16 * steps
    items = problem.batch * (problem.kv_heads // shape.heads) * shape.row_blocks
    assert items == shape.grid[1] * shape.grid[2]
    cluster = defines.get("CLUSTER", 1)
    no_parts = cuts == cluster or shape.parcel_bytes
    assert (shape.parts, shape.counters) == ((0, 0) if no_parts else (items * cuts, items * cluster))


@given(calls())
def test_blocks_that_send_each_other_parcels_all_run_at_once(call):
    _, shape = shape_of(**call)
    defines = dict(shape.defines)
    assert (shape.parcel_bytes > 0) == bool(defines.get("TOGETHER"))
    if shape.parcel_bytes:
        x, y, z = shape.grid
        assert x * y * z <= MULTIPROCESSORS * defines["BLOCKS"]
        assert defines["GRID"] in (heuristics.ALIKE, heuristics.EQUAL_RANGES)
        assert (defines["CLUSTER"], defines["PINNED"], shape.parts, shape.counters) == (1, 0, 0, 0)
        # Of equal ranges every block shares two items at most.
        places = x * y * z if defines["GRID"] == heuristics.ALIKE else 2 * x
        words = shape.parcel_bytes - 8 * defines["MOST_ITEMS"]
        assert words == places * 16 * 4 * defines["TILES"] * shape.heads * (2 + defines["VALUE_DIM"])


def test_one_sequence_is_cut_alike_wherever_its_length_is():
    for call in (
        dict(kv_len=512),
        dict(kv_len=16384),
        dict(kv_len=4096, q_heads=64),
        dict(kv_len=4096, page_size=64),
    ):
        (_, there), (_, here) = shape_of(**call, lengths=True), shape_of(**call)
        assert there.grid == here.grid
        assert dict(there.defines)["GRID"] == heuristics.ALIKE
    assert dict(shape_of(batch=2, lengths=True)[1].defines)["GRID"] == heuristics.EQUAL_RANGES


def test_few_items_of_many_rows_are_shared_by_fewer_blocks():
    """Parts, which many rows make large, are more to send or to merge than few blocks have to read."""
    many, few = (shape_of(batch=2, kv_heads=1, kv_len=8192, q_heads=g, lengths=True)[1] for g in (16, 1))
    assert many.parcel_bytes
    assert 16 <= many.grid[0] <= 64
    assert not few.parcel_bytes
    assert few.grid[0] >= 128
    # Of so few keys one block merges what there is.
    assert not shape_of(batch=2, kv_heads=1, kv_len=256, q_heads=16, lengths=True)[1].parcel_bytes


def test_rows_of_256_bytes_come_by_the_copy_engine_and_two_heads_of_64_make_one():
    assert shape_of(head_dim=128)[1].boxes
    assert shape_of(head_dim=64)[1].heads == 2
    assert not shape_of(head_dim=64, kv_heads=1, q_heads=8)[1].boxes
    assert not shape_of(head_dim=64, heads_first=True)[1].boxes
    assert not shape_of(head_dim=128, capability=(8, 0))[1].boxes
    assert not shape_of(head_dim=128, capability=(12, 0))[1].boxes
    assert not shape_of(head_dim=128, aligned=False)[1].boxes


def test_long_rows_are_cut_so_that_no_multiprocessor_is_idle():
    """Of 132, 8 heads fill 128 with one block each, and all with two, by which short rows gain nothing."""
    for length, blocks, cuts in ((131072, 2, 33), (16384, 1, 16)):
        _, shape = shape_of(kv_len=length)
        assert (dict(shape.defines)["BLOCKS"], shape.grid[0]) == (blocks, cuts)


def test_a_pinned_split_does_not_depend_on_the_batch():
    few, many = (shape_of(batch=n, lengths=True, kv_len=4096, split_size=512)[1] for n in (1, 64))
    differ = {name for name, value in few.defines if dict(many.defines)[name] != value}
    assert few.split_steps == many.split_steps == 32
    assert not differ


def test_only_what_is_read_once_makes_way_in_the_cache():
    """More keys than the second-level cache holds, which no other block or sequence reads again."""

    def read_once(**call):
        return dict(shape_of(**call)[1].defines)["READ_ONCE"]

    assert read_once(kv_len=16384)
    assert read_once(batch=32, kv_len=4096, lengths=True)
    assert not read_once(kv_len=8192)
    assert not read_once(batch=32, kv_len=4096, lengths=True, page_size=64)
    assert not read_once(kv_len=16384, q_len=8, q_heads=32)


@pytest.mark.parametrize("length", [2**28, 2**31 - 16])
def test_steps_beyond_32_bits_are_not_numbered_through(length):
    _, shape = shape_of(batch=64, kv_heads=8, kv_len=length, lengths=True)
    assert dict(shape.defines)["GRID"] == heuristics.WHOLE
