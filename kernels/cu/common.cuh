// What every kernel shares: element types, the only inline PTX, and reductions.
//
// Headers of CUDA are not used, so that NVRTC needs nothing but this file. Each wrapper around an instruction has a second body
// for the host (CUEMU, see host/cuemu.h), with which the same .cu files run and are tested without a card.
//
// A kernel starts while those ahead of it still run, from compute capability 9.0 on (CUDA programming guide, "Programmatic
// Dependent Launch and Synchronization"), which hides its launch and lets its weights arrive meanwhile. So every kernel
//   - calls ptx::launch_dependents() first, which only says that blocks of the next one may take what room is left;
//   - has every thread call ptx::wait_for_earlier_kernels() before it reads or writes anything but weights, which no kernel writes.
//     Without exception: the next kernel waits for the end of this one only, and takes it for the end of all before;
//   - has no pointer that is __restrict__. What a kernel only reads through such pointers is taken to be constant while it runs, so
//     that the compiler may load it before the wait (NVIDIA/cccl#11463) or as ld.global.nc, which sees no later writes.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

// bfloat16 as stored; arithmetic is done in float.
struct bf16 {
  u16 bits;
};
// Two of them, as tensor cores take them: the one with the lower index in the lower half.
using bf16x2 = u32;

#if defined(CUEMU)

#define CU_UNROLL
// The kernel's dynamic shared memory as an array of T. Poisoned with NaN on the host.
#define CU_SHARED(T, name) T* name = reinterpret_cast<T*>(::cuemu::blk()->dyn)

#else

#define CU_UNROLL _Pragma("unroll")
#define CU_SHARED(T, name)                                      \
  extern __shared__ __align__(1024) unsigned char cu_shared_[]; \
  T* name = reinterpret_cast<T*>(cu_shared_)
// Makes a kernel known to the host by its name.
#define CU_EXPORT(kernel)
#define INFINITY __int_as_float(0x7f800000)

#endif

namespace ptx {

#if defined(CUEMU)

using smem_t = uintptr_t;  // an address in shared memory; 32 bits on a card, so keep arithmetic in this type

static inline smem_t smem(const void* p) { return (smem_t)p; }

namespace host {
static inline void check(smem_t address, unsigned bytes, const char* what) {
  cuemu::Block* block = cuemu::blk();
  auto first = (uintptr_t)block->dyn;
  if (address % bytes) cuemu::die(what);
  if (address < first || address + bytes > first + block->dyn_n) cuemu::die("shared address outside of the dynamic window");
}

struct Ldmatrix {
  unsigned* r;
  smem_t row;
};

template <int N, bool TRANS>
static inline void ldmatrix(unsigned* r, smem_t row) {
  Ldmatrix mine{r, row};
  cuemu::warp_op(~0u, mine, TRANS ? "ldmatrix.trans" : "ldmatrix", [](Ldmatrix** lanes) {
    for (int m = 0; m < N; m++) {
      u16 t[8][8];
      for (int i = 0; i < 8; i++) {
        check(lanes[m * 8 + i]->row, 16, "ldmatrix: row address is not 16-byte aligned");
        memcpy(t[i], (void*)lanes[m * 8 + i]->row, 16);
      }
      for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = (l & 3) * 2;
        lanes[l]->r[m] = TRANS ? t[q][g] | (u32)t[q + 1][g] << 16 : t[g][q] | (u32)t[g][q + 1] << 16;
      }
    }
  });
}

struct Mma {
  float* d;
  const unsigned *a, *b;
};

static inline float widen(u32 half) { return __int_as_float((int)(half << 16)); }

static inline u16 narrow(float f) {
  const u32 bits = (u32)__float_as_int(f);
  if (f != f) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace host

static inline float to_float(bf16 x) { return host::widen(x.bits); }
static inline bf16 to_bf16(float x) { return bf16{host::narrow(x)}; }
static inline bf16x2 pack(float low, float high) { return host::narrow(low) | (u32)host::narrow(high) << 16; }

static inline void ldmatrix_x4(unsigned (&r)[4], smem_t row) { host::ldmatrix<4, false>(r, row); }
static inline void ldmatrix_x2(unsigned (&r)[2], smem_t row) { host::ldmatrix<2, false>(r, row); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], smem_t row) { host::ldmatrix<4, true>(r, row); }
static inline void ldmatrix_x2_trans(unsigned (&r)[2], smem_t row) { host::ldmatrix<2, true>(r, row); }

static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  unsigned b[2] = {b0, b1};
  host::Mma mine{c, a, b};
  cuemu::warp_op(~0u, mine, "mma.m16n8k16.bf16", [](host::Mma** lanes) {
    alignas(32) float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, q = (l & 3) * 2;
      for (int i = 0; i < 4; i++) {
        int row = g + (i & 1) * 8, k = q + (i >> 1) * 8;
        A[row][k] = host::widen(lanes[l]->a[i] & 0xffff);
        A[row][k + 1] = host::widen(lanes[l]->a[i] >> 16);
      }
      for (int i = 0; i < 2; i++) {
        B[q + i * 8][g] = host::widen(lanes[l]->b[i] & 0xffff);
        B[q + i * 8 + 1][g] = host::widen(lanes[l]->b[i] >> 16);
      }
      for (int i = 0; i < 4; i++) C[g + (i >> 1) * 8][q + (i & 1)] = lanes[l]->d[i];
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, q = (l & 3) * 2;
      for (int i = 0; i < 4; i++) lanes[l]->d[i] = C[g + (i >> 1) * 8][q + (i & 1)];
    }
  });
}

static inline void mma_bf16_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b0) {
  const unsigned a[4] = {a0, a1, 0, 0};
  mma_bf16(c, a, b0, 0);
}

// The copy takes its place at once and lands only at the wait: who forgets to wait reads poison, and so does who still needs what
// was there.
static inline void cp_async16(smem_t dst, const void* src, bool valid = true) {
  host::check(dst, 16, "cp.async: destination is not 16-byte aligned");
  if (valid && (uintptr_t)src % 16) cuemu::die("cp.async: source is not 16-byte aligned");
  memset((void*)dst, 0xff, 16);
  cuemu::self().open.push_back({(void*)dst, src, 16, valid ? 0u : 1u});
}
static inline void cp_async_commit() {
  auto& fiber = cuemu::self();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N>
static inline void cp_async_wait() {
  auto& groups = cuemu::self().groups;
  while (groups.size() > (size_t)N) {
    for (auto& copy : groups.front()) {
      if (copy.fill)
        memset(copy.dst, 0, 16);
      else
        memcpy(copy.dst, copy.src, 16);
      const size_t granule = ((char*)copy.dst - cuemu::blk()->dyn) / 16;
      cuemu::blk()->unfenced[granule] = cuemu::self().tid + 1;
      cuemu::self().landed.push_back(granule);
    }
    groups.erase(groups.begin());
  }
}

static inline uint4 load_stream(const uint4* p) {
  if ((uintptr_t)p % 16) cuemu::die("16-byte load is not aligned");
  return *p;
}
static inline bf16x2 mul_bf16x2(bf16x2 a, bf16x2 b) {
  return pack(host::widen(a & 0xffff) * host::widen(b & 0xffff), host::widen(a >> 16) * host::widen(b >> 16));
}
static inline float exp2(float x) { return exp2f(x); }
static inline unsigned thread() { return threadIdx.x; }
// The driver's stand-in starts blocks of the kernels behind this one whether or not they are asked to start.
static inline void launch_dependents() {}
static inline void wait_for_earlier_kernels() { cuemu::wait_for_earlier_kernels(); }

#else

using smem_t = u32;

__device__ __forceinline__ smem_t smem(const void* p) { return (smem_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float((int)((u32)x.bits << 16)); }
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ __forceinline__ bf16x2 pack(float low, float high) {
  bf16x2 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], smem_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], smem_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], smem_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], smem_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}

// c += a b, with a [16, 16] row-major, b [16, 8] column-major and c [16, 8].
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Likewise with a [16, 8] and b [8, 8]: for what is left of a length that is not a multiple of 16.
__device__ __forceinline__ void mma_bf16_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

// Copies 16 bytes into shared memory without waiting; zeros if not valid.
__device__ __forceinline__ void cp_async16(smem_t dst, const void* src, bool valid = true) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16 bytes that are read once: they leave no trace in the first-level cache. Not ld.global.nc, which ptxas moves behind
// griddepcontrol.wait.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// The products of the halves, each rounded to nearest once: the product of two bf16 is exact before that, and -0 adds nothing.
__device__ __forceinline__ bf16x2 mul_bf16x2(bf16x2 a, bf16x2 b) {
  bf16x2 y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// threadIdx.x, asked anew each time: what is derived from it takes no register between its uses.
__device__ __forceinline__ unsigned thread() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
// Lets the next kernel of the stream start once every block of this one is here (griddepcontrol, PTX ISA 7.8).
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the kernels ahead have ended and what they wrote is there.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

}  // namespace ptx

using ptx::pack;
using ptx::to_bf16;
using ptx::to_float;

__device__ __forceinline__ float low(bf16x2 x) { return __int_as_float((int)(x << 16)); }
__device__ __forceinline__ float high(bf16x2 x) { return __int_as_float((int)(x & 0xffff0000u)); }

// The lower halves of two words, and the upper ones.
__device__ __forceinline__ bf16x2 low_halves(bf16x2 a, bf16x2 b) { return (a & 0xffffu) | b << 16; }
__device__ __forceinline__ bf16x2 high_halves(bf16x2 a, bf16x2 b) { return a >> 16 | (b & 0xffff0000u); }

// Sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// Sum over the block, in every thread. `scratch` has a float for each warp; the caller synchronises before its next use.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < warps ? scratch[lane] : 0.f;
  return warp_sum(v);
}
