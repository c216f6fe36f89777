// Copies of rows and functions of single elements. All of them move bytes: their time is bytes over memory bandwidth.
#include "common.cuh"

// Rows by index: out[i] = src[rows[i]] (gather) or out[rows[i]] = src[i] (scatter), rows of `row_bytes` bytes that are a multiple
// of sizeof(T). A block per row; threads stride over it. An index outside of [0, limit) gives zeros, or writes nothing.
template <typename T>
__device__ __forceinline__ void gather(const T* src, const int* rows, T* out, int row_bytes, int limit) {
  const size_t words = row_bytes / sizeof(T);
  const int row = rows[blockIdx.x];
  const bool valid = row >= 0 && row < limit;
  for (size_t i = threadIdx.x; i < words; i += blockDim.x) out[blockIdx.x * words + i] = valid ? src[row * words + i] : T{};
}

template <typename T>
__device__ __forceinline__ void scatter(const T* src, const int* rows, T* out, int row_bytes, int limit) {
  const size_t words = row_bytes / sizeof(T);
  const int row = rows[blockIdx.x];
  if (row < 0 || row >= limit) return;
  for (size_t i = threadIdx.x; i < words; i += blockDim.x) out[row * words + i] = src[blockIdx.x * words + i];
}

#define ROWS(BYTES, T)                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      gather_rows_##BYTES(const T* src, const int* rows, T* out, int row_bytes, int limit) {  \
    ptx::launch_dependents();                                                                 \
    ptx::wait_for_earlier_kernels();                                                          \
    gather(src, rows, out, row_bytes, limit);                                                 \
  }                                                                                           \
  CU_EXPORT(gather_rows_##BYTES)                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      scatter_rows_##BYTES(const T* src, const int* rows, T* out, int row_bytes, int limit) { \
    ptx::launch_dependents();                                                                 \
    ptx::wait_for_earlier_kernels();                                                          \
    scatter(src, rows, out, row_bytes, limit);                                                \
  }                                                                                           \
  CU_EXPORT(scatter_rows_##BYTES)
ROWS(16, uint4)
ROWS(4, u32)
ROWS(2, u16)
ROWS(1, u8)

// Pictures into patches, rescaled and normalised: out[p, (c * size + y) * size + x] = table[c, v], where v is channel c of pixel
// origins[p] + y * widths[p] + x. pixels [num_pixels, channels]; indices beyond them read the last one. A thread per element; pixels and
// the table, 256 floats a channel, stay in the first-level cache. Moves 3 bytes an element.
extern "C" __global__ void __launch_bounds__(256)
    patchify(const u8* pixels, const int* origins, const int* widths, const float* table, bf16* out, int num_pixels, int patches,
             int channels, int size) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  const int area = size * size, cols = channels * area;
  const size_t n = (size_t)patches * cols;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    const int patch = (int)(i / cols), j = (int)(i % cols), channel = j / area, y = j % area / size, x = j % size;
    // Unsigned, so that a negative one is beyond them too.
    const unsigned pixel = min((unsigned)origins[patch] + (unsigned)y * (unsigned)widths[patch] + (unsigned)x, (unsigned)num_pixels - 1);
    out[i] = to_bf16(table[channel * 256 + pixels[(size_t)pixel * channels + channel]]);
  }
}
CU_EXPORT(patchify)

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// out[t, j] = silu(x[t, j]) * x[t, n + j]; Shazeer 2020. x [rows, 2 n], out [rows, n]. A thread per 8 elements where n allows.
extern "C" __global__ void __launch_bounds__(256) silu_and_mul(const bf16* x, bf16* out, int rows, int n) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  const size_t first = blockIdx.x * (size_t)blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x;
  if (n % 8 == 0) {
    const size_t chunks = n / 8;
    for (size_t i = first; i < rows * chunks; i += step) {
      const size_t row = i / chunks, chunk = i % chunks;
      const uint4 gate = reinterpret_cast<const uint4*>(x)[row * 2 * chunks + chunk];
      const uint4 up = reinterpret_cast<const uint4*>(x)[row * 2 * chunks + chunks + chunk];
      uint4 y;
      y.x = pack(silu(low(gate.x)) * low(up.x), silu(high(gate.x)) * high(up.x));
      y.y = pack(silu(low(gate.y)) * low(up.y), silu(high(gate.y)) * high(up.y));
      y.z = pack(silu(low(gate.z)) * low(up.z), silu(high(gate.z)) * high(up.z));
      y.w = pack(silu(low(gate.w)) * low(up.w), silu(high(gate.w)) * high(up.w));
      reinterpret_cast<uint4*>(out)[i] = y;
    }
    return;
  }
  for (size_t i = first; i < (size_t)rows * n; i += step) {
    const size_t row = i / n, j = i % n;
    out[i] = to_bf16(silu(to_float(x[row * 2 * n + j])) * to_float(x[row * 2 * n + n + j]));
  }
}
CU_EXPORT(silu_and_mul)
