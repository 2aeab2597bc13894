"""Local linear attention's kernels run on the host, thread by thread, in several orders."""

import numpy as np
import oracle
import pytest

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from budget import solved_budget
from calls import call
from cases import error_of_rows, hold
from emulated_runs import (
    FLOAT16,
    FLOAT32,
    for_racecheck,
    hold_in_every_order,
    hold_steps_in_every_order,
    hold_steps_that_are_foreseen_wrongly,
    lengths,
    make,
    run,
)
from emulation import LATE, RANDOM_EARLY, RANDOM_LATE, Prepared, emulated, needs_compiler
from stand_in import Array, on_gpu
from strategies import BFLOAT16, DecodeCase

import parallax_core as plx
from parallax_core.cuda_kernels import lla

pytestmark = needs_compiler


SOLVED = {
    "heads of 128": (dict(kv_heads=1, capacity=300), (9, 0)),
    "heads of 64, split": (dict(batch=1, kv_heads=1, capacity=2300, head_dim=64), (9, 0)),
    "pages of 16, a window": (
        dict(kv_heads=1, capacity=192, page_size=16, window_size=100, cache_seqlens=lengths(190, 37)), (9, 0)
    ),
    "heads of 64, pages, tokens": (
        dict(head_dim=64, length=2, capacity=192, page_size=64, cache_seqlens=lengths(190, 3)), (9, 0)
    ),
    "float16": (dict(kv_heads=1, capacity=150, dtype=FLOAT16), (9, 0)),
    "packed sequences": (dict(packed=(30, 1, 70), kv_heads=1, head_dim=64), (9, 0)),
    "portable": (dict(capacity=150, head_dim=40, value_dim=24), (8, 0)),
    "portable, float32": (dict(batch=1, capacity=600, head_dim=80, dtype=FLOAT32), (8, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVED)
def test_local_linear_attention_in_every_order_of_its_threads(name):
    sizes, capability = SOLVED[name]
    hold_in_every_order(make(**sizes), capability, "cholesky")


STEPS = {
    "heads of 128": (dict(kv_heads=1, capacity=300), 64),
    "heads of 64, shared by eight blocks": (dict(batch=1, kv_heads=1, capacity=4100, head_dim=64), 64),
    "heads of 128, shared, of two lengths": (
        dict(kv_heads=1, capacity=1100, cache_seqlens=lengths(1090, 40)), 64
    ),
    "pages of 16, left to the factorisation": (
        dict(kv_heads=1, capacity=192, page_size=16, window_size=100, cache_seqlens=lengths(190, 37)), 3
    ),
    "shared, left to the factorisation": (dict(batch=1, kv_heads=1, capacity=1100), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_conjugate_gradients_in_every_order_of_their_threads(name, monkeypatch):
    sizes, most = STEPS[name]
    hold_steps_in_every_order(make(**sizes), most, monkeypatch)


GATHERED = {
    "two blocks": (dict(batch=2, capacity=1100), 64),
    "four blocks": (dict(batch=2, capacity=2070), 64),
    "float16": (dict(batch=2, capacity=2070, dtype=FLOAT16), 64),
    "pages": (dict(batch=2, capacity=2080, page_size=16), 64),
    "one, two and three of four": (
        dict(batch=3, capacity=2080, cache_seqlens=lengths(40, 1000, 1500)), 64
    ),
    "two blocks, left to the factorisation": (dict(batch=1, capacity=1100), 3),
    "four blocks, left to the factorisation": (dict(batch=2, capacity=2070), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
def test_a_block_that_is_given_the_moments_of_others_in_every_order(name, monkeypatch):
    """Two blocks are on every multiprocessor, of which one may solve its row."""
    sizes, most = GATHERED[name]
    case = make(head_dim=64, kv_heads=1, **sizes)
    blocks = 4 if sizes["capacity"] > 2000 else 2
    shapes = hold_steps_in_every_order(case, most, monkeypatch, blocks // 2 * case.q.shape[0])
    assert {dict(shape.defines)["GATHERED"] for shape in shapes} == {blocks}


@pytest.fixture(scope="module")
def launches_of_other_batches():
    """Of two rows and of three, whose blocks have other neighbours: another of the second row's solves it."""
    cases = [make(batch=b, kv_heads=1, group=1, capacity=2070, head_dim=64, seed=b) for b in (2, 3)]
    return [(case, call(plx.reference, "lla", case, ridge=0.1)) for case in (*cases, *cases)]


def test_what_a_block_gave_in_an_earlier_launch_is_not_taken_again(launches_of_other_batches):
    """Other data on one workspace, where a block that solves keeps what it gave before."""
    with emulated((9, 0), multiprocessors=6):
        Prepared.order = RANDOM_LATE
        for case, expected in launches_of_other_batches:
            o = call(plx, "lla", on_gpu(case), ridge=0.1, solver="cg").data.astype(np.float64)
            hold(o, expected, solved_budget(case, np.full(o.shape[:3], 0.1)))


def test_what_a_block_gave_has_the_bit_that_was_used_last(launches_of_other_batches):
    """So the next launch's has the other one; of a block that solved, and gave nothing, too."""
    words = lla._GIVEN_BYTES // 8
    begin = (lla._mail(2, 6, gathered=True)[1] + lla._PLACES_BYTES) // 8
    before, solving = np.zeros((3, 4), np.uint64), set()
    with emulated((9, 0), multiprocessors=6) as workspace:
        for case, _ in launches_of_other_batches:
            call(plx, "lla", on_gpu(case), ridge=0.1, solver="cg")
            rows = len(case.q)
            given = workspace.mail[begin:][: rows * 4 * words].reshape(rows, 4, words)
            # A block's weight, whether it may solve, and the bits that both had last.
            weight, may_solve, last = given[..., 0].copy(), given[..., 4352], given[..., 4354]
            np.testing.assert_array_equal(weight & 1, last & 1)
            np.testing.assert_array_equal(may_solve & 1, last >> 1 & 1)
            same = weight == before[:rows]
            np.testing.assert_array_equal(same.sum(axis=1), 1)
            solving.add(int(same[1].argmax()))
            before[:rows] = weight
    assert len(solving) > 1


ADDED_UP = (
    "heads of 64, shared by eight blocks",
    "heads of 128, shared, of two lengths",
    "shared, left to the factorisation",
)


@pytest.fixture
def steps_are_added_up(monkeypatch):
    """As they are by more blocks than a test has time for."""
    monkeypatch.setattr(lla, "_MOST_SENDERS", 1)


@pytest.mark.parametrize("name", ADDED_UP)
def test_products_that_blocks_add_up_are_the_same_in_every_order(name, steps_are_added_up, monkeypatch):
    sizes, most = STEPS[name]
    hold_steps_in_every_order(make(**sizes), most, monkeypatch)


@pytest.mark.parametrize("head_dim, multiprocessors", [(64, 8), (128, 16)])
def test_of_sixteen_blocks_the_last_may_have_no_keys(head_dim, multiprocessors):
    """Of 129 tiles fifteen blocks take 9 each, and more than there are."""
    case = make(head_dim=head_dim, batch=1, kv_heads=1, group=1, capacity=8193)
    expected = call(plx.reference, "lla", case, ridge=0.1)
    for o in run("lla", case, (9, 0), (RANDOM_EARLY, RANDOM_LATE), multiprocessors, ridge=0.1, solver="cg"):
        hold(o, expected, solved_budget(case, np.full(o.shape[:3], 0.1)))


@pytest.fixture(params=[1, 8], ids=["added up", "sent"])
def steps_are_added_up_or_sent(request, monkeypatch):
    monkeypatch.setattr(lla, "_MOST_SENDERS", request.param)


@pytest.mark.usefixtures("steps_are_added_up_or_sent")
def test_mail_of_other_shapes_is_not_mistaken():
    """Calls one after another on one workspace, whose rows and heads lie in the same mail."""
    sizes = (3, 64, 1600), (1, 128, 1100), (2, 128, 1100)
    cases = [make(batch=b, kv_heads=1, capacity=c, head_dim=d, seed=b) for b, d, c in sizes]
    with emulated((9, 0), multiprocessors=6):
        Prepared.order = RANDOM_EARLY
        for case in (*cases, *cases):
            o = call(plx, "lla", on_gpu(case), ridge=0.1, solver="cg").data.astype(np.float64)
            hold(
                o, call(plx.reference, "lla", case, ridge=0.1), solved_budget(case, np.full(o.shape[:3], 0.1))
            )


KEYS = {
    "queries four times larger": lambda q, k: (4 * q, k),
    "an offset of 16": lambda q, k: (q, k + 16),
    "keys that drift": lambda q, k: (4 * q, k + np.linspace(-4, 4, k.shape[1])[:, None, None]),
    "fewer keys than channels": lambda q, k: (q, k[:, :40]),
}


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", KEYS)
def test_solved_rows_are_within_a_hundredth_of_the_reference(keys, head_dim, solver):
    """In bfloat16 at a ridge of 0.1, where the reference takes the same rounded inputs."""
    case = make(head_dim=head_dim, batch=4, kv_heads=1, capacity=400, dtype=FLOAT32)
    q, k = KEYS[keys](case.q, case.k_cache)
    v = case.v_cache[:, : k.shape[1]]
    case = DecodeCase(*(x.astype(BFLOAT16) for x in (q, case.r, k, v)), {})
    expected = call(plx.reference, "lla", case, ridge=0.1)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), ridge=0.1, solver=solver)
    assert error_of_rows(o, expected).max() <= 1e-2


def along_few_directions(sizes, directions, noise, seed):
    """Keys along so many directions and little besides: after steps of one length comes another."""
    case = make(kv_heads=1, dtype=FLOAT32, **sizes)
    outer, capacity, heads, D = case.k_cache.shape
    random = np.random.default_rng(seed)
    along = random.standard_normal((outer, heads, directions, D)) / 2
    k = np.einsum("blhr,bhrd->blhd", random.standard_normal((outer, capacity, heads, directions)), along)
    arrays = case.q, case.r, k + noise * case.k_cache, case.v_cache
    return DecodeCase(*(x.astype(BFLOAT16) for x in arrays), {})


@pytest.mark.parametrize("name", ["shared", "added up"])
def test_steps_of_another_length_than_was_foreseen_are_found_out(name, monkeypatch):
    """With keys for which errors would be more than that."""
    monkeypatch.setattr(lla, "_MOST_SENDERS", 1 if name == "added up" else 8)
    case = along_few_directions(dict(head_dim=64, batch=1, group=3, capacity=4100), 4, 0.1, 0)
    expected = call(plx.reference, "lla", case, ridge=0.1)
    (o,) = run("lla", case, (9, 0), (RANDOM_LATE,), multiprocessors=24, ridge=0.1, solver="cg")
    assert error_of_rows(o, expected).max() <= 1e-2


LAST_STEPS = {
    "alone": (dict(head_dim=64, batch=2, capacity=400), 12, (1, 0, 0)),
    "given to one": (dict(head_dim=64, batch=2, capacity=1100), 4, (2, 2, 0)),
    "in turn": (dict(head_dim=128, batch=3, capacity=700), 2, (1, 0, 1)),
}
"""Calls, multiprocessors, and the splits, GATHERED and ROWS_IN_TURN of their shapes."""


@pytest.mark.parametrize("name", LAST_STEPS)
def test_steps_go_on_where_the_last_has_led_less_far_than_it_was_thought_to(name, monkeypatch):
    sizes, multiprocessors, kind = LAST_STEPS[name]
    shapes = hold_steps_that_are_foreseen_wrongly(sizes, monkeypatch, multiprocessors)
    seen = {(s.splits, dict(s.defines)["GATHERED"], dict(s.defines)["ROWS_IN_TURN"]) for s in shapes}
    assert seen == {kind}


@pytest.mark.usefixtures("steps_are_added_up_or_sent")
@pytest.mark.parametrize("directions, noise, seed", [(3, 0.1, 28), (5, 0.15, 5)])
def test_after_a_step_of_the_wrong_length_steps_go_on(directions, noise, seed):
    """Of one row the true residual looks small for a step that is foreseen, and is not.

    No moments are left to be factored.
    """
    case = along_few_directions(dict(head_dim=64, batch=1, group=3, capacity=4100), directions, noise, seed)
    with emulated((9, 0), multiprocessors=24) as workspace:
        Prepared.order = RANDOM_LATE
        o = call(plx, "lla", on_gpu(case), ridge=0.1, solver="cg")
        assert workspace.partials.size > 64 * 64
        assert np.isnan(workspace.partials).all()
    assert error_of_rows(o.data.astype(np.float64), call(plx.reference, "lla", case, ridge=0.1)).max() <= 1e-2


@pytest.mark.parametrize("change", ["keys of 30", "a ridge of 1e-8"])
def test_sums_beyond_the_range_of_whole_numbers_leave_rows_to_the_factorisation(change, steps_are_added_up):
    """Where the moments are so many times the ridge that a step's product, in units of it, has no room."""
    case = make(head_dim=128, batch=1, kv_heads=1, capacity=1100, dtype=FLOAT32)
    ridge, keys = (1e-8, 1.0) if "ridge" in change else (1e-5, 30.0)
    arrays = case.q / keys, case.r, keys * case.k_cache, case.v_cache
    case = DecodeCase(*(x.astype(BFLOAT16) for x in arrays), {})
    expected = call(plx.reference, "lla", case, ridge=ridge)
    with emulated((9, 0), multiprocessors=12) as workspace:
        Prepared.order = RANDOM_LATE
        o = call(plx, "lla", on_gpu(case), ridge=ridge, solver="cg").data.astype(np.float64)
        assert not np.isnan(workspace.partials).all()
    assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize(
    "sizes, multiprocessors",
    [
        (dict(head_dim=64, batch=4, capacity=1100), 8),
        (dict(head_dim=64, batch=1, capacity=4100), 24),
        (dict(head_dim=128, batch=2, capacity=1100), 12),
        (dict(head_dim=64, batch=2, capacity=100), 12),
    ],
    ids=["given to one", "shared", "heads of 128", "one block"],
)
def test_steps_find_no_slope_without_a_ridge(sizes, multiprocessors):
    case = make(kv_heads=1, **sizes)
    ridge = Array(np.zeros(case.q.shape[:3], np.float32))
    (o,) = run("lla", case, (9, 0), (RANDOM_LATE,), multiprocessors, ridge=ridge, solver="cg")
    assert np.isnan(o).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("keys, values", [(-10, 12), (8, -9)])
def test_solved_rows_of_numbers_far_from_1_are_as_near(keys, values, dtype):
    """Powers of two bring them there; the scores stay as they are."""
    case = make(head_dim=64, kv_heads=1, capacity=200, dtype=FLOAT32)
    arrays = 2.0**keys * case.q, case.r, 2.0**keys * case.k_cache, 2.0**values * case.v_cache
    case = DecodeCase(*(x.astype(dtype) for x in arrays), {"scale": 4.0**-keys / 8})
    ridge = 0.1 * 4.0**keys
    expected = call(plx.reference, "lla", case, ridge=ridge)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_EARLY,), ridge=ridge)
    assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize(
    "head_dim, capacity, solver",
    [(64, 200, "cholesky"), (128, 200, "cholesky"), (128, 200, "cg"), (64, 1100, "cg")],
)
@pytest.mark.parametrize("change", ["values grow", "zeros come first"])
def test_tiles_beyond_the_scale_of_the_first_are_taken_again(change, head_dim, capacity, solver):
    case = make(batch=1, head_dim=head_dim, kv_heads=1, capacity=capacity, dtype=BFLOAT16)
    k, v = case.k_cache.copy(), case.v_cache.copy()
    if change == "values grow":
        v[:, 64:] *= 2.0**20
    else:
        k[:, :64] = v[:, :64] = 0
    case = case.with_keys_and_values(k, v)
    expected = call(plx.reference, "lla", case, ridge=0.1)
    (o,) = run("lla", case, (9, 0), orders=(LATE,), ridge=0.1, solver=solver)
    assert error_of_rows(o, expected).max() <= 1e-2


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    "head_dim, capacity, solver",
    [(64, 192, "cholesky"), (128, 192, "cholesky"), (128, 192, "cg"), (64, 1104, "cg"), (128, 1104, "cg")],
)
def test_what_is_hidden_changes_no_bit(head_dim, capacity, solver, page_size):
    """Of a last tile all but five keys, or seven, and in pages the first ones of the first tile."""
    seen = dict(cache_leftpad=lengths(70, 5), cache_seqlens=lengths(75 + (capacity - 80) // 64 * 64, 12))
    case = make(head_dim=head_dim, kv_heads=1, capacity=capacity, page_size=page_size, **seen)
    hidden = oracle.hidden_places(case)
    k, v = case.k_cache.copy(), case.v_cache.copy()
    k[hidden], v[hidden] = np.nan, np.inf
    cases = case, case.with_keys_and_values(k, v)
    (clean,), (dirty,) = (run("lla", x, (9, 0), (RANDOM_EARLY,), ridge=0.1, solver=solver) for x in cases)
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(dirty, clean)


def test_keys_about_an_outlying_one_keep_their_digits():
    """The worst of 160 rows with one key 30 times larger: an origin of few keys costs it twice the error."""
    case = make(batch=40, kv_heads=4, group=1, head_dim=128, capacity=2048, dtype=np.dtype(np.float32))
    k = np.where(np.arange(2048)[:, None, None] == 99, 30 * case.k_cache, case.k_cache)
    row = np.s_[5:6, :, 1:2]
    case = type(case)(*(x[row].astype(BFLOAT16) for x in (case.q, case.r, k, case.v_cache)), case.options)
    with emulated(multiprocessors=1):
        o = call(plx, "lla", on_gpu(case), ridge=0.1).data
    assert error_of_rows(o, call(plx.reference, "lla", case, ridge=0.1)).max() <= 3e-2


def test_a_block_with_nearly_all_of_the_weight_keeps_its_distance_from_the_mean():
    """The slope is long where one key has it, e^20 times the others', and makes that distance count."""
    case = make(batch=1, kv_heads=4, group=1, head_dim=64, capacity=2048, dtype=FLOAT32)
    k = np.where(np.arange(2048)[:, None, None] == 99, 30 * case.k_cache, case.k_cache)
    row = np.s_[:, :, 1:2]
    case = type(case)(*(x[row].astype(BFLOAT16) for x in (case.q, case.r, k, case.v_cache)), case.options)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), ridge=0.1, solver="cg")
    assert error_of_rows(o, call(plx.reference, "lla", case, ridge=0.1)).max() <= 1e-2


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_the_kernels_that_racecheck_follows_compute_the_same_bits(solver, monkeypatch):
    case = make(kv_heads=1, capacity=300)
    (expected,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), ridge=0.1, solver=solver)
    for_racecheck(monkeypatch)
    (o,) = run("lla", case, (9, 0), orders=(RANDOM_LATE,), ridge=0.1, solver=solver)
    np.testing.assert_array_equal(o, expected)


@pytest.mark.parametrize("packed", [None, (30, 1, 25)])
def test_a_solved_probe_gives_what_the_solver_gives(packed):
    """In float32 the parallax of the probe is the local linear fit, up to float32's rounding."""
    case = make(packed=packed, length=20, capacity=60, head_dim=24, dtype=FLOAT32)
    options = case.options if packed else {}
    with emulated(multiprocessors=12):
        arrays = on_gpu(case)
        given = arrays.options if packed else {}
        r = plx.lla_probe(arrays.q, arrays.keys_and_values[0], ridge=0.5, **given).data
    assert r.dtype == FLOAT32
    k, v = case.keys_and_values
    o = plx.reference.parallax_attention(case.q, r, k, v, **options)
    expected = plx.reference.lla_attention(case.q, k, v, ridge=0.5, **options)
    np.testing.assert_allclose(o, expected, atol=1e-4)
