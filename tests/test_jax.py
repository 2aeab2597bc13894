"""JAX: gradients and transformations of the public operations."""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import parallax_core as plx
import parallax_core.frameworks.jax as plj

OPTIONS = {
    "causal": {},
    "full": {"causal": False, "scale": 0.3},
    "window": {"window_size": 2},
    "packed": {"cu_seqlens": np.array([0, 2, 2, 5])},
}
NAMES = ("softmax_attention", "parallax_attention", "lla_attention")
operations = pytest.mark.parametrize("operation", NAMES)
options = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def make(operation="parallax_attention", dtype="float64", *, packed=False, lengths=(4, 5)):
    """q, r, k, v, of two query heads a key head and lengths that differ; no r where there is no probe."""
    random = np.random.default_rng(0)
    q_len, kv_len = (5, 5) if packed else lengths
    batch = 1 if packed else 2
    shapes = (batch, q_len, 4, 3), (batch, q_len, 4, 3), (batch, kv_len, 2, 3), (batch, kv_len, 2, 2)
    made = [jnp.asarray(random.standard_normal(s), dtype) for s in shapes]
    if operation != "parallax_attention":
        del made[1]
    return made


def call(operation, module=plj, **given):
    ridge = {"ridge": 0.5} if operation.startswith("lla") else {}
    return lambda *arrays: getattr(module, operation)(*arrays, **ridge, **given)


def same(found, expected):
    return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


@options
@operations
def test_gradients_are_those_of_finite_differences(operation, option):
    arrays = make(operation, packed=option == "packed")
    # Central differences in float64 at JAX's step of 1e-5 are good to 1e-9 or so; its default asks for 1e-5.
    check_grads(call(operation, **OPTIONS[option]), arrays, order=1, modes=["rev"])


@pytest.mark.parametrize("shape", [(), (4,), (2, 4, 1)])
def test_the_gradient_by_the_ridge_has_the_ridge_s_shape(shape):
    arrays = make("lla_attention")
    ridge = jnp.full(shape, 0.7)
    check_grads(lambda *x: plj.lla_attention(*x[:3], ridge=x[3]), (*arrays, ridge), order=1, modes=["rev"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@operations
def test_calls_are_the_public_ones_bit_for_bit(operation, dtype):
    arrays = make(operation, dtype)
    plain = [np.asarray(x) for x in arrays]
    expected = call(operation, plx, return_state=True)(*plain)
    for f in (call(operation, return_state=True), jax.jit(call(operation, return_state=True))):
        o, state = f(*arrays)
        assert isinstance(state, type(expected[1]))
        assert o.dtype == dtype
        assert same((o, state), expected)
    o, gradient = jax.vjp(call(operation), *arrays)
    do = np.random.default_rng(1).standard_normal(o.shape).astype(o.dtype)
    backward = call(f"{operation}_backward", plx)
    assert same(gradient(jnp.asarray(do)), backward(do, *plain, expected[0], None)[: len(arrays)])


def test_numpy_arrays_are_taken_where_jax_would_keep_their_dtype():
    arrays = [np.asarray(x) for x in make()]
    assert isinstance(plj.parallax_attention(*arrays), jax.Array)
    with jax.enable_x64(False), pytest.raises(TypeError, match=r"^q has dtype float64, which JAX would cast"):
        plj.parallax_attention(*arrays)


def test_float64_comes_through_threads_that_do_not_know_of_it():
    arrays = make()

    def loop(q, r, k, v):
        return jax.lax.map(lambda x: plj.parallax_attention(x, r, k, v), jnp.stack([q, 2 * q]))

    found = jax.jit(loop)(*arrays)
    expected = [plx.parallax_attention(n * arrays[0], *arrays[1:]) for n in (1, 2)]
    assert same(list(found), expected)


@operations
def test_mapped_calls_are_those_of_a_batch(operation):
    arrays = make(operation)

    def one(*arrays):
        return call(operation, return_state=True)(*(x[None] for x in arrays))

    found = jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(*arrays))
    assert same(found, call(operation, return_state=True)(*arrays))


def test_transformations_compose():
    q, r, k, v = make()

    def loss(q, r, k, v, lengths):
        out = plj.parallax_attention(*(x[None] for x in (q, r, k, v)), cu_seqlens=lengths)
        return jnp.square(out).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    lengths = jnp.array([[0, 2, 4], [0, 1, 4]])
    k, v = k[:, :4], v[0, :4]
    found = jax.jit(jax.vmap(gradient, in_axes=(0, 0, 0, None, 0)))(q, r, k, v, lengths)
    expected = [gradient(q[i], r[i], k[i], v, lengths[i]) for i in range(2)]
    assert same(found, [jnp.stack(x) for x in zip(*expected)])


def test_probes_wider_than_the_inputs_have_gradients_as_wide():
    q, _, k, v = make(dtype="bfloat16")
    _, r, _, _ = make(dtype="float32")
    dq, dr = jax.grad(lambda q, r: plj.parallax_attention(q, r, k, v).sum(dtype="float32"), argnums=(0, 1))(
        q, r
    )
    assert (dq.dtype, dr.dtype) == (jnp.bfloat16, jnp.float32)


def test_decode_is_the_public_one_with_traced_lengths_and_pages():
    q, r, k, v = make(lengths=(2, 6))
    pages = {"page_table": jnp.array([[1, 0], [3, 2]]), "cache_seqlens": jnp.array([5, 3])}
    leftpad = {"cache_seqlens": jnp.array([6, 4]), "cache_leftpad": jnp.array([1, 2])}
    paged_k, paged_v = (x.reshape(4, 3, *x.shape[2:]) for x in (k, v))
    for operation in ("softmax_decode", "parallax_decode", "lla_decode"):
        for index, cache in ((pages, (paged_k, paged_v)), (leftpad, (k, v))):
            arrays = (q, r, *cache) if operation == "parallax_decode" else (q, *cache)
            traced = jax.jit(lambda arrays, index, f=operation: call(f, return_state=True, **index)(*arrays))
            expected = call(operation, plx, return_state=True, **index)(*arrays)
            assert same(traced(arrays, index), expected)
            assert same(call(operation, **index)(*arrays), expected[0])


def test_the_family_is_the_public_one():
    q, r, k, v = make()
    for given in (
        {"probe": None}, {"probe": r}, {"probe": "query", "intercept": False, "scale": 0.0},
        {"probe": "solve", "ridge": 0.3, "kernel": "gaussian", "bandwidth": 1.5},
        {"probe": r, "amplification": True}, {"probe": "solve", "ridge": jnp.full(4, 0.3)},
    ):  # fmt: skip
        assert same(plj.local_attention(q, k, v, **given), plx.local_attention(q, k, v, **given))
    assert same(plj.lla_probe(q, k, ridge=0.1), plx.lla_probe(q, k, ridge=0.1))


@operations
def test_states_pickle_and_merge(operation):
    _, state = jax.jit(call(operation, return_state=True))(*make(operation, "float32"))
    copy = pickle.loads(pickle.dumps(state))
    assert type(copy) is type(state)
    assert same(copy, state)
    assert same(plx.merge_states(copy, state), plx.merge_states(state, state))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_state_has_no_gradient_and_says_so(wrap):
    arrays = make()
    stated = wrap(call("parallax_attention", return_state=True))
    gradients = jax.grad(lambda *x: stated(*x)[0].sum(), argnums=(0, 1, 2, 3))(*arrays)
    assert same(
        gradients, jax.grad(lambda *x: plj.parallax_attention(*x).sum(), argnums=(0, 1, 2, 3))(*arrays)
    )
    with pytest.raises(TypeError, match=r"^state\.d1 is differentiated"):
        jax.grad(lambda *x: stated(*x)[1].d1.sum())(*arrays)


@pytest.mark.parametrize(
    "name, loss",
    [
        ("q", lambda q, r, k, v: plj.lla_probe(q, k, ridge=0.1)),
        (
            "ridge",
            lambda q, r, k, v: plj.lla_probe(*map(jax.lax.stop_gradient, (q, k)), ridge=q[:, :, :, 0] ** 2),
        ),
        ("k_cache", lambda q, r, k, v: plj.softmax_decode(v[..., :1], q[..., :1], q)),
        ("q", lambda q, r, k, v: plj.parallax_decode(q, r, k, v)),
        ("probe", lambda q, r, k, v: plj.local_attention(r, k, v, probe=q)),
    ],
)
def test_what_has_no_gradient_names_the_argument(name, loss):
    q, r, k, v = make()
    if name == "k_cache":
        v = v.repeat(2, axis=2)
    with pytest.raises(TypeError, match=rf"^{name} is differentiated, and \w+ has no gradient"):
        jax.grad(lambda q: loss(q, r, k, v).sum())(q)


@pytest.mark.parametrize("platforms", [("cuda",), ("tpu",), ("cpu", "cuda")])
@pytest.mark.parametrize("differentiated", [False, True])
def test_no_other_platform_is_compiled_for(platforms, differentiated):
    arrays = make()

    def f(*arrays):
        return plj.parallax_attention(*arrays).sum()

    traced = jax.jit(jax.grad(f) if differentiated else f).trace(*arrays)
    with pytest.raises(plx.BackendUnavailableError, match=r"platform '(cuda|tpu)'"):
        traced.lower(lowering_platforms=platforms)


@operations
def test_arrays_on_another_device_are_refused_before_anything_is_read(operation, monkeypatch):
    """This machine's arrays say that they lie on a GPU; a copy to the host would go through these calls."""

    class Elsewhere:
        platform = "cuda"

    arrays, lengths = make(operation, packed=True), jnp.array([0, 5])
    given = {"ridge": jnp.full(4, 0.5)} if operation == "lla_attention" else {}
    kind = type(lengths)
    monkeypatch.setattr(kind, "devices", lambda self: {Elsewhere()})

    def copied(self, *args, **kwargs):
        raise AssertionError("an array was copied to the host")

    monkeypatch.setattr(kind, "__array__", copied)
    for differentiated in (False, True):

        def f(*arrays):
            return getattr(plj, operation)(*arrays, cu_seqlens=lengths, **given).sum()

        with pytest.raises(plx.BackendUnavailableError, match="platform 'cuda'"):
            (jax.grad(f) if differentiated else f)(*arrays)


@operations
def test_second_derivatives_are_an_error(operation):
    arrays = make(operation)

    def slope(q):
        return jax.grad(lambda q: call(operation)(q, *arrays[1:]).sum())(q).sum()

    with pytest.raises(TypeError, match="have first derivatives alone, and a second one is asked for"):
        jax.grad(slope)(arrays[0])


def wrong():
    with jax.enable_x64(True):
        q, _r, k, v = make()
    yield "q is a list", TypeError, lambda: plj.softmax_attention([1.0], k, v)
    yield "r is a NoneType", TypeError, lambda: plj.parallax_attention(q, None, k, v)
    yield "q has shape", ValueError, lambda: jax.jit(plj.softmax_attention)(q[0], k, v)
    yield "v has shape .* as k has", ValueError, lambda: jax.jit(plj.softmax_attention)(q, k, v[:, 1:])
    yield "k has dtype float32", TypeError, lambda: plj.softmax_attention(q, k.astype("float32"), v)
    yield "q has dtype int", TypeError, lambda: plj.softmax_attention(*(x.astype(int) for x in (q, k, v)))
    yield "scale must be a number", TypeError, lambda: plj.softmax_attention(q, k, v, scale="1")
    yield "window_size is 0", ValueError, lambda: plj.softmax_attention(q, k, v, window_size=0)
    yield "solver is 'lu'", ValueError, lambda: plj.lla_attention(q, k, v, ridge=1, solver="lu")
    yield "ridge must be a number", TypeError, lambda: plj.lla_attention(q, k, v, ridge="1")
    yield "ridge must be a number", TypeError, lambda: plj.lla_attention(q, k, v, ridge=[1.0])
    yield "ridge has dtype bool", TypeError, lambda: plj.lla_attention(q, k, v, ridge=jnp.array(True))
    yield (
        "ridge has dtype complex",
        TypeError,
        lambda: jax.jit(lambda ridge: plj.lla_attention(q, k, v, ridge=ridge))(jnp.array(1j)),
    )
    yield "ridge is -1.0", ValueError, lambda: plj.lla_attention(q, k, v, ridge=jnp.float32(-1))
    yield (
        r"ridge has shape \(3,\)",
        ValueError,
        lambda: jax.jit(lambda ridge: plj.lla_attention(q, k, v, ridge=ridge))(jnp.ones(3)),
    )
    yield (
        "cu_seqlens runs from 0 to 3",
        ValueError,
        lambda: plj.softmax_attention(q[:1], k[:1, :4], v[:1, :4], cu_seqlens=jnp.array([0, 3])),
    )
    yield (
        "cu_seqlens packs",
        ValueError,
        lambda: jax.jit(lambda n: plj.softmax_attention(q, k, v, cu_seqlens=n))(jnp.array([0, 3])),
    )
    yield (
        r"cache_seqlens\[1\] is 9",
        ValueError,
        lambda: plj.softmax_decode(q, k, v, cache_seqlens=jnp.array([1, 9])),
    )
    yield "probe is None", ValueError, lambda: plj.local_attention(q, k, v, probe=None, intercept=False)


@pytest.mark.parametrize("message, kind, run", list(wrong()))
def test_bad_input_is_named(message, kind, run):
    with pytest.raises(kind, match=f"^{message}"):
        run()


def test_traced_values_are_checked_when_they_are_known():
    q, _, k, v = make(lengths=(4, 4))
    packed = jax.jit(lambda n: plj.softmax_attention(q[:1], k[:1], v[:1], cu_seqlens=n))
    with pytest.raises(jax.errors.JaxRuntimeError, match="cu_seqlens runs from 0 to 3; expected 0 to 4"):
        packed(jnp.array([0, 3])).block_until_ready()


def test_without_jax_the_import_names_the_extra():
    code = (
        "import sys; sys.modules['jax'] = None; import parallax_core\n"
        "try: import parallax_core.frameworks.jax\n"
        "except parallax_core.BackendUnavailableError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "parallax-core[jax]" in run.stdout
