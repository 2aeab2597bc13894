"""Which kind of launch a plan takes; it needs neither a GPU nor a compiler."""

import pytest
from test_cuda_heuristics import call_of, shape_of

launch = pytest.importorskip("parallax_core.cuda_kernels.launch")
from parallax_core.cuda_kernels import attend, compiler, early_launch, lla  # noqa: E402

PREPARED = launch.Prepared


class Kernel:
    function = "the kernel"

    def set_shared_memory(self, size):
        pass


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """What is launched, and how: a list of the kind, the function, the grid and the threads."""
    seen = []

    class Prepared:
        def __init__(self, function, grid, threads, shared_bytes, kind):
            self.seen = kind.name.lower(), function, grid, threads

        def launch(self, stream, arguments):
            seen.append(self.seen)

    monkeypatch.setattr(early_launch, "supported", lambda capability: capability >= (9, 0))
    monkeypatch.setattr(launch, "Prepared", Prepared)
    monkeypatch.setattr(compiler, "kernel", lambda *_: Kernel())
    return seen


@pytest.mark.parametrize(
    "wanted, allowed, kind",
    [
        (dict(early=True), True, "early"),
        (dict(early=True), False, "plain"),
        (dict(early=False), True, "plain"),
        (dict(early=True, together=True), True, "together"),
        (dict(early=False, together=True), True, "together"),
    ],
)
def test_a_launch_is_of_the_kind_that_was_asked_for(launched, wanted, allowed, kind):
    go = launch.Launch("f", (3, 2, 1), 64, 0, **wanted)
    with early_launch.allow(allowed):
        go(0, 0)
    assert launched == [(kind, "f", (3, 2, 1), 64)]


@pytest.mark.parametrize("kind", list(launch.Kind), ids=lambda kind: kind.name.lower())
def test_the_driver_is_handed_what_was_asked_for(kind, monkeypatch):
    driver = launch.driver
    handed, result = [], driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *given: handed.append(given) or (result,))
    prepared = PREPARED(7, (3, 2, 1), 64, 1024, kind)
    prepared.launch(5, 9)
    ((config, function, arguments, extra),) = handed
    assert (function, arguments, extra) == (7, 9, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (64, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream)) == (1024, 5)
    found = [(x.id.name, x.value) for x in config.attrs]
    if kind is launch.Kind.PLAIN:
        assert not found
    else:
        ((name, value),) = found
        early = kind is launch.Kind.EARLY
        assert name.endswith("PROGRAMMATIC_STREAM_SERIALIZATION" if early else "COOPERATIVE")
        assert (value.programmaticStreamSerializationAllowed if early else value.cooperative) == 1
    for result, error in (
        (driver.CUresult.CUDA_ERROR_INVALID_VALUE, RuntimeError),
        (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, MemoryError),
    ):
        with pytest.raises(error, match=result.name):
            prepared.launch(5, 9)


@pytest.mark.parametrize(
    "call, kind",
    [
        (dict(), "early"),
        # 1 GiB of keys and values, and a little more.
        (dict(batch=64, kv_len=4096), "early"),
        (dict(batch=65, kv_len=4096), "plain"),
        # Blocks that send each other parcels.
        (dict(q_heads=64, kv_len=4096), "together"),
        (dict(capability=(8, 0)), "plain"),
    ],
)
def test_softmax_and_parallax_begin_early_unless_they_read_much(launched, call, kind):
    problem, shape = shape_of(**call)
    plan = attend.Plan(problem, call_of(**call)[1], shape, Kernel())
    with early_launch.allow(True):
        plan._launch(0, 0)
    assert launched == [(kind, "the kernel", shape.grid, 32 * shape.warps)]


@pytest.mark.parametrize(
    "call, solver, kind",
    [
        (dict(batch=32), "cholesky", "early"),
        (dict(kv_len=16384), "cholesky", "early"),
        (dict(batch=32), "cg", "early"),
        # Blocks that send each other mail, and that give one of them what they have.
        (dict(kv_len=16384), "cg", "together"),
        (dict(batch=16, head_dim=64, kv_len=4096), "cg", "together"),
        (dict(head_dim=80), "cholesky", "plain"),
    ],
)
def test_blocks_that_wait_for_one_another_are_launched_together(launched, call, solver, kind):
    problem, layout = call_of(operation="lla_decode", probe_dtype=None, **call)
    plan = lla.plan(problem, layout, 0.1, solver)
    with early_launch.allow(True):
        for _, go in plan._launches:
            go(0, 0)
    assert [seen[0] for seen in launched] == [kind] * len(plan._launches)
    blocks = sum(grid[0] for _, _, grid, _ in launched)
    assert blocks == problem.batch * problem.q_heads * plan.shape.blocks
