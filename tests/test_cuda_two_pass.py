"""Local linear attention in two passes, over a row's keys and its values, on the host, thread by thread."""

import numpy as np
import pytest

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from calls import call
from cases import error_of_rows
from emulated_runs import (
    FLOAT16,
    FLOAT32,
    hold_steps_in_every_order,
    hold_steps_that_are_foreseen_wrongly,
    lengths,
    make,
    run,
    with_scores,
)
from emulation import RANDOM_EARLY, RANDOM_LATE, needs_compiler
from stand_in import Array
from strategies import BFLOAT16, DecodeCase
from test_cuda_emulated_lla import KEYS

import parallax_core as plx

pytestmark = needs_compiler

RUN = dict(multiprocessors=1, ridge=0.1, solver="cg")
"""With one multiprocessor, rows are always more."""

CALLS = {
    "one tile": (dict(kv_heads=1, capacity=40), 64),
    "all X kept": (dict(kv_heads=1, capacity=300), 64),
    "tiles taken twice": (dict(kv_heads=1, capacity=640), 64),
    "pages of 16, a window": (
        dict(kv_heads=1, capacity=640, page_size=16, window_size=500, cache_seqlens=lengths(590, 37)), 64
    ),
    "paddings, tokens": (
        dict(length=2, capacity=200, cache_seqlens=lengths(200, 90), cache_leftpad=lengths(70, 3)), 64
    ),
    "float16": (dict(kv_heads=1, capacity=450, dtype=FLOAT16), 64),
    "packed sequences": (dict(packed=(9, 1, 14), kv_heads=1, group=2), 64),
    "a row without keys": (dict(kv_heads=1, capacity=100, cache_seqlens=lengths(0, 100)), 64),
    "left to the factorisation": (dict(kv_heads=1, capacity=150), 3),
    "tiles taken twice, left to the factorisation": (dict(kv_heads=1, capacity=500), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_rows_in_every_order_of_their_threads(name, monkeypatch):
    sizes, most = CALLS[name]
    shapes = hold_steps_in_every_order(make(**sizes), most, monkeypatch, multiprocessors=1)
    assert {shape.source for shape in shapes} == {"sm90/lla_two_pass.cu"}


def test_steps_go_on_where_the_last_has_led_less_far_than_it_was_thought_to(monkeypatch):
    hold_steps_that_are_foreseen_wrongly(dict(batch=2, capacity=300), monkeypatch, 1)


@pytest.mark.parametrize("keys", KEYS)
def test_rows_are_within_a_hundredth_of_the_reference(keys):
    """In bfloat16 at a ridge of 0.1, where the reference takes the same rounded inputs."""
    case = make(batch=4, kv_heads=1, capacity=500, dtype=FLOAT32)
    q, k = KEYS[keys](case.q, case.k_cache)
    v = case.v_cache[:, : k.shape[1]]
    case = DecodeCase(*(x.astype(BFLOAT16) for x in (q, case.r, k, v)), {})
    expected = call(plx.reference, "lla", case, ridge=0.1)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize("last", [5, 200, 410])
def test_rows_begin_anew_where_weights_grow(last):
    """The largest score of a tile is 2^20 times the first one's, and another tile's is between them."""
    case = make(batch=2, kv_heads=1, capacity=430, dtype=FLOAT32)
    case = with_scores(case, ((100, 10.0), (last, 20.0)))
    expected = call(plx.reference, "lla", case, ridge=0.1)
    for o in run("lla", case, (9, 0), orders=(RANDOM_LATE, RANDOM_EARLY), **RUN):
        assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize("change", ["keys grow", "zeros come first", "values grow"])
def test_keys_beyond_the_scale_of_the_first_are_taken_again(change):
    case = make(batch=2, kv_heads=1, capacity=450, dtype=BFLOAT16)
    q, k, v = case.q.astype(FLOAT32), case.k_cache.copy(), case.v_cache.copy()
    if change == "keys grow":
        # Across the query: the scores stay as they are.
        across = np.random.default_rng(1).standard_normal(k[:, 64:].shape).astype(np.float32)
        across -= (across * q).sum(-1, keepdims=True) / (q * q).sum(-1, keepdims=True) * q
        k[:, 64:] = (2.0**14 * across).astype(BFLOAT16)
    elif change == "zeros come first":
        k[:, :64] = 0
    else:
        v[:, 64:] *= 2.0**20
    scale = 2.0**-16 if change == "keys grow" else None
    case = DecodeCase(case.q, case.r, k, v, {} if scale is None else {"scale": scale})
    ridge = 0.1 * 4.0**14 if change == "keys grow" else 0.1
    expected = call(plx.reference, "lla", case, ridge=ridge)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN | {"ridge": ridge})
    assert error_of_rows(o, expected).max() <= 1e-2


def test_what_is_hidden_changes_no_bit_and_what_is_seen_shows():
    case = make(length=2, kv_heads=1, capacity=500, cache_seqlens=lengths(430, 17))
    (clean,) = run("lla", case, (9, 0), orders=(RANDOM_EARLY,), **RUN)
    k, v = case.k_cache.copy(), case.v_cache.copy()
    for b, n in enumerate(case.options["cache_seqlens"]):
        k[b, n:], v[b, n:] = np.nan, np.inf
    (dirty,) = run("lla", case.with_keys_and_values(k, v), (9, 0), orders=(RANDOM_EARLY,), **RUN)
    np.testing.assert_array_equal(dirty, clean)
    # The newest key of the first sequence is seen by its last row alone, and one of the first tile by both.
    for place, rows in ((429, np.s_[1:]), (3, np.s_[:])):
        for array, channels in ((0, np.s_[:]), (1, np.s_[5:6])):
            arrays = [case.k_cache.copy(), case.v_cache.copy()]
            arrays[array][0, place, 0, 5] = np.nan
            (o,) = run("lla", case.with_keys_and_values(*arrays), (9, 0), orders=(RANDOM_LATE,), **RUN)
            sees = np.zeros(o.shape, bool)
            sees[0, rows, :, channels] = True
            assert np.isnan(o[sees]).all()
            np.testing.assert_array_equal(o[~sees], clean[~sees])


def test_rows_without_a_ridge_are_nan():
    case = make(kv_heads=1, capacity=100)
    (o,) = run(
        "lla",
        case,
        (9, 0),
        orders=(RANDOM_LATE,),
        **RUN | {"ridge": Array(np.zeros(case.q.shape[:3], np.float32))},
    )
    assert np.isnan(o).all()


def test_rows_of_a_page_that_does_not_exist_are_nan():
    case = make(kv_heads=1, capacity=192, page_size=64, cache_seqlens=lengths(192, 190))
    case.options["page_table"][1, 1] = -1
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), **RUN)
    assert np.isfinite(o[0]).all()
    assert np.isnan(o[1]).all()
