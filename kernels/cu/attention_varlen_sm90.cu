// Bidirectional attention over packed sequences for compute capability 9.0: attention_varlen.cu with the products of warpgroups.
// FlashAttention-3 (Shah et al. 2024): see flash_sm90.cuh.
#include "common.cuh"
#include "flash.cuh"
#include "flash_sm90.cuh"

// Tensors and work are those of attention_varlen.cu, for `heads` key heads. Blocks: for each tile of entries that there may be,
// `wave` more for what is split (flash::sm90::find_work), and ZEROING_BLOCKS; those without work leave at once.
namespace varlen_sm90 {

// Three warpgroups where their registers suffice.
template <int D>
using Head = flash::sm90::Head<D, D <= 80 ? 3 : 2>;

// The last blocks set rows of no sequence to zero. Few: as a rule there are none, or the last of a batch.
constexpr int ZEROING_BLOCKS = 8;

// Keys and values in consecutive rows.
template <int D>
struct PackedKeys {
  using Copier = flash::sm90::Copier<Head<D>>;
  const unsigned char *k, *v;        // this thread's first piece in row 0
  unsigned k_stride, v_stride, len;  // strides in bytes
  Copier copier;

  __device__ __forceinline__ PackedKeys(const bf16* k, const bf16* v, int k_stride, int v_stride, int len)
      : k(reinterpret_cast<const unsigned char*>(k + Copier::quarter() * 8)),
        v(reinterpret_cast<const unsigned char*>(v + Copier::quarter() * 8)),
        k_stride(2u * k_stride),
        v_stride(2u * v_stride),
        len(len) {}
  __device__ __forceinline__ void copy(int tile, ptx::smem_t stage) {
    const unsigned key = tile * Head<D>::KEYS + Copier::row();
    const bool valid = key < len;
    const size_t from = valid ? key : 0;
    copier.copy(stage, reinterpret_cast<const bf16*>(k + from * k_stride), reinterpret_cast<const bf16*>(v + from * v_stride),
                valid);
  }
};

template <int D>
__device__ __forceinline__ void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int* cu_seqlens_q,
                                          const int* cu_seqlens_k, float* partials, int* arrived, int wave, int sequences,
                                          int rows_q, int rows_k, int heads, int q_stride, int k_stride, int v_stride, int group,
                                          float scale) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  using H = Head<D>;
  CU_SHARED(flash::sm90::Header, header);
  const int out_stride = heads * group * D, zeroing = blockIdx.x - (gridDim.x - ZEROING_BLOCKS);
  if (zeroing >= 0) {
    flash::zero_rest(out, cu_seqlens_q, sequences, rows_q, out_stride, zeroing, ZEROING_BLOCKS);
    return;
  }
  const auto tiles = [&](int i) { return (flash::span(cu_seqlens_q, i, rows_q).len * group + H::ROWS - 1) / H::ROWS; };
  const flash::sm90::Work work = flash::sm90::find_work(tiles, sequences, heads, blockIdx.x, wave);
  if (work.sequence < 0) return;
  const flash::Span queries = flash::span(cu_seqlens_q, work.sequence, rows_q);
  const flash::Span keys = flash::span(cu_seqlens_k, work.sequence, rows_k);
  const int head = work.place / work.tiles;
  const flash::Entries entries{work.place % work.tiles * H::ROWS, queries.len * group, group};
  flash::Visible visible{0, keys.len, 0, keys.len};
  const int splits = visible.take_share(H::KEYS, flash::MIN_TILES, work.split, work.splits);
  if (work.split >= splits) return;

  header->tile = {queries.start, entries.first, entries.count, work.slot, work.split, splits};
  header->head = head;
  flash::sm90::Accumulator<H> result;
  if (keys.len > 0) {
    flash::sm90::load_queries<H>(flash::sm90::queries_at<H>(*header),
                                 q + (size_t)queries.start * q_stride + (size_t)head * group * D, q_stride, entries);
    const size_t column = (size_t)head * D;
    PackedKeys<D> source(k + (size_t)keys.start * k_stride + column, v + (size_t)keys.start * v_stride + column, k_stride, v_stride,
                         keys.len);
    const auto sees = [&](int) { return make_int2(0, keys.len); };
    flash::sm90::attend(result, *header, source, visible, sees, scale);
  }
  if (!flash::sm90::join(result, partials, arrived, header->tile)) return;
  const flash::Tile& end = header->tile;
  result.store(out + (size_t)end.row * out_stride + (size_t)header->head * group * D, out_stride, {end.first, end.count, group});
}

}  // namespace varlen_sm90

#define ATTENTION_VARLEN_SM90(D)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(varlen_sm90::Head<D>::THREADS, 1)                                                   \
      attention_varlen_sm90_##D(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int* cu_seqlens_q,                   \
                                const int* cu_seqlens_k, float* partials, int* arrived, int wave, int sequences, int rows_q,       \
                                int rows_k, int heads, int q_stride, int k_stride, int v_stride, int group, float scale) {         \
    varlen_sm90::attention<D>(q, k, v, out, cu_seqlens_q, cu_seqlens_k, partials, arrived, wave, sequences, rows_q, rows_k, heads, \
                              q_stride, k_stride, v_stride, group, scale);                                                         \
  }                                                                                                                                \
  CU_EXPORT(attention_varlen_sm90_##D)

ATTENTION_VARLEN_SM90(64)
ATTENTION_VARLEN_SM90(72)
ATTENTION_VARLEN_SM90(80)
ATTENTION_VARLEN_SM90(96)
ATTENTION_VARLEN_SM90(128)
