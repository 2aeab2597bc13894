"""Races, shaken out by waits of random length for copies and for what warps give each other.

Without a GPU, by other orders of threads and asynchronous work.
"""

import numpy as np
import pytest
from calls import call
from cases import make

import parallax_core as plx

CASES = {
    "copy engine": dict(batch=3, capacity=3000),
    "copy engine, heads of 64": dict(batch=3, capacity=3000, head_dim=64),
    "copy engine, ragged pages": dict(
        batch=3, capacity=3072, page_size=64, cache_seqlens=np.array([3001, 5, 777], np.int32)
    ),
    "16 rows": dict(batch=2, capacity=3000, kv_heads=1, group=16),
    "16 rows, lengths on the device": dict(
        batch=3, capacity=2000, kv_heads=1, group=16, cache_seqlens=np.array([1990, 5, 600], np.int32)
    ),
    "16 rows of long sequences": dict(batch=17, capacity=8192, kv_heads=1, group=16),
    "12 rows, ragged pages of 16": dict(
        batch=3,
        capacity=2000,
        kv_heads=1,
        group=12,
        page_size=16,
        cache_seqlens=np.array([1990, 5, 600], np.int32),
    ),
    "rows in turn": dict(batch=60, capacity=900, kv_heads=1, group=3),
    "rows of which one of four blocks is given the rest": dict(
        batch=33, capacity=2048, kv_heads=2, group=1, head_dim=64
    ),
    "lanes copy": dict(batch=3, capacity=2000, head_dim=80),
    "float32": dict(batch=2, capacity=1000, dtype=np.dtype(np.float32)),
}


@pytest.fixture
def delayed(monkeypatch):
    """Kernels with waits, in place of those that calls would find."""
    from compile_options import add_options

    from parallax_core.cuda_kernels import calls, compiler

    add_options(monkeypatch, "-DSTRESS")
    monkeypatch.setattr(compiler, "_kernels", {})
    calls.forget()
    yield
    calls.forget()


OPERATIONS = {
    "parallax": ("parallax", {}),
    "lla": ("lla", {"ridge": 0.1}),
    "lla by conjugate gradients": ("lla", {"ridge": 0.1, "solver": "cg"}),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_waits_change_no_bit(writable, case, operation, request):
    if operation == "lla by conjugate gradients" and case in ("lanes copy", "float32"):
        pytest.skip("the portable kernel has no conjugate gradients")
    hold_delayed(writable, case, operation, request)


def hold_delayed(writable, case, operation, request):
    arrays = writable.case(make(**CASES[case]))
    operation, extra = OPERATIONS[operation]
    expected = writable.get(call(plx, operation, arrays, **extra))
    request.getfixturevalue("delayed")
    for _ in writable.disturbances():
        np.testing.assert_array_equal(writable.get(call(plx, operation, arrays, **extra)), expected)


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("case", ["rows in turn", "rows of which one of four blocks is given the rest"])
def test_waits_change_no_bit_of_rows_that_are_factored_after_few_steps(
    writable, case, most, request, monkeypatch
):
    """Some warps of a block may be done with their steps before others have added up what these need."""
    from parallax_core.cuda_kernels import calls, lla

    monkeypatch.setattr(lla, "_MOST_STEPS", most)
    calls.forget()
    hold_delayed(writable, case, "lla by conjugate gradients", request)
