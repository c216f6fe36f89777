// Tiles of FlashAttention for compute capability 9.0: what flash.cuh is, with the products of warpgroups. Needs the target sm_90a.
//
// Entries, splits and the base of probabilities are those of flash.cuh; here a warpgroup has 64 entries, and a block has two or
// three warpgroups that share its tiles of keys. Queries are in registers as the left operand of q k^T, and so are probabilities as
// that of p v; scores and results are the accumulators. The design follows FlashAttention-3 (Shah et al. 2024,
// https://arxiv.org/abs/2407.08608): the scores of the next tile are multiplied before, and the results of this one during, the
// softmax of the next, and warpgroups take turns at the tensor cores, so that one's exponentials run beside another's products. At
// a head size of 72 that matters: at 16 exponentials a clock (CUDA C++ programming guide, "Arithmetic Instructions") and 4,096 FLOP
// a clock of a multiprocessor, the exponentials of a tile take 5/6 of the time of its products.
//
// Keys and values have one image in shared memory: 8 keys of 8 elements are 128 consecutive bytes, a core matrix of the layout
// without swizzle, which is K-major for q k^T and N-major for p v alike. Any head size fits, nothing is padded, and with 8 keys x 4
// pieces of 16 bytes to a warp neither cp.async, ldmatrix nor wgmma meets a conflict of banks. Swizzled layouts and the copy engine
// would save instructions, but a head size of 72 is no multiple of their rows, and the blocks of a paged cache are too small for
// its boxes.
//
// A dot product of 72 has half a step of 16 left. The last step begins 8 elements early, and the queries have zeros there.
//
// Each warp copies 8 keys of a tile, two tiles ahead of the products: it waits for its copies, hands them to the asynchronous proxy
// and arrives at the stage's mbarrier. Another mbarrier says that every warp is done with a stage. No barrier of the whole block
// stands in the loop, which would make the warpgroups do the same thing at the same time.
#pragma once
#include "flash.cuh"
#include "ptx_sm90.cuh"

namespace flash {
namespace sm90 {

constexpr int STAGES = 5;
// Tiles whose copies begin before the first product. A stage is filled again two tiles after its last use, so that a warpgroup
// which is one tile ahead of another does not wait for it.
constexpr int AHEAD = STAGES - 2;

// How heads of HEAD_DIM elements are laid out for GROUPS warpgroups: a thread has 168 registers with three of them, 255 with two.
template <int HEAD_DIM, int GROUPS>
struct Head {
  static constexpr int D = HEAD_DIM;
  static constexpr int WARPGROUPS = GROUPS;
  static constexpr int THREADS = 128 * WARPGROUPS;
  static constexpr int WARPS = 4 * WARPGROUPS;
  static constexpr int ROWS = 64 * WARPGROUPS;  // entries of a tile
  static constexpr int KEYS = 8 * WARPS;        // of a tile
  static constexpr int CHUNKS = D / 8;          // of 16 bytes
  static constexpr int STEPS = (D + 15) / 16;   // of 16 elements
  static constexpr int PITCH = KEYS * 16;       // bytes from chunk to chunk of a tile
  static constexpr int TILE = CHUNKS * PITCH;   // bytes
  static constexpr int STAGE = 2 * TILE;        // keys, then values
  static_assert(ROWS * CHUNKS * 16 <= STAGE && STAGE % 128 == 0, "queries fit in a stage, and stages begin with a core matrix");
};

// Most splits of a tile: its last block reads what all the others wrote.
constexpr int MAX_SPLITS = 8;

// What a block does: a split of a tile.
struct Work {
  int sequence;       // negative: no work
  int place;          // of the tile among those of its sequence and all key heads
  int tiles;          // of its sequence for each key head
  int split, splits;  // of at most so many
  int slot;           // of the tile's first split among all splits: less than `wave`
};

// Finds the work of block `block`. Tiles are counted by sequence, key head and place, `tiles(i)` of them in sequence i for each
// head. As long as they fill the card, on which `wave` blocks run at once, a block has one whole. Those that are left then are
// split, so that they fill it too: all, where few tiles see a long context; of 416 on 132 multiprocessors the last 20, which would
// take as long as 132. `cu_seqlens` is on the device, so that only the blocks can count.
template <class Tiles>
__device__ __forceinline__ Work find_work(Tiles tiles, int sequences, int heads, int block, int wave) {
  const int lane = threadIdx.x & 31;
  int all = 0;
  for (int i = lane; i < sequences; i += 32) all += tiles(i) * heads;
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) all += __shfl_xor_sync(0xffffffffu, all, offset);
  all = max(all, 0);
  const int whole = all / wave * wave, rest = all - whole, splits = rest ? min(wave / rest, MAX_SPLITS) : 1;
  const int left = block - whole, index = left < 0 ? block : whole + left / splits;
  if (index >= all) return {-1, 0, 0, 0, 0, 0};
  // The sequence that has it: 32 at a time, by the tiles up to the end of each.
  for (int first = 0, before = 0; first < sequences; first += 32) {
    const int mine = first + lane < sequences ? tiles(first + lane) * heads : 0;
    int end = mine;
    CU_UNROLL
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, end, offset);
      if (lane >= offset) end += other;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, index < before + end);
    if (beyond) {
      const int owner = __ffs(beyond) - 1, count = __shfl_sync(0xffffffffu, mine, owner) / heads;
      const int place = index - before - __shfl_sync(0xffffffffu, end - mine, owner);
      if (left < 0) return {first + owner, place, count, 0, 1, 0};
      return {first + owner, place, count, left % splits, splits, (index - whole) * splits};
    }
    before += __shfl_sync(0xffffffffu, end, 31);
  }
  return {-1, 0, 0, 0, 0, 0};
}

// What a block has in shared memory in front of its stages. Head::STAGE is a multiple of 128, and so is this.
struct alignas(128) Header {
  Tile tile;
  int head, unused;
  unsigned long long full[STAGES], empty[STAGES];  // mbarriers
};

// Where the queries of a tile lie until they are in registers: the last stage.
template <class H>
__device__ __forceinline__ ptx::smem_t queries_at(Header& header) {
  return ptx::smem(&header + 1) + (STAGES - 1) * H::STAGE;
}

// Copies the queries of a tile to `dst`, in the image of keys with `ROWS` rows; those beyond the last are zeros.
template <class H>
__device__ __forceinline__ void load_queries(ptx::smem_t dst, const bf16* q, int stride, const Entries& entries) {
  for (int i = threadIdx.x; i < H::ROWS * H::CHUNKS; i += H::THREADS) {
    const int row = i / H::CHUNKS, chunk = i % H::CHUNKS, entry = entries.first + row;
    const bool valid = entry < entries.count;
    const bf16* src = valid ? q + (size_t)(entry / entries.group) * stride + (size_t)(entry % entries.group) * H::D : q;
    ptx::cp_async16(dst + (chunk * H::ROWS + row) * 16, src + chunk * 8, valid);
  }
}

// A warp's 16 queries.
template <class H>
struct Queries {
  u32 r[H::STEPS][4];

  __device__ __forceinline__ explicit Queries(ptx::smem_t queries) {
    constexpr int CHUNK = H::ROWS * 16;  // bytes from chunk to chunk
    const int lane = threadIdx.x & 31;
    const ptx::smem_t at = queries + ((threadIdx.x >> 5) * 16 + (lane & 15)) * 16;
    CU_UNROLL
    for (int k = 0; k < H::D / 16; k++) ptx::ldmatrix_x4(r[k], at + (2 * k + (lane >> 4)) * CHUNK);
    if (H::D % 16) {
      u32 tail[2];
      ptx::ldmatrix_x2(tail, at + (H::CHUNKS - 1) * CHUNK);
      u32(&last)[4] = r[H::STEPS - 1];
      last[0] = last[1] = 0;
      last[2] = tail[0];
      last[3] = tail[1];
    }
  }
};

// A thread's part in the copies of a tile: four threads to a key, of which each has every fourth piece of 16 bytes.
template <class H>
struct Copier {
  ptx::smem_t to;  // from the stage to the first piece
  bool value;      // of the pieces that are left: one of the value

  static __device__ __forceinline__ int row() { return (threadIdx.x >> 5) * 8 + (threadIdx.x & 7); }
  static __device__ __forceinline__ int quarter() { return threadIdx.x >> 3 & 3; }
  __device__ __forceinline__ Copier() : to(row() * 16 + quarter() * H::PITCH), value(quarter() >= REST) {}

  // `k` and `v` point to this thread's first piece of the tile's key `row()`.
  __device__ __forceinline__ void copy(ptx::smem_t stage, const bf16* k, const bf16* v, bool valid) const {
    stage += to;
    CU_UNROLL
    for (int c = 0; c + 4 <= H::CHUNKS; c += 4) {
      ptx::cp_async16(stage + c * H::PITCH, k + c * 8, valid);
      ptx::cp_async16(stage + c * H::PITCH + H::TILE, v + c * 8, valid);
    }
    // What is left: the first threads have pieces of the key, the next ones of the value.
    if (REST && quarter() < 2 * REST) {
      constexpr int KEY = H::CHUNKS - REST, VALUE = KEY - REST;  // what leads from a thread's first piece there
      ptx::cp_async16(stage + (value ? VALUE * H::PITCH + H::TILE : KEY * H::PITCH), value ? v + VALUE * 8 : k + KEY * 8, valid);
    }
  }

 private:
  static constexpr int REST = H::CHUNKS % 4;
  static_assert(REST <= 2, "each of the four threads has at most one of the pieces that are left");
};

// Results of a warp's 16 entries so far, not yet divided by the sums. Lane 4 g + q has rows g and g + 8 and columns 2 q and 2 q + 1
// of each 8.
template <class H>
struct Accumulator {
  float o[H::D / 2];
  float base[2];  // what the probabilities are relative to, times scale
  float sum[2];   // of the probabilities of this lane's columns

  __device__ __forceinline__ Accumulator() {
    CU_UNROLL
    for (int i = 0; i < H::D / 2; i++) o[i] = 0.f;
    base[0] = base[1] = LOWEST;
    sum[0] = sum[1] = 0.f;
  }

  // Turns scores into probabilities. `scale` has log2(e) in it. True if `factor` is due to the results (`rescale`).
  __device__ __forceinline__ bool exponentiate(float (&s)[H::KEYS / 2], float (&factor)[2], float scale) {
    float top[2];
    bool risen = false;
    CU_UNROLL
    for (int h = 0; h < 2; h++) {
      float t = fmaxf(s[2 * h], s[2 * h + 1]);
      CU_UNROLL
      for (int n = 4; n < H::KEYS / 2; n += 4) t = fmaxf(t, fmaxf(s[n + 2 * h], s[n + 2 * h + 1]));
      top[h] = t * scale;
      risen |= top[h] > base[h] + SLACK;
    }
    risen = __any_sync(0xffffffffu, risen);
    if (risen) {
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        float t = fmaxf(base[h], top[h]);
        t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 1));
        t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 2));
        factor[h] = ptx::exp2(base[h] - t);
        base[h] = t;
        sum[h] *= factor[h];
      }
    }
    CU_UNROLL
    for (int i = 0; i < H::KEYS / 2; i++) {
      s[i] = ptx::exp2(s[i] * scale - base[i >> 1 & 1]);
      sum[i >> 1 & 1] += s[i];
    }
    return risen;
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    CU_UNROLL
    for (int i = 0; i < H::D / 2; i++) o[i] *= factor[i >> 1 & 1];
  }

  static constexpr int PARTIAL = H::THREADS * (4 + H::D / 2);

  // What a split hands on: PARTIAL floats, each thread's own.
  __device__ __forceinline__ void write(float4* partial) const {
    partial += threadIdx.x;
    partial[0] = make_float4(base[0], base[1], sum[0], sum[1]);
    CU_UNROLL
    for (int n = 0; n < H::D / 8; n++)
      partial[(1 + n) * H::THREADS] = make_float4(o[4 * n], o[4 * n + 1], o[4 * n + 2], o[4 * n + 3]);
  }

  // Adds what a split wrote.
  __device__ __forceinline__ void merge(const float4* partial) {
    partial += threadIdx.x;
    const float4 head = partial[0];
    const float bases[2] = {head.x, head.y}, sums[2] = {head.z, head.w};
    float mine[2], theirs[2];
    CU_UNROLL
    for (int h = 0; h < 2; h++) {
      const float t = fmaxf(base[h], bases[h]);
      mine[h] = ptx::exp2(base[h] - t);
      theirs[h] = ptx::exp2(bases[h] - t);
      base[h] = t;
      sum[h] = sum[h] * mine[h] + sums[h] * theirs[h];
    }
    CU_UNROLL
    for (int n = 0; n < H::D / 8; n++) {
      const float4 other = partial[(1 + n) * H::THREADS];
      o[4 * n] = o[4 * n] * mine[0] + other.x * theirs[0];
      o[4 * n + 1] = o[4 * n + 1] * mine[0] + other.y * theirs[0];
      o[4 * n + 2] = o[4 * n + 2] * mine[1] + other.z * theirs[1];
      o[4 * n + 3] = o[4 * n + 3] * mine[1] + other.w * theirs[1];
    }
  }

  // Divides by the sums and stores; `out` is the group's first element in the sequence's first row. Rows that saw nothing are
  // zeros.
  __device__ __forceinline__ void store(bf16* out, int stride, const Entries& entries) const {
    const int lane = threadIdx.x & 31;
    CU_UNROLL
    for (int h = 0; h < 2; h++) {
      float total = sum[h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float factor = total > 0.f ? 1.f / total : 0.f;
      const int entry = entries.first + (threadIdx.x >> 5) * 16 + h * 8 + (lane >> 2);
      if (entry >= entries.count) continue;
      bf16* row = out + (size_t)(entry / entries.group) * stride + (size_t)(entry % entries.group) * H::D;
      CU_UNROLL
      for (int n = 0; n < H::D / 8; n++)
        *reinterpret_cast<bf16x2*>(row + n * 8 + (lane & 3) * 2) = pack(o[4 * n + 2 * h] * factor, o[4 * n + 2 * h + 1] * factor);
    }
  }
};

// Puts the splits of a tile together, in their order whoever is last; true in the block that has the result. `slots` has room for
// what `wave` splits hand on, `arrived` a counter for each that is zero between launches; `tile.index` is Work::slot.
template <class H>
__device__ __forceinline__ bool join(Accumulator<H>& result, float* slots, int* arrived, Tile& tile) {
  if (tile.splits == 1) return true;
  float* partials = slots + (size_t)tile.index * Accumulator<H>::PARTIAL;
  result.write(reinterpret_cast<float4*>(partials + (size_t)tile.split * Accumulator<H>::PARTIAL));
  if (!arrives_last(arrived + tile.index, tile.splits, &tile.flag)) return false;
  result = Accumulator<H>();
  for (int i = 0; i < tile.splits; i++)
    result.merge(reinterpret_cast<const float4*>(partials + (size_t)i * Accumulator<H>::PARTIAL));
  return true;
}

// s = q k^T for the keys of a stage: issues the products.
template <class H>
__device__ __forceinline__ void multiply_keys(float (&s)[H::KEYS / 2], const Queries<H>& q, ptx::smem_t stage) {
  const u64 keys = ptx::matrix_descriptor(stage, H::PITCH, 128);
  CU_UNROLL
  for (int k = 0; k < H::STEPS; k++) {
    // In units of 16 bytes, as descriptors count.
    const int chunk = k < H::D / 16 ? 2 * k : H::CHUNKS - 2;
    ptx::wgmma_bf16<H::KEYS, false>(s, q.r[k], keys + (u64)(chunk * H::PITCH / 16), k > 0);
  }
}

// o += p v for the values of a stage: issues the products.
template <class H>
__device__ __forceinline__ void multiply_values(float (&o)[H::D / 2], const u32 (&p)[H::KEYS / 16][4], ptx::smem_t stage) {
  const u64 values = ptx::matrix_descriptor(stage + H::TILE, 128, H::PITCH);
  CU_UNROLL
  for (int k = 0; k < H::KEYS / 16; k++) ptx::wgmma_bf16<H::D, true>(o, p[k], values + (u64)(k * 256 / 16), true);
}

// Probabilities as the left operand of p v.
template <class H>
__device__ __forceinline__ void pack_probabilities(u32 (&p)[H::KEYS / 16][4], const float (&s)[H::KEYS / 2]) {
  CU_UNROLL
  for (int i = 0; i < H::KEYS / 4; i++) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);
}

// Adds the visible keys, of which there are some, to the results of the tile's entries. The queries are on their way to
// `queries_at<H>(header)`, uncommitted.
//
// `keys.copy(t, stage)` starts this thread's copies of tile t (keys from t KEYS on; zeros for those that no entry sees); tiles are
// asked for in order. `sees(row)` gives the keys x .. y that a row of the tile sees.
template <class H, class Keys, class Sees>
__device__ __forceinline__ void attend(Accumulator<H>& result, Header& header, Keys& keys, const Visible& visible, Sees sees,
                                       float scale) {
  const ptx::smem_t stages = ptx::smem(&header + 1), full = ptx::smem(header.full), empty = ptx::smem(header.empty);
  // From one lane, so that the compiler sees that all have the same: descriptors then are made in uniform registers.
  const int first = __shfl_sync(0xffffffffu, visible.some_begin / H::KEYS, 0);
  const int tiles = __shfl_sync(0xffffffffu, (visible.some_end + H::KEYS - 1) / H::KEYS, 0) - first;
  const int warpgroup = threadIdx.x >> 7;

  const auto stage = [&](int tile) { return stages + tile % STAGES * H::STAGE; };
  const auto copy = [&](int tile) {
    if (tile < tiles) keys.copy(first + tile, stage(tile));
    ptx::cp_async_commit();
  };
  const auto arrive = [](ptx::smem_t barrier) {
    __syncwarp();
    if ((ptx::thread() & 31) == 0) ptx::mbarrier_arrive(barrier);
  };
  // This thread's copies of the tile have landed.
  const auto landed = [&](int tile) {
    ptx::fence_proxy_async();
    arrive(full + tile % STAGES * 8);
  };
  const auto wait = [&](ptx::smem_t barriers, int tile) { ptx::mbarrier_wait(barriers + tile % STAGES * 8, tile / STAGES & 1); };

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      ptx::mbarrier_init(full + i * 8, H::WARPS);
      ptx::mbarrier_init(empty + i * 8, H::WARPS);
    }
  }
  ptx::cp_async_commit();
  CU_UNROLL
  for (int tile = 0; tile < AHEAD; tile++) copy(tile);
  ptx::cp_async_wait<AHEAD>();
  __syncthreads();
  const Queries<H> q(queries_at<H>(header));
  // Every warp has its queries before their place becomes a stage.
  __syncthreads();

  float s[H::KEYS / 2], factor[2];
  u32 p[H::KEYS / 16][4];
  const auto probabilities = [&](int tile) {
    const int key = (first + tile) * H::KEYS;
    if (key < visible.every_begin || key + H::KEYS > visible.every_end) {
      const int lane = ptx::thread() & 31, row = (ptx::thread() >> 5) * 16 + (lane >> 2);
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        const auto seen = sees(row + h * 8);
        CU_UNROLL
        for (int i = 0; i < H::KEYS / 4; i++) {
          const int column = key + i / 2 * 8 + (lane & 3) * 2 + (i & 1);
          if (column < seen.x || column >= seen.y) s[i / 2 * 4 + 2 * h + (i & 1)] = -INFINITY;
        }
      }
    }
    return result.exponentiate(s, factor, scale);
  };

  ptx::cp_async_wait<AHEAD - 1>();
  landed(0);
  wait(full, 0);
  ptx::wgmma_fence();
  multiply_keys<H>(s, q, stage(0));
  ptx::wgmma_commit();
  ptx::cp_async_wait<AHEAD - 2>();
  if (tiles > 1) landed(1);
  ptx::wgmma_wait<0>();
  ptx::settle(s);
  probabilities(0);  // there are no results yet to be rescaled
  pack_probabilities<H>(p, s);

  // The last warpgroup lets the first begin.
  if (warpgroup == H::WARPGROUPS - 1 && tiles > 1) ptx::barrier_arrive(1, 256);
  for (int tile = 0; tile + 1 < tiles; tile++) {
    ptx::cp_async_wait<0>();
    if (tile + 2 < tiles) landed(tile + 2);
    if (tile >= 2 && tile + AHEAD < tiles) wait(empty, tile - 2);
    copy(tile + AHEAD);

    wait(full, tile + 1);
    ptx::barrier_sync(1 + warpgroup, 256);
    ptx::wgmma_fence();
    multiply_keys<H>(s, q, stage(tile + 1));
    ptx::wgmma_commit();
    multiply_values<H>(result.o, p, stage(tile));
    ptx::wgmma_commit();
    if (warpgroup + 1 < H::WARPGROUPS)
      ptx::barrier_arrive(2 + warpgroup, 256);
    else if (tile + 2 < tiles)
      ptx::barrier_arrive(1, 256);

    ptx::wgmma_wait<1>();
    ptx::settle(s);
    const bool risen = probabilities(tile + 1);
    ptx::finish_before_wait(result.sum);
    ptx::wgmma_wait<0>();
    ptx::settle(result.o);
    arrive(empty + tile % STAGES * 8);
    if (risen) result.rescale(factor);
    pack_probabilities<H>(p, s);
  }
  ptx::wgmma_fence();
  multiply_values<H>(result.o, p, stage(tiles - 1));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(result.o);
  ptx::cp_async_wait<0>();
}

}  // namespace sm90
}  // namespace flash
