"""Softmax and Parallax on GPU arrays of every framework, held to the float64 reference."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import oracle
import pytest
from budget import budget
from calls import call
from cases import hold, make
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BFLOAT16, DTYPES, DecodeCase, attention_cases, decode_cases

import parallax_core as plx

GPU_DTYPES = DTYPES[1:]
operations = pytest.mark.parametrize("operation", ["softmax", "parallax"])
dtypes = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda dtype: dtype.name)


def check(framework, operation, case, **extra):
    """Run a case on the GPU and hold it to the reference; returns what the GPU gave."""
    expected, state = call(plx.reference, operation, case, return_state=True)
    bound = budget(case, operation)
    o, found = call(plx, operation, framework.case(case), return_state=True, **extra)
    plain = framework.get(call(plx, operation, framework.case(case), **extra))
    result = framework.get(o)
    np.testing.assert_array_equal(plain, result)
    hold(result, expected, bound.output)
    finished = framework.get(framework.state(found).finish())
    assert finished.dtype == np.float32
    hold(finished, expected, bound.output)
    with np.errstate(invalid="ignore"):
        lse = framework.get(framework.state(found).lse)
        error = np.abs(lse - state.lse)
        # The largest score itself, whatever the kernel's weights were relative to.
        error = np.maximum(error, np.abs(framework.get(found.m) - state.m))
    empty = np.isneginf(state.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (error[~empty] <= bound.lse[~empty]).all()
    return o


@operations
@settings(max_examples=40)
@given(
    case=st.one_of(
        decode_cases(dtypes=GPU_DTYPES),
        decode_cases(dtypes=GPU_DTYPES, max_capacity=300, max_queries=5, max_group=7, page_sizes=(16, 64),
                     head_dims=(16, 40, 64, 96, 128)),
    )
)  # fmt: skip
def test_random_caches_agree_with_the_reference(framework, operation, case):
    check(framework, operation, case)


@operations
@settings(max_examples=30)
@given(case=attention_cases(dtypes=GPU_DTYPES, max_length=40, max_head_dim=20))
def test_random_sequences_agree_with_the_reference(framework, operation, case):
    check(framework, operation, case)


SIZES = [
    dict(head_dim=D, value_dim=Dv, dtype=dtype)
    for D, Dv in [(1, 1), (8, 8), (17, 33), (33, 20), (64, 64), (80, 80), (128, 128), (128, 64), (64, 128),
                  (192, 128), (256, 256), (255, 1)]
    for dtype in GPU_DTYPES
]  # fmt: skip


@operations
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s['head_dim']}-{s['value_dim']}-{s['dtype'].name}")
def test_head_sizes(cuda_torch, operation, sizes):
    check(cuda_torch, operation, make(capacity=333, **sizes))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("length", [1, 2, 4, 7, 20])
def test_group_sizes_and_numbers_of_new_tokens(cuda_torch, group, length):
    for head_dim in (64, 128):
        check(cuda_torch, "parallax", make(group=group, length=length, head_dim=head_dim, capacity=200))


@operations
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 48])
def test_pages(cuda_torch, operation, page_size):
    lengths = np.array([0, 1, 700, 333], np.int32)
    for head_dim, index, group in ((64, np.int32, 4), (128, np.int64, 4), (128, np.int32, 12)):
        case = make(
            batch=4, capacity=700, page_size=page_size, head_dim=head_dim, group=group, cache_seqlens=lengths
        )
        case.options["page_table"] = case.options["page_table"].astype(index)
        for b, n in enumerate(lengths):
            case.options["page_table"][b, -(-n // page_size) :] = -1
        check(cuda_torch, operation, case)


@operations
@pytest.mark.parametrize("layout", ["dense", "heads first", "strided"])
@pytest.mark.parametrize("probe", [None, np.float32])
@dtypes
def test_layouts_and_probes(cuda_torch, operation, layout, probe, dtype):
    options = dict(
        cache_seqlens=np.array([500, 77], np.int64),
        cache_leftpad=np.array([3, 70], np.int64),
        window_size=300,
    )
    for head_dim, group in ((64, 4), (128, 4), (72, 4), (128, 7)):
        sizes = dict(head_dim=head_dim, group=group, dtype=dtype)
        check(cuda_torch, operation, make(layout=layout, probe=probe, **sizes, **options))


@operations
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("capacity, batch", [(1, 1), (15, 3), (16, 1), (17, 70), (4096, 2), (40000, 1)])
def test_lengths_short_and_long(cuda_torch, operation, capacity, batch, group):
    random = np.random.default_rng(1)
    lengths = random.integers(0, capacity + 1, batch).astype(np.int32)
    lengths[0] = capacity
    check(cuda_torch, operation, make(batch=batch, group=group, capacity=capacity, cache_seqlens=lengths))


@operations
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("group", [7, 16])
def test_sequences_of_many_rows_are_shared_by_blocks_that_send_each_other_parcels(
    cuda_torch, operation, group, page_size
):
    """A long sequence whose blocks are nearly all, and others that a block holds whole between two."""
    for lengths in ([9000, 30, 20, 4000], [1, 9000, 0, 16], [5000, 5001, 5002, 5003]):
        lengths = np.array(lengths, np.int32)
        for kv_heads, head_dim in ((1, 128), (2, 64)):
            case = make(
                batch=4, kv_heads=kv_heads, group=group, head_dim=head_dim, capacity=9000,
                page_size=page_size, cache_seqlens=lengths,
            )  # fmt: skip
            check(cuda_torch, operation, case)


@operations
@dtypes
def test_many_rows_of_long_sequences_that_are_alike(cuda_torch, operation, dtype):
    """So many keys a block that warpgroups take them; shared sequences, and whole ones."""
    for sizes in (
        dict(batch=17, capacity=8192),
        dict(batch=1, capacity=140003),
        dict(batch=140, capacity=1100),
    ):
        check(cuda_torch, operation, make(kv_heads=1, group=13, dtype=dtype, **sizes))


@operations
@pytest.mark.parametrize("group", [1, 4, 16])
def test_long_caches_are_cut(cuda_torch, operation, group):
    for head_dim in (64, 128):
        case = make(batch=1, kv_heads=4, group=group, capacity=40000, head_dim=head_dim)
        check(cuda_torch, operation, case)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 250, 10**6])
@pytest.mark.parametrize("length", [1, 6])
def test_windows(cuda_torch, window, length):
    lengths = np.array([640, 100], np.int32)
    check(cuda_torch, "parallax", make(window_size=window, length=length, cache_seqlens=lengths))


def test_tokens_before_a_sequence_see_nothing(cuda_torch):
    """More new tokens than keys: the first rows see none."""
    o = check(cuda_torch, "parallax", make(length=6, cache_seqlens=np.array([3, 0], np.int32)))
    assert (cuda_torch.get(o)[0, :3] == 0).all()
    assert (cuda_torch.get(o)[1] == 0).all()


@operations
@settings(max_examples=25)
@given(case=decode_cases(dtypes=GPU_DTYPES, max_capacity=70, head_dims=(5, 64, 128)))
def test_what_is_hidden_may_hold_anything(writable, operation, case):
    clean = writable.get(call(plx, operation, writable.case(case)))
    hidden = oracle.hidden_places(case)
    k, v = (x.copy() for x in case.keys_and_values)
    k[hidden], v[hidden] = np.nan, np.inf
    dirty = writable.get(call(plx, operation, writable.case(case.with_keys_and_values(k, v))))
    np.testing.assert_array_equal(dirty, clean)


@operations
@pytest.mark.parametrize("length", [1, 5])
@dtypes
def test_what_is_seen_by_some_rows_reaches_those_alone(cuda_torch, operation, length, dtype):
    """A NaN or an infinite value at one key shows in the rows that see it, and changes no other."""
    for head_dim in (64, 128, 24):
        for place in (3, 300, 638, 639):
            for bad in (np.nan, np.inf):
                case = make(length=length, head_dim=head_dim, dtype=dtype, cache_seqlens=np.array([640, 310]))
                clean = cuda_torch.get(call(plx, operation, cuda_torch.case(case)))
                v = case.v_cache.copy()
                v[0, place, 1, 7] = bad
                moved = case.with_keys_and_values(case.k_cache, v)
                o = cuda_torch.get(call(plx, operation, cuda_torch.case(moved)))
                sees = np.zeros(o.shape, bool)
                sees[0, max(0, place - (640 - length)) :, 4:, 7] = True
                assert not np.isfinite(o[sees]).any()
                np.testing.assert_array_equal(o[~sees], clean[~sees])


@pytest.mark.parametrize(
    "sizes",
    [dict(length=3), dict(group=8, cache_seqlens=np.array([640, 300], np.int32))],
    ids=["warps", "warpgroups"],
)
def test_a_nan_query_or_key_is_nan_in_its_rows_alone(cuda_torch, sizes):
    case = make(**sizes)
    clean = cuda_torch.get(call(plx, "parallax", cuda_torch.case(case)))
    q, k = case.q.copy(), case.k_cache.copy()
    q[0, -1, 2, 5] = np.nan
    o = cuda_torch.get(call(plx, "parallax", cuda_torch.case(replace(case, q=q))))
    rows = np.zeros(o.shape, bool)
    rows[0, -1, 2] = True
    assert np.isnan(o[rows]).all()
    np.testing.assert_array_equal(o[~rows], clean[~rows])
    k[1, 200, 0, 9] = np.nan
    o = cuda_torch.get(call(plx, "parallax", cuda_torch.case(case.with_keys_and_values(k, case.v_cache))))
    rows = np.zeros(o.shape, bool)
    rows[1, :, : sizes.get("group", 4)] = True
    assert np.isnan(o[rows]).all()
    np.testing.assert_array_equal(o[~rows], clean[~rows])


INVALID = {
    "cache_seqlens[1] is 641": dict(cache_seqlens=[640, 641, 5]),
    "cache_seqlens[1] is -1": dict(cache_seqlens=[640, -1, 5]),
    "cache_seqlens[1] is 2000000000": dict(cache_seqlens=[640, 2 * 10**9, 5]),
    "cache_leftpad[1] is -3": dict(cache_seqlens=[640, 64, 5], cache_leftpad=[0, -3, 5]),
    "cache_leftpad[1] is 65": dict(cache_seqlens=[640, 64, 5], cache_leftpad=[0, 65, 5]),
    "page_table[1, 1] is 1000000000": dict(page=10**9),
    "page_table[1, 1] is -1": dict(page=-1),
}


@operations
@pytest.mark.parametrize("message", INVALID)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_invalid_lengths_and_pages_give_nan_there_alone(cuda_torch, operation, message, index):
    options = dict(INVALID[message])
    page = options.pop("page", None)
    options = {name: np.array(values, index) for name, values in options.items()}
    for head_dim in (64, 128, 20):
        case = make(batch=3, head_dim=head_dim, page_size=None if page is None else 64, **options)
        if page is not None:
            case.options["page_table"][1, 1] = page
            case.options["cache_seqlens"] = np.array([640, 300, 5], index)
        on_gpu = cuda_torch.case(case)
        o, state = call(plx, operation, on_gpu, return_state=True)
        o = cuda_torch.get(o)
        assert np.isnan(o[1]).all()
        assert np.isnan(cuda_torch.get(cuda_torch.state(state).finish())[1]).all()
        # The other sequences are what they are beside a valid one, to the bit.
        fine = {**case.options, "cache_seqlens": np.array([640, 64, 5], index)}
        fine.pop("cache_leftpad", None) if "leftpad" not in message else fine.update(
            cache_leftpad=np.array([0, 0, 5], index)
        )
        if page is not None:
            fine["page_table"] = case.options["page_table"].copy()
            fine["page_table"][1, 1] = 0
        expected = call(plx.reference, operation, replace(case, options=fine))
        bound = budget(replace(case, options=fine), operation).output
        hold(o[[0, 2]], expected[[0, 2]], bound[[0, 2]])
        with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
            call(plx, operation, on_gpu, validate=True)


@operations
@dtypes
def test_states_of_two_parts_of_a_cache_merge_to_the_whole(framework, operation, dtype):
    case = make(dtype=dtype, capacity=600, head_dim=64)
    expected = call(plx.reference, operation, case)
    bound = 2 * budget(case, operation).output
    for cut in (0, 1, 250, 600):
        parts = [
            case.with_keys_and_values(case.k_cache[:, a:b], case.v_cache[:, a:b])
            for a, b in ((0, cut), (cut, 600))
        ]
        a, b = (
            framework.state(call(plx, operation, framework.case(part), return_state=True)[1])
            for part in parts
        )
        merged = plx.merge_states(a, b)
        assert type(merged.m) is type(a.m)
        hold(framework.get(merged.finish()), expected, bound)


@operations
@pytest.mark.parametrize("layout", ["dense", "heads first", "strided last axis"])
def test_out_is_written_in_place(writable, operation, layout):
    case = make()
    expected = call(plx.reference, operation, case)
    memory = np.full((2, 8, 1, 256), 77, BFLOAT16)
    out = {
        "dense": lambda: writable.put(memory).reshape(2, 1, 8, 256)[..., :128],
        "heads first": lambda: writable.put(memory).swapaxes(1, 2)[..., :128],
        "strided last axis": lambda: writable.put(memory).swapaxes(1, 2)[..., ::2],
    }[layout]()
    result = call(plx, operation, writable.case(case), out=out)
    assert result is out
    hold(writable.get(out), expected, budget(case, operation).output)


def test_out_refuses_memory_that_cannot_be_written_to(framework):
    case = framework.case(make())
    with pytest.raises(ValueError, match=r"out overlaps q in memory|out is read-only"):
        call(plx, "softmax", case, out=case.q)
    if framework.name == "jax":
        with pytest.raises(ValueError, match="out is read-only"):
            call(plx, "softmax", case, out=framework.put(np.zeros(case.q.shape, BFLOAT16)))


@operations
def test_the_same_bits_every_run(cuda_torch, operation):
    lengths = np.array([5000, 17, 3333, 1], np.int32)
    for head_dim, length, group in ((64, 1, 4), (128, 1, 4), (128, 6, 4), (40, 1, 4), (128, 1, 16)):
        case = cuda_torch.case(
            make(batch=4, capacity=5000, head_dim=head_dim, length=length, group=group, cache_seqlens=lengths)
        )
        first = cuda_torch.get(call(plx, operation, case))
        for _ in range(30):
            np.testing.assert_array_equal(cuda_torch.get(call(plx, operation, case)), first)


@operations
@pytest.mark.parametrize("split_size", [16, 128, 512, 4096])
def test_with_a_split_size_the_bits_of_a_sequence_do_not_depend_on_its_batch(
    cuda_torch, operation, split_size
):
    lengths = np.array([3000, 17, 2047, 0, 1], np.int32)
    for head_dim, length in ((64, 1), (128, 3), (40, 1)):
        case = make(batch=5, capacity=3000, head_dim=head_dim, length=length, cache_seqlens=lengths)
        expected = call(plx.reference, operation, case)
        together = cuda_torch.get(call(plx, operation, cuda_torch.case(case), split_size=split_size))
        hold(together, expected, budget(case, operation).output)
        for b in range(5):
            for n in (1, 3):
                # The sequence alone, and three times over beside itself.
                repeated = DecodeCase(
                    *(
                        np.repeat(x[b : b + 1], n, axis=0)
                        for x in (case.q, case.r, case.k_cache, case.v_cache)
                    ),
                    {"cache_seqlens": np.repeat(lengths[b], n)},
                )
                alone = cuda_torch.get(call(plx, operation, cuda_torch.case(repeated), split_size=split_size))
                np.testing.assert_array_equal(alone, np.repeat(together[b : b + 1], n, axis=0))


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("outlier", [False, True], ids=["all keys alike", "one key apart"])
@dtypes
def test_a_vector_added_to_all_keys_of_a_head_costs_no_accuracy(cuda_torch, size, outlier, dtype):
    """Held to the reference on the same rounded keys; the bound grows with what float32 scores lose alone."""
    random = np.random.default_rng(3)
    ragged = dict(group=8, cache_seqlens=np.array([640, 300], np.int32))
    for head_dim, rows in ((64, dict(length=2)), (128, dict(length=2)), (128, ragged)):
        case = make(head_dim=head_dim, dtype=dtype, **rows)
        k = case.k_cache.astype(np.float64) + size * random.standard_normal((2, 1, 2, head_dim))
        if outlier:
            k[:, 0] = case.k_cache[:, 0]
        check(cuda_torch, "parallax", case.with_keys_and_values(k.astype(dtype), case.v_cache))


def test_probe_scores_that_drift_along_the_cache(cuda_torch):
    random = np.random.default_rng(3)
    for rows in ({}, dict(group=8, cache_seqlens=np.array([4000, 1000], np.int32))):
        case = make(capacity=4000, **rows)
        ramp = np.linspace(0, 8, 4000)[None, :, None, None] * random.standard_normal((2, 1, 2, 128))
        moved = (case.k_cache.astype(np.float64) + ramp).astype(BFLOAT16)
        check(cuda_torch, "parallax", case.with_keys_and_values(moved, case.v_cache))


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@dtypes
def test_scores_far_from_zero_in_any_order(cuda_torch, group, dtype):
    """All scores of hundreds or of minus hundreds, which grow or fall along the cache."""
    for lengths in (None, np.array([1000, 400], np.int32)):
        case = make(capacity=1000, group=group, dtype=dtype, cache_seqlens=lengths)
        q = (np.abs(case.q.astype(np.float32)) * 4).astype(dtype)
        for ends in ((8, 1), (1, 8), (-8, -1), (-1, -8), (8, -8)):
            along = np.linspace(*ends, 1000)[None, :, None, None]
            k = (np.abs(case.k_cache.astype(np.float32)) * along).astype(dtype)
            check(cuda_torch, "parallax", replace(case.with_keys_and_values(k, case.v_cache), q=q))


def test_half_precision_probe_scores_do_not_overflow(cuda_torch):
    """Probe scores of 10^5, where float16 ends at 65504; the output is finite in float32."""
    ragged = dict(group=8, cache_seqlens=np.array([640, 300], np.int32))
    for sizes in (dict(head_dim=64), ragged):
        case = make(dtype=np.dtype(np.float16), probe=np.float32, **sizes)
        case = replace(case, r=(case.r * 1e4).astype(np.float32))
        expected = call(plx.reference, "parallax", case)
        o, state = call(plx, "parallax", cuda_torch.case(case), return_state=True)
        hold(cuda_torch.get(cuda_torch.state(state).finish()), expected, budget(case, "parallax").output)
        assert not np.isnan(cuda_torch.get(o)).any()


def test_large_scores_and_tiny_values(cuda_torch):
    for scale in (30.0, -30.0, 1e-6, 0.0):
        check(cuda_torch, "parallax", make(scale=scale, dtype=np.dtype(np.float32), head_dim=64))
    case = make(dtype=np.dtype(np.float32), head_dim=64)
    tiny = (case.v_cache * 1e-40).astype(np.float32)
    o = cuda_torch.get(call(plx, "softmax", cuda_torch.case(case.with_keys_and_values(case.k_cache, tiny))))
    expected = call(plx.reference, "softmax", case.with_keys_and_values(case.k_cache, tiny))
    # Subnormal numbers, a few hundred units of 2^-149 each, do not vanish.
    assert np.abs(o - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("group", [4, 16])
def test_captured_launches_follow_the_lengths(cuda_torch, group):
    torch = cuda_torch.module
    case = make(batch=4, capacity=5000, group=group, cache_seqlens=np.full(4, 5000, np.int32))
    on_gpu = cuda_torch.case(case)
    call(plx, "parallax", on_gpu)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(plx, "parallax", on_gpu)
    for lengths in ([5000, 1, 0, 77], [3, 4000, 5000, 16], [0, 0, 0, 0], [5000] * 4):
        on_gpu.options["cache_seqlens"].copy_(torch.tensor(lengths))
        graph.replay()
        fresh = {**case.options, "cache_seqlens": np.array(lengths, np.int32)}
        fresh = replace(case, options=fresh)
        hold(cuda_torch.get(out), call(plx.reference, "parallax", fresh), budget(fresh, "parallax").output)


@pytest.mark.parametrize(
    "operation, group, lengths, extra",
    [
        ("parallax", 2, None, {}),
        # Rows whose blocks send each other parcels.
        ("parallax", 8, None, {}),
        ("parallax", 16, [9000, 40, 5000], {}),
        ("lla", 2, None, {"ridge": 0.1}),
        ("lla", 2, None, {"ridge": 0.1, "solver": "cg"}),
    ],
    ids=[
        "parallax",
        "parallax of groups of 8",
        "parallax of groups of 16, lengths on the device",
        "lla",
        "lla by conjugate gradients",
    ],
)
def test_graphs_and_streams_beside_one_another_do_not_disturb_each_other(
    cuda_torch, operation, group, lengths, extra
):
    torch = cuda_torch.module
    options = {} if lengths is None else {"cache_seqlens": np.array(lengths, np.int32)}
    cases = [make(seed=seed, batch=3, group=group, capacity=9000, **options) for seed in range(3)]
    on_gpu = [cuda_torch.case(case) for case in cases]
    expected = [call(plx, operation, case, **extra).clone() for case in on_gpu]
    graphs, outs = [], []
    for case in on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([call(plx, operation, case, **extra) for _ in range(3)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in cases]
    plain = [None] * len(cases)
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        for n, case in enumerate(on_gpu):
            with torch.cuda.stream(streams[(n + 1) % len(streams)]):
                plain[n] = call(plx, operation, case, **extra)
    torch.cuda.synchronize()
    for n, want in enumerate(expected):
        for result in (*outs[n], plain[n]):
            assert torch.equal(result, want)


@pytest.mark.parametrize(
    "capacity, head_dim, group",
    [*((c, d, 2) for c in (300, 4096, 20000) for d in (64, 80, 128)), (4096, 128, 8)],
)
def test_launches_that_begin_early_see_what_the_ones_ahead_wrote(cuda_torch, capacity, head_dim, group):
    """Calls whose query is the output of the one ahead, and that write to the cache between them."""
    torch = cuda_torch.module
    early_launch = pytest.importorskip("parallax_core.cuda_kernels.early_launch")
    case = make(capacity=capacity, batch=2, group=group, head_dim=head_dim)
    q, r, k, v = (cuda_torch.put(x) for x in (case.q, case.r, case.k_cache, case.v_cache))
    kv_heads = k.shape[2]

    def chain():
        o, keys = q, k.clone()
        for n in range(8):
            o = plx.parallax_decode(o, r, keys, v)
            o = plx.lla_decode(o, keys, v, ridge=0.5)
            o = plx.softmax_decode(o, keys, v, out=torch.empty_like(o))
            # Ours behind a kernel of PyTorch's, and ahead of one.
            keys[:, n] = o.reshape(o.shape[0], kv_heads, group, head_dim).sum(2)
        return o, keys

    with early_launch.allow(False):
        expected = chain()
    assert not expected[0].isnan().any()
    for _ in range(10):
        assert all(map(torch.equal, chain(), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(10):
        graph.replay()
        assert all(map(torch.equal, result, expected))


def test_cupy_captures_too(cuda_cupy):
    cupy = cuda_cupy.module
    case = make(capacity=3000)
    on_gpu = cuda_cupy.case(case)
    expected = call(plx, "parallax", on_gpu)
    out = cupy.zeros_like(expected)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        call(plx, "parallax", on_gpu, out=out)
        graph = stream.end_capture()
        assert not out.any()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    assert (out == expected).all()


def test_strided_index_arrays(cuda_torch):
    """A row of a wider table, as a server keeps it."""
    torch = cuda_torch.module
    case = make(batch=3, page_size=64, capacity=640, cache_seqlens=np.array([640, 100, 333], np.int32))
    expected = call(plx.reference, "parallax", case)
    on_gpu = cuda_torch.case(case)
    wide = torch.full((3, 50), -7, dtype=torch.int32, device="cuda")
    wide[:, :10] = on_gpu.options["page_table"]
    lengths = torch.zeros((3, 2), dtype=torch.int32, device="cuda")
    lengths[:, 1] = on_gpu.options["cache_seqlens"]
    on_gpu.options.update(page_table=wide[:, :10], cache_seqlens=lengths[:, 1])
    hold(cuda_torch.get(call(plx, "parallax", on_gpu)), expected, budget(case, "parallax").output)


def test_frameworks_can_be_mixed(cuda_torch, cuda_cupy):
    case = make()
    expected = call(plx.reference, "parallax", case)
    ours, theirs = cuda_torch.case(case), cuda_cupy.case(case)
    o = plx.parallax_decode(ours.q, theirs.r, ours.k_cache, theirs.v_cache)
    assert isinstance(o, cuda_torch.module.Tensor)
    hold(cuda_torch.get(o), expected, budget(case, "parallax").output)


def test_tensors_that_cannot_be_taken_are_refused(cuda_torch):
    torch = cuda_torch.module
    case = cuda_torch.case(make(dtype=np.dtype(np.float32)))
    with pytest.raises(TypeError, match=r"^q requires gradients.*frameworks\.torch"):
        plx.softmax_decode(case.q.clone().requires_grad_(), case.k_cache, case.v_cache)
    negated = torch.complex(case.q, case.q).conj().imag
    with pytest.raises(TypeError, match=r"^q is a lazy view"):
        plx.softmax_decode(negated, case.k_cache, case.v_cache)
    with pytest.raises(TypeError, match=r"^k_cache cannot be exchanged"):
        plx.softmax_decode(case.q, case.k_cache.to_sparse(), case.v_cache)
    with pytest.raises(TypeError, match=r"^v_cache is on the CPU; expected CUDA device 0, where q is"):
        plx.softmax_decode(case.q, case.k_cache, case.v_cache.cpu())
    with pytest.raises(TypeError, match=r"^q has dtype float64; expected one of float32"):
        plx.softmax_decode(case.q.double(), case.k_cache, case.v_cache)


def test_what_has_no_kernel_yet_says_so(framework):
    case = framework.case(make(capacity=4, length=4))
    with pytest.raises(plx.BackendUnavailableError, match="local_attention has no CUDA kernel yet"):
        plx.local_attention(case.q, case.k_cache, case.v_cache, probe=None)
    with pytest.raises(
        plx.BackendUnavailableError, match=r"^solver is 'lstsq'; on a GPU there are 'cholesky'"
    ):
        plx.lla_attention(case.q, case.k_cache, case.v_cache, ridge=0.1, solver="lstsq")
    with pytest.raises(plx.BackendUnavailableError, match=r"^solver is 'cg', which on a GPU is there for"):
        plx.lla_probe(case.q, case.k_cache, ridge=0.1, solver="cg")


def test_no_memory_left_is_an_error_after_which_calls_work(cuda_torch):
    torch = cuda_torch.module
    case = cuda_torch.case(make(head_dim=256))
    # Of this process, as tests beside it take and give memory of the device; and of its tensors, as the
    # allocator gives back what it had in reserve before it fails.
    allocated, (_, total) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    rows = total // (2 * 256 * 8) + 1
    # Rows that all lie in one place: the queries cost nothing, their output more than the device has.
    q = case.q[:1].expand(1, rows, 8, 256)
    with pytest.raises(MemoryError, match=r"CUDA device 0 .*softmax_decode: an output of shape"):
        plx.softmax_decode(q, case.k_cache[:1], case.v_cache[:1])
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.isfinite(call(plx, "softmax", case)).all()


def test_a_new_thread_can_call(cuda_torch):
    import threading

    case = cuda_torch.case(make())
    results = []
    thread = threading.Thread(target=lambda: results.append(call(plx, "parallax", case)))
    thread.start()
    thread.join()
    assert cuda_torch.module.equal(results[0], call(plx, "parallax", case))


def test_bfloat16_numpy_arrays_stay_on_the_cpu():
    """The dtype alone sends nothing to the GPU."""
    x = np.ones((1, 2, 1, 4), ml_dtypes.bfloat16)
    assert isinstance(plx.softmax_attention(x, x, x), np.ndarray)
