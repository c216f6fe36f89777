// Attention of a few new rows over the paged cache (decoding, and the check of a draft), the keys of a sequence shared by several
// blocks: Flash-Decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).
#include "common.cuh"
#include "flash.cuh"
#include "rope.cuh"

// Shapes and what a row sees are those of paged_prefill; sequences with at most `max_rows` rows are this kernel's.
//
// A block has one key head, 16 entries (an entry is one row of one head of the group, so 4 rows of 4 heads, read from memory once)
// and a share of the keys; blocks are (splits, key heads x tiles of entries, sequences + 1), where the last z sets rows of no
// sequence to zero. How the keys are shared is computed here, from the context's length, since a recorded launch is replayed with
// others: every split that has work has about as much, the others leave at once. The splits of a tile write what they have to
// `partials` and count themselves in `arrived`; the last one puts all together, and sets the counter back to zero.
//
// A warp takes 16 keys at a time. Their 16 x D elements go from global memory straight into the fragments of mma.sync, 16 bytes a
// load: the order of the D terms of a dot product is free, so lane 4 g + q reads 8 neighbours of key g as its part of two
// products; and so is that of the columns of the result, so it reads 8 neighbours of value 2 q as its column of eight products.
// Nothing passes through shared memory and no warp waits for another. Values are on their way during the scores, the next keys
// during the softmax.
//
// rope_paged_decode takes a step whose rows are neither rotated nor in the cache: queries are rotated in registers, and the block
// to which the step's own keys fall takes them from qkv, rotates them, and puts them and their values into the cache. Lanes hold
// both elements of a pair where D is a multiple of 64.
//
// Moves 4 D bytes a key and key head, at 4 D group FLOPs: bound by memory.
namespace decode {

constexpr int WARPS = 4;
constexpr int ENTRIES = 16;     // of a tile
constexpr int STEP = 16;        // keys that a warp takes at a time
constexpr int MIN_STEPS = 8;    // of a split: with fewer the work is less than that of putting splits together
constexpr int MAX_SPLITS = 32;  // of a tile

// Partial results of a split in f32: [16, D] relative to exp2(base), then [16] bases, then [16] sums.
template <int D>
constexpr int PARTIAL = ENTRIES * (D + 2);

// What a step has that is neither rotated nor in the cache.
struct Fresh {
  const float* cos_sin;  // [tokens, D]: cosines of the angles, then sines
  const int* slots;      // of the tokens
};

// Where the keys or values of a head lie: row `slot` of the cache, or, if that is negative, row ~slot of qkv.
template <bool FRESH>
struct Rows {
  const bf16* cached;
  const bf16* fresh;
  int cached_stride, fresh_stride;

  __device__ __forceinline__ const uint4* operator[](int slot) const {
    const bf16* row = FRESH && slot < 0 ? fresh + (size_t)~slot * fresh_stride : cached + (size_t)slot * cached_stride;
    return reinterpret_cast<const uint4*>(row);
  }
};

// Rotates a row: lane q of four has elements 32 i + 8 q .. of it.
template <int D, int K>
__device__ __forceinline__ void rotate(uint4 (&row)[K], const float* cos_sin) {
  static_assert(D % 64 == 0 && K == D / 32, "a lane has both elements of its pairs");
  CU_UNROLL
  for (int i = 0; i < K / 2; i++) {
    const float* cosines = cos_sin + 32 * i + 8 * (threadIdx.x & 3);
    rope::rotate(row[i], row[i + K / 2], cosines, cosines + D / 2);
  }
}

// The elements of 16 keys and values of one lane.
template <int D>
struct Fragments {
  static constexpr int K = (D + 31) / 32, V = (D + 63) / 64;
  uint4 k[2][K];  // keys g and g + 8: elements 32 i + 8 q ..
  uint4 v[4][V];  // values 2 q, 2 q + 1, 2 q + 8, 2 q + 9: elements 64 i + 8 g ..

  // The slots of this lane's keys and values, where `slot` is that of key lane % 16.
  __device__ __forceinline__ static int key_slot(int j, int slot) {
    return __shfl_sync(0xffffffffu, slot, ((threadIdx.x & 31) >> 2) + 8 * j);
  }
  __device__ __forceinline__ static int value_slot(int j, int slot) {
    return __shfl_sync(0xffffffffu, slot, 2 * (threadIdx.x & 3) + (j & 1) + (j >> 1) * 8);
  }

  // Beyond D a lane reads elements that do not count.
  template <bool FRESH>
  __device__ __forceinline__ void load_keys(const Rows<FRESH>& keys, int slot) {
    CU_UNROLL
    for (int j = 0; j < 2; j++) {
      const uint4* row = keys[key_slot(j, slot)];
      CU_UNROLL
      for (int i = 0; i < K; i++) k[j][i] = ptx::load_stream(row + min(4 * i + (int)(threadIdx.x & 3), D / 8 - 1));
    }
  }
  template <bool FRESH>
  __device__ __forceinline__ void load_values(const Rows<FRESH>& values, int slot) {
    CU_UNROLL
    for (int j = 0; j < 4; j++) {
      const uint4* row = values[value_slot(j, slot)];
      CU_UNROLL
      for (int i = 0; i < V; i++) v[j][i] = ptx::load_stream(row + min(8 * i + (int)((threadIdx.x & 31) >> 2), D / 8 - 1));
    }
  }

  // Rotates the keys that are not in the cache, and puts them and their values there. `k_cache` and `v_cache` are those of the
  // head.
  __device__ __forceinline__ void store_fresh(const Fresh& fresh, int slot, bf16* k_cache, bf16* v_cache, int stride,
                                              int num_slots) {
    const int lane = threadIdx.x & 31;
    CU_UNROLL
    for (int j = 0; j < 2; j++) {
      const int token = ~key_slot(j, slot);
      if (token < 0) continue;
      rotate<D>(k[j], fresh.cos_sin + (size_t)token * D);
      const int to = fresh.slots[token];
      if (to < 0 || to >= num_slots) continue;
      uint4* row = reinterpret_cast<uint4*>(k_cache + (size_t)to * stride);
      CU_UNROLL
      for (int i = 0; i < K; i++) row[4 * i + (lane & 3)] = k[j][i];
    }
    CU_UNROLL
    for (int j = 0; j < 4; j++) {
      const int token = ~value_slot(j, slot);
      if (token < 0) continue;
      const int to = fresh.slots[token];
      if (to < 0 || to >= num_slots) continue;
      uint4* row = reinterpret_cast<uint4*>(v_cache + (size_t)to * stride);
      CU_UNROLL
      for (int i = 0; i < V; i++) row[8 * i + (lane >> 2)] = v[j][i];
    }
  }
};

// What a warp has of the tile. Lane 4 g + q has rows g and g + 8, and in each 64 columns those from 16 q on: in o[8 i + j], columns
// 64 i + 16 q + j and + 8.
template <int D>
struct State {
  static constexpr int K = Fragments<D>::K, V = Fragments<D>::V;
  uint4 q[2][K];
  float o[8 * V][4];
  float base[2], sum[2];

  __device__ __forceinline__ State() {
    CU_UNROLL
    for (int h = 0; h < 2; h++) {
      base[h] = flash::LOWEST;
      sum[h] = 0.f;
      CU_UNROLL
      for (int i = 0; i < K; i++) q[h][i] = uint4{0, 0, 0, 0};
    }
    CU_UNROLL
    for (int n = 0; n < 8 * V; n++) {
      CU_UNROLL
      for (int i = 0; i < 4; i++) o[n][i] = 0.f;
    }
  }

  // Row h of this lane from `row`; elements beyond D stay 0, so those of the keys do not matter.
  __device__ __forceinline__ void load_query(int h, const bf16* row) {
    CU_UNROLL
    for (int i = 0; i < K; i++) {
      const int chunk = 4 * i + (threadIdx.x & 3);
      if (chunk < D / 8) q[h][i] = reinterpret_cast<const uint4*>(row)[chunk];
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[2][4], const Fragments<D>& keys) const {
    CU_UNROLL
    for (int j = 0; j < 2; j++) {
      CU_UNROLL
      for (int i = 0; i < 4; i++) s[j][i] = 0.f;
    }
    CU_UNROLL
    for (int i = 0; i < K; i++) {
      const unsigned first[4] = {q[0][i].x, q[1][i].x, q[0][i].y, q[1][i].y};
      const unsigned second[4] = {q[0][i].z, q[1][i].z, q[0][i].w, q[1][i].w};
      CU_UNROLL
      for (int j = 0; j < 2; j++) {
        ptx::mma_bf16(s[j], first, keys.k[j][i].x, keys.k[j][i].y);
        ptx::mma_bf16(s[j], second, keys.k[j][i].z, keys.k[j][i].w);
      }
    }
  }

  __device__ __forceinline__ void exponentiate(float (&s)[2][4], float scale) {
    float top[2];
    CU_UNROLL
    for (int h = 0; h < 2; h++) top[h] = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1])) * scale;
    if (__any_sync(0xffffffffu, top[0] > base[0] + flash::SLACK || top[1] > base[1] + flash::SLACK)) {
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        float t = fmaxf(base[h], top[h]);
        t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 1));
        t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 2));
        const float factor = ptx::exp2(base[h] - t);
        base[h] = t;
        sum[h] *= factor;
        CU_UNROLL
        for (int n = 0; n < 8 * V; n++) {
          o[n][2 * h] *= factor;
          o[n][2 * h + 1] *= factor;
        }
      }
    }
    CU_UNROLL
    for (int j = 0; j < 2; j++) {
      CU_UNROLL
      for (int i = 0; i < 4; i++) {
        // The sum is that of the rounded probabilities: what rounding does to a key that outweighs all others cancels.
        s[j][i] = to_float(to_bf16(ptx::exp2(s[j][i] * scale - base[i >> 1])));
        sum[i >> 1] += s[j][i];
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const float (&p)[2][4], const Fragments<D>& values) {
    const unsigned a[4] = {pack(p[0][0], p[0][1]), pack(p[0][2], p[0][3]), pack(p[1][0], p[1][1]), pack(p[1][2], p[1][3])};
    CU_UNROLL
    for (int i = 0; i < V; i++) {
      const uint4* v[4] = {&values.v[0][i], &values.v[1][i], &values.v[2][i], &values.v[3][i]};
      const bf16x2 words[4][4] = {{v[0]->x, v[0]->y, v[0]->z, v[0]->w},
                                  {v[1]->x, v[1]->y, v[1]->z, v[1]->w},
                                  {v[2]->x, v[2]->y, v[2]->z, v[2]->w},
                                  {v[3]->x, v[3]->y, v[3]->z, v[3]->w}};
      CU_UNROLL
      for (int j = 0; j < 4; j++) {
        ptx::mma_bf16(o[8 * i + 2 * j], a, low_halves(words[0][j], words[1][j]), low_halves(words[2][j], words[3][j]));
        ptx::mma_bf16(o[8 * i + 2 * j + 1], a, high_halves(words[0][j], words[1][j]), high_halves(words[2][j], words[3][j]));
      }
    }
  }

  // Writes this warp's partial results.
  __device__ __forceinline__ void store(float* partial, int entries) {
    const int lane = threadIdx.x & 31, q = lane & 3;
    CU_UNROLL
    for (int h = 0; h < 2; h++) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      const int entry = (lane >> 2) + 8 * h;
      if (entry >= entries) continue;
      CU_UNROLL
      for (int i = 0; i < V; i++) {
        CU_UNROLL
        for (int half = 0; half < 2; half++) {
          const int column = 64 * i + 16 * q + 8 * half;
          if (column >= D) continue;
          float4* to = reinterpret_cast<float4*>(partial + entry * D + column);
          const int c = 2 * h + half;
          to[0] = make_float4(o[8 * i][c], o[8 * i + 1][c], o[8 * i + 2][c], o[8 * i + 3][c]);
          to[1] = make_float4(o[8 * i + 4][c], o[8 * i + 5][c], o[8 * i + 6][c], o[8 * i + 7][c]);
        }
      }
      if (q == 0) {
        partial[ENTRIES * D + entry] = base[h];
        partial[ENTRIES * (D + 1) + entry] = sum[h];
      }
    }
  }
};

// Puts `count` partial results together, each PARTIAL<D> floats after the other: calls use(entry, column, sums of 4 columns, base,
// sum of the probabilities). `weights` has room for count x ENTRIES floats, ENTRIES bases and sums. All threads call it; what was
// written before a barrier is read.
template <int D, class Use>
__device__ __forceinline__ void combine(const float* partials, int count, int entries, float* weights, Use use) {
  float* bases = weights + MAX_SPLITS * ENTRIES;
  float* sums = bases + ENTRIES;
  if ((int)threadIdx.x < entries) {
    const float* base = partials + ENTRIES * D + threadIdx.x;
    float top = flash::LOWEST, sum = 0.f;
    for (int i = 0; i < count; i++) top = fmaxf(top, base[(size_t)i * PARTIAL<D>]);
    for (int i = 0; i < count; i++) {
      const float weight = ptx::exp2(base[(size_t)i * PARTIAL<D>] - top);
      weights[i * ENTRIES + threadIdx.x] = weight;
      sum += weight * base[(size_t)i * PARTIAL<D> + ENTRIES];
    }
    bases[threadIdx.x] = top;
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < entries * D / 4; i += blockDim.x) {
    const int entry = i / (D / 4), column = i % (D / 4) * 4;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int j = 0; j < count; j++) {
      const float4 part = *reinterpret_cast<const float4*>(partials + (size_t)j * PARTIAL<D> + entry * D + column);
      const float weight = weights[j * ENTRIES + entry];
      o.x += weight * part.x;
      o.y += weight * part.y;
      o.z += weight * part.z;
      o.w += weight * part.w;
    }
    use(entry, column, o, bases[entry], sums[entry]);
  }
}

// With FRESH the rows of a sequence are the last of its context, and `fresh` has what is to be done with them first.
template <int D, bool FRESH>
__device__ __forceinline__ void attention(const bf16* qkv, bf16* k_cache, bf16* v_cache, bf16* out, const int* positions,
                                          const int* cu_seqlens_q, const int* block_tables, const int* context_lens,
                                          float* partials, int* arrived, const Fresh& fresh, int tokens, int table_width,
                                          int block_size, int num_slots, int num_kv_heads, int group, int window, int max_rows,
                                          float scale) {
  CU_SHARED(float, shared);  // a partial result of each warp, then what combine needs
  const int sequence = blockIdx.z, q_size = num_kv_heads * group * D, kv_size = num_kv_heads * D, row_size = q_size + 2 * kv_size;
  if (sequence + 1 == (int)gridDim.z) {
    flash::zero_rest(out, cu_seqlens_q, sequence, tokens, q_size);
    return;
  }
  const flash::Span rows = flash::span(cu_seqlens_q, sequence, tokens);
  const int head = blockIdx.y % num_kv_heads, first = blockIdx.y / num_kv_heads * ENTRIES;
  const int entries = min(rows.len * group - first, ENTRIES);
  if (rows.len > max_rows || entries <= 0) return;

  // What the rows of this lane see, and what any of the tile's sees.
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int len = flash::context_len(context_lens[sequence], table_width, block_size, num_slots);
  State<D> state;
  int2 seen[2];
  flash::Visible visible{len, 0, 0, len};
  CU_UNROLL
  for (int h = 0; h < 2; h++) {
    const int e = (lane >> 2) + 8 * h;
    seen[h] = make_int2(0, 0);
    if (e >= entries) continue;
    const int row = rows.start + (first + e) / group;
    seen[h] = flash::causal_keys(positions[row], len, window);
    visible.add(seen[h]);
    state.load_query(h, qkv + (size_t)row * row_size + (size_t)(head * group + (first + e) % group) * D);
    if constexpr (FRESH) rotate<D>(state.q[h], fresh.cos_sin + (size_t)row * D);
  }
  visible.reduce();

  const int split = blockIdx.x, splits = visible.take_share(STEP, MIN_STEPS, split, gridDim.x);
  if (split >= splits) return;
  const int end = (visible.some_end + STEP - 1) / STEP;

  const int* table = block_tables + (size_t)sequence * table_width;
  const unsigned last_block = num_slots / block_size - 1;
  const int first_fresh = FRESH ? len - rows.len : len;
  // The row of key lane % 16 of a step; for those that no row sees, that of the nearest that one does.
  const auto slot_of = [&](int step) {
    const int key = min(max(step * STEP + (lane & 15), visible.some_begin), visible.some_end - 1);
    if (FRESH && key >= first_fresh) return ~(rows.start + key - first_fresh);
    return (int)min((unsigned)table[key / block_size], last_block) * block_size + key % block_size;
  };
  bf16* k_head = k_cache + (size_t)head * D;
  bf16* v_head = v_cache + (size_t)head * D;
  const bf16* fresh_keys = qkv + q_size + (size_t)head * D;
  const Rows<FRESH> keys{k_head, fresh_keys, kv_size, row_size}, values{v_head, fresh_keys + kv_size, kv_size, row_size};
  Fragments<D> fragments;
  int step = visible.some_begin / STEP + warp, slot = 0;
  if (step < end) {
    slot = slot_of(step);
    fragments.load_keys(keys, slot);
  }
  for (; step < end; step += WARPS) {
    fragments.load_values(values, slot);
    if constexpr (FRESH)
      if ((step + 1) * STEP > first_fresh) fragments.store_fresh(fresh, slot, k_head, v_head, kv_size, num_slots);
    slot = slot_of(min(step + WARPS, end - 1));
    float s[2][4];
    state.multiply_keys(s, fragments);
    if (step + WARPS < end) fragments.load_keys(keys, slot);
    if (step * STEP < visible.every_begin || (step + 1) * STEP > visible.every_end) {
      CU_UNROLL
      for (int i = 0; i < 8; i++) {
        const int key = step * STEP + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1), h = i >> 1 & 1;
        if (key < seen[h].x || key >= seen[h].y) s[i >> 2][i & 3] = -INFINITY;
      }
    }
    state.exponentiate(s, scale);
    state.multiply_values(s, fragments);
  }

  state.store(shared + warp * PARTIAL<D>, entries);
  __syncthreads();
  float* weights = shared + WARPS * PARTIAL<D>;
  const auto finish = [&](int e, int column, float4 o, float, float sum) {
    const float factor = sum > 0.f ? 1.f / sum : 0.f;
    const size_t row = rows.start + (first + e) / group;
    bf16* to = out + row * q_size + (size_t)(head * group + (first + e) % group) * D + column;
    *reinterpret_cast<uint2*>(to) = uint2{pack(o.x * factor, o.y * factor), pack(o.z * factor, o.w * factor)};
  };
  if (splits == 1) {
    combine<D>(shared, WARPS, entries, weights, finish);
    return;
  }

  const size_t tile = (size_t)sequence * gridDim.y + blockIdx.y;
  float* of_tile = partials + tile * gridDim.x * PARTIAL<D>;
  float* mine = of_tile + (size_t)split * PARTIAL<D>;
  combine<D>(shared, WARPS, entries, weights, [&](int e, int column, float4 o, float base, float sum) {
    *reinterpret_cast<float4*>(mine + e * D + column) = o;
    if (column == 0) {
      mine[ENTRIES * D + e] = base;
      mine[ENTRIES * (D + 1) + e] = sum;
    }
  });
  if (!flash::arrives_last(arrived + tile, splits, reinterpret_cast<int*>(shared))) return;
  combine<D>(of_tile, splits, entries, weights, finish);
}

}  // namespace decode

#define PAGED_DECODE(NAME, D, FRESH)                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * decode::WARPS, 2)                                                             \
      NAME(const bf16* qkv, bf16* k_cache, bf16* v_cache, bf16* out, const int* positions, const int* cu_seqlens_q,               \
           const int* block_tables, const int* context_lens, float* partials, int* arrived, const float* cos_sin,                 \
           const int* slots, int tokens, int table_width, int block_size, int num_slots, int num_kv_heads, int group, int window, \
           int max_rows, float scale) {                                                                                           \
    ptx::launch_dependents();                                                                                                     \
    ptx::wait_for_earlier_kernels();                                                                                              \
    decode::attention<D, FRESH>(qkv, k_cache, v_cache, out, positions, cu_seqlens_q, block_tables, context_lens, partials,        \
                                arrived, decode::Fresh{cos_sin, slots}, tokens, table_width, block_size, num_slots, num_kv_heads, \
                                group, window, max_rows, scale);                                                                  \
  }                                                                                                                               \
  CU_EXPORT(NAME)

PAGED_DECODE(paged_decode_64, 64, false)
PAGED_DECODE(paged_decode_72, 72, false)
PAGED_DECODE(paged_decode_80, 80, false)
PAGED_DECODE(paged_decode_96, 96, false)
PAGED_DECODE(paged_decode_128, 128, false)
PAGED_DECODE(rope_paged_decode_64, 64, true)
PAGED_DECODE(rope_paged_decode_128, 128, true)
