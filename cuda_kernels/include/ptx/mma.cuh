#pragma once
// Warp-wide matrix products of half-precision tiles and the loads and transposes that feed them.
// g = lane / 4 and t = lane % 4 below.

// Four 8x8 matrices whose rows are the 32 lanes' addresses; of each, lane holds row g, columns 2t and 2t+1.
__device__ __forceinline__ void load_matrices(unsigned (&a)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&a)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

// The other way: column c of each matrix becomes a row of 16 bytes, at the address of lane 8 i + c for matrix i (sm_90).
__device__ __forceinline__ void store_matrices_transposed(unsigned address, const unsigned (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}

__device__ __forceinline__ unsigned transpose_matrix(unsigned a) {
  unsigned b;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}

// C (16x8, float) += A (16x16) B (16x8). Lane holds C[g][2t, 2t+1] in c0, c1 and C[g+8][2t, 2t+1] in c2, c3.
template <bool BFLOAT>
__device__ __forceinline__ void multiply_add(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],
                                             unsigned b0, unsigned b1) {
  if constexpr (BFLOAT)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C (16x8, float) += A (16x8) B (8x8) of float32 numbers, whose low 13 bits the tensor cores ignore. Lane holds
// A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4] and B[t][g], B[t+4][g].
__device__ __forceinline__ void multiply_add_tf32(float& c0, float& c1, float& c2, float& c3, float a0, float a1,
                                                  float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
