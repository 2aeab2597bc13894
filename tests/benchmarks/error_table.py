"""Print, as Markdown, the errors of softmax, Parallax and LLA against float64 of the same rounded inputs.

Each cell is our error, then that of the plain formula.

python tests/benchmarks/error_table.py
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import ml_dtypes
import numpy as np

import parallax_core as plx

B, L, H, D = 1, 256, 1, 64
RIDGE = 0.1
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def cases():
    """Inputs by name, in standard deviations of the keys; the probe is of the size of a solved one."""
    rng = np.random.default_rng(0)
    q, r, k, v = rng.standard_normal((4, B, L, H, D))
    offset = rng.standard_normal((1, 1, H, D))
    offset /= np.sqrt(np.square(offset).mean(-1, keepdims=True))
    outlier = k.copy()
    outlier[:, 0] += 64 * offset[:, 0]
    drift = 16 * np.linspace(0, 1, L)[:, None, None] * offset
    yield "random keys", (q, r, k, v)
    yield "offset of 16", (q, r, k + 16 * offset, v)
    yield "offset of 256", (q, r, k + 256 * offset, v)
    yield "one outlying key, 64 off", (q, r, outlier, v)
    yield "keys drifting by 16", (q, r, k + drift, v)


def plain(q, r, k, v, estimator: str):
    """The formulas as they stand, in float32 (float64 for float64) with whole matrices."""
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    q, r, k, v = (np.moveaxis(array.astype(dtype), 2, 1) for array in (q, r, k, v))
    s = (q @ k.swapaxes(2, 3)) * dtype(D**-0.5)
    s[..., np.triu(np.ones((L, L), bool), 1)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if estimator == "softmax":
        return np.moveaxis(p @ v, 1, 2)
    if estimator == "lla":
        centred = k[:, :, None] - (p @ k)[:, :, :, None]
        C_kk = (p[..., None] * centred).swapaxes(3, 4) @ centred + dtype(RIDGE) * np.eye(D, dtype=dtype)
        r = -np.linalg.solve(C_kk, (q - p @ k)[..., None])[..., 0]
    t = r @ k.swapaxes(2, 3)
    c = (p * t).sum(-1, keepdims=True)
    return np.moveaxis((1 + c) * (p @ v) - (p * t) @ v, 1, 2)


CALLS = {
    "softmax": lambda module, q, r, k, v: module.softmax_attention(q, k, v),
    "parallax": lambda module, q, r, k, v: module.parallax_attention(q, r, k, v),
    "lla": lambda module, q, r, k, v: module.lla_attention(q, k, v, ridge=RIDGE),
}


def relative(a, b) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def main() -> None:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    print(
        f"`OPENBLAS_NUM_THREADS=1 python tests/benchmarks/error_table.py`, "
        f"parallax-core {plx.__version__}, {cpu}, {len(os.sched_getaffinity(0))} cores, "
        f"{datetime.date.today()}. B={B} L={L} H={H} D={D}, causal, "
        f"ridge {RIDGE}.\n"
    )
    print("| keys | dtype | softmax | Parallax | LLA |\n|---|---|---|---|---|")
    for case, arrays in cases():
        for name, dtype in DTYPES.items():
            rounded = [array.astype(dtype) for array in arrays]
            cells = []
            for estimator, call in CALLS.items():
                truth = call(plx.reference, *rounded)
                ours = call(plx, *rounded)
                with np.errstate(over="ignore", invalid="ignore"):
                    simple = plain(*rounded, estimator).astype(dtype)
                cells.append(f"{relative(ours, truth):.1e} / {relative(simple, truth):.1e}")
            print(f"| {case} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
