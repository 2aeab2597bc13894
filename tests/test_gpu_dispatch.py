"""The host's side of the GPU backend without a GPU, on a stand-in whose plans run the reference.

The stand-in's arrays lie in host memory. A plan gets what a kernel gets, addresses and the layout, and reads
and writes through those alone: a wrong stride, pointer or copy gives a wrong result.
"""

import contextlib
import gc
import re
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
from calls import call
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, attention_cases, decode_cases

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from stand_in import Array, Framework, Runtime, on_gpu, stand_in

import parallax_core as plx
from parallax_core import cuda_kernels, gpu_exchange
from parallax_core.cuda_kernels import calls
from parallax_core.gpu_exchange import Description
from parallax_core.state import LLAState, ParallaxState

GPU_DTYPES = DTYPES[1:]
FLOAT32 = np.dtype(np.float32)


class Memory:
    def __init__(self, address, shape, strides, dtype):
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "strides": tuple(s * dtype.itemsize for s in strides),
            "typestr": f"|V{dtype.itemsize}",
        }
        self.dtype = dtype


def at(address, shape, dtype, strides=None):
    """What lies at an address; dense along the axes for which there are no strides."""
    if not address or 0 in shape:
        return None if not address else np.empty(shape, dtype)
    dense = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    strides = dense if strides is None else [*strides, *dense[len(strides) :]]
    return np.asarray(Memory(address, shape, strides, dtype)).view(dtype)


class Plan:
    """Computes by the reference what a kernel computes, from addresses and layout."""

    made: ClassVar[list] = []

    def __init__(self, problem, layout, ridge=None, solver=None):
        self.problem, self.layout, self.ridge, self.solver = problem, layout, ridge, solver
        self.launches = []
        Plan.made.append(self)

    def launch(self, stream, arrays, state):
        assert len(arrays) == len(calls.Arrays._fields)
        assert all(type(x) is int for x in (*arrays, *state))
        self.launches.append(stream)
        p, layout = self.problem, self.layout
        lla = p.operation.startswith("lla")
        q, r, k, v, *index, out, ridge = arrays
        shape = p.batch, p.q_len, p.q_heads, p.head_dim
        outer = (p.batch, p.kv_len) if layout.num_pages is None else (layout.num_pages, p.page_size)
        queries = [at(q, shape, p.dtype, layout.q)]
        if r:
            queries.append(at(r, shape, p.probe_dtype, layout.r))
        keys = at(k, (*outer, p.kv_heads, p.head_dim), p.dtype, layout.k)
        values = at(v, (*outer, p.kv_heads, p.value_dim), p.dtype, layout.v)
        names = "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table"
        options = {}
        for name, address in zip(names, index):
            if address:
                described = getattr(p, name)
                options[name] = at(address, described.shape, np.dtype(f"i{layout.index_bits[name] // 8}"))
        if lla:
            options["ridge"] = self.ridge
            if ridge:
                options["ridge"] = at(ridge, p.row_shape, FLOAT32, self.ridge)
        if not p.operation.endswith("_decode"):
            options["causal"] = p.causal
        o, found = getattr(plx.reference, p.operation)(
            *queries, keys, values, scale=p.scale, window_size=p.window_size, return_state=True, **options
        )
        with np.errstate(over="ignore"):
            at(out, p.output_shape, p.dtype, layout.out)[...] = o
        assert layout.return_state == any(state)
        if layout.return_state:
            if len(found) == 3:
                assert (state[2], state[4], state[5]) == (0, 0, 0)
                state = state[0], state[1], state[3]
            for address, x in zip(state, found, strict=True):
                at(address, x.shape, FLOAT32)[...] = x


@pytest.fixture(autouse=True, scope="module")
def _stand_in():
    planners = {}
    for name in ("attend", "lla"):
        planners[name] = types.ModuleType(name)
        planners[name].plan = Plan
    with stand_in() as patch:
        for name, module in planners.items():
            patch.setitem(sys.modules, f"{cuda_kernels.__name__}.{name}", module)
            patch.setattr(cuda_kernels, name, module, raising=False)
        yield


@pytest.fixture(autouse=True)
def _fresh():
    calls.forget()
    Plan.made.clear()
    Runtime.current = 0


def good(dtype=np.float16, length=1, head_dim=16, value_dim=8):
    random = np.random.default_rng(0)
    shapes = (2, length, 4, head_dim), (2, length, 4, head_dim), (2, 6, 2, head_dim), (2, 6, 2, value_dim)
    return [Array(random.standard_normal(shape).astype(dtype)) for shape in shapes]


def expected_of(arrays, operation="parallax_decode", **options):
    return getattr(plx.reference, operation)(*(x.data for x in arrays), **options)


def close(result, expected):
    """One rounding to the result's dtype, where the result is finite in it."""
    eps = {2: 2**-7, 4: 2**-23}[result.dtype.itemsize]
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(result.data.astype(np.float64) - expected)
        return (difference <= eps * (np.abs(expected) + 1e-3)).all()


@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("return_state", [False, True])
@given(case=st.one_of(decode_cases(dtypes=GPU_DTYPES), attention_cases(dtypes=GPU_DTYPES)))
def test_every_call_reaches_its_plan_with_the_right_memory(operation, return_state, case):
    expected, state = call(plx.reference, operation, case, return_state=True)
    result = call(plx, operation, on_gpu(case), return_state=return_state)
    if return_state:
        result, found = result
        assert type(found) is type(state)
        for x, y in zip(found, state):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x.data, y.astype(np.float32))
    assert isinstance(result, Array)
    assert result.dtype == case.q.dtype
    assert close(result, expected)


@pytest.mark.parametrize("return_state", [False, True])
@settings(max_examples=30)
@given(
    case=decode_cases(dtypes=GPU_DTYPES) | attention_cases(dtypes=GPU_DTYPES),
    form=st.sampled_from(("number", "rows", "heads", "half")),
)
def test_lla_reaches_its_plan(return_state, case, form):
    rows = case.q.shape[:3]
    random = np.random.default_rng(0)
    ridge = {
        "number": 0.5,
        "rows": random.uniform(0.5, 1, rows).astype(np.float32),
        "heads": random.uniform(0.5, 1, (1, rows[2])).astype(np.float32),
        "half": random.uniform(0.5, 1, rows[1:]).astype(np.float16),
    }[form]
    expected, state = call(plx.reference, "lla", case, ridge=ridge, return_state=True)
    given_ridge = ridge if form == "number" else Array(ridge)
    result = call(plx, "lla", on_gpu(case), ridge=given_ridge, return_state=return_state)
    if return_state:
        result, found = result
        assert isinstance(found, LLAState)
        for x, y in zip(found, state):
            np.testing.assert_array_equal(x.data, np.broadcast_to(y, x.shape).astype(np.float32))
    assert close(result, expected)


def test_a_call_is_planned_once_for_each_signature():
    q, r, k, v = good()
    for _ in range(3):
        plx.parallax_decode(q, r, k, v)
        plx.parallax_decode(*good(), scale=None)
    assert len(Plan.made) == 1
    assert len(Plan.made[0].launches) == 6
    changes = [
        lambda: plx.parallax_decode(q, r, k, v, scale=0.5),
        lambda: plx.parallax_decode(q, r, k, v, window_size=2),
        lambda: plx.parallax_decode(q, r, k, v, return_state=True),
        lambda: plx.parallax_decode(q, r, k, v, split_size=64),
        lambda: plx.parallax_decode(q, Array(r.data.astype(np.float32)), k, v),
        lambda: plx.parallax_decode(*good(dtype=np.float32)),
        lambda: plx.parallax_decode(*good(length=2)),
        lambda: plx.parallax_decode(q, r, Array(k.data.swapaxes(1, 2).copy().swapaxes(1, 2)), v),
        lambda: plx.parallax_decode(q, r, k, v, cache_seqlens=Array(np.array([3, 4], np.int32))),
        lambda: plx.parallax_decode(q, r, k, v, cache_seqlens=Array(np.array([3, 4], np.int64))),
        lambda: plx.softmax_decode(q, k, v),
        lambda: plx.parallax_attention(q, r, k, v),
        lambda: plx.parallax_decode(*(Array(x.data, 1) for x in (q, r, k, v))),
    ]
    for n, change in enumerate(changes):
        change()
        change()
        assert len(Plan.made) == n + 2


def test_plans_know_alignment_device_and_options():
    q, r, k, v = good()
    for offset in (0, 1):
        memory = np.zeros(k.data.size + 16, np.float16)
        start = -memory.ctypes.data % 16 // 2 + offset
        shifted = memory[start : start + k.data.size].reshape(k.shape)
        plx.parallax_decode(q, r, Array(shifted), v, split_size=32)
        layout = Plan.made[-1].layout
        assert layout.aligned == (offset == 0)
        assert layout.split_size == 32
        assert (layout.device, layout.capability, layout.multiprocessors) == (0, (9, 0), 132)
    # Rows of 5 half-precision numbers: 10 bytes.
    plx.parallax_decode(*good(head_dim=5))
    assert not Plan.made[-1].layout.aligned


def test_the_oldest_calls_go_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(calls, "MOST_CALLS", 8)
    arrays = good()
    for scale in range(1, 9):
        plx.parallax_decode(*arrays, scale=scale)
    plx.parallax_decode(*arrays, scale=1)
    plx.parallax_decode(*arrays, scale=9)
    assert len(calls._calls) <= 8
    before = len(Plan.made)
    plx.parallax_decode(*arrays, scale=1)
    plx.parallax_decode(*arrays, scale=9)
    assert len(Plan.made) == before


def test_calls_run_on_the_arrays_device_and_stream_and_restore_the_current_one():
    seen = []
    arrays = [Array(x.data, 1) for x in good()]
    plx.parallax_decode(*arrays)
    (plan,) = Plan.made
    launch = plan.launch
    plan.launch = lambda *addresses: (seen.append(Runtime.current), launch(*addresses))
    plx.parallax_decode(*arrays)
    assert seen == [1]
    assert plan.launches == [1235, 1235]
    assert Runtime.current == 0
    plan.launch = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        plx.parallax_decode(*arrays)
    assert Runtime.current == 0


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("strides", ["dense", "heads first", "strided last axis"])
def test_out_is_written_in_place_whatever_its_strides(strides, state):
    arrays = good()
    memory = np.full((2, 4, 1, 16), 77, np.float16)
    out = {
        "dense": memory.reshape(2, 1, 4, 16)[..., :8],
        "heads first": memory.swapaxes(1, 2)[..., :8],
        "strided last axis": memory.swapaxes(1, 2)[..., ::2],
    }[strides]
    out = Array(out)
    result = plx.parallax_decode(*arrays, out=out, return_state=state)
    if state:
        result, found = result
        assert isinstance(found, ParallaxState)
    assert result is out
    assert close(out, expected_of(arrays))
    assert (memory == 77).sum() == memory.size // 2


@pytest.mark.parametrize("name", ["q", "r", "k_cache", "v_cache", "cache_seqlens"])
def test_out_may_overlap_no_input(name):
    q, r, k, v = good(head_dim=8)
    given = {"q": q, "r": r, "k_cache": k, "v_cache": v, "cache_seqlens": Array(np.array([6, 6], np.int32))}
    memory = np.zeros(4096, np.float16)
    x = given[name].data
    inside = memory[64:].view(x.dtype)[: x.size].reshape(x.shape)
    inside[...] = x
    given[name] = Array(inside)
    arrays = [given[n] for n in ("q", "r", "k_cache", "v_cache")]
    apart = Array(memory[:64].reshape(2, 1, 4, 8))
    assert plx.parallax_decode(*arrays, cache_seqlens=given["cache_seqlens"], out=apart) is apart
    over = Array(memory[1:65].reshape(2, 1, 4, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^out overlaps {name} in memory"):
            plx.parallax_decode(*arrays, cache_seqlens=given["cache_seqlens"], out=over)


@pytest.mark.parametrize("operation", ["softmax_decode", "lla_decode", "softmax_attention"])
@pytest.mark.parametrize("sizes", [(0, 1, 2, 4), (2, 0, 2, 4), (2, 1, 0, 4), (2, 3, 2, 0)])
def test_nothing_is_launched_where_there_is_nothing_to_do(operation, sizes):
    batch, length, heads, keys = sizes
    q = Array(np.ones((batch, length, 2 * heads, 8), np.float16))
    k = Array(np.ones((batch, keys, heads, 8), np.float16))
    extra = {"ridge": 0.5} if operation == "lla_decode" else {}
    o, state = getattr(plx, operation)(q, k, k, return_state=True, **extra)
    assert o.shape == q.shape
    assert (o.data == 0).all()
    assert np.isneginf(state.m.data).all()
    assert (state.d1.data == 0).all()
    if operation == "lla_decode":
        assert (state.q.data == 1).all()
        assert (state.ridge.data == 0.5).all()
    assert not Plan.made


def index(*values):
    return Array(np.array(values, np.int32))


float64 = [Array(x.data.astype(np.float64)) for x in good()]
BAD = [
    (
        {"q": float64[0]},
        TypeError,
        "q has dtype float64; expected one of float32, float16, bfloat16 on a GPU",
    ),
    (
        {"r": float64[1]},
        TypeError,
        "r has dtype float64; expected one of float32, float16, bfloat16 on a GPU",
    ),
    ({"v_cache": good(np.float32)[3]}, TypeError, "v_cache has dtype float32; expected float16, that of q"),
    ({"r": good(head_dim=8)[1]}, ValueError, "r has shape (2, 1, 4, 8); expected (2, 1, 4, 16)"),
    ({"k_cache": good(head_dim=8)[2]}, ValueError, "k_cache has head size 8"),
    ({"k_cache": Array(good()[2].data, 1)}, TypeError, "k_cache is on CUDA device 1; expected CUDA device 0"),
    ({"k_cache": good()[2].data}, TypeError, "k_cache is on the CPU; expected CUDA device 0, where q is"),
    ({"cache_seqlens": index(3)}, ValueError, "cache_seqlens has shape (1,); expected (2,)"),
    ({"cache_seqlens": np.ones(2, np.int32)}, TypeError, "cache_seqlens is on the CPU"),
    (
        {"cache_seqlens": Array(np.ones(2, np.int16))},
        TypeError,
        "cache_seqlens has dtype int16; expected int32 or int64",
    ),
    ({"page_table": Array(np.zeros((2, 3), np.int32))}, ValueError, "page_table needs cache_seqlens"),
    ({"scale": np.nan}, ValueError, "scale is nan"),
    ({"scale": True}, TypeError, "scale must be a number"),
    ({"scale": []}, TypeError, "scale must be a number"),
    ({"window_size": 0}, ValueError, "window_size is 0"),
    ({"window_size": 1.0}, TypeError, "window_size must be an integer"),
    ({"split_size": 24}, ValueError, "split_size is 24; expected a positive multiple of 16"),
    ({"split_size": 0}, ValueError, "split_size is 0"),
    ({"split_size": 16.0}, TypeError, "split_size must be an integer or None"),
    ({"out": Array(np.zeros((2, 1, 4, 9), np.float16))}, ValueError, "out has shape (2, 1, 4, 9)"),
    (
        {"out": Array(np.zeros((2, 1, 4, 8), np.float32))},
        TypeError,
        "out has dtype float32; expected float16",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:45] for *_, message in BAD])
def test_bad_input_names_the_argument_before_anything_runs(change, error, message):
    options = dict(zip(("q", "r", "k_cache", "v_cache"), good())) | change
    arrays = [options.pop(n) for n in ("q", "r", "k_cache", "v_cache")]
    # Equal options of the right type, seen before, must not let the wrong ones through.
    plx.parallax_decode(*good(), scale=1, window_size=1, split_size=16)
    launched = len(Plan.made)
    for _ in range(2):
        with pytest.raises(error, match=re.escape(message)):
            plx.parallax_decode(*arrays, **options)
    assert len(Plan.made) == launched


def test_devices_that_are_too_old_say_so():
    with pytest.raises(
        plx.BackendUnavailableError, match=r"q is on CUDA device 2 of compute capability 7\.5"
    ):
        plx.parallax_decode(*(Array(x.data, 2) for x in good()))


def test_index_values_are_read_back_only_when_asked():
    q, r, k, v = good()
    pages = dict(page_table=Array(np.array([[0, 1], [9, 1]], np.int32)), cache_seqlens=index(8, 8))
    bad = [
        (dict(cache_seqlens=index(7, 3)), "cache_seqlens[0] is 7; expected 0 to 6"),
        (
            dict(cache_seqlens=index(3, 3), cache_leftpad=index(0, 4)),
            "cache_leftpad[1] is 4; expected 0 to 3",
        ),
        (dict(cache_leftpad=index(0, 7)), "cache_leftpad[1] is 7; expected 0 to 6"),
        (pages, "page_table[1, 0] is 9; expected 0 to 1"),
    ]
    for options, message in bad:
        for validate in (True, True):
            with contextlib.suppress(
                Exception
            ):  # what the stand-in's reference makes of it is its own affair
                plx.parallax_decode(q, r, k, v, **options)
            with pytest.raises(ValueError, match=re.escape(message)):
                plx.parallax_decode(q, r, k, v, **options, validate=validate)
    fine = dict(cache_seqlens=index(3, 6), cache_leftpad=index(0, 6))
    assert close(
        plx.parallax_decode(q, r, k, v, **fine, validate=True),
        expected_of((q, r, k, v), cache_seqlens=fine["cache_seqlens"].data, cache_leftpad=np.array([0, 6])),
    )
    packed = [Array(x.data[:1]) for x in good(length=6)]
    with pytest.raises(ValueError, match=r"cu_seqlens runs from 0 to 5; expected 0 to 6"):
        plx.parallax_attention(*packed, cu_seqlens=index(0, 3, 5), validate=True)


def test_ridges_are_checked_by_shape_and_dtype_and_by_value_when_asked():
    q, _, k, v = good()
    for ridge, error, message in (
        (-0.5, ValueError, "ridge is -0.5"),
        (0, ValueError, "ridge is 0 with solver='cholesky'"),
        (None, TypeError, "ridge must be a number"),
        (Array(np.ones(3, np.float32)), ValueError, "ridge has shape (3,); expected one that broadcasts"),
        (Array(np.ones(4)), TypeError, "ridge has dtype float64; expected one of float32"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            plx.lla_decode(q, k, v, ridge=ridge)
    bad = Array(np.array([1, 1, -2, 1], np.float32))
    with pytest.raises(ValueError, match=r"ridge is -2\.0"):
        plx.lla_decode(q, k, v, ridge=bad, validate=True)


def test_what_has_no_kernel_says_so_and_copies_nothing():
    q, r, k, v = good(length=6)
    o = Array(np.zeros((2, 6, 4, 8), np.float16))
    refused = [
        ("local_attention", lambda: plx.local_attention(q, k, v, probe=None)),
        ("softmax_attention_backward", lambda: plx.softmax_attention_backward(o, q, k, v, o, None)),
        ("parallax_attention_backward", lambda: plx.parallax_attention_backward(o, q, r, k, v, o, None)),
        ("lla_attention_backward", lambda: plx.lla_attention_backward(o, q, k, v, o, None, ridge=0.1)),
    ]
    for name, run in refused:
        with pytest.raises(
            plx.BackendUnavailableError, match=f"^q is on CUDA device 0, and {name} has no CUDA"
        ):
            run()


def test_no_memory_left_is_a_memory_error_that_says_for_what(monkeypatch):
    arrays = good()
    plx.parallax_decode(*arrays)
    monkeypatch.setattr(Framework, "memory", 10)
    message = r"CUDA device 0 .*parallax_decode: an output of shape \(2, 1, 4, 8\)"
    with pytest.raises(MemoryError, match=message):
        plx.parallax_decode(*arrays)
    with pytest.raises(MemoryError, match=message + " and a ParallaxState"):
        plx.parallax_decode(*arrays, return_state=True)
    monkeypatch.undo()
    assert close(plx.parallax_decode(*arrays), expected_of(arrays))


def test_tensors_are_read_by_their_attributes_or_refused():
    """On the CPU here, where an address and a layout are what they are on a GPU."""
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 3, 4, 6)
    read = gpu_exchange.framework(x)
    assert read is gpu_exchange.framework(torch.nn.Parameter(x))
    pointers, key = read.signature([x, None, x[1:]])
    assert pointers == [x.data_ptr(), 0, x[1:].data_ptr()]
    assert read.signature([x.clone(), None, x.clone()[1:]])[1] == key
    assert read.describe("x", x.transpose(1, 2)) == Description((2, 4, 3, 6), (72, 6, 24, 1), FLOAT32)
    unusual = [
        x.clone().requires_grad_(),
        torch.view_as_complex(x.view(2, 3, 4, 3, 2)).conj().imag,
        x.to_sparse(),
        x.numpy(),
        torch.nested.nested_tensor([x[0], x[0, :1]]),
    ]
    assert unusual[1].is_neg()
    pointers_of = read.matcher([x, None, x])
    assert pointers_of([x, None, x.clone()])[:2] == [x.data_ptr(), 0]
    unlike = [
        x[1:],
        x.double(),
        x.transpose(1, 2),
        torch.nn.Parameter(x, requires_grad=False),
        x.view(-1)[1:],
    ]
    for tensor in (x for x in (*unusual, *unlike) if type(x) is torch.Tensor):
        assert pointers_of([x, None, tensor]) is None
    shifted = torch.zeros(x.numel() + 1)[1:].view(x.shape)
    assert pointers_of([x, None, shifted]) is None
    assert read.matcher([x, None, shifted]) is None
    for tensor in unusual:
        assert read.signature([x, tensor]) is None
    with pytest.raises(TypeError, match=r"v is a lazy view that was never computed; pass v\.resolve_neg\(\)"):
        plx.softmax_attention(*[x[..., :3]] * 2, unusual[1])
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        y = x.to(dtype)
        assert read.describe("y", y).dtype.name == name
        assert read.allocator(y, (2, 5))(y).dtype == dtype
        assert read.allocator(y, (2, 5), FLOAT32)(y).dtype == torch.float32
        assert read.allocator(y.transpose(1, 2), (2, 4, 3, 6))(y.transpose(1, 2)).is_contiguous()


def test_the_quick_allocation_of_pytorch_is_taken_only_where_it_gives_what_it_must():
    torch = pytest.importorskip("torch")

    def found(empty):
        space = types.SimpleNamespace
        compiler = space(_dynamo=space(guards=space(_empty_strided_cuda=empty)))
        cuda = space(device=lambda device: contextlib.nullcontext())
        fake = space(cuda=cuda, _C=compiler, bfloat16=torch.bfloat16)
        return gpu_exchange._torch_empty(fake, torch.device("cpu"))

    def empty(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype)

    def fails(size, stride, dtype):
        raise RuntimeError("no such device")

    assert found(empty) is empty
    for unlike in (
        lambda size, stride, dtype: torch.empty_strided(size, stride[::-1], dtype=dtype),
        lambda size, stride, dtype: torch.empty_strided(size[::-1], stride, dtype=dtype),
        lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=torch.float16),
        lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="meta"),
        lambda size, stride: torch.empty_strided(size, stride, dtype=torch.bfloat16),
        fails,
    ):
        assert found(unlike) is None
    assert gpu_exchange._torch_empty(types.SimpleNamespace(), torch.device("cpu")) is None


@pytest.mark.filterwarnings("error")
def test_a_stream_of_others_keeps_its_address_and_is_not_destroyed(monkeypatch):
    destroyed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: destroyed.append(report.exc_value))
    stream = gpu_exchange.stream_at(12345)
    assert (stream.ptr, stream.__cuda_stream__()) == (12345, (0, 12345))
    # Without a driver, to destroy one would raise.
    del stream
    gc.collect()
    assert not destroyed


def test_early_launches_are_allowed_for_a_while():
    early_launch = pytest.importorskip("parallax_core.cuda_kernels.early_launch")
    default = early_launch.allowed()
    with early_launch.allow(False):
        assert not early_launch.allowed()
        with early_launch.allow(True):
            assert early_launch.allowed()
        assert not early_launch.allowed()
    assert early_launch.allowed() == default
