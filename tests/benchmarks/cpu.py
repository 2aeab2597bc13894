"""Time the CPU backend beside PyTorch's scaled dot-product attention, in one process on the same inputs.

    python tests/benchmarks/cpu.py [--rounds 9] [--threads 2]

The competitors of a row take turns, and a row shows the median times and the median of the ratios turn by
turn, which holds where the machine's speed drifts. PyTorch computes softmax, half of Parallax's arithmetic.
Last come two measurements in processes of their own: what the order of the imports does to either side, and
the memory of a long sequence.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import parallax_core as plx
from parallax_core.cpu import threads

PAUSE = 0.02
"""Seconds before every call: OpenMP's threads spin for milliseconds after their work, on whose time it is."""


def pause():
    """Wait for PAUSE seconds at work.

    After a sleep the kernels of some virtual machines wake all threads of a call on one processor, for a
    random half of the calls of either side: the times then show the scheduler and no program.
    """
    end = time.perf_counter() + PAUSE
    while time.perf_counter() < end:
        pass


def turns(rounds, **functions):
    """Seconds of each function in each of the rounds, all in turn, after one call to warm up."""
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            pause()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def row(title, seconds, peer, target=None):
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    for name in seconds:
        if name == peer:
            continue
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[peer]))
        goal = "" if target is None or name not in target else f"{target[name]:.2f}"
        numbers = f"{milliseconds[name]:.1f} | {peer} {milliseconds[peer]:.1f} | {ratio:.2f}"
        print(f"| {title} | {name} | {numbers} | {goal} |", flush=True)


def arrays(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain_parallax(q, r, k, v):
    """The formula in PyTorch's own operations, (B, H, L, D)."""
    L = q.shape[-2]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf)
    p, t = scores.softmax(-1), r @ k.mT
    return (p * (1 + (p * t).sum(-1, keepdim=True) - t)) @ v


def whole_sequences(rounds):
    for B, H, L, D in ((1, 8, 1024, 64), (1, 8, 2048, 128)):
        q, r, k, v, do = arrays(*[(B, L, H, D)] * 5)
        heads_first = [x.transpose(1, 2) for x in (q, r, k, v)]
        sq, _, sk, sv = heads_first
        title = f"B{B} H{H} L{L} D{D} float32 causal"
        seconds = turns(
            rounds,
            Parallax=lambda: plx.parallax_attention(q, r, k, v),
            softmax=lambda: plx.softmax_attention(q, k, v),
            SDPA=lambda: F.scaled_dot_product_attention(sq, sk, sv, is_causal=True),
        )
        row(f"{title}, forward", seconds, "SDPA", {"Parallax": 1.6 if D == 128 else 1.7, "softmax": 0.95})
        seconds = turns(
            max(3, rounds // 3),
            Parallax=lambda: plx.parallax_attention(q, r, k, v),
            plain=lambda: plain_parallax(*heads_first),
        )
        row(f"{title}, forward", seconds, "plain", {"Parallax": 0.25})
        o, state = plx.parallax_attention(q, r, k, v, return_state=True)
        so, softmax_state = plx.softmax_attention(q, k, v, return_state=True)
        leaves = [x.clone().requires_grad_() for x in (sq, sk, sv)]
        graph, gradient = F.scaled_dot_product_attention(*leaves, is_causal=True), do.transpose(1, 2)
        seconds = turns(
            rounds,
            Parallax=lambda: plx.parallax_attention_backward(do, q, r, k, v, o, state),
            softmax=lambda: plx.softmax_attention_backward(do, q, k, v, so, softmax_state),
            SDPA=lambda: torch.autograd.grad(graph, leaves, gradient, retain_graph=True),
        )
        row(f"{title}, backward", seconds, "SDPA", {"Parallax": 1.8})


def decode(rounds):
    B, L = 8, 4096
    for dtype, target in ((torch.float32, 0.6), (torch.bfloat16, 0.3)):
        for Hq, Hkv, D in ((8, 8, 128), (32, 8, 128), (8, 8, 64)):
            q, r = arrays((B, 1, Hq, D), (B, 1, Hq, D), dtype=dtype)
            k, v = arrays((B, L, Hkv, D), (B, L, Hkv, D), dtype=dtype)
            sq, sk, sv = (x.transpose(1, 2) for x in (q, k, v))
            seconds = turns(
                rounds,
                Parallax=lambda: plx.parallax_decode(q, r, k, v),
                SDPA=lambda: F.scaled_dot_product_attention(sq, sk, sv, enable_gqa=Hq != Hkv),
                read=lambda: (k.view(torch.float32).amax(), v.view(torch.float32).amax()),
            )
            heads = f"H{Hq}" if Hq == Hkv else f"Hq{Hq} Hkv{Hkv}"
            title = f"B{B} {heads} L{L} D{D} {str(dtype)[6:]}, decode"
            tuned = (Hq, D) == (8, 128)
            row(
                title,
                {n: s for n, s in seconds.items() if n != "read"},
                "SDPA",
                {"Parallax": target} if tuned else None,
            )
            row(title, {n: s for n, s in seconds.items() if n != "SDPA"}, "read", {"Parallax": 1 / 0.7})


def lla(rounds):
    B, H, L, D = 1, 8, 1024, 64
    q, k, v = (x.numpy() for x in arrays(*[(B, L, H, D)] * 3))
    expected = plx.reference.lla_attention(q[:, :256], k[:, :256], v[:, :256], ridge=0.1)
    seconds = turns(
        max(3, rounds // 3),
        **{s: lambda s=s: plx.lla_attention(q, k, v, ridge=0.1, solver=s) for s in ("cholesky", "cg")},
    )
    for solver, times in seconds.items():
        o = plx.lla_attention(q[:, :256], k[:, :256], v[:, :256], ridge=0.1, solver=solver)
        error = np.linalg.norm(o - expected) / np.linalg.norm(expected)
        print(
            f"| B{B} H{H} L{L} D{D} float32 LLA, forward | {solver} | {1e3 * statistics.median(times):.0f} "
            f"| error {error:.1e} | | 700 ms, 1e-5 |"
        )


def in_a_process(script, **values):
    """The numbers that a Python program prints, run in a process of its own."""
    script = textwrap.dedent(script).format(**values)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [float(x) for x in run.stdout.split()]


def import_order(rounds, count):
    """Parallax and SDPA forward where ours is imported before PyTorch, and after it."""
    script = """
        import statistics, time
        {imports}
        from parallax_core.cpu import threads
        threads.set_num_threads({threads}), torch.set_num_threads({threads})
        q, r, k, v = torch.randn((4, 1, 1024, 8, 64)).unbind()
        sq, sk, sv = (x.transpose(1, 2) for x in (q, k, v))
        for call in (
            lambda: plx.parallax_attention(q, r, k, v),
            lambda: torch.nn.functional.scaled_dot_product_attention(sq, sk, sv, is_causal=True),
        ):
            times = []
            for _ in range({rounds}):
                end = time.perf_counter() + {pause}
                while time.perf_counter() < end:
                    pass
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            print(statistics.median(times))
    """
    # The backend by name, since the package alone leaves Numba for the first call.
    ours, torchs = "import parallax_core as plx, parallax_core.cpu.forward", "import torch"
    orders = {"first": f"{ours}; {torchs}", "last": f"{torchs}; {ours}"}
    seconds = {order: [] for order in orders}
    # A process is faster or slower as a whole by where its memory lies, hence several of each.
    for _ in range(5):
        for order, imports in orders.items():
            seconds[order].append(
                in_a_process(script, imports=imports, threads=count, rounds=2 * rounds, pause=PAUSE)
            )
    first, last = ([statistics.median(times) for times in zip(*seconds[order])] for order in orders)
    for name, a, b in zip(("Parallax", "SDPA"), first, last):
        numbers = f"{1e3 * a:.1f} | ours imported last {1e3 * b:.1f} | {a / b:.2f}"
        print(f"| B1 H8 L1024 D64 float32 causal, ours imported first | {name} | {numbers} | 0.90 to 1.10 |")


def memory(count):
    """Resident memory of a long sequence above its inputs and output, with the kernel compiled before.

    The peak of the process, less what is resident before the call: where compiling took more than the call
    it is the larger of the two. From Linux's own table, since ``getrusage`` hands a parent's peak down.
    """
    length = 65536
    script = """
        import numpy as np
        import parallax_core as plx
        from parallax_core.cpu import threads

        def status(name):
            line = next(x for x in open("/proc/self/status") if x.startswith(name))
            return 1024 * int(line.split()[1])

        threads.set_num_threads({threads})
        q, r, k, v = np.random.default_rng(0).standard_normal((4, 1, {length}, 1, 64), np.float32)
        # Long enough for the way that the long sequence takes.
        plx.parallax_attention(*(x[:, :1024] for x in (q, r, k, v)))
        before = status("VmRSS")
        o = plx.parallax_attention(q, r, k, v)
        print((status("VmHWM") - before - o.nbytes) / 1e6)
    """
    (megabytes,) = in_a_process(script, threads=count, length=length)
    title = f"B1 H1 L{length} D64 float32 causal, forward"
    print(f"| {title} | Parallax | {megabytes:.0f} MB above inputs and output | | | 200 MB |")


def processor():
    """The processor's name; where the operating system hides the model, its family and model number."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().partition("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    numbers = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{fields.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of every competitor")
    parser.add_argument("--threads", type=int, default=2, help="threads of every competitor")
    arguments = parser.parse_args()
    threads.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    machine = f"{processor()}, {os.cpu_count()} processors"
    print(f"{machine}, {arguments.threads} threads each, torch {torch.__version__}")
    print("| case | ours | ms | peer ms | ratio | target |")
    print("|---|---|---|---|---|---|")
    whole_sequences(arguments.rounds)
    decode(arguments.rounds)
    lla(arguments.rounds)
    import_order(arguments.rounds, arguments.threads)
    memory(arguments.threads)


if __name__ == "__main__":
    main()
