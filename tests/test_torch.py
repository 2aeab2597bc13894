"""PyTorch: gradients, tracing, export and autocast of the public operations."""

import io
import pickle
import subprocess
import sys

import pytest
import torch

import parallax_core as plx
import parallax_core.frameworks.torch as plt

OPTIONS = {
    "causal": {},
    "full": {"causal": False, "scale": 0.3},
    "window": {"window_size": 2},
    "packed": {"cu_seqlens": torch.tensor([0, 2, 2, 5])},
}
NAMES = ("softmax_attention", "parallax_attention", "lla_attention")
operations = pytest.mark.parametrize("operation", NAMES)
options = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _one_thread():
    """PyTorch's own threads spin while they wait, which costs these small tensors more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(operation="parallax_attention", dtype=torch.float64, *, packed=False, grad=False, lengths=(4, 5)):
    """q, r, k, v, of two query heads a key head and lengths that differ; no r where there is no probe."""
    generator = torch.Generator().manual_seed(0)
    q_len, kv_len = (5, 5) if packed else lengths
    batch = 1 if packed else 2
    shapes = (batch, q_len, 4, 3), (batch, q_len, 4, 3), (batch, kv_len, 2, 3), (batch, kv_len, 2, 2)
    made = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]
    if operation != "parallax_attention":
        del made[1]
    return [x.requires_grad_(grad) for x in made]


def call(operation, **given):
    ridge = {"ridge": 0.5} if operation.startswith("lla") else {}
    return lambda *arrays: getattr(plt, operation)(*arrays, **ridge, **given)


@options
@operations
def test_gradients_are_those_of_finite_differences(operation, option):
    arrays = make(operation, packed=option == "packed", grad=True, lengths=(2, 3))
    assert torch.autograd.gradcheck(call(operation, **OPTIONS[option]), arrays)


@pytest.mark.parametrize("learned", [("q",), ("r",), ("k",), ("v",), ("r", "v")])
def test_gradients_of_some_inputs_of_parallax_are_those_of_finite_differences(learned):
    arrays = [x.requires_grad_(name in learned) for name, x in zip("qrkv", make(lengths=(2, 3)))]
    assert torch.autograd.gradcheck(plt.parallax_attention, arrays)


@pytest.mark.parametrize("learned", [("v",), ("ridge",), ("k", "ridge")])
def test_gradients_of_some_inputs_of_lla_are_those_of_finite_differences(learned):
    inputs = *make("lla_attention", lengths=(2, 3)), torch.full((4,), 0.7, dtype=torch.float64)
    arrays = [x.requires_grad_(name in learned) for name, x in zip(("q", "k", "v", "ridge"), inputs)]
    assert torch.autograd.gradcheck(lambda q, k, v, ridge: plt.lla_attention(q, k, v, ridge=ridge), arrays)


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 1), (2, 2, 4)])
def test_the_gradient_by_the_ridge_has_the_ridge_s_shape(shape):
    arrays = make("lla_attention", grad=True, lengths=(2, 3))
    ridge = torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: plt.lla_attention(*x[:3], ridge=x[3]), [*arrays, ridge])
    single = ridge.detach().float().requires_grad_()
    plt.lla_attention(*arrays, ridge=single).sum().backward()
    assert single.grad.dtype == torch.float32


def test_probes_wider_than_the_inputs_have_gradients_as_wide():
    q, r, k, v = (x.requires_grad_() for x in make(dtype=torch.bfloat16))
    wide = r.detach().float().requires_grad_()
    plt.parallax_attention(q, wide, k, v).sum().backward()
    assert wide.grad.dtype == torch.float32
    assert q.grad.dtype == torch.bfloat16
    _, r64, _, _ = make()
    single = [x.detach().float() for x in (q, k, v)]
    o, state = plt.parallax_attention(single[0], r64, *single[1:], return_state=True)
    assert (o.dtype, state.O2.dtype) == (torch.float32, torch.float64)


@operations
def test_gradients_are_the_public_ones_bit_for_bit(operation):
    arrays = make(operation, torch.float32, grad=True)
    o = call(operation)(*arrays)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(o, arrays, do)
    plain = [x.detach() for x in arrays]
    ridge = {"ridge": 0.5} if operation == "lla_attention" else {}
    expected = getattr(plx, f"{operation}_backward")(do, *plain, o.detach(), None, **ridge)
    assert torch.equal(o, getattr(plx, operation)(*plain, **ridge))
    assert all(map(torch.equal, found, expected))


def operator_calls():
    """Every operator with arguments; mask: scale, causal, window_size, cu_seqlens."""
    mask = None, True, None, None
    system = None, 0.5, "cholesky"
    lengths = torch.tensor([5, 3])
    for dtype in (torch.float64, torch.bfloat16):
        q, r, k, v = make(dtype=dtype)
        ridge = torch.full((4,), 0.5, dtype=dtype)
        out = torch.empty(2, 4, 4, 2, dtype=dtype)
        cache = lengths, None, None, 3, None
        for stated in (False, True):
            yield "softmax_attention", (q, k, v, *mask, stated)
            yield "parallax_attention", (q, r, k, v, 0.2, True, 3, None, stated)
            yield "lla_attention", (q, k, v, *system, *mask, stated)
            yield "lla_attention", (q, k, v, ridge, None, "cholesky", *mask, stated)
            yield "softmax_decode", (q, k, v, *cache, stated)
            yield "parallax_decode", (q, r, k, v, *cache, stated)
            yield "lla_decode", (q, k, v, *system, *cache, stated)
            yield "softmax_decode_into", (q, k, v, *cache, out.clone(), [])
            yield "parallax_decode_into", (q, r, k, v, *cache, out.clone(), [])
            yield "lla_decode_into", (q, k, v, *system, *cache, out.clone(), [])
        yield "lla_probe", (q, k, *system, *mask)
        yield (
            "local_attention",
            (q, k, v, None, "query", "gaussian", True, False, None, None, "cholesky", *mask),
        )
        do, o = torch.randn(2, 4, 4, 2).to(dtype), torch.zeros(2, 4, 4, 2, dtype=dtype)
        yield "softmax_attention_backward", (do, q, k, v, o, [], *mask)
        yield "parallax_attention_backward", (do, q, r, k, v, o, [], *mask)
        yield "lla_attention_backward", (do, q, k, v, o, *system, *mask)


def test_every_operator_keeps_what_it_registered():
    for name, args in operator_calls():
        torch.library.opcheck(
            getattr(torch.ops.parallax_core, name).default, args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@operations
def test_differentiable_operators_trace_with_dynamic_shapes(operation, dtype):
    arrays = make(operation, dtype, grad=True)
    system = (torch.full((4,), 0.5, dtype=dtype, requires_grad=True), None, "cholesky")
    given = *arrays, *(system if operation == "lla_attention" else ()), None, True, None, None
    for stated in (False, True):
        torch.library.opcheck(getattr(torch.ops.parallax_core, operation).default, (*given, stated))


class Block(torch.nn.Module):
    """One call between projections, whose lengths are the tokens'."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.operation, self.width = operation, 8
        self.project = torch.nn.Linear(8, 4 * 8)

    def forward(self, x):
        q, r, k, v = self.project(x).unflatten(-1, (4, 2, 4)).unbind(2)
        if self.operation == "lla_attention":
            return plt.lla_attention(q, k, v, ridge=r.square().mean(-1) + 0.1)
        return plt.parallax_attention(q, r, k, v, window_size=5)


@pytest.mark.parametrize("operation", NAMES[1:])
def test_compiled_is_eager_bit_for_bit_forward_and_backward(operation):
    block = Block(operation)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 9):
        x = torch.randn(2, length, 8)
        outcomes = []
        for f in (block, compiled):
            block.zero_grad()
            o = f(x)
            o.square().sum().backward()
            outcomes.append((o, block.project.weight.grad))
        assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_calls_take_numbers_that_change(dynamic):
    q, r, k, v = make()

    def f(scale, window, bandwidth, ridge, offsets):
        return (
            plt.parallax_attention(q, r, k, v, scale=scale, window_size=window),
            plt.local_attention(q, k, v, probe="query", bandwidth=bandwidth),
            plt.lla_attention(q, k, v, ridge=ridge),
            plt.softmax_attention(q[:1], k[:1, :4], v[:1, :4], cu_seqlens=offsets),
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for given in ((0.3, 2, 1.5, 0.5, [0, 4]), (0.4, 3, 2.5, 0.7, [0, 1, 4]), (1, None, 1, 2, [0, 4])):
        offsets = torch.tensor(given[-1])
        assert all(map(torch.equal, compiled(*given[:-1], offsets), f(*given[:-1], offsets)))


def test_the_default_compiler_takes_operations_and_their_gradients():
    arrays = make(dtype=torch.float32, grad=True)
    call_ = call("parallax_attention", window_size=3)
    o, expected = (f(*arrays) for f in (torch.compile(call_, fullgraph=True), call_))
    assert torch.equal(o, expected)
    do = torch.randn_like(o)
    assert all(
        map(torch.equal, torch.autograd.grad(o, arrays, do), torch.autograd.grad(expected, arrays, do))
    )


def test_compiled_decode_writes_into_out_and_returns_its_state():
    q, r, k, v = make(dtype=torch.float32, lengths=(1, 9))
    lengths = torch.tensor([4, 9], dtype=torch.int32)

    def step(q, r, k, v, out):
        return plt.parallax_decode(q, r, k, v, cache_seqlens=lengths, out=out, return_state=True)

    out = torch.empty(2, 1, 4, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    o, state = compiled(q, r, k, v, out)
    expected, states = plx.parallax_decode(q, r, k, v, cache_seqlens=lengths, return_state=True)
    assert torch.equal(out, expected)
    assert torch.equal(o, expected)
    assert isinstance(state, plx.ParallaxState)
    assert all(map(torch.equal, state, states))
    assert plt.parallax_decode(q, r, k, v, cache_seqlens=lengths, out=out) is out


def test_exported_programs_take_other_lengths_and_return_states():
    class Attention(torch.nn.Module):
        def forward(self, q, r, k, v):
            o, parallax = plt.parallax_attention(q, r, k, v, return_state=True)
            _, softmax = plt.softmax_attention(q, k, v, return_state=True)
            return o, parallax, softmax, plt.lla_attention(q, k, v, ridge=0.3, return_state=True)[1]

    length = torch.export.Dim("length", min=2, max=64)
    arrays = make(dtype=torch.float32, lengths=(6, 6))
    program = torch.export.export(Attention(), tuple(arrays), dynamic_shapes=({1: length},) * 4)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    arrays = make(dtype=torch.float32, lengths=(9, 9))
    for found, expected in zip(loaded(*arrays), Attention()(*arrays)):
        assert type(found) is type(expected)
        assert all(map(torch.equal, found, expected))


@operations
def test_states_pickle(operation):
    _, state = call(operation, return_state=True)(*make(operation, torch.float32))
    copy = pickle.loads(pickle.dumps(state))
    assert type(copy) is type(state)
    assert all(map(torch.equal, copy, state))
    assert torch.equal(plx.merge_states(copy, state).lse, plx.merge_states(state, copy).lse)


@operations
def test_a_state_shares_no_memory_with_the_inputs(operation):
    arrays = make(operation, torch.float32)
    _, state = call(operation, return_state=True)(*arrays)
    inputs = {x.untyped_storage().data_ptr() for x in arrays}
    assert not inputs & {x.untyped_storage().data_ptr() for x in state}


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_inputs_and_leaves_a_wide_probe(compiled):
    q, r, k, v = (x.requires_grad_() for x in make(dtype=torch.float32))

    def f(q, r, k, v):
        return plt.parallax_attention(q, r, k, v)

    run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = run(q, r, k, v)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(o, plx.parallax_attention(half[0], r.detach(), *half[1:]))
    o.float().sum().backward()
    assert {x.grad.dtype for x in (q, r, k, v)} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.float16):
        assert run(q, r, k, v).dtype == torch.float16
        assert plt.lla_attention(q, k, v, ridge=0.5).dtype == torch.float16
        assert plt.lla_probe(q.detach(), k.detach(), ridge=0.5).dtype == torch.float32
        doubles = make("softmax_attention")
        assert plt.softmax_attention(*doubles).dtype == torch.float64
    assert run(q, r, k, v).dtype == torch.float32


def test_inputs_of_any_strides_and_gradients_without_memory_of_their_own():
    base = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    moved = base.transpose(1, 2)
    o = plt.softmax_attention(moved, moved, moved)
    (found,) = torch.autograd.grad(o.sum(), base)  # the gradient of a sum is one number, expanded
    plain = moved.detach().contiguous()
    gradients = plx.softmax_attention_backward(torch.ones_like(o), plain, plain, plain, o.detach(), None)
    # Three terms are added in another order.
    torch.testing.assert_close(found, sum(gradients).transpose(1, 2), rtol=1e-13, atol=1e-13)


def test_a_backward_pass_without_a_saved_state_makes_its_own():
    arrays = make(grad=True)
    o, expected = (
        torch.ops.parallax_core.parallax_attention(*arrays, None, True, None, None, stated)[0]
        for stated in (False, True)
    )
    assert all(map(torch.equal, *(torch.autograd.grad(x.sum(), arrays) for x in (o, expected))))


def refused():
    q, _r, k, v = make()
    learned = q.clone().requires_grad_()
    yield "q", lambda: plt.softmax_attention(learned, k, v, return_state=True)
    yield "r", lambda: plt.parallax_attention(q, learned, k, v, return_state=True)
    yield "ridge", lambda: plt.lla_probe(q, k, ridge=torch.ones((), requires_grad=True))
    yield "q", lambda: plt.lla_probe(learned, k, ridge=1.0)
    yield "probe", lambda: plt.local_attention(q, k, v, probe=learned)
    yield "q", lambda: plt.softmax_decode(learned, k, v)
    yield "r", lambda: plt.parallax_decode(q, learned, k, v)
    yield "ridge", lambda: plt.lla_decode(q, k, v, ridge=torch.ones((), requires_grad=True))


@pytest.mark.parametrize("name, run", list(refused()))
def test_a_graph_is_never_cut(name, run):
    with pytest.raises(TypeError, match=rf"^{name} requires gradients, which \w+ does not have"):
        run()
    with torch.no_grad():
        run()


@operations
def test_second_derivatives_are_an_error(operation):
    arrays = make(operation, grad=True)
    first = torch.autograd.grad(call(operation)(*arrays).sum(), arrays, create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{operation}_backward is differentiated, and has no derivative"):
        first[0].sum().backward()


@pytest.mark.parametrize("module", [plt, plx, plx.reference])
@pytest.mark.parametrize("place", range(5))
def test_a_forward_mode_tangent_is_never_dropped(module, place):
    def call(q, r, k, v, ridge):
        module.parallax_attention(q, r, k, v)
        module.lla_attention(q, k, v, ridge=ridge)

    arrays = [*make(), torch.full((4,), 0.7, dtype=torch.float64)]
    name = ("q", "r", "k", "v", "ridge")[place]
    with torch.autograd.forward_ad.dual_level():
        arrays[place] = torch.autograd.forward_ad.make_dual(arrays[place], torch.ones_like(arrays[place]))
        with pytest.raises(TypeError, match=f"^{name} has a tangent of forward-mode differentiation"):
            call(*arrays)


@operations
def test_mapped_calls_and_their_gradients_are_those_of_a_batch(operation):
    arrays = make(operation, grad=True)

    def one(*arrays):
        return call(operation)(*(x[None] for x in arrays))[0]

    found, expected = torch.vmap(one)(*arrays), call(operation)(*arrays)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, *(torch.autograd.grad(o.square().sum(), arrays) for o in (found, expected))))
    plain = [x.detach() for x in arrays]
    states = torch.vmap(lambda *x: call(operation, return_state=True)(*(y[None] for y in x))[1])(*plain)
    expected = call(operation, return_state=True)(*plain)[1]
    assert all(torch.equal(x[:, 0], y) for x, y in zip(states, expected))


def test_what_a_tensor_hides_from_its_memory_is_not_passed_over():
    q, r, k, v = make()
    negated = torch._neg_view(q)
    assert torch.equal(plt.parallax_attention(negated, r, k, v), plt.parallax_attention(-q, r, k, v))
    for module in (plx, plx.reference):
        with pytest.raises(TypeError, match=r"^q is a lazy view .* q\.resolve_neg"):
            module.parallax_attention(negated, r, k, v)


def test_the_family_is_the_public_one():
    q, r, k, v = make()
    for given in (
        {"probe": None}, {"probe": r}, {"probe": "query", "intercept": False, "scale": 0.0},
        {"probe": "solve", "ridge": 0.3, "kernel": "gaussian", "bandwidth": 1.5},
        {"probe": r, "amplification": True}, {"probe": "solve", "ridge": torch.full((4,), 0.3).double()},
    ):  # fmt: skip
        assert torch.equal(plt.local_attention(q, k, v, **given), plx.local_attention(q, k, v, **given))
    assert torch.equal(plt.lla_probe(q, k, ridge=0.1), plx.lla_probe(q, k, ridge=0.1))


def wrong():
    q, _r, k, v = make()
    yield "q is a ndarray", TypeError, lambda: plt.softmax_attention(q.numpy(), k, v)
    yield "r is a NoneType", TypeError, lambda: plt.parallax_attention(q, None, k, v)
    yield r"k has shape \(2, 5, 6\)", ValueError, lambda: plt.softmax_attention(q, k.flatten(2), v)
    yield r"v has shape .* as k has", ValueError, lambda: plt.softmax_attention(q, k, v[:, 1:])
    yield "k has dtype float32", TypeError, lambda: plt.softmax_attention(q, k.float(), v)
    yield "scale must be a number", TypeError, lambda: plt.softmax_attention(q, k, v, scale="1")
    yield "causal must be True or False", TypeError, lambda: plt.softmax_attention(q, k, v, causal=1)
    yield "window_size is 0", ValueError, lambda: plt.softmax_attention(q, k, v, window_size=0)
    yield (
        "window_size is 2 with causal=False",
        ValueError,
        lambda: plt.softmax_attention(q, k, v, window_size=2, causal=False),
    )
    yield "solver is 'lu'", ValueError, lambda: plt.lla_attention(q, k, v, ridge=1, solver="lu")
    yield "ridge must be a number or a tensor", TypeError, lambda: plt.lla_attention(q, k, v, ridge="1")
    yield "ridge is -1.0", ValueError, lambda: plt.lla_attention(q, k, v, ridge=-1)
    yield "ridge has dtype bool", TypeError, lambda: plt.lla_attention(q, k, v, ridge=torch.tensor(True))
    yield "ridge is given", ValueError, lambda: plt.local_attention(q, k, v, probe=None, ridge=1)
    yield "ridge is None", ValueError, lambda: plt.local_attention(q, k, v, probe="solve")
    yield "kernel is 3", ValueError, lambda: plt.local_attention(q, k, v, probe=None, kernel=3)
    yield "k is on meta; expected cpu", TypeError, lambda: plt.softmax_attention(q, k.to("meta"), v)
    yield (
        "ridge is on meta; expected cpu",
        TypeError,
        lambda: plt.lla_attention(q, k, v, ridge=torch.ones((), device="meta")),
    )
    yield "scale is nan", ValueError, lambda: plt.softmax_attention(q, k, v, scale=float("nan"))
    yield "cu_seqlens is a list", TypeError, lambda: plt.softmax_attention(q, k, v, cu_seqlens=[0, 5])
    cache = torch.zeros(2, 5, 4, 3)
    yield "out overlaps k", ValueError, lambda: plt.softmax_decode(q.float(), cache, cache, out=cache[:, :4])
    yield (
        "out has dtype",
        TypeError,
        lambda: plt.softmax_decode(q.float(), cache, cache, out=cache[:, 1:].double()),
    )


@pytest.mark.parametrize("message, kind, run", list(wrong()))
def test_bad_input_is_named(message, kind, run):
    with pytest.raises(kind, match=f"^{message}"):
        run()


def test_without_pytorch_the_import_names_the_extra():
    code = (
        "import sys; sys.modules['torch'] = None; import parallax_core\n"
        "try: import parallax_core.frameworks.torch\n"
        "except parallax_core.BackendUnavailableError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "parallax-core[torch]" in run.stdout
