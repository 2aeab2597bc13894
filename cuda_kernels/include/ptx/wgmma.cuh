#pragma once
// Warpgroup matrix products (sm_90a) of two shared-memory operands of half-precision numbers: rows of keys, channels
// contiguous, 128 bytes of each with the 128-byte swizzle. Where the keys are summed over, an operand is "transposed".

// Orders this thread's accumulator writes before the next products.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all groups but the last PENDING are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Accumulators that were waited for: nothing is to be read from them before.
__device__ __forceinline__ void wgmma_arrived(float& c) { asm volatile("" : "+f"(c)::"memory"); }

// Blocks of 64 channels, each a column of 128-byte rows (one a key) with the 128-byte swizzle, 1024-byte
// aligned: 8 keys are 1024 bytes (the stride offset), `block_bytes` part the blocks (the leading offset).
__device__ __forceinline__ unsigned long long keys_outermost(unsigned address, unsigned block_bytes) {
  constexpr unsigned long long swizzle_128 = 1ull << 62;
  return swizzle_128 | (static_cast<unsigned long long>(1024 >> 4) << 32) |
         (static_cast<unsigned long long>(block_bytes >> 4) << 16) | ((address & 0x3ffff) >> 4);
}

// Rows of 128 bytes that follow one another, 1024-byte aligned; the sum is along a row.
__device__ __forceinline__ unsigned long long channels_innermost(unsigned address) { return keys_outermost(address, 16); }

// What moves the address of a descriptor on by some bytes, all below 256 KiB.
__device__ __forceinline__ constexpr unsigned descriptor_step(unsigned bytes) { return bytes >> 4; }

// c += A B^T of a 64 x 128 tile over 16 keys, float16; c: 64 registers.
__device__ __forceinline__ void wgmma_m64n128(float* c, unsigned long long a, unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63}, "
      "%64, %65, 1, 1, 1, 1, 1;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]),
        "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),
        "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]),
        "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),
        "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]),
        "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]),
        "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]),
        "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
      : "l"(a), "l"(b));
}


// The same of a 64 x 192 tile; c: 96 registers.
__device__ __forceinline__ void wgmma_m64n192(float* c, unsigned long long a, unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, 1, 1, 1, 1, 1;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]),
        "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]),
        "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]),
        "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]),
        "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), "+f"(c[64]),
        "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), "+f"(c[72]),
        "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), "+f"(c[80]),
        "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), "+f"(c[88]),
        "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95])
      : "l"(a), "l"(b));
}

// c = A b, or c += A b, of 64 keys over 16 channels: eight vectors b, each a row of channels.
template <bool BFLOAT>
__device__ __forceinline__ void wgmma_scores(float (&c)[4], unsigned long long a, unsigned long long b, bool add) {
  if constexpr (BFLOAT)
    asm volatile(
        "{\n\t"
        ".reg .pred add;\n\t"
        "setp.ne.b32 add, %6, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, 0, 0;\n\t"
        "}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(a), "l"(b), "r"(int(add)));
  else
    asm volatile(
        "{\n\t"
        ".reg .pred add;\n\t"
        "setp.ne.b32 add, %6, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, 0, 0;\n\t"
        "}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(a), "l"(b), "r"(int(add)));
}

// c = A B, or c += A B, of 64 x COLUMNS over 16: B, and A too unless its keys are summed over, by rows of 128 bytes along which
// the sum is. c: the four numbers of every eight columns, upper row first.
#define WGMMA_SMALL(COLUMNS, TYPE, PLACES, A, B, ADD, KEYS, ...)                                                               \
  asm volatile("{\n\t"                                                                                                         \
               ".reg .pred add;\n\t"                                                                                           \
               "setp.ne.b32 add, " ADD ", 0;\n\t"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" PLACES "}, " A ", " B                  \
               ", add, 1, 1, " KEYS ", 0;\n\t"                                                                                 \
               "}"                                                                                                             \
               : __VA_ARGS__                                                                                                   \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(OVER_KEYS)))
#define WGMMA_FOUR(i) "+f"(*c[i]), "+f"(*c[i + 1]), "+f"(*c[i + 2]), "+f"(*c[i + 3])
#define WGMMA_SMALL_8(TYPE) WGMMA_SMALL("8", TYPE, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", WGMMA_FOUR(0))
#define WGMMA_SMALL_16(TYPE) \
  WGMMA_SMALL("16", TYPE, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", WGMMA_FOUR(0), WGMMA_FOUR(4))
#define WGMMA_SMALL_32(TYPE)                                                                                                \
  WGMMA_SMALL("32", TYPE, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19", \
              WGMMA_FOUR(0), WGMMA_FOUR(4), WGMMA_FOUR(8), WGMMA_FOUR(12))

template <int COLUMNS, bool BFLOAT, bool OVER_KEYS>
__device__ __forceinline__ void wgmma_small(float* const (&c)[COLUMNS / 2], unsigned long long a, unsigned long long b, bool add) {
  static_assert(COLUMNS == 8 || COLUMNS == 16 || COLUMNS == 32, "8, 16 or 32 columns");
  if constexpr (COLUMNS == 8) {
    if constexpr (BFLOAT)
      WGMMA_SMALL_8("bf16");
    else
      WGMMA_SMALL_8("f16");
  } else if constexpr (COLUMNS == 16) {
    if constexpr (BFLOAT)
      WGMMA_SMALL_16("bf16");
    else
      WGMMA_SMALL_16("f16");
  } else if constexpr (COLUMNS == 32) {
    if constexpr (BFLOAT)
      WGMMA_SMALL_32("bf16");
    else
      WGMMA_SMALL_32("f16");
  }
}

#undef WGMMA_SMALL_32
#undef WGMMA_SMALL_16
#undef WGMMA_SMALL_8
#undef WGMMA_FOUR
#undef WGMMA_SMALL
