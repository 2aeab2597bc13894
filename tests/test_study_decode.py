"""The decode study measures what it says, on tiny points; no test depends on how fast the machine is."""

import dataclasses
import functools
import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pyarrow.parquet as pq
import pytest
from jinja2 import UndefinedError

import parallax_core
from parallax_core import cuda_kernels
from parallax_core.distributed import decode, decode_arrays, decode_peers, decode_timing
from parallax_core.distributed.decode import Options, measure
from parallax_core.distributed.decode_config import DecodeConfig, decode_points, load_decode_config
from parallax_core.distributed.decode_findings import find_decode
from parallax_core.distributed.decode_graphs import CupyTimer, TorchTimer
from parallax_core.distributed.decode_point import DecodePoint, Shape
from parallax_core.distributed.decode_report import SCHEMA, write_decode_report
from parallax_core.distributed.decode_timing import LEAST_ROUNDS, CpuTimer, in_turns, round_calls
from parallax_core.distributed.point import PointError
from parallax_core.distributed.report_files import Provenance
from parallax_core.distributed.study import Study, run_decode
from parallax_core.distributed.study_file import ConfigError, parse

QUICK = Options("cpu", rounds=5, seconds=1e-3, rotation=1 << 16, host_cost=True, fa3=None)
# The rounding of the output to bfloat16 alone leaves 2^-9 / sqrt(3), about 1.1e-3; float32 has no such step.
LARGEST_ERROR = {"float32": 3e-6, "bfloat16": 6e-3, "float16": 1e-3}


def point(operation="parallax", shape=(2, 4, 2, 100, 16), dtype="float32", **fields):
    return DecodePoint(**{"operation": operation, "shape": shape, "dtype": dtype, "cache": "cold"} | fields)


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["parallax", "softmax", "lla"])
def test_a_row_has_small_errors_and_consistent_fields(operation, dtype, page_size, library, monkeypatch):
    if library == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.setattr(decode_arrays.importlib.util, "find_spec", lambda name: None)
    row = measure(point(operation, dtype=dtype, page_size=page_size), QUICK)
    assert row["framework"] == library
    assert row["error"] < LARGEST_ERROR[dtype]
    assert row["us_low"] <= row["us"] <= row["us_high"]
    assert row["bytes_per_second"] == pytest.approx(row["bytes_read"] / row["us"] * 1e6)
    assert row["fraction"] == pytest.approx(row["bytes_per_second"] / row["read_bandwidth"])
    assert row["error_rows"] == 2 * 4
    assert row["rounds"] == LEAST_ROUNDS
    assert row["host_us"] is None  # a call on the CPU is its own work
    (peer,) = row["peers"]
    if library == "numpy":
        assert peer == {"name": "sdpa", "absent": "needs PyTorch"}
    elif page_size:
        assert peer == {"name": "sdpa", "absent": "has no paged cache"}
    else:
        # SDPA is held to softmax whatever the operation.
        assert peer["error"] < LARGEST_ERROR[dtype]
        assert peer["us"] > 0


def test_bytes_read_are_those_of_the_arrays():
    measured = point(page_size=16)
    problem = decode_arrays.build(measured, decode_arrays.NumpyArrays(), 1)
    (k, v), (B, _, Hkv, L, D) = problem.caches[0], measured.shape
    used = (B * L * Hkv * D) / (k.size)  # the last page of each sequence is not full
    arrays = k.nbytes * used + v.nbytes * used + problem.q.nbytes + problem.r.nbytes
    assert measured.bytes_read == arrays + problem.page_table.nbytes
    assert measured.bytes_read - point("lla", page_size=16).bytes_read == problem.r.nbytes


def test_a_cold_cache_is_rotated_through_as_much_memory_as_asked_for_and_a_warm_one_is_not():
    arrays = decode_arrays.NumpyArrays()
    cold = decode_arrays.build(point(), arrays, 1 << 18)
    assert sum(x.nbytes for cache in cold.caches for x in cache) >= 1 << 18
    assert len({x.ctypes.data for cache in cold.caches for x in cache}) == 2 * len(cold.caches)
    warm = decode_arrays.build(point(cache="warm"), arrays, 1 << 18)
    assert len(warm.caches) == 1
    # The same numbers, so that warm and cold are one problem.
    for other in (*cold.caches[1:], warm.caches[0]):
        np.testing.assert_array_equal(other[0], cold.caches[0][0])


def test_a_page_table_leads_to_the_keys_of_its_sequence():
    problem = decode_arrays.build(point(page_size=16, cache="warm"), decode_arrays.NumpyArrays(), 1)
    assert sorted(problem.page_table.ravel()) == list(range(len(problem.caches[0][0])))
    assert problem.page_table.ravel().tolist() != list(range(problem.page_table.size))


def test_the_reference_looks_at_some_rows_of_a_large_problem(monkeypatch):
    monkeypatch.setattr(decode, "REFERENCE_NUMBERS", 2 * 2 * 100 * 16)
    row = measure(point(shape=(6, 8, 4, 100, 16)), QUICK)
    assert row["error_rows"] == 2 * 2  # two sequences, one key head with its two query heads
    assert row["error"] < LARGEST_ERROR["float32"]


def test_an_output_that_is_wrong_shows_in_the_error(monkeypatch):
    exact = parallax_core.parallax_decode
    monkeypatch.setattr(parallax_core, "parallax_decode", lambda *a, **o: 1.01 * exact(*a, **o))
    assert measure(point(), QUICK)["error"] == pytest.approx(0.01, rel=1e-3)


def test_a_peer_that_fails_is_part_of_the_row_and_the_others_stay(monkeypatch):
    def refuse(problem, path):
        def call(k, v):
            raise RuntimeError("no kernel\nfor this")

        return call

    bad = decode_peers.Peer("fla", "bad", "parallax", False, refuse)
    monkeypatch.setattr(decode_peers, "PEERS", (bad, *decode_peers.PEERS))
    peers = measure(point(), QUICK)["peers"]
    assert peers[0] == {"name": "fla", "absent": "RuntimeError: no kernel"}
    assert peers[1]["absent"] is None or "PyTorch" in peers[1]["absent"]
    # Parallax's peers have nothing to say about softmax.
    assert [peer["name"] for peer in measure(point("softmax"), QUICK)["peers"]] == ["sdpa"]


def test_only_the_peers_that_are_asked_for_are_timed():
    assert measure(point(), QUICK._replace(peers=("fa2",)))["peers"] == []
    assert [peer["name"] for peer in measure(point(), QUICK._replace(peers=("sdpa",)))["peers"]] == ["sdpa"]
    every = [peer.name for peer in decode_peers.PEERS]
    assert load_decode_config().peers == DecodeConfig().peers == every
    assert Options.of(DecodeConfig(peers=["fla"]), "gpu").peers == ("fla",)
    with pytest.raises(ConfigError, match="peers"):
        parse(DecodeConfig, "peers: [fa4]")


@pytest.mark.parametrize("library, timer", [("torch", TorchTimer), ("cupy", CupyTimer)])
def test_a_captured_graph_keeps_what_its_calls_hold(library, timer, monkeypatch):
    """A graph has the addresses of arrays alone: those of a peer would be freed with its call."""
    monkeypatch.setattr(pytest.importorskip(library), "cuda", MagicMock())
    call = functools.partial(int)
    held = weakref.ref(call)
    turn = timer().prepare([call], 1)
    del call
    gc.collect()
    assert held() is not None
    del turn
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("library, timer", [("torch", TorchTimer), ("cupy", CupyTimer)])
def test_a_graph_is_launched_while_the_device_is_busy(library, timer, monkeypatch):
    """An event of an idle device is over before the host has launched what is timed."""
    cuda, seen = MagicMock(), []
    monkeypatch.setattr(pytest.importorskip(library), "cuda", cuda)
    monkeypatch.setattr(timer, "_keep_busy", lambda self, stream: seen.append("busy"))
    event, graph = cuda.Event.return_value, cuda.CUDAGraph.return_value
    event.record.side_effect = lambda *_: seen.append("event")
    cuda.Stream.return_value.end_capture.return_value = graph
    graph.replay.side_effect = graph.launch.side_effect = lambda *_: seen.append("graph")
    event.elapsed_time.return_value = cuda.get_elapsed_time.return_value = 1.0
    assert timer().prepare([int], 4)() == pytest.approx(1e-3 / 4)
    assert seen == ["busy", "event", "graph", "event"]


def test_the_host_cost_of_a_pass_is_the_median_of_its_calls(monkeypatch):
    """Which a few long ones do not move; a pass begins with an empty queue, and ends with one."""
    graphs = sys.modules[TorchTimer.__module__]
    now, calls, waits = [0.0], [0], [0]
    monkeypatch.setattr(graphs.time, "perf_counter", lambda: now[0])

    class Timer(TorchTimer):
        def _synchronize(self):
            waits[0] += 1

    def function():
        calls[0] += 1
        now[0] += 1e-3 if calls[0] % 10 == 0 else 12e-6

    assert Timer().host(function) == pytest.approx(12e-6)
    assert waits[0] == 2


def test_competitors_make_their_passes_in_turns_and_the_least_disturbed_count():
    """So what slows the processor for a while hits all of them, and none has it for its figure."""
    made = []

    def competitor(name, seconds):
        def make_pass():
            made.append(name)
            # The second round is a quiet one.
            return seconds if made.count(name) == 2 else 2 * seconds

        return make_pass

    found = decode_timing.least_disturbed(
        {"": competitor("", 12e-6), "fa3": competitor("fa3", 40e-6), "cpu": lambda: None}
    )
    assert found == {"": 12e-6, "fa3": 40e-6, "cpu": None}
    assert made == ["", "fa3"] * decode_timing.HOST_PASSES


def test_each_competitor_of_a_row_has_its_own_host_cost(monkeypatch):
    pytest.importorskip("torch")

    class Timer(CpuTimer):
        passes = 0

        def host(self, function):
            function()
            Timer.passes += 1
            return 1e-5 * (1 + Timer.passes % 2)

    monkeypatch.setattr(decode, "timer", lambda arrays: Timer())
    row = measure(point(dtype="float32", cache="warm"), QUICK)
    (peer,) = row["peers"]
    assert (row["host_us"], peer["host_us"]) == pytest.approx((20, 10))
    assert Timer.passes == 2 * decode_timing.HOST_PASSES
    assert measure(point(dtype="float32", cache="cold"), QUICK)["host_us"] is None


def test_a_peer_that_fails_while_its_calls_are_timed_is_absent(monkeypatch):
    pytest.importorskip("torch")
    passes = []

    class Timer(CpuTimer):
        def host(self, function):
            passes.append(function)
            if len(passes) == 4:
                raise RuntimeError("no room\nand more")
            return 1e-5

    monkeypatch.setattr(decode, "timer", lambda arrays: Timer())
    row = measure(point(dtype="float32", cache="warm"), QUICK)
    assert row["peers"] == [{"name": "sdpa", "absent": "RuntimeError: no room"}]
    assert row["host_us"] == pytest.approx(10)
    # The second of the peer's was its last.
    assert len(passes) == decode_timing.HOST_PASSES + 2
    passes[:] = [None] * 3
    with pytest.raises(PointError, match="no room"):
        measure(point(dtype="float32", cache="warm"), QUICK)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_kernels.availability() is not None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_a_gpu_row_comes_from_captured_graphs_and_has_a_host_cost(library, page_size, monkeypatch):
    if library == "torch" and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    if library == "cupy":
        monkeypatch.setattr(decode, "framework", lambda device: decode_arrays.CupyArrays())
    options = QUICK._replace(device="gpu")
    row = measure(
        point(shape=(2, 8, 2, 300, 64), dtype="float16", page_size=page_size, cache="warm"), options
    )
    assert row["framework"] == library
    assert row["error"] < LARGEST_ERROR["float16"]
    assert row["host_us"] > 0
    assert row["read_bandwidth"] > 1e11  # any GPU that the kernels run on
    peers = {peer["name"]: peer for peer in row["peers"]}
    if library == "torch" and page_size is None:
        assert peers["fa2"]["error"] < LARGEST_ERROR["float16"]
    else:
        assert peers["fa2"]["absent"] in ("needs PyTorch", "has no paged cache")
    assert peers["fa3"]["absent"] is not None


def flash_attention_3(
    q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
    max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
    q_descale, k_descale, v_descale, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, s_aux, cp_world_size, cp_rank,
    cp_tot_seqused_k,
):  # fmt: skip
    """What vLLM's entry computes, by its signature, one sequence after another."""
    assert (max_seqlen_q, is_causal, window_size_left, window_size_right, softcap) == (1, True, -1, -1, 0.0)
    assert (num_splits, sm_margin, cp_world_size, cp_rank) == (0, 0, 1, 0)
    outputs = []
    for i, row in enumerate(q):
        if page_table is None:
            keys = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
            mine = k[None, keys], v[None, keys]
        else:
            mine = (x[page_table[i]].flatten(0, 1)[None, : seqused_k[i]] for x in (k, v))
        assert cu_seqlens_q[i + 1] - cu_seqlens_q[i] == 1
        outputs.append(parallax_core.softmax_decode(row[None, None], *mine, scale=softmax_scale)[0])
    assert max_seqlen_k == 100
    import torch

    return [torch.cat(outputs)]


@pytest.mark.parametrize("page_size", [None, 16])
def test_the_peers_of_a_gpu_are_called_as_they_are_defined(page_size, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    # The kernels need a GPU; how they are called can be seen without one.
    arrays = decode_arrays.TorchArrays("cpu")
    arrays.on_gpu = True
    monkeypatch.setattr(decode, "framework", lambda device: arrays)
    monkeypatch.setattr(decode, "timer", lambda arrays: CpuTimer())
    monkeypatch.setattr(arrays, "release", lambda: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=flash_attention_3), raising=False)
    fla = SimpleNamespace(
        parallax_decode_one_step=lambda q, r, k, v: parallax_core.parallax_decode(q, r, k, v)
    )
    monkeypatch.setitem(sys.modules, "fla.ops.parallax.decode", fla)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "fla" or find_spec(name))
    library = tmp_path / "_vllm_fa3_C.abi3.so"
    library.write_bytes(b"")
    measured = point(dtype="bfloat16", page_size=page_size)
    fa2, fa3, fla, early = measure(measured, QUICK._replace(device="gpu", fa3=str(library)))["peers"]
    assert fa3["error"] < LARGEST_ERROR["bfloat16"]
    assert early["error"] < LARGEST_ERROR["bfloat16"]
    if page_size:
        assert fa2["absent"] == fla["absent"] == "has no paged cache"
    else:
        assert fa2["error"] < LARGEST_ERROR["bfloat16"]
        assert fla["error"] < LARGEST_ERROR["bfloat16"]
    fa2, fa3, fla, early = measure(measured, QUICK._replace(device="gpu", fa3="absent.so"))["peers"]
    assert fa3["absent"] == "no file absent.so"


def test_a_point_that_fails_is_named(monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("q: no")

    monkeypatch.setattr(parallax_core, "lla_decode", fail)
    with pytest.raises(PointError, match=r"decode: lla, batch=2, .*float16, page_size=32, cold.*: q: no"):
        measure(point("lla", dtype="float16", page_size=32), QUICK)


def test_competitors_take_turns():
    order = []

    def turn(name):
        return lambda: order.append(name) or 1.0

    taken = in_turns({"a": turn("a"), "b": turn("b")}, rounds=8, seconds=60)
    assert order == ["a", "b"] * 9  # one round to warm up
    assert [len(times) for times in taken.values()] == [8, 8]
    assert len(in_turns({"a": turn("a")}, rounds=8, seconds=0)["a"]) == LEAST_ROUNDS


@pytest.mark.parametrize("nbytes, caches", [(1, 1), (1, 7), (1 << 20, 3), (1 << 40, 1), (1 << 40, 5)])
def test_a_turn_visits_every_cache_equally_often(nbytes, caches):
    calls = round_calls(nbytes, caches, turn=2e-3, floor=5e-6, bandwidth=4e12, least=20, most=200)
    assert calls % caches == 0
    assert 20 <= calls < 200 + caches
    seen = []
    CpuTimer().prepare([lambda i=i: seen.append(i) for i in range(caches)], calls)()
    visits = np.bincount(seen[3:], minlength=caches)  # three calls warm up
    assert (visits == calls // caches).all()


def test_the_read_covers_the_caches():
    caches = [(np.ones((1, 9, 1, 4), np.float32), np.ones((1, 9, 1, 4), np.float32)) for _ in range(3)]
    turn, nbytes = CpuTimer().read(caches)
    assert nbytes >= 64 << 20  # a small cache is read more than once, but whole
    assert nbytes % (3 * 2 * 9 * 4 * 4) == 0
    assert turn() > 0


GRID = "{{operations: [{operation}], dtypes: [{dtype}], shapes: [{shape}]{more}}}"


def text(operation="parallax", dtype="float32", shape="[1, 4, 2, 64, 16]", more=""):
    return f"cpu: [{GRID.format(operation=operation, dtype=dtype, shape=shape, more=more)}]"


@pytest.mark.parametrize(
    "written, message",
    [
        (text(operation="mamba"), r"cpu\.0\.operations\.0: .*'mamba'"),
        (text(dtype="int8"), r"cpu\.0\.dtypes\.0: .*'int8'"),
        (text(shape="[1, 4, 3, 64, 16]"), r"cpu\.0\.shapes\.0: .*multiple of the key heads, got 4 and 3"),
        (text(shape="[1, 4, 2, 64, 257]"), r"cpu\.0\.shapes\.0\.(4|head_size): .*256, got 257"),
        (text(shape="[0, 4, 2, 64, 16]"), r"cpu\.0\.shapes\.0\.(0|batch): .*got 0"),
        (text(shape="[1, 4, 2, 64]"), r"cpu\.0\.shapes\.0\.(4|head_size): "),
        (text(more=", page_sizes: [8]"), r"cpu\.0\.page_sizes\.0.*: .*16, got 8"),
        (text(more=", caches: [hot]"), r"cpu\.0\.caches\.0: .*'hot'"),
        (text(more=", ridge: 0"), r"cpu\.0\.ridge: .*got 0"),
        (text(more=", pages: [16]"), r"cpu\.0\.pages: unknown key"),
        (text() + "\nrounds: 1", r"rounds: .*3, got 1"),
        (text() + "\nsecond: 1", r"second: unknown key"),
    ],
)
def test_the_error_is_one_line_that_names_the_key(written, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(DecodeConfig, written)
    assert "\n" not in str(caught.value)


def test_the_default_grid_of_a_gpu_is_the_published_one():
    points = decode_points(load_decode_config(), "gpu")
    parallax, solved = ([p for p in points if p.operation == name] for name in ("parallax", "lla"))
    assert len(parallax) == 2 * 14
    assert len(parallax) + len(solved) == len(points)
    assert {(p.dtype, p.page_size) for p in points} == {("bfloat16", None)}
    assert {p.cache for p in parallax} == {"warm", "cold"}
    shapes = list(dict.fromkeys(p.shape for p in parallax))
    assert len(shapes) == 14
    assert {p.shape for p in solved} < set(shapes)
    assert shapes[0] == Shape(batch=1, query_heads=8, kv_heads=8, length=512, head_size=128)
    assert shapes[-1] == Shape(128, 8, 8, 2048, 64)


def test_the_grid_of_grouped_heads_is_dense_and_paged():
    grouped = Path(decode.__file__).parent / "configs" / "grouped-decode.yaml"
    points = decode_points(load_decode_config(grouped), "gpu")
    assert {p.page_size for p in points} == {None, 64}
    assert any(p.shape.query_heads > 4 * p.shape.kv_heads for p in points)


def test_the_default_grid_of_a_cpu_has_every_operation_and_pages():
    points = decode_points(load_decode_config(), "cpu")
    assert {p.operation for p in points} == {"parallax", "softmax", "lla"}
    assert any(p.page_size for p in points)
    with pytest.raises(ValueError, match="gpu: expected a grid"):
        decode_points(parse(DecodeConfig, text()), "gpu")


def row(us, peers, cache="cold", operation="parallax", **fields):
    """A row of a GPU, whose peers are ``name=us``; None for one that is absent."""
    shape = Shape(1, 8, 8, 512, 128)
    numbers = {"us_low": 0.9 * us, "us_high": 1.1 * us, "error": 2e-3, "host_us": 7.0}
    return {
        **{"operation": operation, "dtype": "bfloat16", "page_size": None, "cache": cache, "ridge": 0.1},
        **{"seed": 0, "device": "GPU <1>", "framework": "torch", "rounds": 20, "calls": 200, "us": us},
        **shape._asdict(),
        **{"bytes_read": 10**6, "bytes_per_second": 1e12 / us, "read_bandwidth": 4e12},
        **{"fraction": 0.25 / us, "error_rows": 8},
        **numbers,
        "peers": [
            {"name": name, "absent": "needs <it>"}
            if time is None
            else {"name": name, "us": time, **numbers, "absent": None}
            for name, time in peers.items()
        ],
        **fields,
    }


ROWS = [
    row(10.0, {"fa2": 20.0, "fa3": 40.0, "fla": 30.0}),
    row(10.0, {"fa2": 90.0, "fa3": 5.0, "fla": None}),
    row(10.0, {"fa2": 30.0, "fa3": None, "fla": 20.0}, cache="warm"),
    row(8.0, {"fa2": None, "fa3": None}, operation="lla"),
]


def test_the_ratio_is_that_of_the_fastest_peer_and_its_mean_is_geometric():
    findings = find_decode(ROWS)
    softmax = [ratios["softmax"] for ratios in findings.ratios]
    assert softmax == [2.0, 0.5, 3.0, None]
    cold, fla, warm, warm_fla = findings.comparisons
    assert (cold.peers, cold.ratio, cold.least, cold.rows, cold.won) == (["fa2", "fa3"], 1.0, 0.5, 2, 1)
    assert (fla.peers, fla.computes, fla.rows, fla.ratio) == (["fla"], "parallax", 1, pytest.approx(3.0))
    assert (warm.peers, warm.ratio, warm_fla.ratio) == (["fa2"], pytest.approx(3.0), pytest.approx(2.0))
    fa3 = findings.peers[1]
    assert (fa3.name, fa3.rows, fa3.host_us, fa3.absent) == ("fa3", 2, 7.0, ["needs <it>"])
    assert findings.own.rows == 4


@pytest.fixture
def report(tmp_path):
    config = parse(DecodeConfig, text())
    study = Study(config, None, ROWS)
    write_decode_report(
        study, find_decode(ROWS), tmp_path, Provenance("parallax-core study <decode>", "p", 1.0)
    )
    return tmp_path


def test_the_report_says_what_was_measured_and_loads_nothing(report):
    page, summary = ((report / name).read_text() for name in ("report.html", "summary.md"))
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert "http-equiv" not in page
    for escaped in ("&lt;decode&gt;", "GPU &lt;1&gt;", "needs &lt;it&gt;"):
        assert escaped in page
    assert ">2.00<" in page  # the ratio of the first row
    assert "FlashAttention-2 of PyTorch and FlashAttention-3 of vLLM over ours" in " ".join(page.split())
    assert (
        "| Parallax | bfloat16 | cold | FlashAttention-2 of PyTorch, FlashAttention-3 of vLLM | 1.00 |"
        in summary
    )
    assert "| LLA | 1 | 8 | 8 | 512 | 128 | bfloat16 | - | cold | 8.00 |" in summary


def test_the_rows_survive_parquet_and_give_the_same_findings(report):
    rows = pq.read_table(report / "rows.parquet").to_pylist()
    assert find_decode(rows) == find_decode([{name: row[name] for name in SCHEMA.names} for row in rows])
    assert find_decode(rows).comparisons == find_decode(ROWS).comparisons


def test_the_schema_holds_every_field_of_a_measured_row():
    assert set(measure(point(), QUICK)) == set(SCHEMA.names)


def test_the_configuration_beside_the_report_is_the_study(report):
    assert parse(DecodeConfig, (report / "config.yaml").read_text()) == parse(DecodeConfig, text())


def test_every_peer_has_its_place_in_a_report(tmp_path):
    """Ours, launched early, computes what a point asks for, and no other peer's ratio is with it."""
    rows = [
        row(10.0, {peer.name: 20.0 for peer in decode_peers.PEERS} | {"early": 1.0}, operation=operation)
        for operation in ("parallax", "softmax", "lla")
    ]
    findings = find_decode(rows)
    assert all(comparison.ratio == pytest.approx(2.0) for comparison in findings.comparisons)
    study = Study(parse(DecodeConfig, text()), None, rows)
    write_decode_report(study, findings, tmp_path, Provenance("c", "p", 1.0))
    for name in ("report.html", "summary.md"):
        assert all(peer.title in (tmp_path / name).read_text() for peer in decode_peers.PEERS)


def test_rows_outlive_a_report_that_fails(tmp_path):
    findings = find_decode(ROWS)
    study = Study(parse(DecodeConfig, text()), None, ROWS)
    with pytest.raises(UndefinedError):
        write_decode_report(
            study, dataclasses.replace(findings, ratios=[]), tmp_path, Provenance("c", "p", 1.0)
        )
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == len(ROWS)


def test_a_report_without_peers_can_be_read(tmp_path):
    rows = [row(8.0, {}, operation="lla") | {"host_us": None}]
    write_decode_report(
        Study(parse(DecodeConfig, text()), None, rows), find_decode(rows), tmp_path, Provenance("c", "p", 1.0)
    )
    page = (tmp_path / "report.html").read_text()
    assert "peer / ours</th>" not in page
    assert "host &micro;s</th>" not in page


def test_ray_measures_one_point_at_a_time(monkeypatch):
    import ray

    config = parse(
        DecodeConfig, text(more=", caches: [warm, cold]") + "\nrounds: 5\nseconds: 0.001\nrotation: 1"
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        # An actor takes the whole of the one node.
        with pytest.raises(ValueError, match="workers: expected at most the 1 largest nodes"):
            run_decode(config, "cpu", engine="ray", workers=2)
        rows = run_decode(config, "cpu", engine="ray").rows
        with pytest.raises(ValueError, match=r"workers: expected at most the \d+ GPUs"):
            run_decode(config.model_copy(update={"gpu": config.cpu}), "gpu", engine="ray", workers=1000)
    finally:
        ray.shutdown()
    assert [row["cache"] for row in rows] == ["warm", "cold"]
    assert all(row["error"] < LARGEST_ERROR["float32"] for row in rows)
