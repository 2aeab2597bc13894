"""Arrays of every framework in and out: zero-copy, dtypes, and what cannot be exchanged."""

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import parallax_core as plx
from parallax_core import exchange

TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
names = pytest.mark.parametrize("dtype", list(TORCH))
frameworks = pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def make(framework, shape, dtype, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    if framework == "numpy":
        return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if framework == "torch":
        return torch.from_numpy(x).to(TORCH[dtype])
    return jnp.asarray(x, dtype=dtype)


def pointer(x):
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.unsafe_buffer_pointer()


def float64(x):
    if isinstance(x, torch.Tensor):
        return x.double().numpy()
    return np.asarray(x).astype(np.float64)


@names
@frameworks
def test_arrays_come_in_without_a_copy(framework, dtype):
    x = make(framework, (3, 4, 2, 5), dtype)
    seen = exchange.to_numpy("x", x)
    assert seen.ctypes.data == pointer(x)
    assert seen.dtype.name == dtype
    np.testing.assert_array_equal(seen.astype(np.float64), float64(x))


@names
@frameworks
def test_results_go_out_without_a_copy(framework, dtype):
    like = make(framework, (1,), dtype)
    array = exchange.empty((3, 5), exchange.to_numpy("like", like).dtype)
    array[...] = np.arange(15).reshape(3, 5)
    out = exchange.hand_back(array, like)
    assert type(out) is type(like)
    assert out.dtype == like.dtype
    assert pointer(out) == array.ctypes.data
    np.testing.assert_array_equal(float64(out), np.arange(15).reshape(3, 5))


@names
@frameworks
def test_public_calls_answer_in_the_framework_of_q(framework, dtype):
    q, r, k, v = (make(framework, (2, 6, h, 8), dtype, s) for s, h in enumerate((4, 4, 2, 2)))
    o, state = plx.parallax_attention(q, r, k, v, return_state=True)
    assert type(o) is type(q)
    assert o.dtype == q.dtype
    assert all(type(x) is type(q) for x in state)
    expected = plx.reference.parallax_attention(*map(float64, (q, r, k, v)))
    # One rounding of the result to its dtype, and float32 sums of six terms.
    tolerance = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert np.abs(float64(o) - expected).max() < tolerance * np.abs(expected).max()
    finished = plx.merge_states(state, state).finish()
    assert type(finished) is type(q)


def test_frameworks_can_be_mixed_on_one_device():
    q, r, k, v = (
        make(f, (1, 5, 1, 4), "float32", s) for s, f in enumerate(("torch", "numpy", "jax", "numpy"))
    )
    assert isinstance(plx.parallax_attention(q, r, k, v), torch.Tensor)


@frameworks
def test_views_with_any_strides_are_taken_as_they_are(framework):
    x = make(framework, (2, 3, 6, 8), "float32")
    moved = jnp.swapaxes(x, 1, 2) if framework == "jax" else x.swapaxes(1, 2)
    base = float64(moved)
    result = float64(plx.softmax_attention(moved, moved, moved))
    np.testing.assert_allclose(result, plx.reference.softmax_attention(base, base, base), atol=1e-6)


def test_strided_last_axis_negative_and_zero_strides():
    x = torch.randn(2, 6, 2, 8)
    for view in (x[..., ::2], x.flip(1).numpy()[:, ::-1], x[:, :1].expand(2, 6, 2, 8)):
        base = float64(view)
        expected = plx.reference.softmax_attention(base, base, base)
        np.testing.assert_allclose(float64(plx.softmax_attention(view, view, view)), expected, atol=1e-6)


def test_read_only_arrays_are_accepted_and_no_input_is_written_to():
    arrays = [make("numpy", (1, 70, 2, 8), "float32", s) for s in range(4)]
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    plx.parallax_attention(*arrays)
    plx.lla_attention(*arrays[1:], ridge=0.1)
    for x, copy in zip(arrays, copies):
        np.testing.assert_array_equal(x, copy)


def test_memory_lives_as_long_as_its_consumers():
    before = len(exchange._exported)
    out = plx.softmax_attention(*(make("torch", (1, 4, 1, 4), "bfloat16", s) for s in range(3)))
    kept = out.clone()
    gc.collect()
    assert torch.equal(out, kept)
    del out
    gc.collect()
    assert len(exchange._exported) == before
    capsule = exchange._Export(np.zeros(3, ml_dtypes.bfloat16)).__dlpack__()
    assert len(exchange._exported) == before + 1
    del capsule  # never consumed: its destructor frees it
    assert len(exchange._exported) == before


class Elsewhere:
    """An array on a device that this machine may not have."""

    shape, dtype = (1, 2, 1, 4), np.dtype(np.float32)

    def __init__(self, *device):
        self.device = device

    def __dlpack_device__(self):
        return self.device


def test_arrays_on_two_devices_name_the_one_that_differs():
    x = make("numpy", (1, 2, 1, 4), "float32")
    with pytest.raises(TypeError, match=r"^v is on CUDA device 1; expected the CPU, where q is"):
        plx.softmax_attention(x, x, Elsewhere(2, 1))


def test_a_gpu_without_its_backend_says_what_is_missing():
    reason = plx.cuda_kernels.availability() if hasattr(plx, "cuda_kernels") else None
    with pytest.raises(plx.BackendUnavailableError, match=r"^q is on CUDA device 0, and ") as error:
        plx.softmax_attention(*[Elsewhere(2, 0)] * 3)
    assert reason is None or reason in str(error.value)
    with pytest.raises(plx.BackendUnavailableError, match="DLPack type 8"):
        plx.softmax_attention(*[Elsewhere(8, 0)] * 3)


def test_what_cannot_be_exchanged_is_named():
    x = make("torch", (1, 2, 1, 4), "float32")
    with pytest.raises(TypeError, match=r"^k requires gradients.*frameworks\.torch"):
        plx.softmax_attention(x, x.clone().requires_grad_(), x)
    with pytest.raises(TypeError, match=r"^ridge requires gradients"):
        plx.lla_attention(x, x, x, ridge=torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match=r"^q is a list"):
        plx.softmax_attention([[1.0]], x, x)
    with pytest.raises(TypeError, match=r"^v is a masked array"):
        plx.softmax_attention(x, x, np.ma.masked_array(x.numpy()))
    with pytest.raises(TypeError, match=r"^q cannot be exchanged"):
        plx.softmax_attention(x.to_sparse(), x, x)
    with pytest.raises(TypeError, match=r"^q has DLPack dtype \(code 10, 8 bits"):
        plx.softmax_attention(x.to(torch.float8_e4m3fn), x, x)
    with pytest.raises(TypeError, match=r"^k has DLPack dtype \(code 5, 64 bits"):
        plx.softmax_attention(x, x.to(torch.complex64), x)
    with pytest.raises(TypeError, match=r"^q is being traced by JAX"):
        jax.jit(lambda y: plx.softmax_attention(y, y, y))(jnp.zeros((1, 2, 1, 4)))
    with pytest.raises(TypeError, match=r"^q has dtype >f4"):
        plx.softmax_attention(*[x.numpy().astype(">f4")] * 3)
