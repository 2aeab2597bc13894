"""Which kernel of local linear attention a call gets, and how its rows are cut."""

import itertools
import math

import numpy as np
import pytest

from parallax_core.errors import BackendUnavailableError

pytest.importorskip("cupy", reason="the launcher imports CuPy; pip install '.[gpu-compile]'")

from test_cuda_heuristics import call_of

from parallax_core.cuda_kernels import heuristics, lla


def shape_of(layout=None, **call):
    problem, found = call_of(**{"operation": "lla_decode", "probe_dtype": None} | call)
    return lla.choose(problem, found._replace(**layout or {}))


@pytest.mark.parametrize(
    "call, splits, cluster",
    [
        (dict(batch=32, kv_len=4096), 1, 1),
        (dict(kv_len=300), 1, 1),
        # A full GPU has no room for large clusters.
        (dict(kv_len=16384), 16, 2),
        (dict(batch=4, q_heads=16, kv_heads=16, kv_len=4096, head_dim=64), 4, 2),
        (dict(q_heads=1, kv_heads=1, kv_len=131072), 32, 8),
        (dict(kv_len=4096), 8, 8),
        # Nor does the bits' place in a batch decide.
        (dict(kv_len=4096, split_size=1024), 4, 2),
    ],
)
def test_rows_are_cut_where_they_leave_the_gpu_idle(call, splits, cluster):
    shape = shape_of(**call)
    assert shape.source == "sm90/lla.cu"
    assert (shape.splits, dict(shape.defines)["CLUSTER"]) == (splits, cluster)


@pytest.mark.parametrize(
    "call, splits, solvers",
    [
        (dict(batch=32, kv_len=4096), 1, 1),
        (dict(kv_len=4096), 8, 8),
        (dict(kv_len=16384), 16, 16),
        (dict(q_heads=1, kv_heads=1, kv_len=131072), 16, 16),
        # One is given the moments of the others, where these are small and few.
        (dict(batch=4, q_heads=16, kv_heads=16, kv_len=4096, head_dim=64), 4, 1),
        (dict(batch=3, q_heads=16, kv_heads=16, kv_len=4096, head_dim=64), 4, 1),
        (dict(batch=16, kv_len=4096, head_dim=64), 2, 1),
        (dict(batch=2, q_heads=16, kv_heads=16, kv_len=8192, head_dim=64), 8, 8),
        (dict(batch=8, kv_len=4096), 2, 2),
        (dict(kv_len=16384, split_size=1024), 1, 1),
        (dict(batch=16, kv_len=4096, head_dim=64, split_size=1024), 1, 1),
    ],
)
def test_blocks_that_solve_a_row_together_run_at_once(call, splits, solvers):
    problem, layout = call_of(**{"operation": "lla_decode", "probe_dtype": None} | call)
    shape = lla.choose(problem, layout, "cg")
    assert shape.source == "sm90/lla.cu"
    defines = dict(shape.defines)
    assert (shape.splits, defines["SOLVERS"], defines["CLUSTER"]) == (splits, solvers, 1)
    assert defines["GATHERED"] == (splits if solvers < splits else 0)
    assert (shape.mail_bytes > 0) == (splits > 1)
    # Only what is shared may be left to a factorisation that merges it.
    assert (shape.partial_floats > 0) == (solvers > 1)
    # Of fewer blocks words are sooner looked at than added up.
    assert defines["STEPS_ADDED_UP"] == (splits > 8)
    blocks_at_once = {64: 2, 128: 1}[problem.head_dim] * layout.multiprocessors
    assert splits == 1 or shape.rows * splits <= blocks_at_once


@pytest.mark.parametrize(
    "call, two_passes",
    [
        (dict(batch=32, kv_len=512), True),
        (dict(batch=17, kv_len=640, page_size=64, lengths=True), True),
        # Long rows read their keys once, and few rows have the multiprocessors to themselves.
        (dict(batch=32, kv_len=641), False),
        (dict(batch=16, kv_len=512), False),
        (dict(batch=64, kv_len=512, head_dim=64), False),
        # A row's bits do not depend on its batch.
        (dict(batch=32, kv_len=512, split_size=1024), False),
    ],
)
def test_many_rows_of_few_keys_are_taken_in_two_passes(call, two_passes):
    problem, layout = call_of(**{"operation": "lla_decode", "probe_dtype": None} | call)
    shape = lla.choose(problem, layout, "cg")
    assert shape.source == ("sm90/lla_two_pass.cu" if two_passes else "sm90/lla.cu")
    assert lla.choose(problem, layout, "cholesky").source == "sm90/lla.cu"
    if two_passes:
        assert (shape.splits, shape.rows, shape.mail_bytes) == (1, 8 * problem.batch, 0)


@pytest.mark.parametrize(
    "call, turns",
    [
        (dict(batch=32, kv_len=1024), 2),
        (dict(batch=32, kv_len=2048), 2),
        (dict(batch=17, kv_len=1024), 2),
        (dict(batch=1000, kv_len=1024), 32),
        # Each row has a multiprocessor; the loop counts for more; two blocks hide each other's solving.
        (dict(batch=16, kv_len=1024), 1),
        (dict(batch=32, kv_len=2049), 1),
        (dict(batch=128, kv_len=2048, head_dim=64), 1),
        # Rows of any lengths go to the blocks that are free, and a row's bits do not depend on its batch.
        (dict(batch=32, kv_len=1024, lengths=True), 1),
        (dict(batch=32, kv_len=1024, split_size=1024), 1),
    ],
)
def test_many_rows_are_taken_in_turn(call, turns):
    problem, layout = call_of(**{"operation": "lla_decode", "probe_dtype": None, "lengths": False} | call)
    shape = lla.choose(problem, layout, "cg")
    assert shape.source == "sm90/lla.cu"
    assert (shape.turns, dict(shape.defines)["ROWS_IN_TURN"]) == (turns, turns > 1)
    assert lla.choose(problem, layout, "cholesky").turns == 1


def test_rows_of_every_cut_have_mail_of_their_own():
    """Word by word: what a cut of rows reaches ends where the next one's begins."""
    offsets = [lla._mail(log2, 132)[1] for log2 in range(1, 6)]
    for log2, (begin, end) in enumerate(itertools.pairwise(offsets), start=1):
        rows = 2 * 132 >> log2
        words = 2 * 2**log2 * 384 + (4 * 128 if log2 > 3 else 4) + 1
        assert end - begin == rows * math.ceil(words / 16) * 128
    assert {lla._mail(log2, 132)[0] for log2 in range(1, 5)} == {offsets[4]}
    # What one block of a row is given lies behind, of whatever cut: of all blocks that run at once.
    given = 128 * math.ceil((16 * (2 * 64 + 2 * 64 * 64 // 4) + 2 * 8) / 128)
    for log2 in (1, 2):
        assert lla._mail(log2, 132, gathered=True) == (offsets[4] + 4096 + 2 * 132 * given, offsets[4])


@pytest.mark.parametrize("call", [dict(head_dim=80), dict(return_state=True), dict(capability=(8, 0))])
def test_conjugate_gradients_say_where_they_are(call):
    problem, layout = call_of(**{"operation": "lla_decode", "probe_dtype": None} | call)
    with pytest.raises(BackendUnavailableError, match=r"^solver is 'cg', which on a GPU is there for"):
        lla.choose(problem, layout, "cg")


@pytest.mark.parametrize("page_size, box", [(None, 64), (16, 16), (48, 16), (32, 32), (64, 64), (256, 64)])
def test_copies_do_not_cross_pages(page_size, box):
    shape = shape_of(lengths=page_size is not None, page_size=page_size, kv_len=768)
    assert shape.source == "sm90/lla.cu"
    assert shape.box == dict(shape.defines)["BOX"] == box


@pytest.mark.parametrize(
    "call, layout",
    [
        (dict(lengths=True, page_size=20), {}),
        (dict(head_dim=80), {}),
        (dict(value_dim=64), {}),
        (dict(dtype=np.dtype(np.float32)), {}),
        (dict(aligned=False), {}),
        (dict(return_state=True), {}),
        (dict(capability=(8, 0)), {}),
        (dict(capability=(10, 0)), {}),
        (dict(), dict(k=(512 * 1024, -1024, 128))),
        (dict(), dict(v=(512 * 1024, 1024, 0))),
        (dict(batch=2), dict(k=(0, 1024, 128))),
    ],
)
def test_everything_else_takes_the_portable_kernel(call, layout):
    shape = shape_of(layout, **call)
    assert (shape.source, shape.box) == ("portable/lla.cu", 0)


@pytest.mark.parametrize("k", [(512 * 1024, 1024, 0), (0, 1024, 128), (512 * 1024, -1024, 128)])
def test_broadcast_and_reversed_caches_are_not_described_to_the_copy_engine(k):
    problem, layout = call_of(batch=2)
    assert heuristics.choose(problem, layout).boxes
    assert not heuristics.choose(problem, layout._replace(k=k)).boxes
