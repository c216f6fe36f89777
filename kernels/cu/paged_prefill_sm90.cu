// Causal attention of many new rows over the paged cache for compute capability 9.0: paged_prefill.cu with the products of
// warpgroups. FlashAttention-3 (Shah et al. 2024): see flash_sm90.cuh.
#include "common.cuh"
#include "flash.cuh"
#include "flash_sm90.cuh"

// Tensors and work are those of paged_prefill.cu, for `heads` key heads. Blocks: for each tile of entries that there may be, and
// `wave` more for what is split (flash::sm90::find_work); those without work leave at once.
namespace prefill_sm90 {

// Two warpgroups: with three, what finding rows of the cache takes would spill.
template <int D>
using Head = flash::sm90::Head<D, 2>;

// Keys and values in blocks of the cache. Rows are looked up a tile ahead.
template <int D>
struct PagedKeys {
  using H = Head<D>;
  using Copier = flash::sm90::Copier<H>;
  const bf16 *k, *v;  // this thread's first piece, of the key head in row 0
  const int* table;
  int stride, block_size, num_blocks;
  int begin, end;     // keys that some entry sees
  int key;            // this thread's in the next tile,
  int block, offset;  // its place in the table and in the block,
  int slot;           // and its row of the cache; negative if there is none
  Copier copier;

  __device__ __forceinline__ PagedKeys(const bf16* k, const bf16* v, const int* table, int stride, int block_size, int num_blocks,
                                       const flash::Visible& visible)
      : k(k + Copier::quarter() * 8),
        v(v + Copier::quarter() * 8),
        table(table),
        stride(stride),
        block_size(block_size),
        num_blocks(num_blocks),
        begin(visible.some_begin),
        end(visible.some_end),
        key(visible.some_begin / H::KEYS * H::KEYS + Copier::row()),
        block(key / block_size),
        offset(key % block_size) {
    look_up();
  }
  __device__ __forceinline__ void look_up() {
    slot = -1;
    if (key < begin || key >= end) return;
    const int found = table[block];
    if (found >= 0 && found < num_blocks) slot = found * block_size + offset;
  }
  __device__ __forceinline__ void copy(int, ptx::smem_t stage) {
    const size_t from = (size_t)max(slot, 0) * stride;
    copier.copy(stage, k + from, v + from, slot >= 0);
    key += H::KEYS;
    block += H::KEYS / block_size;
    offset += H::KEYS % block_size;
    if (offset >= block_size) block++, offset -= block_size;
    look_up();
  }
};

template <int D>
__device__ __forceinline__ void attention(const bf16* qkv, const bf16* k_cache, const bf16* v_cache, bf16* out,
                                          const int* positions, const int* cu_seqlens_q, const int* block_tables,
                                          const int* context_lens, float* partials, int* arrived, int wave, int sequences,
                                          int heads, int tokens, int table_width, int block_size, int num_slots, int group,
                                          int window, int min_rows, float scale) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  using H = Head<D>;
  CU_SHARED(flash::sm90::Header, header);
  const auto tiles = [&](int i) {
    const int rows = flash::span(cu_seqlens_q, i, tokens).len;
    return rows > min_rows ? (rows * group + H::ROWS - 1) / H::ROWS : 0;
  };
  const flash::sm90::Work work = flash::sm90::find_work(tiles, sequences, heads, blockIdx.x, wave);
  if (work.sequence < 0) return;
  // The last tiles see the most keys: they go first.
  const int head = work.place % heads, tile = work.tiles - 1 - work.place / heads;
  const flash::Span rows = flash::span(cu_seqlens_q, work.sequence, tokens);
  const flash::Entries entries{tile * H::ROWS, rows.len * group, group};

  // [ROWS] what each entry sees, behind the stages
  int2* seen = reinterpret_cast<int2*>(reinterpret_cast<unsigned char*>(header + 1) + flash::sm90::STAGES * H::STAGE);
  const int len = flash::context_len(context_lens[work.sequence], table_width, block_size, num_slots);
  flash::Visible visible = flash::causal<H::ROWS>(seen, positions + rows.start, len, window, entries);
  const int splits = visible.take_share(H::KEYS, flash::MIN_TILES, work.split, work.splits);
  if (work.split >= splits) return;
  header->tile = {rows.start, entries.first, entries.count, work.slot, work.split, splits};
  header->head = head;

  const int q_size = heads * group * D, kv_size = heads * D;
  flash::sm90::Accumulator<H> result;
  if (visible.some_begin < visible.some_end) {
    flash::sm90::load_queries<H>(flash::sm90::queries_at<H>(*header),
                                 qkv + (size_t)rows.start * (q_size + 2 * kv_size) + (size_t)head * group * D, q_size + 2 * kv_size,
                                 entries);
    const size_t column = (size_t)head * D;
    PagedKeys<D> source(k_cache + column, v_cache + column, block_tables + (size_t)work.sequence * table_width, kv_size, block_size,
                        num_slots / block_size, visible);
    flash::sm90::attend(result, *header, source, visible, [&](int row) { return seen[row]; }, scale);
  }
  if (!flash::sm90::join(result, partials, arrived, header->tile)) return;
  const flash::Tile& last = header->tile;
  result.store(out + (size_t)last.row * q_size + (size_t)header->head * group * D, q_size, {last.first, last.count, group});
}

}  // namespace prefill_sm90

#define PAGED_PREFILL_SM90(D)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(prefill_sm90::Head<D>::THREADS, 1) paged_prefill_sm90_##D(                          \
      const bf16* qkv, const bf16* k_cache, const bf16* v_cache, bf16* out, const int* positions, const int* cu_seqlens_q,         \
      const int* block_tables, const int* context_lens, float* partials, int* arrived, int wave, int sequences, int heads,         \
      int tokens, int table_width, int block_size, int num_slots, int group, int window, int min_rows, float scale) {              \
    prefill_sm90::attention<D>(qkv, k_cache, v_cache, out, positions, cu_seqlens_q, block_tables, context_lens, partials, arrived, \
                               wave, sequences, heads, tokens, table_width, block_size, num_slots, group, window, min_rows,        \
                               scale);                                                                                             \
  }                                                                                                                                \
  CU_EXPORT(paged_prefill_sm90_##D)

PAGED_PREFILL_SM90(64)
PAGED_PREFILL_SM90(72)
PAGED_PREFILL_SM90(80)
PAGED_PREFILL_SM90(96)
PAGED_PREFILL_SM90(128)
