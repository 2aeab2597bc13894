"""Print, as Markdown, the errors of softmax, Parallax and LLA against float64 of the same rounded inputs.

Each cell is our error, then that of the plain formula. The first table is of the outputs, the second of the
gradients, the worst of a call's arrays.

OPENBLAS_NUM_THREADS=1 python tests/benchmarks/error_table.py
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

import parallax_core as plx

LENGTH, HEAD_DIM, RIDGE = 256, 64, 0.1
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INPUTS = {"softmax": "qkv", "parallax": "qrkv", "lla": "qkv"}


def cases(length=LENGTH, head_dim=HEAD_DIM):
    """q, r, k and v by name of the case, float64; offsets are in standard deviations of the keys.

    ``(1, length, 1, head_dim)`` each; the probe is of the size of a solved one.
    """
    rng = np.random.default_rng(0)
    q, r, k, v = rng.standard_normal((4, 1, length, 1, head_dim))
    offset = rng.standard_normal((1, 1, 1, head_dim))
    offset /= np.sqrt(np.square(offset).mean(-1, keepdims=True))
    outlier = k.copy()
    outlier[:, 0] += 64 * offset[:, 0]
    drift = 16 * np.linspace(0, 1, length)[:, None, None] * offset
    return {
        "random keys": (q, r, k, v),
        "offset of 16": (q, r, k + 16 * offset, v),
        "offset of 256": (q, r, k + 256 * offset, v),
        "one outlying key, 64 off": (q, r, outlier, v),
        "keys drifting by 16": (q, r, k + drift, v),
    }


def plain(operation, inputs, *, ridge=RIDGE, scale=None, do=None):
    """The formulas as they stand with whole matrices, causal, in float32 (float64 for float64).

    operation: softmax, parallax or lla; inputs: NumPy arrays by name, of as many queries as keys and as many
    heads of each. Returns the output, and with its gradient ``do`` those of the inputs by name too, all
    rounded to their dtypes.
    """
    dtypes = {name: x.dtype for name, x in inputs.items()}
    wide = np.float64 if dtypes["q"] == np.float64 else np.float32
    leaves = {n: torch.tensor(x.astype(wide), requires_grad=do is not None) for n, x in inputs.items()}
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    length, head_dim = q.shape[2:]
    s = q @ k.mT * (head_dim**-0.5 if scale is None else scale)
    p = s.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    if operation == "softmax":
        o = p @ v
    else:
        if operation == "lla":
            kbar = p @ k
            centred = k[:, :, None] - kbar[:, :, :, None]
            C_kk = (p[..., None] * centred).mT @ centred
            r = -torch.linalg.solve(C_kk + ridge * torch.eye(head_dim, dtype=q.dtype), q - kbar)
        else:
            r = leaves["r"].transpose(1, 2)
        t = r @ k.mT
        c = (p * t).sum(-1, keepdim=True)
        o = (1 + c) * (p @ v) - (p * t) @ v
    o = o.transpose(1, 2)
    with np.errstate(over="ignore"):
        output = o.detach().numpy().astype(dtypes["v"])
        if do is None:
            return output
        o.backward(torch.tensor(do.astype(wide)))
        return output, {name: x.grad.numpy().astype(dtypes[name]) for name, x in leaves.items()}


def attend(module, operation, inputs, **options):
    ridge = {"ridge": RIDGE} if operation == "lla" else {}
    return getattr(module, f"{operation}_attention")(*inputs.values(), **ridge, **options)


def differentiate(module, operation, inputs, do, **options):
    """The gradients of the inputs by name."""
    ridge = {"ridge": RIDGE} if operation == "lla" else {}
    backward = getattr(module, f"{operation}_attention_backward")
    gradients = backward(do, *inputs.values(), np.zeros_like(do), None, **ridge, **options)
    return dict(zip(inputs, gradients))


def relative(a, b) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def cell(operation, arrays, dtype, with_gradients) -> str:
    inputs = {n: x.astype(dtype) for n, x in zip("qrkv", arrays) if n in INPUTS[operation]}
    if not with_gradients:
        truth = attend(plx.reference, operation, inputs)
        ours, simple = attend(plx, operation, inputs), plain(operation, inputs)
        return f"{relative(ours, truth):.1e} / {relative(simple, truth):.1e}"
    do = np.random.default_rng(1).standard_normal(arrays[3].shape).astype(dtype)
    truth = differentiate(plx.reference, operation, inputs, do)
    ours, (_, simple) = differentiate(plx, operation, inputs, do), plain(operation, inputs, do=do)
    worst = (max(relative(found[name], truth[name]) for name in inputs) for found in (ours, simple))
    return "{:.1e} / {:.1e}".format(*worst)


def main() -> None:
    torch.set_num_threads(1)
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
        f"{datetime.date.today()}. B=1 L={LENGTH} H=1 D={HEAD_DIM}, causal, ridge {RIDGE}."
    )
    for title in ("Outputs", "Gradients"):
        print(f"\n### {title}\n\n| keys | dtype | softmax | Parallax | LLA |\n|---|---|---|---|---|")
        for case, arrays in cases().items():
            for name, dtype in DTYPES.items():
                cells = (cell(operation, arrays, dtype, title == "Gradients") for operation in INPUTS)
                print(f"| {case} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
