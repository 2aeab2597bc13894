"""Gradients against derivatives of the formulas in extended precision, and what must hold of them."""

import functools
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, FLOAT64, attention_cases, seeds

import parallax_core as plx

EPS = np.finfo(np.float64).eps
# The bound is of first order in the rounding; this is for its constants.
SAFETY = 8
# A complex step: its square is nothing beside 1 even in extended precision.
STEP = oracle.WIDE(2.0) ** -200
ARGUMENTS = {"softmax": "qkv", "parallax": "qrkv", "lla": ("q", "k", "v", "ridge")}

backends = pytest.mark.parametrize("backend", [plx.reference, plx], ids=["reference", "cpu"])
operations = pytest.mark.parametrize("operation", ARGUMENTS)
# float64 throughout: rounding the gradients to their dtype would be the larger error.
cases = attention_cases(dtypes=FLOAT64, max_length=6, max_group=2, max_head_dim=4, max_value_dim=3)
examples = settings(max_examples=15)


def inputs(operation, case, seed):
    """The differentiated arguments by name, and a gradient of the output."""
    random = np.random.default_rng(seed)
    ridge = 10.0 ** random.uniform(-2, 1, case.q.shape[:3])
    arrays = {"q": case.q, "r": case.r, "k": case.k, "v": case.v, "ridge": ridge}
    do = random.standard_normal((*case.q.shape[:3], case.v.shape[-1])).astype(case.q.dtype)
    return {name: arrays[name] for name in ARGUMENTS[operation]}, do


def forward(backend, operation, arrays, options):
    positional = [x for name, x in arrays.items() if name != "ridge"]
    ridge = {"ridge": arrays["ridge"]} if "ridge" in arrays else {}
    return getattr(backend, f"{operation}_attention")(*positional, **ridge, **options, return_state=True)


def backward(backend, operation, arrays, do, options, state="that of the forward call"):
    """The gradients by the name of their argument."""
    o, own_state = forward(backend, operation, arrays, options)
    state = own_state if isinstance(state, str) else state
    positional = [x for name, x in arrays.items() if name != "ridge"]
    ridge = {"ridge": arrays["ridge"]} if "ridge" in arrays else {}
    function = getattr(backend, f"{operation}_attention_backward")
    return dict(zip(arrays, function(do, *positional, o, state, **ridge, **options)))


def directions(arrays, seed):
    random = np.random.default_rng([seed, 1])
    return {name: random.standard_normal(x.shape) for name, x in arrays.items()}


def slope(gradients, moves):
    """The change of ``sum(do * o)`` along ``moves``, by the gradients."""
    return sum((gradients[name] * move).sum() for name, move in moves.items())


# The formulas for one row; complex numbers pass through them, which oracle's bounds and eliminations bar.


def solve_complex(matrix, b):
    """To first order in the imaginary parts."""
    x = oracle.solve(matrix.real, b.real)
    return x + 1j * oracle.solve(matrix.real, b.imag - matrix.imag @ x)


def weights(q, K, scale):
    w = np.exp(scale * (K @ q) - (scale * (K @ q)).real.max())
    return w / w.sum()


def solved_probe(q, K, ridge, scale):
    p = weights(q, K, scale)
    X = K - p @ K
    return solve_complex((p[:, None] * X).T @ X + ridge * np.eye(q.size), p @ K - q)


def output(q, K, V, scale, r=None, ridge=None):
    p = weights(q, K, scale)
    if ridge is not None:
        r = solved_probe(q, K, ridge, scale)
    t = np.zeros(len(K)) if r is None else K @ r
    return (p * (1 + p @ t - t)) @ V


def derivative(case, arrays, do, moves):
    """Of ``sum(do * o)`` along ``moves``, row by row."""
    scale, value = scale_of(case), oracle.WIDE(0)
    for row in oracle.seen_rows(case):
        if row.places:
            point = {n: gather(n, x, row) for n, x in arrays.items()}
            point |= {n: point[n] + 1j * STEP * gather(n, move, row) for n, move in moves.items()}
            probe = {n: point[n] for n in ("r", "ridge") if n in point}
            o = output(*(point[n] for n in "qkv"), scale, **probe)
            value += (gather("do", do, row) @ o).imag / STEP
    return value


def bound(case, arrays, do, moves):
    """What rounding may change of the derivative along ``moves``.

    The magnitudes of the terms of docs/math.md times the relative error of the sums over keys and, for LLA,
    the condition of the system, summed over the rows.
    """
    scale, total = scale_of(case), 0.0
    for row in oracle.seen_rows(case):
        if row.places:
            point, move = ({n: gather(n, x, row) for n, x in some.items()} for some in (arrays, moves))
            total += row_bound(scale, gather("do", do, row), point, move)
    return SAFETY * EPS * total


def scale_of(case):
    scale = case.options.get("scale")
    return 1 / np.sqrt(oracle.WIDE(case.q.shape[-1])) if scale is None else scale


def gather(name, x, row):
    if name in ("k", "v"):
        return np.array([x[place] for place in row.places]).astype(oracle.WIDE)
    return x[row.batch, row.row, row.head].astype(oracle.WIDE)


def row_bound(scale, g, point, move):
    q, K, V = (point[name] for name in "qkv")
    error = oracle.softmax(q, None, K, V, scale).sensitivity / np.abs(V).max()
    G = norm(g) * norm(V)
    if "ridge" not in point:
        return error * terms(scale, q, K, g, G, norm(point.get("r", np.zeros(1))), norm(K), 0.0, move)
    p = weights(q, K, scale)
    X = K - p @ K
    u = solved_probe(q, K, point["ridge"], scale).real
    matrix = ((p[:, None] * X).T @ X + point["ridge"] * np.eye(q.size)).astype(float)
    smallest, largest = np.linalg.eigvalsh(matrix)[[0, -1]]
    y = np.linalg.solve(matrix, ((p * (V @ g - p @ V @ g)) @ X).astype(float))
    solving = error * (1 + (largest + norm(K) * norm(X)) / smallest)
    # Where weights vanish the adjoint cancels to nothing, and the rounding of its terms does not.
    uncancelled = 2 * G * norm(X) / smallest
    return sum(
        relative * terms(scale, q, K, g, G, norm(u), norm(X), adjoint, move)
        for relative, adjoint in ((solving, norm(y)), (error, uncancelled))
    )


def terms(scale, q, K, g, G, probe, spread, adjoint, move):
    """Magnitudes of what is added up; probe, spread, adjoint: the norms of r or u, of k_j - kbar and of y."""
    along = 1 + 4 * probe * spread
    rest = 2 * G + adjoint * spread
    scores = 4 * abs(scale) * along * rest
    factors = {
        "q": scores * norm(K) + adjoint,
        "r": rest * norm(K),
        "k": scores * norm(q) + rest * probe + along * adjoint,
        "v": along * norm(g),
        "ridge": adjoint * probe,
    }
    return sum(float(factors[name] * norm(m)) for name, m in move.items())


def norm(x):
    """Of the longest vector."""
    return np.linalg.norm(np.atleast_1d(x).astype(float), axis=-1).max(initial=0.0)


# Against the formulas


@backends
@operations
@settings(max_examples=40)
@given(case=cases, seed=seeds, size=st.sampled_from((1.0, 1.0, 1e3)))
def test_gradients_are_the_derivatives_of_the_formulas(backend, operation, case, seed, size):
    # A thousand: scores in the thousands, where all weight is on one key.
    case = type(case)(size * case.q, case.r, case.k, case.v, case.options)
    arrays, do = inputs(operation, case, seed)
    gradients = backward(backend, operation, arrays, do, case.options)
    for name, move in directions(arrays, seed).items():
        assert gradients[name].shape == arrays[name].shape
        assert gradients[name].dtype == np.float64
        along = case, arrays, do, {name: move}
        assert abs(slope(gradients, {name: move}) - derivative(*along)) <= bound(*along), name


@backends
@pytest.mark.parametrize("solver", ["cg", "lstsq"])
@examples
@given(case=cases, seed=seeds)
def test_every_solver_gives_the_gradients_of_lla(backend, solver, case, seed):
    arrays, do = inputs("lla", case, seed)
    gradients = backward(backend, "lla", arrays, do, {**case.options, "solver": solver})
    for name, move in directions(arrays, seed).items():
        along = case, arrays, do, {name: move}
        # Conjugate gradients stop at a residual of 1e-13, 450 rounding units.
        tolerance = bound(*along) * (450 if solver == "cg" else 1)
        assert abs(slope(gradients, {name: move}) - derivative(*along)) <= tolerance, name


@backends
@examples
@given(case=cases, seed=seeds)
def test_lla_without_a_ridge_where_the_keys_span_the_space(backend, case, seed):
    B, _, heads, D = case.k.shape
    random = np.random.default_rng(seed)
    k, v = (random.standard_normal((B, 2 * D + 2, heads, n)) for n in (D, 3))
    case = type(case)(case.q, case.r, k, v, {"scale": case.options["scale"], "causal": False})
    arrays, do = inputs("lla", case, seed)
    arrays["ridge"] = np.zeros_like(arrays["ridge"])
    gradients = backward(backend, "lla", arrays, do, {**case.options, "solver": "lstsq"})
    for name, move in directions(arrays, seed).items():
        along = case, arrays, do, {name: move}
        assert abs(slope(gradients, {name: move}) - derivative(*along)) <= bound(*along), name


@backends
@examples
@given(case=cases, seed=seeds)
def test_lla_is_parallax_with_a_probe_that_moves(backend, case, seed):
    """The chain rule through ``lla_probe``, whose own derivative is that of the formula."""
    arrays, do = inputs("lla", case, seed)
    options, moves = case.options, directions(arrays, seed)
    gradients = backward(backend, "lla", arrays, do, options)
    keys, ridge = {name: arrays[name] for name in "kv"}, arrays["ridge"]
    r = backend.lla_probe(case.q, case.k, ridge=ridge, **options)
    fixed = backward(backend, "parallax", {"q": case.q, "r": r, **keys}, do, options)
    scale, turn = scale_of(case), np.zeros(r.shape)
    for row in oracle.seen_rows(case):
        if row.places:
            q, K, lam = (
                gather(n, arrays[n], row) + 1j * STEP * gather(n, moves[n], row) for n in ("q", "k", "ridge")
            )
            turn[row.batch, row.row, row.head] = solved_probe(q, K, lam, scale).imag / STEP
    chained = slope(fixed, {"q": moves["q"], "k": moves["k"], "v": moves["v"], "r": turn})
    # The terms of Parallax cancel where the probe turns; they are those of its own bound.
    parts = bound(case, {"q": case.q, "r": r, **keys}, do, {"r": turn, **{n: moves[n] for n in "qkv"}})
    tolerance = bound(case, arrays, do, moves) + parts * condition(case, ridge)
    assert abs(slope(gradients, moves) - chained) <= tolerance


def condition(case, ridge):
    """How far a solved probe is off, in rounding units, at most: the trace of C_kk over the ridge."""
    largest = np.abs(case.k).max(initial=0.0) ** 2 * case.k.shape[-1]
    return (1 + largest / ridge.min(initial=np.inf)) * (1 + np.abs(case.q).max(initial=0.0))


# What holds of the gradients of any numbers


@backends
@operations
@examples
@given(case=cases, seed=seeds)
def test_gradients_are_linear_in_that_of_the_output(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    other = np.random.default_rng([seed, 2]).standard_normal(do.shape)
    compute = functools.partial(backward, backend, operation, arrays, options=case.options)
    first, second, both = compute(do=do), compute(do=other), compute(do=do + other)
    moves = directions(arrays, seed)
    tolerance = sum(bound(case, arrays, x, moves) for x in (do, other, do + other))
    assert abs(slope(both, moves) - slope(first, moves) - slope(second, moves)) <= tolerance


@backends
@operations
@examples
@given(case=cases, seed=seeds)
def test_the_output_is_linear_in_the_values(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    o, _ = forward(backend, operation, arrays, case.options)
    along = {"v": case.v}
    result = slope(backward(backend, operation, arrays, do, case.options), along)
    # Twice: the output's own rounding is that of the same sums.
    assert abs(result - (do * o).sum()) <= 2 * bound(case, arrays, do, along)


@backends
@operations
@examples
@given(case=cases, seed=seeds)
def test_constant_values_pass_the_gradient_through(backend, operation, case, seed):
    """A constant added to the values of a head is added to the output of its group, where a key is seen."""
    arrays, do = inputs(operation, case, seed)
    B, _, heads, Dv = case.v.shape
    sees = np.isfinite(plx.reference.softmax_attention(**{n: arrays[n] for n in "qkv"}, **case.options,
                                                       return_state=True)[1].lse)  # fmt: skip
    expected = (do * sees[..., None]).sum(axis=1).reshape(B, heads, -1, Dv).sum(axis=2)
    result = backward(backend, operation, arrays, do, case.options)["v"].sum(axis=1)
    tolerance = bound(case, arrays, do, {"v": np.ones_like(case.v)})
    assert (np.abs(result - expected) <= tolerance).all()


@backends
@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@examples
@given(case=cases, seed=seeds)
def test_moving_all_keys_of_a_head_together_changes_nothing(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    dk = backward(backend, operation, arrays, do, case.options)["k"]
    tolerance = bound(case, arrays, do, {"k": np.ones_like(case.k)})
    assert (np.abs(dk.sum(axis=1)) <= tolerance).all()


@backends
@operations
@examples
@given(case=cases, seed=seeds)
def test_rotating_queries_probes_and_keys_changes_nothing(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    D = case.q.shape[-1]
    skew = np.random.default_rng([seed, 3]).standard_normal((D, D))
    skew -= skew.T
    turn = {name: x @ skew for name, x in arrays.items() if name in "qrk"}
    result = slope(backward(backend, operation, arrays, do, case.options), turn)
    assert abs(result) <= bound(case, arrays, do, turn)


@backends
@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@examples
@given(case=cases, seed=seeds)
def test_keys_times_a_number_undo_queries_and_probes_over_it(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    stretch = {name: x if name == "k" else -x for name, x in arrays.items() if name != "v"}
    result = slope(backward(backend, operation, arrays, do, case.options), stretch)
    assert abs(result) <= bound(case, arrays, do, stretch)


@backends
@examples
@given(case=cases, seed=seeds)
def test_lla_with_uniform_weights_does_not_know_the_unit_of_length(backend, case, seed):
    arrays, do = inputs("lla", case, seed)
    case = type(case)(case.q, case.r, case.k, case.v, {**case.options, "scale": 0.0})
    stretch = {"q": case.q, "k": case.k, "ridge": 2 * arrays["ridge"]}
    result = slope(backward(backend, "lla", arrays, do, case.options), stretch)
    assert abs(result) <= bound(case, arrays, do, stretch)


@backends
@examples
@given(case=cases, seed=seeds)
def test_parallax_is_linear_in_its_probe_and_softmax_without(backend, case, seed):
    arrays, do = inputs("parallax", case, seed)
    o, _ = forward(backend, "parallax", arrays, case.options)
    still = {name: arrays[name] for name in "qkv"}
    vbar, _ = forward(backend, "softmax", still, case.options)
    result = slope(backward(backend, "parallax", arrays, do, case.options), {"r": case.r})
    tolerance = 2 * bound(case, arrays, do, {"r": case.r, "v": case.v})
    assert abs(result - (do * (o - vbar)).sum()) <= tolerance

    zero = backward(backend, "parallax", {**arrays, "r": np.zeros_like(case.r)}, do, case.options)
    plain = backward(backend, "softmax", still, do, case.options)
    moves = directions(still, seed)
    assert abs(slope(zero, moves) - slope(plain, moves)) <= 2 * bound(case, still, do, moves)


# What a call is given beside its inputs


@backends
@operations
@examples
@given(case=cases, seed=seeds)
def test_a_state_that_is_left_out_is_computed_again(backend, operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    passed, left_out = (
        backward(backend, operation, arrays, do, case.options, **state) for state in ({}, {"state": None})
    )
    moves = directions(arrays, seed)
    assert abs(slope(passed, moves) - slope(left_out, moves)) <= 2 * bound(case, arrays, do, moves)


@operations
@examples
@given(case=attention_cases(max_length=6, max_head_dim=4, dtypes=DTYPES[1:]), seed=seeds)
def test_the_reference_works_in_float64_on_narrower_inputs(operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    result = backward(plx.reference, operation, arrays, do, case.options)
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    expected = backward(plx.reference, operation, wide, do.astype(np.float64), case.options)
    for name in arrays:
        np.testing.assert_array_equal(result[name], expected[name])


@operations
@examples
@given(case=attention_cases(max_length=6, max_head_dim=4, dtypes=DTYPES[1:]), seed=seeds)
def test_the_cpu_works_in_the_compute_dtype_and_rounds_once(operation, case, seed):
    arrays, do = inputs(operation, case, seed)
    result = backward(plx, operation, arrays, do, case.options)
    expected = backward(plx.reference, operation, arrays, do, case.options)
    for name, move in directions(arrays, seed).items():
        dtype = np.float32 if name == "ridge" else arrays[name].dtype
        assert result[name].dtype == dtype
        rounding = ml_dtypes.finfo(dtype).eps * np.abs(expected[name] * move).sum()
        tolerance = bound(case, arrays, do, {name: move}) * (np.finfo(np.float32).eps / EPS) + rounding
        wide = {name: result[name].astype(np.float64)}
        assert abs(slope(wide, {name: move}) - slope(expected, {name: move})) <= tolerance, name


# What is seen, and what is not


@backends
@operations
@examples
@given(case=cases, seed=seeds, junk=st.sampled_from((np.nan, np.inf, -np.inf)))
def test_rows_without_keys_and_keys_without_rows_have_no_gradient(backend, operation, case, seed, junk):
    arrays, do = inputs(operation, case, seed)
    expected = backward(backend, operation, arrays, do, case.options)
    hidden = oracle.hidden_places(case)
    blind = np.ones(case.q.shape[:3], bool)
    for row in oracle.seen_rows(case):
        blind[row.batch, row.row, row.head] = not row.places
    unseen = {"q": blind, "r": blind, "k": hidden, "v": hidden, "ridge": blind}
    spoilt = {n: np.where(unseen[n][..., None], junk, x) if n != "ridge" else x for n, x in arrays.items()}
    result = backward(backend, operation, spoilt, np.where(blind[..., None], junk, do), case.options)
    for name in arrays:
        assert (result[name][unseen[name]] == 0).all()
        assert (expected[name][unseen[name]] == 0).all()
    moves = directions(arrays, seed)
    assert abs(slope(result, moves) - slope(expected, moves)) <= 2 * bound(case, arrays, do, moves)


@backends
@operations
@examples
@given(data=st.data(), case=cases, seed=seeds)
def test_nan_reaches_what_depends_on_it_and_nothing_else(backend, operation, data, case, seed):
    assume(case.q.size and case.k.size)
    arrays, do = inputs(operation, case, seed)
    name = data.draw(st.sampled_from(["do", *(n for n in arrays if n != "ridge")]))
    whole = do if name == "do" else arrays[name]
    place = tuple(data.draw(st.integers(0, n - 1)) for n in whole.shape)
    spoilt = whole.copy()
    spoilt[place] = np.nan
    clean = backward(backend, operation, arrays, do, case.options)
    if name == "do":
        result = backward(backend, operation, arrays, spoilt, case.options)
    else:
        result = backward(backend, operation, {**arrays, name: spoilt}, do, case.options)

    rows, keys = np.zeros(case.q.shape[:3], bool), np.zeros(case.k.shape[:3], bool)
    for row in oracle.seen_rows(case):
        at = row.batch, row.row, row.head
        if row.places and (place[:3] in row.places if name in "kv" else place[:3] == at):
            rows[at] = True
            for seen in row.places:
                keys[seen] = True
    touched = {"q": rows, "r": rows, "k": keys, "v": keys, "ridge": rows}
    # dr does not know the probe, nor dv the values; dv knows one channel of the gradient alone.
    free = {"r": "r", "v": "v"}.get(name)
    moves, difference = directions(arrays, seed), {}
    for n in arrays:
        depends = touched[n] if n != free else np.zeros_like(touched[n])
        spread = depends if n == "ridge" else np.broadcast_to(depends[..., None], result[n].shape).copy()
        if (name, n) == ("do", "v"):
            spread[..., np.arange(spread.shape[-1]) != place[3]] = False
        np.testing.assert_array_equal(np.isnan(result[n]), spread)
        difference[n] = np.where(spread, 0.0, result[n] - clean[n])
    assert abs(slope(difference, moves)) <= 2 * bound(case, arrays, do, moves)


@backends
@pytest.mark.parametrize(
    "operation, name", [("softmax", "q"), ("parallax", "q"), ("parallax", "r"), ("lla", "q")]
)
def test_scores_that_overflow_are_nan_in_their_row_and_the_keys_it_sees(backend, operation, name):
    random = np.random.default_rng(0)
    arrays = {n: random.standard_normal((1, 4, 1, 2)) for n in "qrkv"}
    # Every number is finite, and the second row's score of the first key is not.
    arrays["k"][0, 0] = 1e10
    arrays[name][0, 1] = 1e300
    arrays["ridge"] = np.ones((1, 4, 1))
    arrays = {n: arrays[n] for n in ARGUMENTS[operation]}
    gradients = backward(backend, operation, arrays, random.standard_normal((1, 4, 1, 2)), {})
    for n, gradient in gradients.items():
        if n in "kv":
            assert np.isnan(gradient[0, :2]).all()
            assert np.isfinite(gradient[0, 2:]).all()
        else:
            assert np.isfinite(np.delete(gradient, 1, axis=1)).all()
    assert np.isnan(gradients["q"][0, 1]).all()


@backends
@operations
@pytest.mark.parametrize("empty", ["batch", "length", "keys", "heads"])
def test_axes_of_size_zero_give_empty_or_zero_gradients(backend, operation, empty):
    B, L, S, H = (0 if empty == name else 2 for name in ("batch", "length", "keys", "heads"))
    arrays = {"q": np.ones((B, L, 2 * H, 3)), "r": np.ones((B, L, 2 * H, 3))}
    arrays |= {"k": np.ones((B, S, H, 3)), "v": np.ones((B, S, H, 4)), "ridge": np.ones((B, L, 2 * H))}
    arrays = {name: arrays[name] for name in ARGUMENTS[operation]}
    gradients = backward(backend, operation, arrays, np.ones((B, L, 2 * H, 4)), {})
    for name, x in arrays.items():
        assert gradients[name].shape == x.shape
        assert (gradients[name] == 0).all()


# Bad input


def bad_input(backend, operation, options=None, **changes):
    """A call of two sequences, four query heads and two key heads, with something changed."""
    random = np.random.default_rng(0)
    shapes = {"q": (2, 5, 4, 3), "r": (2, 5, 4, 3), "k": (2, 6, 2, 3), "v": (2, 6, 2, 7), "ridge": (2, 5, 4)}
    arrays = {n: random.uniform(1, 2, shapes[n]).astype(np.float32) for n in ARGUMENTS[operation]}
    o, state = forward(backend, operation, arrays, options or {})
    call = {"do": np.ones(o.shape, o.dtype), "o": o, "state": state}
    call |= {name: change(call[name]) for name, change in changes.items()}
    ridge = {"ridge": arrays.pop("ridge")} if "ridge" in arrays else {}
    function = getattr(backend, f"{operation}_attention_backward")
    return function(call["do"], *arrays.values(), call["o"], call["state"], **ridge, **(options or {}))


@backends
@operations
@pytest.mark.parametrize("name", ["do", "o"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: x[:, :4], ValueError, "has shape (2, 4, 4, 7); expected (2, 5, 4, 7)"),
        (lambda x: x[..., :3], ValueError, "has shape (2, 5, 4, 3); expected (2, 5, 4, 7)"),
        (lambda x: x[0], ValueError, "has shape (5, 4, 7); expected (2, 5, 4, 7)"),
        (lambda x: x.astype(np.float16), TypeError, "has dtype float16; expected float32"),
        (lambda x: x.astype(np.int64), TypeError, "has dtype int64; expected float32"),
        (lambda x: x.tolist(), TypeError, "is a list; expected an array"),
        (lambda x: None, TypeError, "is a NoneType; expected an array"),
    ],
)
def test_what_comes_from_the_output_must_have_its_shape_and_dtype(
    backend, operation, name, change, error, message
):
    with pytest.raises(error, match=re.escape(f"{name} {message}")):
        bad_input(backend, operation, **{name: change})


@backends
@operations
def test_every_field_of_a_state_of_another_problem_is_refused(backend, operation):
    kind = {"softmax": plx.SoftmaxState, "parallax": plx.ParallaxState, "lla": plx.LLAState}[operation]
    for field in kind._fields:
        with pytest.raises(ValueError, match=rf"state\.{field} has shape .* of another problem"):
            bad_input(
                backend,
                operation,
                state=lambda s, field=field: s._replace(**{field: getattr(s, field)[:, :4]}),
            )
        with pytest.raises(TypeError, match=rf"state\.{field} has dtype float16; expected float32"):
            bad_input(
                backend,
                operation,
                state=lambda s, field=field: s._replace(**{field: getattr(s, field).astype(np.float16)}),
            )


@backends
@operations
def test_a_state_of_another_kind_is_refused(backend, operation):
    kind = {"softmax": "SoftmaxState", "parallax": "ParallaxState", "lla": "LLAState"}[operation]
    rows, values = np.ones((2, 5, 4)), np.ones((2, 5, 4, 7))
    other = plx.ParallaxState(rows, rows, rows, values, values, rows)
    other = plx.SoftmaxState(rows, rows, values) if operation == "parallax" else other
    for wrong in (other, (rows, rows, values), rows):
        message = f"state is a {type(wrong).__name__}; expected the {kind}"
        with pytest.raises(TypeError, match=message):
            bad_input(backend, operation, state=lambda _, wrong=wrong: wrong)


@backends
def test_a_ridge_of_0_needs_keys_that_span_the_space(backend):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 9, 1, 4)) for _ in range(3))
    options = {"ridge": 0.0, "solver": "lstsq"}
    for call in ({**options, "causal": True}, {**options, "causal": False}):
        keys = k if call["causal"] else k * [1, 1, 1, 0]
        o, state = backend.lla_attention(q, keys, v, **call, return_state=True)
        with pytest.raises(plx.SolverError, match="use a ridge above 0"):
            backend.lla_attention_backward(v, q, keys, v, o, state, **call)


@backends
def test_what_the_forward_call_refuses_is_refused(backend):
    x = np.ones((1, 3, 2, 4))
    ridge = np.ones((1, 3, 2))
    for message, changed in (
        ("k has head size 5", {"k": np.ones((1, 3, 2, 5))}),
        ("window_size is 0", {"window_size": 0}),
        ("ridge is -1.0", {"ridge": -ridge}),
        ("ridge is 0.0 with solver='cholesky'|ridge is 0 with solver='cholesky'", {"ridge": 0 * ridge}),
        ("solver is 'lu'", {"solver": "lu"}),
    ):
        call = {"q": x, "k": x, "v": x, "ridge": ridge, **changed}
        with pytest.raises(ValueError, match=message):
            backend.lla_attention_backward(x, o=x, state=None, **call)
