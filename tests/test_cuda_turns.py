"""Blocks of local linear attention that take rows in turn, on the host, thread by thread."""

import numpy as np
import pytest

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from calls import call
from cases import error_of_rows
from emulated_runs import (
    FLOAT16,
    FLOAT32,
    chosen_shapes,
    for_racecheck,
    hold_in_every_order,
    make,
    run,
    with_scores,
)
from emulation import RANDOM_EARLY, RANDOM_LATE, needs_compiler
from stand_in import Array
from strategies import BFLOAT16, DecodeCase
from test_cuda_emulated_lla import KEYS

import parallax_core as plx
from parallax_core.cuda_kernels import lla

pytestmark = needs_compiler

RUN = dict(multiprocessors=2, ridge=0.1, solver="cg")

CALLS = {
    "a tile a row": (dict(batch=3, kv_heads=2, capacity=40), 64),
    "rows that the ring has room for": (dict(batch=3, kv_heads=1, capacity=300), 64),
    "rows that it has not": (dict(batch=7, kv_heads=1, capacity=700), 64),
    "a window": (dict(batch=2, length=3, kv_heads=1, capacity=400, window_size=150), 64),
    "float16": (dict(batch=3, kv_heads=1, capacity=450, dtype=FLOAT16), 64),
    "a group of 3": (dict(batch=2, kv_heads=1, group=3, capacity=200), 64),
    "rows without keys": (dict(batch=2, length=5, kv_heads=1, capacity=2), 64),
    "left to the factorisation": (dict(batch=5, kv_heads=1, capacity=700), 3),
    "a tile a row, left to the factorisation": (dict(batch=5, kv_heads=1, capacity=60), 3),
    "some left to the factorisation": (dict(batch=5, kv_heads=1, capacity=450), 16),
}  # fmt: skip


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    """Every row in one pass; the shapes that were chosen."""
    monkeypatch.setattr(lla, "_TWO_PASS_KEYS", 0)
    seen = chosen_shapes(monkeypatch)
    yield seen
    assert seen
    assert all(dict(shape.defines)["ROWS_IN_TURN"] and shape.turns > 1 for shape in seen)


@pytest.mark.parametrize("name", CALLS)
def test_rows_in_every_order_of_their_threads(name, monkeypatch):
    sizes, most = CALLS[name]
    monkeypatch.setattr(lla, "_MOST_STEPS", most)
    hold_in_every_order(make(**sizes), (9, 0), "cg", multiprocessors=2)


@pytest.mark.parametrize("keys", KEYS)
def test_rows_are_within_a_hundredth_of_the_reference(keys):
    """In bfloat16 at a ridge of 0.1, where the reference takes the same rounded inputs."""
    case = make(batch=4, kv_heads=1, capacity=500, dtype=FLOAT32)
    q, k = KEYS[keys](case.q, case.k_cache)
    case = DecodeCase(*(x.astype(BFLOAT16) for x in (q, case.r, k, case.v_cache[:, : k.shape[1]])), {})
    expected = call(plx.reference, "lla", case, ridge=0.1)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize("most", [64, 3])
@pytest.mark.parametrize("last", [70, 150, 250, 350])
def test_weights_may_grow_while_the_row_before_is_solved(last, most, monkeypatch):
    """The origin moves with moments that are not the row's yet; or the tiles are taken anew."""
    monkeypatch.setattr(lla, "_MOST_STEPS", most)
    case = make(batch=5, kv_heads=1, capacity=430, dtype=FLOAT32)
    case = with_scores(case, ((65, 10.0), (last, 20.0)))
    expected = call(plx.reference, "lla", case, ridge=0.1)
    results = run("lla", case, (9, 0), orders=(RANDOM_LATE, RANDOM_EARLY), **RUN)
    np.testing.assert_array_equal(*results)
    assert error_of_rows(results[0], expected).max() <= 1e-2


@pytest.mark.parametrize("change", ["values grow", "zeros come first"])
def test_rows_beyond_the_scale_of_their_first_tile_are_taken_again(change):
    """Every other one of a block's rows."""
    case = make(batch=8, kv_heads=1, capacity=400, dtype=BFLOAT16)
    k, v = case.k_cache.copy(), case.v_cache.copy()
    if change == "values grow":
        v[2:6, 64:] *= 2.0**20
    else:
        k[2:6, :64] = v[2:6, :64] = 0
    case = case.with_keys_and_values(k, v)
    expected = call(plx.reference, "lla", case, ridge=0.1)
    results = run("lla", case, (9, 0), orders=(RANDOM_LATE, RANDOM_EARLY), **RUN)
    np.testing.assert_array_equal(*results)
    assert error_of_rows(results[0], expected).max() <= 1e-2


def test_rows_without_a_ridge_are_nan_alone():
    case = make(batch=5, kv_heads=1, capacity=200)
    (whole,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    ridge = np.array([0.1, 0.0, 0.1, -1.0, 0.1], np.float32).reshape(5, 1, 1)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN | {"ridge": Array(ridge)})
    assert np.isnan(o[[1, 3]]).all()
    np.testing.assert_array_equal(o[[0, 2, 4]], whole[[0, 2, 4]])


def test_what_is_seen_of_nan_stays_in_its_row():
    case = make(batch=6, kv_heads=1, capacity=300)
    (clean,) = run("lla", case, (9, 0), orders=(RANDOM_EARLY,), **RUN)
    for array, channels in ((0, np.s_[:]), (1, np.s_[5:6])):
        arrays = [case.k_cache.copy(), case.v_cache.copy()]
        arrays[array][2, 290, 0, 5] = np.nan
        (o,) = run("lla", case.with_keys_and_values(*arrays), (9, 0), orders=(RANDOM_LATE,), **RUN)
        sees = np.zeros(o.shape, bool)
        sees[2, :, :, channels] = True
        assert np.isnan(o[sees]).all()
        np.testing.assert_array_equal(o[~sees], clean[~sees])


def test_the_kernel_that_racecheck_follows_computes_the_same_bits(monkeypatch):
    case = make(batch=4, kv_heads=1, capacity=450)
    (expected,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    for_racecheck(monkeypatch)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    np.testing.assert_array_equal(o, expected)
