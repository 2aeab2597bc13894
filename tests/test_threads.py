"""The CPU backend beside other users of threads, each in a process of its own."""

import subprocess
import sys
import textwrap

import pytest

SETUP = """
import numpy as np
q, r, k, v = np.random.default_rng(0).standard_normal((4, 2, 300, 2, 16)).astype(np.float32)
def ours():
    import parallax_core as plx
    return plx.parallax_attention(q, r, k, v)
def expected():
    import parallax_core as plx
    return plx.reference.parallax_attention(q, r, k, v)
def check(o):
    # float32 sums over 300 keys against float64
    assert np.abs(o - expected()).max() < 1e-4
"""


def run(body):
    script = SETUP + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_from_several_python_threads_at_once():
    run("""
        from concurrent.futures import ThreadPoolExecutor
        first = ours()
        with ThreadPoolExecutor(8) as pool:
            for o in pool.map(lambda _: ours(), range(64)):
                np.testing.assert_array_equal(o, first)
        check(first)
    """)


def test_first_calls_from_several_python_threads_at_once():
    run("""
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool:
            for o in pool.map(lambda _: ours(), range(4)):
                check(o)
    """)


def test_a_forked_child_starts_threads_of_its_own():
    run("""
        import os, threading
        first = ours()
        assert any(t.name.startswith("parallax") for t in threading.enumerate()) or os.cpu_count() == 1
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(0 if np.array_equal(ours(), first) else 3)
                except BaseException:
                    os._exit(4)
            assert os.waitpid(pid, 0)[1] == 0
        np.testing.assert_array_equal(ours(), first)
    """)


@pytest.mark.parametrize("order", ["ours first", "PyTorch first"])
def test_beside_pytorch_in_either_import_order(order):
    lines = ["check(ours())", "import torch; check(torch_softmax())"]
    body = "\n".join(lines if order == "ours first" else lines[::-1])
    run(
        textwrap.dedent("""
        def torch_softmax():
            import torch
            a = torch.from_numpy(q).transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(a, a, a)
            return ours()
        """)
        + body
        + "\ncheck(ours()); check(torch_softmax())"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the maps of a Linux process")
def test_no_openmp_runtime_is_loaded():
    """One loaded before PyTorch's own slows PyTorch down threefold."""
    maps = run("""
        ours()
        print(open("/proc/self/maps").read())
    """)
    assert not [name for name in ("libgomp", "libiomp", "libomp") if name in maps]


def test_import_is_light():
    loaded = run("""
        import sys
        import parallax_core
        print(sorted(sys.modules))
    """)
    for heavy in ("'cupy'", "'ray'", "'torch'", "'jax'", "'numba'", "'scipy.linalg'"):
        assert heavy not in loaded


def test_compiled_kernels_are_kept_for_the_next_process():
    body = """
        import parallax_core as plx
        from parallax_core.cpu import tile_loop
        ours()
        stats = tile_loop.attend.stats
        print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
    """
    run(body)
    hits, misses = map(int, run(body).split())
    assert (hits, misses) == (1, 0)
