// Bidirectional attention over packed sequences: out = softmax(q k^T / sqrt(head_dim)) v, each sequence and head by itself.
// FlashAttention-2 (Dao 2023): see flash.cuh.
#include "common.cuh"
#include "flash.cuh"

// q [rows_q, ..], k and v [rows_k, ..]: heads of D columns from the pointers on, rows strides apart, all in multiples of 8
// elements. Query head h uses key head h / group. Sequence i has rows cu_seqlens[i] .. cu_seqlens[i + 1]; out [rows_q, heads D].
//
// Blocks: (tiles of the longest sequence's entries x splits of the keys, key heads, sequences + 1); those past a sequence's end
// leave at once, the last z sets rows of no sequence to zero. Does 4 len_q len_k D heads FLOPs and len_q len_k heads exponentials;
// keys and values come from the L2 cache but for their first use. At D = 72 the last 8 of a dot product have an instruction of half
// the length: nothing is padded.
namespace varlen {

// Keys and values in consecutive rows.
template <int D>
struct PackedKeys {
  using H = flash::Head<D>;
  const unsigned char *k, *v;        // the chunk that this thread copies, in row 0
  unsigned k_stride, v_stride, len;  // strides in bytes

  __device__ __forceinline__ PackedKeys(const bf16* k, const bf16* v, int k_stride, int v_stride, int len)
      : k(reinterpret_cast<const unsigned char*>(k) + threadIdx.x % H::CHUNKS * 16),
        v(reinterpret_cast<const unsigned char*>(v) + threadIdx.x % H::CHUNKS * 16),
        k_stride(2u * k_stride),
        v_stride(2u * v_stride),
        len(len) {}
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ void copy(int tile, ptx::smem_t stage) {
    constexpr int PASSES = (H::KEYS + H::PASS - 1) / H::PASS;
    const unsigned thread = ptx::thread(), row = thread / H::CHUNKS;
    if (row >= H::PASS) return;
    const ptx::smem_t to = stage + row * H::PITCH + thread % H::CHUNKS * 16;
    CU_UNROLL
    for (int i = 0; i < PASSES; i++) {
      if (i == PASSES - 1 && row + i * H::PASS >= H::KEYS) break;
      const unsigned key = tile * H::KEYS + row + i * H::PASS;
      const bool valid = key < len;
      const size_t from = valid ? key : 0;
      ptx::cp_async16(to + i * H::PASS * H::PITCH, k + from * k_stride, valid);
      ptx::cp_async16(to + (H::KEYS + i * H::PASS) * H::PITCH, v + from * v_stride, valid);
    }
  }
};

template <int D>
__device__ __forceinline__ void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int* cu_seqlens_q,
                                          const int* cu_seqlens_k, const flash::Meeting& meeting, int rows_q, int rows_k,
                                          int q_stride, int k_stride, int v_stride, int group, float scale) {
  CU_SHARED(unsigned char, bytes);
  const int sequence = blockIdx.z, head = blockIdx.y, out_stride = gridDim.y * group * D;
  if (sequence + 1 == (int)gridDim.z) {
    flash::zero_rest(out, cu_seqlens_q, sequence, rows_q, out_stride);
    return;
  }
  const int tile = blockIdx.x / meeting.count, split = blockIdx.x % meeting.count;
  const flash::Span queries = flash::span(cu_seqlens_q, sequence, rows_q), keys = flash::span(cu_seqlens_k, sequence, rows_k);
  const flash::Entries entries{tile * flash::ROWS, queries.len * group, group};
  flash::Visible visible{0, keys.len, 0, keys.len};
  const int splits = visible.take_share(flash::Head<D>::KEYS, flash::MIN_TILES, split, meeting.count);
  if (entries.first >= entries.count || split >= splits) return;

  flash::Tile* end = reinterpret_cast<flash::Tile*>(bytes);
  const int index = (sequence * gridDim.y + head) * (gridDim.x / meeting.count) + tile;
  *end = {queries.start, entries.first, entries.count, index, split, splits};
  const size_t columns = (size_t)head * group * D;
  flash::Accumulator<D> result;
  if (keys.len > 0) {
    const ptx::smem_t shared = ptx::smem(end + 1);
    flash::load_queries<D>(flash::queries_at<D>(shared), q + (size_t)queries.start * q_stride + columns, q_stride, entries);
    PackedKeys<D> source(k + (size_t)keys.start * k_stride + (size_t)head * D, v + (size_t)keys.start * v_stride + (size_t)head * D,
                         k_stride, v_stride, keys.len);
    const auto sees = [&](int) { return make_int2(0, keys.len); };
    flash::attend(result, shared, source, visible, sees, scale);
  }
  if (!flash::join(result, meeting, *end)) return;
  result.store(out + (size_t)end->row * out_stride + columns, out_stride, {end->first, end->count, group});
}

}  // namespace varlen

#define ATTENTION_VARLEN(D)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(flash::THREADS, flash::Head<D>::BLOCKS) attention_varlen_##D(                     \
      const bf16* q, const bf16* k, const bf16* v, bf16* out, const int* cu_seqlens_q, const int* cu_seqlens_k, float* partials, \
      int* arrived, int splits, int rows_q, int rows_k, int q_stride, int k_stride, int v_stride, int group, float scale) {      \
    ptx::launch_dependents();                                                                                                    \
    ptx::wait_for_earlier_kernels();                                                                                             \
    varlen::attention<D>(q, k, v, out, cu_seqlens_q, cu_seqlens_k, {partials, arrived, splits}, rows_q, rows_k, q_stride,        \
                         k_stride, v_stride, group, scale);                                                                      \
  }                                                                                                                              \
  CU_EXPORT(attention_varlen_##D)

ATTENTION_VARLEN(64)
ATTENTION_VARLEN(72)
ATTENTION_VARLEN(80)
ATTENTION_VARLEN(96)
ATTENTION_VARLEN(128)
