// Instructions of compute capability 9.0 (H100, H200) that no other has: products of warpgroups need the target sm_90a. Like
// common.cuh, each wrapper has a second body for the host: host/wgmma.h.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", "mbarrier", "fence.proxy"; the layouts
// of descriptors also in CUTLASS, cute/atom/mma_traits_sm90_gmma.hpp.
#pragma once
#include "common.cuh"

using u64 = unsigned long long;

#if defined(CUEMU)

#include "host/wgmma.h"

#else

namespace ptx {

// An operand in shared memory without swizzle: core matrices of 8 rows of 16 bytes, `leading` bytes from one to the next in K and
// `stride` bytes in M or N. A row has 8 elements along K, or along M or N if the instruction transposes.
__device__ __forceinline__ u64 matrix_descriptor(smem_t start, unsigned leading, unsigned stride) {
  const auto field = [](unsigned bytes) { return (u64)((bytes & 0x3ffff) >> 4); };
  return field(start) | field(leading) << 16 | field(stride) << 32;
}

// Before the products of a batch: registers that were written since the last one are there.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups of products are under way; `settle` what they wrote before it is used.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps what these sums are made of ahead of the wait behind this. Nothing else does: no register that a product writes depends on
// it, so ptxas schedules it behind the wait, where it no longer runs beside the products. Sums are never negative.
__device__ __forceinline__ void finish_before_wait(const float (&sums)[2]) {
  if (sums[0] < 0.f || sums[1] < 0.f) asm volatile("nanosleep.u32 0;");
}
// Keeps the compiler from moving uses of registers over a wait that it does not know to be about them.
template <int N>
__device__ __forceinline__ void settle(float (&registers)[N]) {
  CU_UNROLL
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

#define WGMMA_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define WGMMA_R32                                                                                                                  \
  WGMMA_R8(0, 1, 2, 3, 4, 5, 6, 7)                                                                                                 \
  "," WGMMA_R8(8, 9, 10, 11, 12, 13, 14, 15) "," WGMMA_R8(16, 17, 18, 19, 20, 21, 22, 23) "," WGMMA_R8(24, 25, 26, 27, 28, 29, 30, \
                                                                                                       31)
#define WGMMA_R36 WGMMA_R32 ",%32,%33,%34,%35"
#define WGMMA_R40 WGMMA_R32 "," WGMMA_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define WGMMA_R48 WGMMA_R40 "," WGMMA_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define WGMMA_R64 WGMMA_R48 "," WGMMA_R8(48, 49, 50, 51, 52, 53, 54, 55) "," WGMMA_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define WGMMA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D16(i) WGMMA_D4(i), WGMMA_D4(i + 4), WGMMA_D4(i + 8), WGMMA_D4(i + 12)
#define WGMMA_D32 WGMMA_D16(0), WGMMA_D16(16)
#define WGMMA_D36 WGMMA_D32, WGMMA_D4(32)
#define WGMMA_D40 WGMMA_D36, WGMMA_D4(36)
#define WGMMA_D48 WGMMA_D32, WGMMA_D16(32)
#define WGMMA_D64 WGMMA_D48, WGMMA_D16(48)
// COUNT registers of the result, and the numbers of the operands that follow them.
#define WGMMA(N, COUNT, A0, A1, A2, A3, B, ACCUMULATE, TRANSPOSE)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
               "k16.f32.bf16.bf16 {" WGMMA_R##COUNT "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TRANSPOSE \
                                                    ";\n}"                                                                     \
               : WGMMA_D##COUNT                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"((int)TRANS_B))

// d = a b, or d += a b: a [64, 16] in registers, b [16, N] where the descriptor says, K-major or (TRANS_B) N-major; d [64, N]. Warp
// w of the warpgroup has rows 16 w .. 16 w + 16 of a and d, laid out as for mma.m16n8k16. Neither d nor a may be touched before a
// wait.
template <int N, bool TRANS_B>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  if constexpr (N == 64) WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (N == 72) WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42);
  if constexpr (N == 80) WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46);
  if constexpr (N == 96) WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54);
  if constexpr (N == 128) WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70);
  static_assert(N == 64 || N == 72 || N == 80 || N == 96 || N == 128, "a shape without a wrapper");
}

// What this thread wrote to shared memory before, copies that it waited for included, is there for wgmma of whoever it synchronises
// with after.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of 8 bytes in shared memory that completes a phase with every `count` arrivals.
__device__ __forceinline__ void mbarrier_init(smem_t barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(smem_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity is complete; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(smem_t barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Barriers 1 to 15 of some of the block's threads: `threads` of them, those that wait and those that only arrive.
__device__ __forceinline__ void barrier_sync(unsigned barrier, unsigned threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier, unsigned threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace ptx

#endif
