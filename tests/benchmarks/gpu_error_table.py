"""Print, as Markdown, errors of decoding on a GPU in bfloat16 against float64 of the same rounded inputs.

Each cell is the error of all outputs together and that of the worst row, relative to their size. The first
table has Parallax, and fla-core's where it is installed; the second LLA at a ridge of 0.1. Needs PyTorch.

python tests/benchmarks/gpu_error_table.py
"""

from __future__ import annotations

import datetime
import importlib.util

import numpy as np
import torch

import parallax_core as plx

BATCH, HEADS, LENGTH, RIDGE = 4, 8, 2048, 0.1
SOLVERS = "cholesky", "cg"


def cases(head_dim: int) -> dict[str, tuple[np.ndarray, ...]]:
    """q, r, k and v by name of the case; offsets are in standard deviations of the keys."""
    rng = np.random.default_rng(0)
    q, r = rng.standard_normal((2, BATCH, 1, HEADS, head_dim))
    k, v = rng.standard_normal((2, BATCH, LENGTH, HEADS, head_dim))
    outlier = k.copy()
    outlier[:, 99] *= 30
    drift = np.linspace(-8, 8, LENGTH)[:, None, None]
    return {
        "random": (q, r, k, v),
        "queries four times larger": (4 * q, r, k, v),
        "key offset of 16": (q, r, k + 16, v),
        "one key 30 times larger": (q, r, outlier, v),
        "keys drifting by 16": (q, r, k + drift, v),
        "40 keys": (q, r, k[:, :40], v[:, :40]),
    }


def errors(o, expected: np.ndarray) -> str:
    difference = o.detach().double().cpu().numpy() - expected
    of_row = np.linalg.norm(difference, axis=-1) / np.linalg.norm(expected, axis=-1)
    return f"{np.linalg.norm(difference) / np.linalg.norm(expected):.2e}, {of_row.max():.2e}"


def main() -> None:
    fla = None
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.parallax.decode import parallax_decode_one_step as fla
    name = torch.cuda.get_device_name()
    print(f"{datetime.date.today()}, {name}, PyTorch {torch.__version__}, parallax-core {plx.__version__}:")
    print(f"{BATCH} sequences of {LENGTH} keys, {HEADS} heads, bfloat16\n")
    solved = []
    print("| inputs | head size | Parallax, parallax-core | Parallax, fla-core |\n|---|---|---|---|")
    for head_dim in (64, 128):
        for case, arrays in cases(head_dim).items():
            q, r, k, v = (torch.tensor(x, device="cuda", dtype=torch.bfloat16) for x in arrays)
            wide = [x.double().cpu().numpy() for x in (q, r, k, v)]
            expected = plx.reference.parallax_decode(*wide)
            theirs = errors(fla(q, r, k, v).reshape(expected.shape), expected) if fla else "-"
            print(f"| {case} | {head_dim} | {errors(plx.parallax_decode(q, r, k, v), expected)} | {theirs} |")
            expected = plx.reference.lla_decode(wide[0], *wide[2:], ridge=RIDGE)
            found = [
                errors(plx.lla_decode(q, k, v, ridge=RIDGE, solver=solver), expected) for solver in SOLVERS
            ]
            solved.append(f"| {case} | {head_dim} | {' | '.join(found)} |")
    print(f"\n| inputs | head size | LLA, {' | LLA, '.join(SOLVERS)} |\n|---|---|---|---|", *solved, sep="\n")


if __name__ == "__main__":
    main()
