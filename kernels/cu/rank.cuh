// Logits by rank: the more likely before the less likely, and of equals the lower id first. For kernels with a block per row.
#pragma once
#include "common.cuh"

using u64 = unsigned long long;

constexpr int THREADS = 512, WARPS = THREADS / 32;

// A number that is larger for a larger float; NaN lie at the ends.
__device__ __forceinline__ u32 order_of(float x) {
  const u32 bits = (u32)__float_as_int(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// A number that is larger for what comes earlier; no two ids have the same, and none has 0.
__device__ __forceinline__ u64 rank_of(float logit, int id) { return (u64)order_of(logit) << 32 | (0xffffffffu - (u32)id); }
__device__ __forceinline__ int id_of(u64 rank) { return (int)(0xffffffffu - (u32)rank); }

// The largest of the block, in every thread. `partial` has a value for each warp.
__device__ __forceinline__ u64 block_max(u64 v, u64* partial) {
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, offset));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
  __syncthreads();
  u64 most = 0;
  CU_UNROLL
  for (int i = 0; i < WARPS; i++) most = max(most, partial[i]);
  return most;
}
