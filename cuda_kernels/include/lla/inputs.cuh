#pragma once
// What a kernel of local linear attention is compiled for.

constexpr bool BFLOAT = !HALF_IS_FLOAT16;
constexpr int D = HEAD_DIM;
static_assert(D == 64 || D == 128, "one matrix warpgroup takes 64 key channels");
