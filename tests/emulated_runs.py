"""A public call on emulated kernels, in several orders of their threads."""

import functools

import cases
import emulation
import numpy as np
from budget import solved_budget
from calls import call
from cases import error_of_rows, hold
from emulation import EARLY, LATE, RANDOM_EARLY, RANDOM_LATE, Prepared, emulated
from stand_in import on_gpu
from strategies import BFLOAT16, DecodeCase

import parallax_core as plx

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
ORDERS = LATE, EARLY, RANDOM_LATE, RANDOM_EARLY

make = functools.partial(cases.make, group=1, capacity=200)


def lengths(*values):
    return np.array(values, np.int32)


def run(operation, case, capability, orders=ORDERS, multiprocessors=12, **extra):
    """The outputs of a call in each of the orders, as float64; counters are left zero."""
    results = []
    with emulated(capability, multiprocessors) as workspace:
        arrays = on_gpu(case)
        for Prepared.order in orders:
            o = call(plx, operation, arrays, **extra)
            results.append(o.data.astype(np.float64))
            assert not getattr(workspace, "counters", np.zeros(1)).any()
    return results


def with_scores(case, scores):
    """Keys of chosen scores, in units of log 2, along the query of the first row; in bfloat16."""
    q, k = case.q.copy(), case.k_cache.copy()
    norm = np.linalg.norm(q[:, 0, 0], axis=-1)[:, None]
    for key, score in scores:
        k[:, key, 0] = score * np.log(2) * np.sqrt(q.shape[-1]) / norm * (q[:, 0, 0] / norm)
    return DecodeCase(*(x.astype(BFLOAT16) for x in (q, case.r, k, case.v_cache)), {})


def define(name, monkeypatch):
    """From here on kernels are built with this defined."""
    kernel = emulation._kernel
    monkeypatch.setattr(emulation, "_kernel", lambda source, defines: kernel(source, (*defines, (name, 1))))


def for_racecheck(monkeypatch):
    """From here on kernels are built as ``PARALLAX_RACECHECK=1`` has them built."""
    define("FOR_RACECHECK", monkeypatch)


def hold_in_every_order(case, capability, solver, multiprocessors=12):
    """Local linear attention: the same bits, within the reference's bound."""
    expected = call(plx.reference, "lla", case, ridge=0.1)
    bound = solved_budget(case, np.full(case.q.shape[:3], 0.1))
    results = run("lla", case, capability, multiprocessors=multiprocessors, ridge=0.1, solver=solver)
    for o in results:
        np.testing.assert_array_equal(o, results[0])
    hold(results[0], expected, bound)


def chosen_shapes(monkeypatch):
    """The shapes of calls from here on, as they are chosen."""
    from parallax_core.cuda_kernels import lla

    shapes, choose = [], lla.choose
    monkeypatch.setattr(lla, "choose", lambda *call: shapes.append(choose(*call)) or shapes[-1])
    return shapes


def hold_steps_in_every_order(case, most, monkeypatch, multiprocessors=12):
    """The same by conjugate gradients of so many steps at most; returns the shapes that were chosen."""
    from parallax_core.cuda_kernels import lla

    monkeypatch.setattr(lla, "_MOST_STEPS", most)
    shapes = chosen_shapes(monkeypatch)
    hold_in_every_order(case, (9, 0), "cg", multiprocessors)
    return shapes


def hold_steps_that_are_foreseen_wrongly(sizes, monkeypatch, multiprocessors):
    """Every second step is thought to be the last; the slope is the row's in the end, in every order.

    Queries are large: what the slope adds is more than the output. Returns the shapes that were chosen.
    """
    shapes = chosen_shapes(monkeypatch)
    define("FORESEEN_WRONGLY", monkeypatch)
    case = make(kv_heads=1, dtype=FLOAT32, **sizes)
    arrays = 4 * case.q, case.r, case.k_cache, case.v_cache
    case = DecodeCase(*(x.astype(BFLOAT16) for x in arrays), {})
    expected = call(plx.reference, "lla", case, ridge=0.1)
    results = run("lla", case, (9, 0), multiprocessors=multiprocessors, ridge=0.1, solver="cg")
    for o in results:
        np.testing.assert_array_equal(o, results[0])
    assert error_of_rows(results[0], expected).max() <= 1e-2
    return shapes
