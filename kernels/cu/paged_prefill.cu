// Causal attention of many new rows over the paged cache: out = softmax(mask(q k^T / sqrt(head_dim))) v. FlashAttention-2 (Dao
// 2023): see flash.cuh.
#include "common.cuh"
#include "flash.cuh"

// qkv [tokens, q_size + 2 kv_size], of which q is used: heads of D columns, `group` of which share a key head. Sequence i has the
// rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1], those with more than `min_rows` are this kernel's; the row at position p sees the
// tokens max(0, p - window + 1) ..= p of the context_lens[i] that are in the cache. Token t is row block_tables[i][t /
// block_size] * block_size + t % block_size of k_cache and v_cache [num_slots, kv_size]. out [tokens, q_size].
//
// Blocks: (tiles of the longest sequence's entries x splits of the keys, key heads, sequences), longest tiles first; those past a
// sequence's end leave at once. Does 4 D FLOPs for each query head and each key that it sees; tiles of keys that no entry sees are
// passed over.
namespace prefill {

// Keys and values in blocks of the cache. Rows are looked up a tile ahead.
template <int D>
struct PagedKeys {
  using H = flash::Head<D>;
  const bf16 *k, *v;  // the chunk that this thread copies, of the key head in row 0
  const int* table;
  int* slots;  // [2, KEYS] in shared memory
  int stride, block_size, num_blocks;
  flash::Visible visible;

  __device__ __forceinline__ void prepare(int tile) {
    const int thread = ptx::thread(), key = tile * H::KEYS + thread;
    if (thread >= H::KEYS) return;
    int slot = -1;
    if (key >= visible.some_begin && key < visible.some_end) {
      const int block = table[key / block_size];
      if (block >= 0 && block < num_blocks) slot = block * block_size + key % block_size;
    }
    slots[(tile & 1) * H::KEYS + thread] = slot;
  }
  __device__ __forceinline__ void copy(int tile, ptx::smem_t stage) {
    constexpr int PASSES = (H::KEYS + H::PASS - 1) / H::PASS;
    const int thread = ptx::thread(), row = thread / H::CHUNKS;
    if (row >= H::PASS) return;
    const ptx::smem_t to = stage + row * H::PITCH + thread % H::CHUNKS * 16;
    const int* rows = slots + (tile & 1) * H::KEYS + row;
    CU_UNROLL
    for (int i = 0; i < PASSES; i++) {
      if (i == PASSES - 1 && row + i * H::PASS >= H::KEYS) break;
      const int slot = rows[i * H::PASS];
      const size_t from = (size_t)max(slot, 0) * stride;
      ptx::cp_async16(to + i * H::PASS * H::PITCH, k + from, slot >= 0);
      ptx::cp_async16(to + (H::KEYS + i * H::PASS) * H::PITCH, v + from, slot >= 0);
    }
  }
};

template <int D>
__device__ __forceinline__ void attention(const bf16* qkv, const bf16* k_cache, const bf16* v_cache, bf16* out,
                                          const int* positions, const int* cu_seqlens_q, const int* block_tables,
                                          const int* context_lens, const flash::Meeting& meeting, int tokens, int table_width,
                                          int block_size, int num_slots, int group, int window, int min_rows, float scale) {
  using H = flash::Head<D>;
  CU_SHARED(unsigned char, bytes);
  const int sequence = blockIdx.z, head = blockIdx.y;
  const flash::Span rows = flash::span(cu_seqlens_q, sequence, tokens);
  const int tile = (gridDim.x - 1 - blockIdx.x) / meeting.count, split = blockIdx.x % meeting.count;
  const flash::Entries entries{tile * flash::ROWS, rows.len * group, group};
  if (rows.len <= min_rows || entries.first >= entries.count) return;

  flash::Tile* end = reinterpret_cast<flash::Tile*>(bytes);
  int2* seen = reinterpret_cast<int2*>(end + 1);            // [ROWS] what each entry sees
  int* slots = reinterpret_cast<int*>(seen + flash::ROWS);  // [2, KEYS]
  const ptx::smem_t shared = ptx::smem(slots + 2 * flash::MAX_KEYS);

  const int len = flash::context_len(context_lens[sequence], table_width, block_size, num_slots);
  flash::Visible visible = flash::causal(seen, positions + rows.start, len, window, entries);
  const int splits = visible.take_share(H::KEYS, flash::MIN_TILES, split, meeting.count);
  if (split >= splits) return;
  const int index = (sequence * gridDim.y + head) * (gridDim.x / meeting.count) + tile;
  *end = {rows.start, entries.first, entries.count, index, split, splits};

  const int q_size = gridDim.y * group * D, kv_size = gridDim.y * D;
  const size_t columns = (size_t)head * group * D;
  flash::Accumulator<D> result;
  if (visible.some_begin < visible.some_end) {
    flash::load_queries<D>(flash::queries_at<D>(shared), qkv + (size_t)rows.start * (q_size + 2 * kv_size) + columns,
                           q_size + 2 * kv_size, entries);
    const size_t first = (size_t)head * D + threadIdx.x % H::CHUNKS * 8;
    PagedKeys<D> source{
        k_cache + first,        v_cache + first, block_tables + (size_t)sequence * table_width, slots, kv_size, block_size,
        num_slots / block_size, visible};
    flash::attend(result, shared, source, visible, [&](int row) { return seen[row]; }, scale);
  }
  if (!flash::join(result, meeting, *end)) return;
  result.store(out + (size_t)end->row * q_size + columns, q_size, {end->first, end->count, group});
}

}  // namespace prefill

#define PAGED_PREFILL(D)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(flash::THREADS, 2) paged_prefill_##D(                                            \
      const bf16* qkv, const bf16* k_cache, const bf16* v_cache, bf16* out, const int* positions, const int* cu_seqlens_q,      \
      const int* block_tables, const int* context_lens, float* partials, int* arrived, int splits, int tokens, int table_width, \
      int block_size, int num_slots, int group, int window, int min_rows, float scale) {                                        \
    ptx::launch_dependents();                                                                                                   \
    ptx::wait_for_earlier_kernels();                                                                                            \
    prefill::attention<D>(qkv, k_cache, v_cache, out, positions, cu_seqlens_q, block_tables, context_lens,                      \
                          {partials, arrived, splits}, tokens, table_width, block_size, num_slots, group, window, min_rows,     \
                          scale);                                                                                               \
  }                                                                                                                             \
  CU_EXPORT(paged_prefill_##D)

PAGED_PREFILL(64)
PAGED_PREFILL(72)
PAGED_PREFILL(80)
PAGED_PREFILL(96)
PAGED_PREFILL(128)
