"""Kernels run on the host, thread by thread, in several orders: what a GPU computes, without one."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cupy", reason="the GPU backend imports CuPy; pip install '.[gpu-compile]'")

from budget import budget
from calls import call
from cases import hold
from emulated_runs import FLOAT16, FLOAT32, ORDERS, for_racecheck, lengths, make, run
from emulation import EARLY, LATE, RANDOM_EARLY, RANDOM_LATE, Prepared, compiled, emulated, needs_compiler
from stand_in import on_gpu
from strategies import BFLOAT16, DecodeCase

import parallax_core as plx
from parallax_core.cuda_kernels import early_launch, heuristics
from parallax_core.cuda_kernels.launch import Kind

pytestmark = needs_compiler


CASES = {
    "copy engine": (dict(capacity=700), (9, 0)),
    "copy engine, two heads of 64": (dict(capacity=700, head_dim=64), (9, 0)),
    "copy engine, ragged pages, tokens, a window": (
        dict(length=3, group=2, capacity=256, page_size=64, window_size=90, cache_seqlens=lengths(249, 31)),
        (9, 0),
    ),
    "a cluster of blocks": (dict(batch=1, kv_heads=1, capacity=512), (9, 0)),
    "16 rows of one head": (dict(kv_heads=1, group=16, capacity=500, dtype=FLOAT16), (9, 0)),
    "packed sequences": (dict(packed=(5, 1, 20), kv_heads=1, head_dim=40, causal=False), (9, 0)),
    "lanes copy": (dict(capacity=300, length=2, cache_seqlens=lengths(299, 2)), (8, 0)),
    "float32": (dict(head_dim=33, value_dim=20, dtype=FLOAT32), (8, 0)),
}


@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("name", CASES)
def test_attention_in_every_order_of_its_threads(operation, name):
    sizes, capability = CASES[name]
    case = make(**sizes)
    expected = call(plx.reference, operation, case)
    bound = budget(case, operation).output
    results = run(operation, case, capability)
    for o in results:
        np.testing.assert_array_equal(o, results[0])
    hold(results[0], expected, bound)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 5])
def test_probe_scores_far_from_their_shift_cost_no_accuracy(keys, dtype):
    """Rows of few keys, whose probe scores are spread less than they are large."""
    case = make(batch=60, kv_heads=1, head_dim=16, capacity=keys, dtype=dtype)
    expected = call(plx.reference, "parallax", case)
    (o,) = run("parallax", case, (9, 0), orders=(RANDOM_LATE,))
    hold(o, expected, budget(case, "parallax").output)


@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_a_state_has_the_largest_score_and_changes_no_bit_of_the_output(operation, dtype):
    case = make(kv_heads=1, group=3, capacity=150, dtype=dtype)
    _, state = call(plx.reference, operation, case, return_state=True)
    with emulated((9, 0)):
        plain = call(plx, operation, on_gpu(case))
        o, found = call(plx, operation, on_gpu(case), return_state=True)
        np.testing.assert_array_equal(plain.data, o.data)
        assert (np.abs(found.m.data - state.m) <= budget(case, operation).lse).all()


MANY_PARTS = {
    "two heads of 64": (dict(batch=1, kv_heads=2, head_dim=64, capacity=3000), (9, 0), 40),
    "three rows of two sequences": (dict(kv_heads=1, group=3, capacity=2600), (9, 0), 40),
    "heads of 48": (dict(batch=1, kv_heads=1, group=3, head_dim=48, capacity=3000), (8, 0), 40),
    "more than two rounds": (dict(batch=1, kv_heads=1, value_dim=64, capacity=5200), (9, 0), 40),
}


@pytest.mark.parametrize("name", MANY_PARTS)
def test_an_item_may_have_more_parts_than_are_merged_at_a_time(name):
    sizes, capability, multiprocessors = MANY_PARTS[name]
    case = make(**sizes)
    results = run("parallax", case, capability, (RANDOM_LATE, RANDOM_EARLY), multiprocessors)
    np.testing.assert_array_equal(results[1], results[0])
    hold(results[0], call(plx.reference, "parallax", case), budget(case, "parallax").output)


WARPGROUPS = {
    "a block a sequence": dict(group=16, capacity=200),
    "a cluster of blocks": dict(batch=1, group=16, capacity=700, multiprocessors=8),
    "parts": dict(batch=1, group=11, capacity=901, multiprocessors=3, window_size=800),
    "parcels": dict(batch=1, group=16, capacity=1090, multiprocessors=9, dtype=FLOAT16),
    "ragged, 5 rows of each of two heads": dict(
        batch=3, kv_heads=2, group=5, capacity=400, cache_seqlens=lengths(391, 0, 65)
    ),
    "ragged, a float32 probe, parcels": dict(
        group=16, capacity=600, cache_seqlens=lengths(600, 90), probe=FLOAT32, multiprocessors=9
    ),
    "ragged pages of 16": dict(
        batch=3, group=8, capacity=400, page_size=16, cache_seqlens=lengths(391, 0, 65), multiprocessors=4
    ),
    "ragged pages of 256, float16": dict(
        batch=3, group=12, capacity=512, page_size=256, cache_seqlens=lengths(512, 1, 300), dtype=FLOAT16
    ),
}  # fmt: skip


@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("name", WARPGROUPS)
def test_warpgroups_in_every_order(operation, name, monkeypatch):
    """Sums of 64 keys a step; where sequences are alike, such steps are for longer ones than these."""
    monkeypatch.setattr(heuristics, "_KEYS_OF_WARPGROUPS", 0)
    sizes = dict(WARPGROUPS[name])
    multiprocessors = sizes.pop("multiprocessors", 12)
    case = make(**{"kv_heads": 1} | sizes)
    if operation == "softmax" and "probe" in sizes:
        pytest.skip("softmax has no probe")
    results = run(operation, case, (9, 0), multiprocessors=multiprocessors)
    for o in results:
        np.testing.assert_array_equal(o, results[0])
    hold(results[0], call(plx.reference, operation, case), budget(case, operation).output)


@pytest.mark.parametrize("name", ["parts", "parcels", "ragged pages of 16"])
def test_the_kernels_that_racecheck_follows_compute_the_same_bits(name, monkeypatch):
    sizes = dict(WARPGROUPS[name])
    multiprocessors = sizes.pop("multiprocessors")
    case = make(**{"kv_heads": 1} | sizes)
    monkeypatch.setattr(heuristics, "_KEYS_OF_WARPGROUPS", 0)
    options = dict(orders=(RANDOM_LATE,), multiprocessors=multiprocessors)
    (expected,) = run("parallax", case, (9, 0), **options)
    for_racecheck(monkeypatch)
    (o,) = run("parallax", case, (9, 0), **options)
    np.testing.assert_array_equal(o, expected)


@pytest.mark.parametrize(
    "group, dtype", [(8, FLOAT16), (8, BFLOAT16), (2, FLOAT16), (2, BFLOAT16), (2, FLOAT32)], ids=str
)
@pytest.mark.parametrize("name", ["offset", "peaked", "one large key", "large probes", "low scores"])
def test_sums_follow_scores_and_probe_scores(name, group, dtype):
    """By warps and by warpgroups: maxima that grow by orders of magnitude, probe scores that move."""
    case = make(kv_heads=1, group=group, capacity=400, dtype=dtype, cache_seqlens=lengths(390, 77))
    q, r, k = (x.astype(np.float32) for x in (case.q, case.r, case.k_cache))
    if name == "offset":
        k += 16
    elif name == "peaked":
        q *= 6
    elif name == "one large key":
        k[:, 200] *= 30
    elif name == "large probes":
        r *= 3000
        k[:, :100] /= 100
    else:
        q[:] = np.abs(q) * 4
        k[:] = -np.abs(k) * np.linspace(8, 1, k.shape[1])[:, None, None]
    case = DecodeCase(*(x.astype(dtype) for x in (q, r, k)), case.v_cache, case.options)
    (o,) = run("parallax", case, (9, 0), orders=(RANDOM_LATE,))
    hold(o, call(plx.reference, "parallax", case), budget(case, "parallax").output)


PARCELS = {
    "groups of 16": dict(kv_heads=1, group=16, capacity=1100),
    "groups of 3, two tokens, heads of 64": dict(kv_heads=2, group=3, length=2, head_dim=64, capacity=1000),
    "a window": dict(kv_heads=1, group=8, capacity=1025, window_size=1020),
    "two lengths": dict(batch=2, kv_heads=1, group=16, capacity=600, cache_seqlens=lengths(600, 90)),
    "pages, a block with a whole sequence between two others": dict(
        batch=3, kv_heads=1, group=12, capacity=448, page_size=16, cache_seqlens=lengths(400, 20, 200)
    ),
}  # fmt: skip


ONE_SEQUENCE = {
    "a cluster of blocks": dict(kv_heads=1, group=1, capacity=512),
    "parts": dict(kv_heads=2, group=1, capacity=700),
    "parcels, pages": dict(kv_heads=1, group=5, capacity=1088, page_size=16),
    "lanes copy": dict(kv_heads=1, group=2, head_dim=40, capacity=300),
}


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_one_sequence_is_as_long_as_the_device_says(name):
    """Blocks that have no keys of it give a part all the same; a row that sees none has an output too."""
    case = make(batch=1, **ONE_SEQUENCE[name], cache_seqlens=lengths(0))
    capacity = ONE_SEQUENCE[name]["capacity"]
    for length in (capacity, 300, 17, 1, 0, -1, capacity + 1):
        this = replace(case, options={**case.options, "cache_seqlens": lengths(length)})
        (o,) = run("parallax", this, (9, 0), orders=(RANDOM_LATE,), multiprocessors=9)
        if 0 <= length <= capacity:
            hold(o, call(plx.reference, "parallax", this), budget(this, "parallax").output)
            assert length or not o.any()
        else:
            assert np.isnan(o).all()


@pytest.mark.parametrize("operation", ["softmax", "parallax"])
@pytest.mark.parametrize("name", PARCELS)
def test_blocks_that_send_each_other_parcels_in_every_order(operation, name):
    case = make(**{"batch": 1} | PARCELS[name])
    Prepared.kinds.clear()
    results = run(operation, case, (9, 0), multiprocessors=9 * case.q.shape[0])
    assert set(Prepared.kinds) == {Kind.TOGETHER}
    for o in results:
        np.testing.assert_array_equal(o, results[0])
    hold(results[0], call(plx.reference, operation, case), budget(case, operation).output)


def test_parcels_of_other_shapes_are_not_mistaken():
    """Calls one after another on one workspace, whose rows and parts lie in the same parcels."""
    sizes = (1, 1, 16, 128, 8), (1, 1, 5, 128, 11), (2, 1, 8, 64, 8)
    with emulated((9, 0), multiprocessors=16):
        Prepared.order = RANDOM_EARLY
        for seed, (batch, kv_heads, group, head_dim, tiles) in enumerate((*sizes, sizes[0])):
            case = make(
                batch=batch, kv_heads=kv_heads * 128 // head_dim, group=group, head_dim=head_dim,
                capacity=128 * tiles, seed=seed,
            )  # fmt: skip
            Prepared.kinds.clear()
            o = call(plx, "parallax", on_gpu(case)).data.astype(np.float64)
            assert set(Prepared.kinds) == {Kind.TOGETHER}
            hold(o, call(plx.reference, "parallax", case), budget(case, "parallax").output)


@pytest.mark.parametrize(
    "operation, extra, capability",
    [
        *(
            (*operation, capability)
            for operation in (("softmax", {}), ("parallax", {}), ("lla", {"ridge": 0.5}))
            for capability in ((9, 0), (8, 0))
        ),
        ("lla", {"ridge": 0.5, "solver": "cg"}, (9, 0)),
    ],
)
def test_what_is_hidden_changes_no_bit(operation, extra, capability):
    """Keys and values of NaN beyond the lengths, of which rows of the same tile see more and fewer."""
    case = make(length=3, capacity=100, cache_seqlens=lengths(90, 17))
    (clean,) = run(operation, case, capability, orders=(EARLY,), **extra)
    k, v = case.k_cache.copy(), case.v_cache.copy()
    for b, n in enumerate(case.options["cache_seqlens"]):
        k[b, n:], v[b, n:] = np.nan, np.inf
    (dirty,) = run(operation, case.with_keys_and_values(k, v), capability, orders=(EARLY,), **extra)
    np.testing.assert_array_equal(dirty, clean)
    # The newest key of the first sequence is seen by its last row alone.
    k, v = case.k_cache.copy(), case.v_cache.copy()
    v[0, 89, 0, 3] = np.nan
    (o,) = run(operation, case.with_keys_and_values(k, v), capability, orders=(LATE,), **extra)
    sees = np.zeros(o.shape, bool)
    sees[0, 2, 0, 3] = True
    assert np.isnan(o[sees]).all()
    np.testing.assert_array_equal(o[~sees], clean[~sees])


@pytest.mark.parametrize("operation", ["parallax", "lla"])
def test_with_a_split_size_a_sequence_has_the_same_bits_in_any_batch(operation):
    extra = {"split_size": 512, **({"ridge": 0.1} if operation == "lla" else {})}
    found = lengths(1500, 0, 700)
    case = make(batch=3, kv_heads=1, capacity=1500, head_dim=64, cache_seqlens=found)
    together, other = run(operation, case, (9, 0), orders=(LATE, RANDOM_EARLY), **extra)
    np.testing.assert_array_equal(together, other)
    for b in range(3):
        arrays = (x[b : b + 1] for x in (case.q, case.r, *case.keys_and_values))
        one = DecodeCase(*arrays, {"cache_seqlens": found[b : b + 1]})
        (alone,) = run(operation, one, (9, 0), orders=(EARLY,), **extra)
        np.testing.assert_array_equal(alone[0], together[b])


@pytest.mark.parametrize("operation", ["parallax", "lla"])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_cache_may_be_broadcast_over_sequences_or_heads(operation, axis):
    case = make(capacity=130, kv_heads=2)
    arrays = [np.broadcast_to(x.take([0], axis), x.shape) for x in case.keys_and_values]
    case = case.with_keys_and_values(*arrays)
    extra = {"ridge": 0.1} if operation == "lla" else {}
    expected = call(plx.reference, operation, case, **extra)
    for o in run(operation, case, (9, 0), orders=(LATE,), **extra):
        np.testing.assert_allclose(o, expected, atol=2.0**-6, rtol=2.0**-6)


def test_a_page_that_does_not_exist_is_nan_in_every_head():
    case = make(head_dim=64, capacity=128, page_size=64, cache_seqlens=lengths(128, 100))
    case.options["page_table"][1, 0] = -1
    for operation, extra in (("parallax", {}), ("lla", {"ridge": 0.1})):
        for o in run(operation, case, (9, 0), **extra):
            assert np.isfinite(o[0]).all()
            assert np.isnan(o[1]).all()


SWAP = """
#include "ptx/copy.cuh"
#include "ptx/shared_memory.cuh"
__global__ void swap_halves(const uint4* from, uint4* to, int copied, int waits, int meets, int offset) {
  extern __shared__ uint4 shared[];
  const int i = threadIdx.x;
  if (copied) {
    copy_16(shared_address(shared + i), from + i);
    copy_commit();
    if (waits) copy_wait<0>();
  } else {
    shared[i] = from[i];
  }
  if (meets) __syncthreads();
  if (meets > 1 && i < 32) __syncthreads();
  to[i] = shared_load4(shared_address(shared + (i ^ 32)) + offset);
}
"""


def swapped(order=LATE, copied=0, waits=1, meets=1, offset=0):
    """What becomes of the numbers of 64 threads, 4 each, and what the emulator says of it."""
    options = "".join(f", static_cast<int*>(a[2])[{i}]" for i in range(4))
    call = f"swap_halves(*static_cast<const uint4**>(a[0]), *static_cast<uint4**>(a[1]){options})"
    kernel = compiled(SWAP, call, ())
    numbers, result = np.arange(256, dtype=FLOAT32), np.zeros(256, FLOAT32)
    pointers = np.array([numbers.ctypes.data, result.ctypes.data], np.uint64)
    flags = np.array([copied, waits, meets, offset], np.int32)
    at = pointers.ctypes.data
    arguments = np.array([at, at + 8, flags.ctypes.data], np.uint64)
    failure = kernel.launch(arguments.ctypes.data, 1, 1, 1, 64, 1024, order)
    return failure, (result.reshape(2, 128)[::-1].ravel() == numbers).all()


@pytest.mark.parametrize(
    "operation, extra",
    [("parallax", {}), ("lla", {"ridge": 0.1}), ("lla", {"ridge": 0.1, "solver": "cg"})],
    ids=["parallax", "lla", "lla by conjugate gradients"],
)
def test_an_early_launch_is_the_same_launch(operation, extra, monkeypatch):
    arrays = on_gpu(make(capacity=150))
    with emulated():
        monkeypatch.setattr(early_launch, "supported", lambda capability: capability >= (9, 0))
        Prepared.kinds.clear()
        early = call(plx, operation, arrays, **extra).data
        with early_launch.allow(False):
            plain = call(plx, operation, arrays, **extra).data
    assert list(Prepared.kinds) == [Kind.EARLY, Kind.PLAIN]
    np.testing.assert_array_equal(early, plain)


def test_the_emulator_tells_what_is_wrong_with_a_kernel():
    for order in ORDERS:
        assert swapped(order) == (b"", True)
        assert swapped(order, copied=1) == (b"", True)
    # Read by one thread what another writes, whether or not the order of both happens to be right.
    assert all(swapped(order, meets=0)[0].startswith(b"race") for order in ORDERS)
    # A copy that nothing waits for is there only where it came early.
    assert not swapped(LATE, copied=1, waits=0)[1]
    assert swapped(EARLY, copied=1, waits=0)[1]
    # Vectors where there is none.
    assert all(swapped(order, offset=8)[0].startswith(b"misaligned") for order in ORDERS)
    # A barrier that half of the threads never come to.
    assert swapped(meets=2)[0].startswith(b"deadlock")
