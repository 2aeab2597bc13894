"""Numbers at the edge of what floating point holds, on every backend and in every dtype.

Errors are those against extended precision of the same rounded inputs.
"""

import functools

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from backends import BACKENDS, every_backend_and_dtype
from benchmarks.error_table import INPUTS, RIDGE, cases, plain, relative
from strategies import DTYPES, AttentionCase

import parallax_core as plx

# Three tiles of keys; fewer dimensions than the published table, as the truth costs an elimination a row.
LENGTH, HEAD_DIM = 150, 16
SCALES = {"logits of 1e4": 1e4 / 25, "logits of -1e4, then 1e4": 1.0}
OFFSETS = "offset of 16", "offset of 256"

operations = pytest.mark.parametrize("operation", INPUTS)


@pytest.fixture(autouse=True)
def _one_thread():
    """PyTorch's own threads spin while they wait, which costs these small tensors more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def arrays():
    """q, r, k and v by name of the case, float64."""
    made = cases(LENGTH, HEAD_DIM)
    q, r, k, v = made["random keys"]
    largest = np.abs(np.einsum("bihd,bjhd->bij", q, k)).max()
    made["logits of 1e4"] = q * (25 / largest), r, k, v
    # Exact in every dtype: early rows see logits of -1e4 alone, later ones both.
    direction = np.zeros((1, LENGTH, 1, HEAD_DIM))
    direction[..., 0] = 100
    signs = np.where(np.arange(LENGTH) < LENGTH // 3, -1, 1)[:, None, None]
    along = np.arange(HEAD_DIM) == 0
    made["logits of -1e4, then 1e4"] = direction, r, np.where(along, signs * direction, k), v
    return made


CASES = tuple(arrays())


def rounded(case, dtype):
    return {name: x.astype(dtype) for name, x in zip("qrkv", arrays()[case])}


def options(case, operation):
    ridge = {"ridge": RIDGE} if operation == "lla" else {}
    return ridge | ({"scale": SCALES[case]} if case in SCALES else {})


@functools.cache
def truth(case, dtype, operation):
    inputs = rounded(case, dtype)
    estimator = getattr(oracle, operation)
    if operation == "lla":
        estimator = functools.partial(estimator, ridge=np.full(inputs["q"].shape[:3], RIDGE))
    scale = {"scale": SCALES[case]} if case in SCALES else {}
    return oracle.evaluate(AttentionCase(*inputs.values(), scale), estimator)[:2]


@functools.cache
def outcome(backend, case, dtype, operation):
    inputs = rounded(case, dtype)
    given = (inputs[name] for name in INPUTS[operation])
    return backend(f"{operation}_attention", *given, **options(case, operation), return_state=True)


def eps(backend, dtype):
    return float(np.finfo(backend.compute_dtype(dtype)).eps)


def rounding(backend, dtype, o):
    """What rounding to the result's dtype may change of ``o``."""
    info = ml_dtypes.finfo(backend.result_dtype(dtype))
    return np.abs(o) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2


@every_backend_and_dtype
@operations
@pytest.mark.parametrize("case", CASES)
def test_errors_are_at_most_twice_those_of_the_plain_formula(backend, dtype, operation, case):
    o, state = outcome(backend, case, dtype, operation)
    expected, lse = truth(case, dtype, operation)
    inputs = {name: x for name, x in rounded(case, dtype).items() if name in INPUTS[operation]}
    if backend.wide:
        inputs = {name: x.astype(np.float64) for name, x in inputs.items()}
    simple = plain(operation, inputs, **options(case, operation))
    wide = {name: x.astype(backend.compute_dtype(dtype)) for name, x in inputs.items()}
    unrounded = plain(operation, wide, **options(case, operation))
    assert o.dtype == backend.result_dtype(dtype)
    # A rounding unit beside it: where the plain formula is exact by luck, nothing is twice as good.
    unit = eps(backend, dtype)
    assert relative(o, expected) <= 2 * relative(simple, expected) + unit
    # A state is not finished about the mean key, which it does not know beforehand, but about a seen one.
    assert relative(state.finish(), expected) <= 4 * relative(unrounded, expected) + unit
    # A score is a sum of products, of which each and each partial sum is rounded.
    q, k = (np.abs(inputs[name].astype(np.float64)) for name in "qk")
    scale = options(case, operation).get("scale", HEAD_DIM**-0.5)
    largest = scale * np.einsum("bihd,bjhd->bij", q, k).max()
    assert np.abs(state.lse - lse).max() <= unit * (HEAD_DIM + 4) * (largest + np.log(LENGTH))


@pytest.mark.parametrize(
    "backend, dtype",
    [
        pytest.param(b, dtype, id=f"{b.name}-{dtype.name}")
        for b in BACKENDS
        for dtype in b.dtypes
        if dtype.itemsize == 2 and not b.wide
    ],
)
@operations
@pytest.mark.parametrize("case", OFFSETS)
def test_an_offset_of_all_keys_costs_half_precision_less_than_a_factor_of_two(
    backend, dtype, operation, case
):
    there, here = (
        relative(outcome(backend, name, dtype, operation)[0], truth(name, dtype, operation)[0])
        for name in (case, "random keys")
    )
    assert there <= 2 * here


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.wide], ids=lambda b: b.name)
@operations
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_good_as_those_of_the_plain_formula(backend, dtype, operation, case):
    inputs = {name: x for name, x in rounded(case, dtype).items() if name in INPUTS[operation]}
    do = np.random.default_rng(1).standard_normal(inputs["v"].shape).astype(dtype)
    call = f"{operation}_attention_backward", do, *inputs.values(), np.zeros_like(do), None
    expected = getattr(plx.reference, call[0])(*call[1:], **options(case, operation))
    found = backend(*call, **options(case, operation))
    simple = plain(operation, inputs, do=do, **options(case, operation))[1]
    for name, ours, exact in zip(inputs, found, expected):
        # Three, not two: the derivatives by the scores of a row sum to 0 only as well as the forward call's
        # numbers and the backward call's agree, and what is left is multiplied by the keys' offset.
        bound = 3 * relative(simple[name], exact) + eps(backend, dtype)
        assert relative(ours, exact) <= bound, name


@every_backend_and_dtype
@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize("probe", ["none", "given", "solve"])
def test_a_bandwidth_of_1e_6_picks_one_value(backend, dtype, kernel, probe):
    """The nearest key's, or that of the largest product; every other weight is exactly 0."""
    q, r, k, v = rounded("random keys", dtype).values()
    wide_q, wide_k = (x[0, :, 0].astype(np.float64) for x in (q, k))
    score = wide_q @ wide_k.T
    if kernel == "gaussian":
        score = -0.5 * np.square(wide_q[:, None] - wide_k).sum(axis=-1)
    score[np.triu_indices(LENGTH, 1)] = -np.inf
    best = np.sort(score, axis=1)
    # What float32 may change of a score here leaves the order as it is.
    assert (best[1:, -1] - best[1:, -2]).min() > 1e-5 * np.abs(score[np.isfinite(score)]).max()
    given = {"none": {"probe": None}, "given": {"probe": r}, "solve": {"probe": "solve", "ridge": RIDGE}}
    o = backend("local_attention", q, k, v, kernel=kernel, bandwidth=1e-6, **given[probe])
    expected = v[:, score.argmax(axis=1)].astype(np.float64)
    # A probe score is taken from another that may be as large: |q - k| |k| / ridge where the probe is solved.
    largest = 0 if probe == "none" else (1 + np.linalg.norm(wide_k, axis=1).max()) ** 2 / RIDGE
    slack = 8 * eps(backend, dtype) * largest * np.abs(expected)
    slack += rounding(backend, dtype, expected) if largest else 0
    assert (np.abs(o.astype(np.float64) - expected) <= slack).all()


@every_backend_and_dtype
@operations
@pytest.mark.parametrize("offset", [0, 256])
def test_one_key_gives_its_value_and_takes_the_gradient(backend, dtype, operation, offset):
    random = np.random.default_rng(0)
    q, r = (random.standard_normal((2, 3, 4, 5)).astype(dtype) for _ in range(2))
    k = (random.standard_normal((2, 1, 2, 5)) + offset).astype(dtype)
    v, do = (random.standard_normal((2, n, h, 7)).astype(dtype) for n, h in ((1, 2), (3, 4)))
    arrays = (q, r, k, v) if operation == "parallax" else (q, k, v)
    for system in ({"ridge": 1e-6}, {"ridge": 0, "solver": "lstsq"}) if operation == "lla" else ({},):
        o = backend(f"{operation}_attention", *arrays, causal=False, **system)
        expected = np.broadcast_to(np.repeat(v, 2, axis=2), o.shape)
        # A correction that should be 0 is the rounding of v alone, whatever the probe scores are.
        slack = 4 * eps(backend, dtype) * np.abs(expected.astype(np.float64))
        difference = np.abs(o.astype(np.float64) - expected.astype(np.float64))
        assert (difference <= slack + rounding(backend, dtype, expected.astype(np.float64))).all()
    if operation == "lla":
        system = {"ridge": 0.1}
    *gradients, dv = backend(
        f"{operation}_attention_backward", do, *arrays, np.zeros_like(do), None, causal=False, **system
    )[: len(arrays)]
    total = do.astype(np.float64).reshape(2, 3, 2, 2, 7).sum(axis=(1, 3))[:, None]
    sizes = np.abs(do.astype(np.float64)).sum()
    # What should be 0 is the difference of two sums that differ by rounding: of g.v times the keys, and for a
    # slope of up to |q - k| / ridge of its products with the key and the mean.
    reach = 1 + np.abs(k.astype(np.float64)).max() + np.abs(q.astype(np.float64)).max()
    slack = 64 * eps(backend, dtype) * sizes * (reach**2 / 0.1 if operation == "lla" else reach)
    assert (np.abs(dv.astype(np.float64) - total) <= rounding(backend, dtype, total) + slack).all()
    for gradient in gradients:
        assert np.abs(gradient.astype(np.float64)).max() <= slack


@every_backend_and_dtype
@operations
@pytest.mark.parametrize("offset", [0, 256])
@pytest.mark.parametrize("ridge", [0, 1e-12, 0.1])
def test_identical_keys_give_the_mean_of_the_values(backend, dtype, operation, offset, ridge):
    """C_kk = 0, and so is C_vk: no slope, however large, may show."""
    random = np.random.default_rng(0)
    q, r, v = (random.standard_normal((1, 70, 1, d)).astype(dtype) for d in (5, 5, 3))
    k = np.broadcast_to((random.standard_normal(5) + offset).astype(dtype), q.shape)
    arrays = (q, r, k, v) if operation == "parallax" else (q, k, v)
    system = {"ridge": ridge, "solver": "cholesky" if ridge else "lstsq"} if operation == "lla" else {}
    o = backend(f"{operation}_attention", *arrays, **system)
    wide = v.astype(np.float64)
    expected = np.cumsum(wide, axis=1) / np.arange(1, 71)[:, None, None]
    # A sum of 70 weights and of as many values; a slope of 1e15 times the rounding of equal probe scores.
    slack = 140 * eps(backend, dtype) * np.abs(wide).max()
    assert (np.abs(o.astype(np.float64) - expected) <= slack + rounding(backend, dtype, expected)).all()


def without_ridge(inputs, row, dtype, minimum_norm):
    """LLA in one row with the slope ``minimum_norm(X, p, b)`` of ``X^T diag(p) X u = b``."""
    q, k, v = (inputs[name][0, :, 0].astype(dtype) for name in "qkv")
    q, k, v = q[row], k[: row + 1], v[: row + 1]
    p, _ = oracle.weights(dtype(q.size) ** dtype(-0.5) * (k @ q))
    X = k - p @ k
    return (p * (1 + X @ minimum_norm(X, p, q - p @ k))) @ v


def pseudoinverse(X, p, b):
    C_kk = X.T @ (p[:, None] * X)
    return np.linalg.pinv(C_kk, rcond=b.size * np.finfo(b.dtype).eps, hermitian=True) @ b


def elimination(X, p, b):
    """Keys in general position, no more than there are dimensions: their differences are a basis."""
    B = X[1:] - X[0]
    return B.T @ oracle.solve(B @ X.T @ (p[:, None] * X) @ B.T, B @ b)


@every_backend_and_dtype
@pytest.mark.parametrize("case", ["random keys", *OFFSETS])
def test_ridge_0_with_fewer_keys_than_dimensions(backend, dtype, case):
    rows = range(HEAD_DIM - 4)
    inputs = {name: x[:, : len(rows)] for name, x in rounded(case, dtype).items()}
    o = backend("lla_attention", *(inputs[name] for name in "qkv"), ridge=0, solver="lstsq")
    truth, simple = (
        np.array([without_ridge(inputs, row, wide, minimum_norm) for row in rows])[None, :, None]
        for wide, minimum_norm in (
            (oracle.WIDE, elimination),
            (backend.compute_dtype(dtype).type, pseudoinverse),
        )
    )
    simple = simple.astype(backend.result_dtype(dtype))
    # The factorisations of different routines are each exact to a few times D rounding units.
    assert relative(o, truth) <= 2 * relative(simple, truth) + HEAD_DIM * eps(backend, dtype)


JUNK = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "largest": None}


@every_backend_and_dtype
@operations
@pytest.mark.parametrize("junk", JUNK)
def test_what_no_row_sees_changes_no_bit(backend, dtype, operation, junk):
    junk = dtype.type(ml_dtypes.finfo(dtype).max if JUNK[junk] is None else JUNK[junk])
    random = np.random.default_rng(0)
    system = {"ridge": RIDGE} if operation == "lla" else {}

    def normal(*shape):
        return random.standard_normal(shape).astype(dtype)

    def check(function, k, v, hidden, **given):
        spoilt = [x.copy() for x in (k, v)]
        for x in spoilt:
            x[hidden] = junk
        lead = queries if operation == "parallax" else queries[:1]
        expected, found = (
            backend(f"{operation}_{function}", *lead, *caches, **given, **system)
            for caches in ((k, v), spoilt)
        )
        np.testing.assert_array_equal(found, expected)
        assert np.isfinite(expected.astype(np.float64)).all()

    queries = normal(2, 3, 4, 5), normal(2, 3, 4, 5)
    k, v = normal(2, 200, 2, 5), normal(2, 200, 2, 6)
    # The window of the first of three queries, the one that sees key 197 last, begins at key 190.
    check("attention", k, v, np.s_[:, :190], window_size=8)
    lengths, leftpad = np.array([150, 3]), np.array([70, 0])
    positions = np.arange(200)
    hidden = (positions < leftpad[:, None]) | (positions >= lengths[:, None])
    check("decode", k, v, hidden, cache_seqlens=lengths, cache_leftpad=leftpad)
    pages = np.array([[3, 0, 4], [1, 10**6, -1]], np.int32)
    paged = [x.reshape(10, 40, *x.shape[2:]) for x in (k, v)]
    lengths = np.array([95, 3])
    hidden = np.ones((10, 40), bool)
    hidden[[3, 0]], hidden[4, :15], hidden[1, :3] = False, False, False
    check("decode", *paged, hidden, cache_seqlens=lengths, page_table=pages)


@every_backend_and_dtype
@operations
def test_rows_that_see_no_key_are_0_beside_any_junk(backend, dtype, operation):
    arrays = [np.full((2, n, 1, 4), np.nan, dtype) for n in (3, 3, 9, 9)]
    arrays = arrays if operation == "parallax" else [arrays[0], *arrays[2:]]
    system = {"ridge": RIDGE} if operation == "lla" else {}
    o, state = backend(
        f"{operation}_decode", *arrays, **system, cache_seqlens=np.array([0, 5]),
        cache_leftpad=np.array([0, 5]), return_state=True,
    )  # fmt: skip
    assert (o == 0).all()
    assert np.isneginf(state.lse).all()


@every_backend_and_dtype
@operations
@pytest.mark.parametrize("which", ["k", "v", "all"])
def test_subnormal_numbers_are_not_flushed(backend, dtype, operation, which):
    random = np.random.default_rng(0)
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    inputs = {n: random.standard_normal((1, 40, 1, 5)) for n in "qrkv"}
    for name in "qrkv" if which == "all" else which:
        shape = inputs[name].shape
        inputs[name] = normal * random.uniform(0.25, 0.99, shape) * random.choice([-1, 1], shape)
    inputs = {name: x.astype(dtype) for name, x in inputs.items()}
    given = (inputs[name] for name in INPUTS[operation])
    o = backend(f"{operation}_attention", *given, **options("", operation))
    estimator = getattr(oracle, operation)
    if operation == "lla":
        estimator = functools.partial(estimator, ridge=np.full((1, 40, 1), RIDGE))
    expected, _, sensitivity = oracle.evaluate(AttentionCase(*inputs.values(), {}), estimator)
    # Each of 40 products of a weight and a value is rounded to a multiple of the smallest number.
    underflow = 100 * float(np.finfo(backend.compute_dtype(dtype)).smallest_subnormal)
    slack = 8 * eps(backend, dtype) * sensitivity + underflow
    assert (np.abs(o.astype(np.float64) - expected) <= slack + rounding(backend, dtype, expected)).all()
    if which != "k":
        assert np.abs(expected).max() > normal / 4  # most of a subnormal's digits, and not its rounding
