// Linear layers of few rows, x [n, k] and W bf16, bias [m] bf16 or none, out [n, m] bf16 or float:
//   gemv    out = epilogue(x W^T + bias), W [m, k]
//   normed  out = epilogue(rms_norm(x) W^T + bias), W [m, k]
//   gated   out = silu(rms_norm(x) G^T) * (rms_norm(x) U^T), W = [G; U] [2 m, k]; Shazeer 2020 (SwiGLU)
// with rms_norm(x) = x / sqrt(mean(x^2) + eps) * norm, norm [k] bf16; Zhang and Sennrich 2019. Decode is these: all of W, 2 bytes
// an element, must be read for 2 n FLOPs an element, so that memory is the bound and W's path is all that counts.
//
// A block has 16 rows of W, and its 8 warps share k: batch i of 64 elements is that of warp i % 8. Tensor cores multiply 16 rows of
// W by up to 8 of x (mma m16n8k16), which costs no conversions and next to no issue slots, whatever n is. Since a sum does not care
// how its terms are numbered, lane (g, q) of a warp owns 8 consecutive elements of k of rows g and g + 8 of W and of row g of x:
// one load of 16 bytes each, straight into the registers that mma takes. Nothing passes through shared memory, as no warp needs
// what another has, but the sums of the warps at the end. DEPTH batches are under way: 2 KiB of W a warp each, 16 warps an SM, so
// 64 KiB an SM or more, where 3.35 TB/s at 0.8 us of latency need 20 KiB. The first of them do not wait for the kernels ahead.
//
// The norm takes no pass of its own: x is multiplied by `norm` on its way into mma (the product is rounded to bf16, as a normalised
// x would be), the block sees all of k and so adds up x^2, and the square root divides the sums at the end. The gate takes no pass
// either: the 16 rows of W are 8 of G and the same 8 of U, and meet where the warps' sums do, in f32.
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

enum Kind { GEMV, NORMED, GATED };
enum Epilogue { STORE = 0, ACCUMULATE = 1, GELU_TANH = 2 };

// Shapes: see above. A gated product has neither bias nor epilogue.
struct Product {
  const bf16 *x, *weight, *bias, *norm;
  void* out;
  int n, m, k;
  float eps;
  int epilogue, out_is_float;
};

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

__device__ __forceinline__ uint4 multiply(uint4 a, uint4 b) {
  return uint4{ptx::mul_bf16x2(a.x, b.x), ptx::mul_bf16x2(a.y, b.y), ptx::mul_bf16x2(a.z, b.z), ptx::mul_bf16x2(a.w, b.w)};
}

// sum + the squares of all 8, in their order.
__device__ __forceinline__ float add_squares(float sum, uint4 octet) {
  const bf16x2 pairs[4] = {octet.x, octet.y, octet.z, octet.w};
  CU_UNROLL
  for (int j = 0; j < 4; j++) {
    sum += low(pairs[j]) * low(pairs[j]);
    sum += high(pairs[j]) * high(pairs[j]);
  }
  return sum;
}

// A lane's part of a batch: rows g and g + 8 of W, the norm's weights, and row g of each 8 rows of x.
template <int X_TILES>
struct Batch {
  uint4 w[STEPS][2];
  uint4 norm[STEPS];
  uint4 x[STEPS][X_TILES];
};

// x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), Hendrycks and Gimpel 2016, as x / (1 + exp(-2 u)).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.f + __expf(-2.f * u));
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// Rows 8 X_TILES blockIdx.y and on of x; columns 16 blockIdx.x and on of out, 8 blockIdx.x if it is gated. ALIGNED: k is a multiple
// of 8.
template <Kind KIND, int X_TILES, int DEPTH, bool ALIGNED>
__device__ __forceinline__ void multiply(const Product& p) {
  ptx::launch_dependents();
  constexpr int COLUMNS = KIND == GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS, X_ROWS = 8 * X_TILES;
  CU_SHARED(float, sums);                               // [WARPS, X_ROWS, SUM_STRIDE]
  float* squares = sums + WARPS * X_ROWS * SUM_STRIDE;  // [WARPS, X_ROWS]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int first_column = blockIdx.x * COLUMNS, first_x = blockIdx.y * X_ROWS;

  // Where this lane's part of the warp's next batch begins in each of its rows. Rows of W beyond the last are read as the last, and
  // not stored; those of x are zeros.
  int position = warp * BATCH + q * 8;
  const bf16* w_next[2];
  CU_UNROLL
  for (int i = 0; i < 2; i++) {
    const size_t row = KIND == GATED ? (size_t)i * p.m + min(first_column + g, p.m - 1) : min(first_column + g + 8 * i, p.m - 1);
    w_next[i] = p.weight + row * p.k + position;
  }
  const bf16* x_next[X_TILES];
  bool has_x[X_TILES];
  CU_UNROLL
  for (int t = 0; t < X_TILES; t++) {
    has_x[t] = first_x + 8 * t + g < p.n;
    x_next[t] = p.x + (size_t)(first_x + 8 * t + g) * p.k + position;
  }

  // Loads the warp's d-th batch from here: first what no kernel writes, then what one may just have written.
  auto load_weights = [&](Batch<X_TILES>& b, int d, bool is_whole) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const int offset = d * WARPS * BATCH + s * 32, left = is_whole ? 8 : p.k - position - offset;
      CU_UNROLL
      for (int i = 0; i < 2; i++) b.w[s][i] = load_octet<ALIGNED>(w_next[i] + offset, left, true);
      if constexpr (KIND != GEMV) b.norm[s] = load_octet<ALIGNED>(p.norm + position + offset, left, false);
    }
  };
  auto load_x = [&](Batch<X_TILES>& b, int d, bool is_whole) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const int offset = d * WARPS * BATCH + s * 32, left = is_whole ? 8 : p.k - position - offset;
      CU_UNROLL
      for (int t = 0; t < X_TILES; t++) b.x[s][t] = load_octet<ALIGNED>(x_next[t] + offset, has_x[t] ? left : 0, false);
    }
  };

  float sum[X_TILES][4] = {}, square[X_TILES] = {};
  auto multiply_batch = [&](const Batch<X_TILES>& b) {
    CU_UNROLL
    for (int s = 0; s < STEPS; s++) {
      const uint4 upper = b.w[s][0], lower = b.w[s][1];
      CU_UNROLL
      for (int t = 0; t < X_TILES; t++) {
        uint4 x = b.x[s][t];
        if constexpr (KIND != GEMV) {
          square[t] = add_squares(square[t], x);
          x = multiply(x, b.norm[s]);
        }
        ptx::mma_bf16(sum[t], {upper.x, lower.x, upper.y, lower.y}, x.x, x.y);
        ptx::mma_bf16(sum[t], {upper.z, lower.z, upper.w, lower.w}, x.z, x.w);
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
      multiply_batch(stage[d]);
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
  while (position - q * 8 + ahead <= p.k) turn(true);
  while (position - q * 8 < p.k) turn(false);

  // sum[t][0..1] belong to row g of W and rows 2 q and 2 q + 1 of x, sum[t][2..3] to row g + 8 of W; square[t] to row g of x.
  CU_UNROLL
  for (int t = 0; t < X_TILES; t++) {
    float* mine = sums + (warp * X_ROWS + 8 * t + 2 * q) * SUM_STRIDE + g;
    CU_UNROLL
    for (int j = 0; j < 4; j++) mine[(j & 1) * SUM_STRIDE + (j >> 1) * 8] = sum[t][j];
    if constexpr (KIND != GEMV) {
      square[t] += __shfl_xor_sync(0xffffffffu, square[t], 1);
      square[t] += __shfl_xor_sync(0xffffffffu, square[t], 2);
      if (q == 0) squares[warp * X_ROWS + 8 * t + g] = square[t];
    }
  }
  __syncthreads();
  const int local = threadIdx.x % COLUMNS, column = first_column + local, x_index = threadIdx.x / COLUMNS;
  if (x_index >= X_ROWS || first_x + x_index >= p.n || column >= p.m) return;
  float scale = 1.f;
  if constexpr (KIND != GEMV) {
    float mean = 0.f;
    CU_UNROLL
    for (int i = 0; i < WARPS; i++) mean += squares[i * X_ROWS + x_index];
    scale = rsqrtf(mean / p.k + p.eps);
  }
  auto total = [&](int weight_row) {
    float y = 0.f;
    CU_UNROLL
    for (int i = 0; i < WARPS; i++) y += sums[(i * X_ROWS + x_index) * SUM_STRIDE + weight_row];
    return y * scale;
  };
  const size_t at = (size_t)(first_x + x_index) * p.m + column;
  float y = total(local);
  if constexpr (KIND == GATED) {
    y = silu(y) * total(COLUMNS + local);
  } else {
    if (p.bias) y += to_float(p.bias[column]);
    if (p.epilogue == ACCUMULATE) y += p.out_is_float ? static_cast<float*>(p.out)[at] : to_float(static_cast<bf16*>(p.out)[at]);
    if (p.epilogue == GELU_TANH) y = gelu_tanh(y);
  }
  if (p.out_is_float)
    static_cast<float*>(p.out)[at] = y;
  else
    static_cast<bf16*>(p.out)[at] = to_bf16(y);
}

}  // namespace linear

#define LINEAR(NAME, KIND, X_TILES, DEPTH, ALIGNED)                                                                              \
  extern "C" __global__ void __launch_bounds__(linear::WARPS * 32, 2)                                                            \
      NAME(const bf16* x, const bf16* weight, const bf16* bias, const bf16* norm, void* out, int n, int m, int k, float eps,     \
           int epilogue, int out_is_float) {                                                                                     \
    linear::multiply<linear::KIND, X_TILES, DEPTH, ALIGNED>({x, weight, bias, norm, out, n, m, k, eps, epilogue, out_is_float}); \
  }                                                                                                                              \
  CU_EXPORT(NAME)
LINEAR(gemv_8, GEMV, 1, 4, true)
LINEAR(gemv_16, GEMV, 2, 3, true)
LINEAR(gemv_unaligned, GEMV, 2, 1, false)
LINEAR(normed_8, NORMED, 1, 3, true)
LINEAR(normed_16, NORMED, 2, 2, true)
LINEAR(normed_unaligned, NORMED, 2, 1, false)
LINEAR(gated_8, GATED, 1, 3, true)
LINEAR(gated_16, GATED, 2, 2, true)
LINEAR(gated_unaligned, GATED, 2, 1, false)
