// Linear layers of few rows: out = epilogue(x W^T + bias), x [n, k] and W [m, k] bf16, bias [m] bf16 or none, out [n, m] bf16 or
// float. Decode is this: all of W, 2 m k bytes, must be read for 2 n m k FLOPs, so that memory is the bound and W's path is all
// that counts.
//
// A block has 16 rows of W, and its 8 warps share k: batch i of 64 elements is that of warp i % 8. Tensor cores multiply 16 rows of
// W by up to 8 of x (mma m16n8k16), which costs no conversions and next to no issue slots, whatever n is. Since a sum does not care
// how its terms are numbered, lane (g, q) of a warp owns 8 consecutive elements of k of rows g and g + 8 of W and of row g of x:
// one load of 16 bytes each, straight into the registers that mma takes. Nothing passes through shared memory, as no warp needs
// what another has, but the sums of the warps at the end. DEPTH batches are under way: 2 KiB a warp each, 16 warps an SM. The first
// of them do not wait for the kernels ahead.
//
// A row's result depends neither on n nor on its place among the rows, and not on the card: k is split the same way always, and
// warps are added in their order.
#include "common.cuh"

namespace linear {

constexpr int WARPS = 8;
constexpr int WEIGHT_ROWS = 16;  // of a block
constexpr int STEPS = 2;         // of a batch: products over 32 elements of k each, 128 consecutive bytes of a row in all
constexpr int BATCH = 32 * STEPS;
constexpr int SUM_STRIDE = WEIGHT_ROWS + 4;  // floats; spreads what a warp stores over all banks

// The 8 elements at p, of which the first `left` are of the row; zeros for the others. `once` says that nobody reads them again.
template <bool ALIGNED>
__device__ __forceinline__ uint4 load_octet(const bf16* p, int left, bool once) {
  if (left <= 0) return uint4{0, 0, 0, 0};
  if constexpr (ALIGNED) {
    const uint4* octet = reinterpret_cast<const uint4*>(p);
    return once ? ptx::load_stream(octet) : *octet;
  } else {
    u32 pairs[4];
    CU_UNROLL
    for (int j = 0; j < 4; j++)
      pairs[j] = (2 * j < left ? p[2 * j].bits : 0u) | (2 * j + 1 < left ? (u32)p[2 * j + 1].bits : 0u) << 16;
    return uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// A lane's part of a batch: rows g and g + 8 of W, and row g of each 8 rows of x.
template <int X_TILES>
struct Batch {
  uint4 w[STEPS][2];
  uint4 x[STEPS][X_TILES];
};

// x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), Hendrycks and Gimpel 2016, as x / (1 + exp(-2 u)).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.f + __expf(-2.f * u));
}

enum Epilogue { STORE = 0, ACCUMULATE = 1, GELU_TANH = 2 };

// Rows 8 X_TILES blockIdx.y and on of x by rows 16 blockIdx.x and on of W. ALIGNED: k is a multiple of 8.
template <int X_TILES, int DEPTH, bool ALIGNED>
__device__ __forceinline__ void gemv(const bf16* x, const bf16* weight, const bf16* bias, void* out, int n, int m, int k,
                                     int epilogue, int out_is_float) {
  ptx::launch_dependents();
  CU_SHARED(float, sums);  // [WARPS, 8 X_TILES, SUM_STRIDE]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int first_row = blockIdx.x * WEIGHT_ROWS, first_x = blockIdx.y * 8 * X_TILES;

  // Where this lane's part of the warp's next batch begins in each of its rows. Rows of W beyond the last are read as the last, and
  // not stored; those of x are zeros.
  int position = warp * BATCH + q * 8;
  const bf16* w_next[2];
  CU_UNROLL
  for (int i = 0; i < 2; i++) w_next[i] = weight + (size_t)min(first_row + g + 8 * i, m - 1) * k + position;
  const bf16* x_next[X_TILES];
  bool has_x[X_TILES];
  CU_UNROLL
  for (int t = 0; t < X_TILES; t++) {
    has_x[t] = first_x + 8 * t + g < n;
    x_next[t] = x + (size_t)(first_x + 8 * t + g) * k + position;
  }

  // Loads the warp's d-th batch from here: first what no kernel writes, then what one may just have written.
  auto load_weights = [&](Batch<X_TILES>& b, int d, bool is_whole) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const int offset = d * WARPS * BATCH + s * 32, left = is_whole ? 8 : k - position - offset;
      CU_UNROLL
      for (int i = 0; i < 2; i++) b.w[s][i] = load_octet<ALIGNED>(w_next[i] + offset, left, true);
    }
  };
  auto load_x = [&](Batch<X_TILES>& b, int d, bool is_whole) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const int offset = d * WARPS * BATCH + s * 32, left = is_whole ? 8 : k - position - offset;
      CU_UNROLL
      for (int t = 0; t < X_TILES; t++) b.x[s][t] = load_octet<ALIGNED>(x_next[t] + offset, has_x[t] ? left : 0, false);
    }
  };

  float sum[X_TILES][4] = {};
  auto multiply = [&](const Batch<X_TILES>& b) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const uint4 upper = b.w[s][0], lower = b.w[s][1];
      CU_UNROLL
      for (int t = 0; t < X_TILES; t++) {
        ptx::mma_bf16(sum[t], {upper.x, lower.x, upper.y, lower.y}, b.x[s][t].x, b.x[s][t].y);
        ptx::mma_bf16(sum[t], {upper.z, lower.z, upper.w, lower.w}, b.x[s][t].z, b.x[s][t].w);
      }
    }
  };

  Batch<X_TILES> stage[DEPTH];
  CU_UNROLL
  for (int d = 0; d < DEPTH; d++) load_weights(stage[d], d, false);
  ptx::wait_for_earlier_kernels();
  CU_UNROLL
  for (int d = 0; d < DEPTH; d++) load_x(stage[d], d, false);
  auto turn = [&](bool is_whole) {
    CU_UNROLL
    for (int d = 0; d < DEPTH; d++) {
      multiply(stage[d]);
      load_weights(stage[d], d + DEPTH, is_whole);
      load_x(stage[d], d + DEPTH, is_whole);
    }
    constexpr int TURN = DEPTH * WARPS * BATCH;
    position += TURN;
    CU_UNROLL
    for (int i = 0; i < 2; i++) w_next[i] += TURN;
    CU_UNROLL
    for (int t = 0; t < X_TILES; t++) x_next[t] += TURN;
  };
  const int ahead = (2 * DEPTH - 1) * WARPS * BATCH + (STEPS - 1) * 32 + 32;  // how far a turn's loads reach
  while (position - q * 8 + ahead <= k) turn(true);
  while (position - q * 8 < k) turn(false);

  // sum[t][0..1] belong to row g of W and rows 2 q and 2 q + 1 of x, sum[t][2..3] to row g + 8 of W.
  CU_UNROLL
  for (int t = 0; t < X_TILES; t++) {
    float* mine = sums + (warp * 8 * X_TILES + 8 * t + 2 * q) * SUM_STRIDE + g;
    CU_UNROLL
    for (int j = 0; j < 4; j++) mine[(j & 1) * SUM_STRIDE + (j >> 1) * 8] = sum[t][j];
  }
  __syncthreads();
  const int row = first_row + threadIdx.x % WEIGHT_ROWS, x_index = threadIdx.x / WEIGHT_ROWS;
  if (x_index >= 8 * X_TILES || first_x + x_index >= n || row >= m) return;
  float y = 0.f;
  CU_UNROLL
  for (int i = 0; i < WARPS; i++) y += sums[(i * 8 * X_TILES + x_index) * SUM_STRIDE + threadIdx.x % WEIGHT_ROWS];
  if (bias) y += to_float(bias[row]);
  const size_t at = (size_t)(first_x + x_index) * m + row;
  if (epilogue == ACCUMULATE) y += out_is_float ? static_cast<float*>(out)[at] : to_float(static_cast<bf16*>(out)[at]);
  if (epilogue == GELU_TANH) y = gelu_tanh(y);
  if (out_is_float)
    static_cast<float*>(out)[at] = y;
  else
    static_cast<bf16*>(out)[at] = to_bf16(y);
}

}  // namespace linear

#define GEMV(NAME, X_TILES, DEPTH, ALIGNED)                                                                                       \
  extern "C" __global__ void __launch_bounds__(linear::WARPS * 32, 2)                                                             \
      NAME(const bf16* x, const bf16* weight, const bf16* bias, void* out, int n, int m, int k, int epilogue, int out_is_float) { \
    linear::gemv<X_TILES, DEPTH, ALIGNED>(x, weight, bias, out, n, m, k, epilogue, out_is_float);                                 \
  }                                                                                                                               \
  CU_EXPORT(NAME)
GEMV(gemv_8, 1, 4, true)
GEMV(gemv_16, 2, 3, true)
GEMV(gemv_unaligned, 2, 1, false)
