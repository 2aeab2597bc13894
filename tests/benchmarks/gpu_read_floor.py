"""Print, as Markdown, what bounds decoding on a GPU from below: reading keys and values, and one exchange.

In turns, cold, from CUDA graphs, as the decode study times calls, in microseconds: a kernel whose 128 blocks
read the same bytes in equal ranges by the copy engine, and do nothing else; the same, whose blocks then count
themselves in groups of 16, of which the last gathers a word of each; Parallax; the bytes at 98 % of what a
plain read of 1 GiB gets, plus 4. Needs PyTorch and compute capability 9.0.

python tests/benchmarks/gpu_read_floor.py
"""

from __future__ import annotations

import datetime
import functools

import cupy
import numpy as np
import torch

import parallax_core as plx
from parallax_core.cuda_kernels import early_launch
from parallax_core.distributed.decode_graphs import TorchTimer
from parallax_core.distributed.decode_timing import in_turns
from parallax_core.gpu_exchange import stream_at

ROUNDS, SECONDS, ROTATION = 20, 5.0, 512 << 20
BLOCKS, WARPS, SLOTS, PIECE, SHARERS = 128, 8, 3, 8192, 16
# Batch, query heads, key heads, length, head size; the last for comparison.
SHAPES = (1, 8, 8, 16384, 128), (4, 16, 16, 4096, 64), (16, 16, 1, 16384, 128), (32, 8, 8, 4096, 128)

SOURCE = r"""
// Every warp feeds a ring of its own. Pieces of a block are those of one range.
__device__ unsigned address(const void* x) { return static_cast<unsigned>(__cvta_generic_to_shared(x)); }

__device__ void bring(unsigned to, const unsigned char* from, unsigned barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(PIECE) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(PIECE), "r"(barrier) : "memory");
}

__device__ void wait(unsigned barrier, unsigned parity) {
  asm volatile("{\n\t.reg .pred done;\n\twait:\n\t"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra wait;\n\t}"
               ::"r"(barrier), "r"(parity) : "memory");
}

extern "C" __global__ void read_ranges(const unsigned char* from, int pieces, int exchanges,
                                       unsigned* counters, float* words) {
  extern __shared__ __align__(1024) unsigned char ring[];
  __shared__ __align__(8) unsigned long long full[WARPS][SLOTS];
  const int warp = threadIdx.x / 32, each = pieces / gridDim.x, count = each / WARPS;
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < SLOTS; i++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[warp][i])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const unsigned char* own = from + (size_t(blockIdx.x) * each + warp) * PIECE;
    const auto bring_piece = [&](int i) {
      const int slot = i % SLOTS;
      bring(address(ring + (warp * SLOTS + slot) * PIECE), own + size_t(i) * WARPS * PIECE,
            address(&full[warp][slot]));
    };
    for (int i = 0; i < min(SLOTS, count); i++) bring_piece(i);
    for (int i = 0; i < count; i++) {
      wait(address(&full[warp][i % SLOTS]), i / SLOTS & 1);
      if (i + SLOTS < count) bring_piece(i + SLOTS);
    }
  }
  __syncthreads();
  if (!exchanges || threadIdx.x >= 32) return;
  const int group = blockIdx.x / SHARERS;
  unsigned before = 0;
  if (threadIdx.x == 0) {
    words[blockIdx.x] = ring[0];
    __threadfence();
    before = atomicAdd(&counters[group], 1);
    __threadfence();
  }
  if (__shfl_sync(~0u, before, 0) % SHARERS != SHARERS - 1) return;
  float sum = threadIdx.x < SHARERS ? __ldcg(&words[group * SHARERS + threadIdx.x]) : 0.0f;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x == 0) words[gridDim.x + group] = sum;
}
"""


def reader():
    sizes = {"WARPS": WARPS, "SLOTS": SLOTS, "PIECE": PIECE, "SHARERS": SHARERS}
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in sizes.items()))
    kernel = cupy.RawModule(code=SOURCE, options=options).get_function("read_ranges")
    kernel.max_dynamic_shared_size_bytes = WARPS * SLOTS * PIECE
    return kernel


def main() -> None:
    clock, kernel = TorchTimer(), reader()
    counters, words = cupy.zeros(BLOCKS // SHARERS, np.uint32), cupy.zeros(2 * BLOCKS, np.float32)
    device = torch.cuda.get_device_name()
    print(f"{datetime.date.today()}, {device}, parallax-core {plx.__version__}, bfloat16:\n")
    print("| B | Hq | Hkv | L | D | read | and exchanged | Parallax | bytes / (0.98 of a plain read) + 4 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for B, Hq, Hkv, L, D in SHAPES:
        q, r = torch.randn(2, B, 1, Hq, D, device="cuda", dtype=torch.bfloat16)
        nbytes = 4 * B * L * Hkv * D
        caches = [
            torch.randn(2, B, L, Hkv, D, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(1, -(-ROTATION // nbytes)))
        ]

        def read(cache, exchanges, pieces=nbytes // PIECE):
            arguments = cache.data_ptr(), np.int32(pieces), np.int32(exchanges), counters, words
            with stream_at(torch.cuda.current_stream().cuda_stream):
                kernel((BLOCKS,), (32 * WARPS,), arguments, shared_mem=WARPS * SLOTS * PIECE)

        functions = {
            "read": lambda c: read(c, 0),
            "exchanged": lambda c: read(c, 1),
            "ours": lambda c, q=q, r=r: plx.parallax_decode(q, r, c[0], c[1]),
        }
        calls = clock.calls(nbytes, len(caches))
        with early_launch.allow(False):
            turns = {
                name: clock.prepare([functools.partial(call, c) for c in caches], calls)
                for name, call in functions.items()
            }
        turns["plain"], plain_bytes = clock.read(caches)
        taken = {name: 1e6 * float(np.median(x)) for name, x in in_turns(turns, ROUNDS, SECONDS).items()}
        limit = nbytes / (0.98 * plain_bytes / taken["plain"]) + 4
        figures = " | ".join(f"{taken[name]:.2f}" for name in ("read", "exchanged", "ours"))
        print(f"| {B} | {Hq} | {Hkv} | {L} | {D} | {figures} | {limit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
