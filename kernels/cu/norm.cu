// Normalisation of rows. A block per row; a row is read twice, the second time from cache: 4 bytes an element move.
#include "common.cuh"

// Calls f(index, value) for each element of a row, 8 at a time where `cols` and alignment allow.
template <typename F>
__device__ __forceinline__ void for_each(const bf16* row, int cols, F f) {
  if (cols % 8 == 0) {
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) {
      const uint4 v = reinterpret_cast<const uint4*>(row)[i];
      const bf16x2 pairs[4] = {v.x, v.y, v.z, v.w};
      CU_UNROLL
      for (int j = 0; j < 4; j++) {
        f(i * 8 + 2 * j, low(pairs[j]));
        f(i * 8 + 2 * j + 1, high(pairs[j]));
      }
    }
    return;
  }
  for (int i = threadIdx.x; i < cols; i += blockDim.x) f(i, to_float(row[i]));
}

// Stores f(index, value) for each element of a row, likewise.
template <typename F>
__device__ __forceinline__ void map(const bf16* row, bf16* out, int cols, F f) {
  if (cols % 8 == 0) {
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) {
      const uint4 v = reinterpret_cast<const uint4*>(row)[i];
      uint4 y;
      y.x = pack(f(i * 8, low(v.x)), f(i * 8 + 1, high(v.x)));
      y.y = pack(f(i * 8 + 2, low(v.y)), f(i * 8 + 3, high(v.y)));
      y.z = pack(f(i * 8 + 4, low(v.z)), f(i * 8 + 5, high(v.z)));
      y.w = pack(f(i * 8 + 6, low(v.w)), f(i * 8 + 7, high(v.w)));
      reinterpret_cast<uint4*>(out)[i] = y;
    }
    return;
  }
  for (int i = threadIdx.x; i < cols; i += blockDim.x) out[i] = to_bf16(f(i, to_float(row[i])));
}

// y = x / sqrt(mean(x^2) + eps) * weight; Zhang and Sennrich 2019. x and y [rows, cols].
extern "C" __global__ void __launch_bounds__(256) rms_norm(const bf16* x, const bf16* weight, bf16* y, int cols, float eps) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  CU_SHARED(float, scratch);
  const bf16* row = x + (size_t)blockIdx.x * cols;
  float squares = 0.f;
  for_each(row, cols, [&](int, float v) { squares += v * v; });
  const float scale = rsqrtf(block_sum(squares, scratch) / cols + eps);
  map(row, y + (size_t)blockIdx.x * cols, cols, [&](int i, float v) { return v * scale * to_float(weight[i]); });
}
CU_EXPORT(rms_norm)

// y = (x - mean) / sqrt(var + eps) * weight + bias; Ba et al. 2016. The variance is taken around the mean in a pass of its own:
// the difference of two large sums would cancel.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm(const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int cols, float eps) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  CU_SHARED(float, scratch);  // [2, 32]
  const bf16* row = x + (size_t)blockIdx.x * cols;
  float sum = 0.f;
  for_each(row, cols, [&](int, float v) { sum += v; });
  const float mean = block_sum(sum, scratch) / cols;
  float squares = 0.f;
  for_each(row, cols, [&](int, float v) { squares += (v - mean) * (v - mean); });
  const float scale = rsqrtf(block_sum(squares, scratch + 32) / cols + eps);
  map(row, y + (size_t)blockIdx.x * cols, cols,
      [&](int i, float v) { return (v - mean) * scale * to_float(weight[i]) + to_float(bias[i]); });
}
CU_EXPORT(layer_norm)
