// Tiles of FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691), shared by the kernels of attention over many queries.
//
// An entry is one query row of one head of the group that shares a key head. A block has one key head and ROWS entries, row by
// row with the heads of the group inside, so that a tile of keys and values serves all of them. Its four warps take 32 entries
// each: a fragment of keys or values that was read from shared memory serves two products, without which reading it would take
// longer than multiplying. Keys and values come in tiles, in two stages: cp.async fills one while the other is in use. Scores
// and probabilities live in registers.
//
// Where there are too few tiles for the card, several blocks share the keys of one: each writes what it has and counts itself, and
// the last one puts all together.
//
// Rows in shared memory are an odd number of 16-byte chunks apart, so the eight rows of an ldmatrix hit eight groups of banks.
#pragma once

namespace flash {

constexpr int THREADS = 128;
constexpr int ROWS = 128;     // entries of a tile
constexpr int MAX_KEYS = 64;  // of a tile of any head size
constexpr int MIN_TILES = 4;  // of keys in a split: with fewer the work is less than that of putting splits together
// What a maximum begins with: finite, so that a row that sees nothing gets exp2(-inf) and not exp2(-inf + inf).
constexpr float LOWEST = -3e38f;
// Probabilities are taken relative to a base that follows the maximum only when that has risen by a factor of 2^8: the result is
// the same, powers of two cancel, and the accumulators are rarely rescaled (as in FlashAttention-4). f32 and bf16 have the room.
constexpr float SLACK = 8.f;

// How a head size is laid out. Shared memory of a block: 2 stages x 2 x KEYS rows, and ROWS more if the queries stay there.
template <int D>
struct Head {
  static constexpr int CHUNKS = D / 8;                   // of 16 bytes
  static constexpr int PITCH = (CHUNKS | 1) * 16;        // bytes from row to row in shared memory
  static constexpr bool Q_IN_REGISTERS = D <= 96;        // else they are read again for each tile
  static constexpr int KEYS = Q_IN_REGISTERS ? 64 : 32;  // of a tile: two blocks fit the 164 KiB of an A100's multiprocessor
  static constexpr int PART = 32;                        // keys whose scores are in registers at a time
  static constexpr int STAGE = 2 * KEYS * PITCH;         // bytes: keys, then values
  static constexpr int PASS = THREADS / CHUNKS;          // rows that a block copies at a time
  static constexpr int BLOCKS = D <= 72 ? 3 : 2;         // per multiprocessor: exponentials of one run beside products of others
};

// Where the queries of a tile lie: if they move on into registers, then where the second stage will be.
template <int D>
__device__ __forceinline__ ptx::smem_t queries_at(ptx::smem_t shared) {
  return shared + (Head<D>::Q_IN_REGISTERS ? 1 : 2) * Head<D>::STAGE;
}

// Rows `start .. start + len` of sequence i, within `rows` whatever `cu_seqlens` holds.
struct Span {
  int start, len;
};
__device__ __forceinline__ Span span(const int* cu_seqlens, int i, int rows) {
  const int start = min(max(cu_seqlens[i], 0), rows);
  return {start, min(max(cu_seqlens[i + 1], start), rows) - start};
}

// Zeros for the rows of out [rows, cols] that belong to no sequence: the part of block `block` of `blocks`.
__device__ __forceinline__ void zero_rest(bf16* out, const int* cu_seqlens, int sequences, int rows, int cols, int block,
                                          int blocks) {
  const int first = min(max(cu_seqlens[0], 0), rows), end = min(max(cu_seqlens[sequences], 0), rows);
  const size_t thread = (size_t)block * blockDim.x + threadIdx.x, step = (size_t)blocks * blockDim.x;
  for (size_t i = thread; i < (size_t)first * cols; i += step) out[i] = bf16{0};
  for (size_t i = (size_t)end * cols + thread; i < (size_t)rows * cols; i += step) out[i] = bf16{0};
}
// Likewise; the blocks of this z share them.
__device__ __forceinline__ void zero_rest(bf16* out, const int* cu_seqlens, int sequences, int rows, int cols) {
  zero_rest(out, cu_seqlens, sequences, rows, cols, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
}

// The entries of a tile: `count` of its sequence, the tile's begin at `first`.
struct Entries {
  int first, count, group;
};

// Copies the queries of a tile; `q` is the group's first element in the sequence's first row. Entries beyond the last are zeros.
template <int D>
__device__ __forceinline__ void load_queries(ptx::smem_t dst, const bf16* q, int stride, const Entries& entries) {
  using H = Head<D>;
  const int row = threadIdx.x / H::CHUNKS, chunk = threadIdx.x % H::CHUNKS;
  if (row >= H::PASS) return;
  for (int r = row; r < ROWS; r += H::PASS) {
    const int entry = entries.first + r;
    const bool valid = entry < entries.count;
    const bf16* src = valid ? q + (size_t)(entry / entries.group) * stride + (size_t)(entry % entries.group) * D : q;
    ptx::cp_async16(dst + r * H::PITCH + chunk * 16, src + chunk * 8, valid);
  }
}

// A warp's 32 queries as the left operand: fragments, or where they lie.
template <int D, bool IN_REGISTERS>
struct Queries;

template <int D>
struct Queries<D, true> {
  unsigned r[2][(D + 15) / 16][4];
  __device__ __forceinline__ explicit Queries(ptx::smem_t rows) {
    const int lane = threadIdx.x & 31;
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      const ptx::smem_t at = rows + ((threadIdx.x >> 5) * 32 + m * 16 + (lane & 15)) * Head<D>::PITCH;
      CU_UNROLL
      for (int k = 0; k < D / 16; k++) ptx::ldmatrix_x4(r[m][k], at + (lane >> 4) * 16 + k * 32);
      if (D % 16) {
        unsigned tail[2];
        ptx::ldmatrix_x2(tail, at + D / 16 * 32);
        r[m][(D + 15) / 16 - 1][0] = tail[0];
        r[m][(D + 15) / 16 - 1][1] = tail[1];
        r[m][(D + 15) / 16 - 1][2] = r[m][(D + 15) / 16 - 1][3] = 0;
      }
    }
  }
  __device__ __forceinline__ void fragment(unsigned (&a)[4], int m, int k) const {
    CU_UNROLL
    for (int i = 0; i < 4; i++) a[i] = r[m][k][i];
  }
};

template <int D>
struct Queries<D, false> {
  static_assert(D % 16 == 0, "");
  ptx::smem_t at;
  __device__ __forceinline__ explicit Queries(ptx::smem_t rows) {
    const int lane = threadIdx.x & 31;
    at = rows + ((threadIdx.x >> 5) * 32 + (lane & 15)) * Head<D>::PITCH + (lane >> 4) * 16;
  }
  __device__ __forceinline__ void fragment(unsigned (&a)[4], int m, int k) const {
    ptx::ldmatrix_x4(a, at + m * 16 * Head<D>::PITCH + k * 32);
  }
};

// s = q k^T for the PART keys at `keys`.
template <int D>
__device__ __forceinline__ void multiply_keys(float (&s)[2][Head<D>::PART / 8][4], const Queries<D, Head<D>::Q_IN_REGISTERS>& q,
                                              ptx::smem_t keys) {
  using H = Head<D>;
  const int lane = threadIdx.x & 31;
  CU_UNROLL
  for (int m = 0; m < 2; m++) {
    CU_UNROLL
    for (int n = 0; n < H::PART / 8; n++) {
      CU_UNROLL
      for (int i = 0; i < 4; i++) s[m][n][i] = 0.f;
    }
  }
  const ptx::smem_t at = keys + ((lane & 7) + (lane >> 4) * 8) * H::PITCH + (lane >> 3 & 1) * 16;
  CU_UNROLL
  for (int k = 0; k < D / 16; k++) {
    unsigned a[2][4];
    CU_UNROLL
    for (int m = 0; m < 2; m++) q.fragment(a[m], m, k);
    CU_UNROLL
    for (int n = 0; n < H::PART / 8; n += 2) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, at + n * 8 * H::PITCH + k * 32);
      CU_UNROLL
      for (int m = 0; m < 2; m++) {
        ptx::mma_bf16(s[m][n], a[m], b[0], b[1]);
        ptx::mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
  if (D % 16) {
    static_assert(D % 16 == 0 || H::PART % 32 == 0, "");
    unsigned a[2][4];
    CU_UNROLL
    for (int m = 0; m < 2; m++) q.fragment(a[m], m, D / 16);
    CU_UNROLL
    for (int n = 0; n < H::PART / 8; n += 4) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, keys + (n * 8 + lane) * H::PITCH + D / 16 * 32);
      CU_UNROLL
      for (int j = 0; j < 4; j++) {
        CU_UNROLL
        for (int m = 0; m < 2; m++) ptx::mma_bf16_k8(s[m][n + j], a[m][0], a[m][1], b[j]);
      }
    }
  }
}

// Results of a warp's 32 entries so far, not yet divided by the sums. Lane 4 g + q has rows g and g + 8 of each 16 and columns
// 2 q and 2 q + 1 of each 8.
template <int D>
struct Accumulator {
  float o[2][D / 8][4];
  float base[2][2];  // what the probabilities are relative to, times scale
  float sum[2][2];   // of the probabilities of this lane's columns

  __device__ __forceinline__ Accumulator() {
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      CU_UNROLL
      for (int n = 0; n < D / 8; n++) {
        CU_UNROLL
        for (int i = 0; i < 4; i++) o[m][n][i] = 0.f;
      }
      base[m][0] = base[m][1] = LOWEST;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Turns scores into probabilities. `scale` has log2(e) in it.
  __device__ __forceinline__ void exponentiate(float (&s)[2][Head<D>::PART / 8][4], float scale) {
    float top[2][2];
    bool risen = false;
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        float t = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
        CU_UNROLL
        for (int n = 1; n < Head<D>::PART / 8; n++) t = fmaxf(t, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        top[m][h] = t * scale;
        risen |= top[m][h] > base[m][h] + SLACK;
      }
    }
    if (__any_sync(0xffffffffu, risen)) {
      CU_UNROLL
      for (int m = 0; m < 2; m++) {
        CU_UNROLL
        for (int h = 0; h < 2; h++) {
          float t = fmaxf(base[m][h], top[m][h]);
          t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 1));
          t = fmaxf(t, __shfl_xor_sync(0xffffffffu, t, 2));
          const float factor = ptx::exp2(base[m][h] - t);
          base[m][h] = t;
          sum[m][h] *= factor;
          CU_UNROLL
          for (int n = 0; n < D / 8; n++) {
            o[m][n][2 * h] *= factor;
            o[m][n][2 * h + 1] *= factor;
          }
        }
      }
    }
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      CU_UNROLL
      for (int n = 0; n < Head<D>::PART / 8; n++) {
        CU_UNROLL
        for (int i = 0; i < 4; i++) {
          s[m][n][i] = ptx::exp2(s[m][n][i] * scale - base[m][i >> 1]);
          sum[m][i >> 1] += s[m][n][i];
        }
      }
    }
  }

  // o += p v for the PART values at `values`.
  __device__ __forceinline__ void multiply_values(const float (&p)[2][Head<D>::PART / 8][4], ptx::smem_t values) {
    using H = Head<D>;
    const int lane = threadIdx.x & 31;
    const ptx::smem_t at = values + (lane & 15) * H::PITCH + (lane >> 4) * 16;
    CU_UNROLL
    for (int k = 0; k < H::PART / 16; k++) {
      unsigned a[2][4];
      CU_UNROLL
      for (int m = 0; m < 2; m++) {
        a[m][0] = pack(p[m][2 * k][0], p[m][2 * k][1]);
        a[m][1] = pack(p[m][2 * k][2], p[m][2 * k][3]);
        a[m][2] = pack(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
        a[m][3] = pack(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
      }
      CU_UNROLL
      for (int n = 0; n + 1 < D / 8; n += 2) {
        unsigned b[4];
        ptx::ldmatrix_x4_trans(b, at + k * 16 * H::PITCH + n * 16);
        CU_UNROLL
        for (int m = 0; m < 2; m++) {
          ptx::mma_bf16(o[m][n], a[m], b[0], b[1]);
          ptx::mma_bf16(o[m][n + 1], a[m], b[2], b[3]);
        }
      }
      if (D / 8 % 2) {
        unsigned b[2];
        ptx::ldmatrix_x2_trans(b, values + (k * 16 + (lane & 15)) * H::PITCH + (D / 8 - 1) * 16);
        CU_UNROLL
        for (int m = 0; m < 2; m++) ptx::mma_bf16(o[m][D / 8 - 1], a[m], b[0], b[1]);
      }
    }
  }

  // What a split hands on: PARTIAL<D> floats, each thread's own.
  __device__ __forceinline__ void write(float4* partial) const {
    partial += threadIdx.x;
    partial[0] = make_float4(base[0][0], base[0][1], base[1][0], base[1][1]);
    partial[THREADS] = make_float4(sum[0][0], sum[0][1], sum[1][0], sum[1][1]);
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      CU_UNROLL
      for (int n = 0; n < D / 8; n++)
        partial[(2 + m * (D / 8) + n) * THREADS] = make_float4(o[m][n][0], o[m][n][1], o[m][n][2], o[m][n][3]);
    }
  }

  // Adds what another split wrote.
  __device__ __forceinline__ void merge(const float4* partial) {
    partial += threadIdx.x;
    const float4 bases = partial[0], sums = partial[THREADS];
    const float others[2][2][2] = {{{bases.x, sums.x}, {bases.y, sums.y}}, {{bases.z, sums.z}, {bases.w, sums.w}}};
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      float mine[2], theirs[2];
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        const float t = fmaxf(base[m][h], others[m][h][0]);
        mine[h] = ptx::exp2(base[m][h] - t);
        theirs[h] = ptx::exp2(others[m][h][0] - t);
        base[m][h] = t;
        sum[m][h] = sum[m][h] * mine[h] + others[m][h][1] * theirs[h];
      }
      CU_UNROLL
      for (int n = 0; n < D / 8; n++) {
        const float4 other = partial[(2 + m * (D / 8) + n) * THREADS];
        o[m][n][0] = o[m][n][0] * mine[0] + other.x * theirs[0];
        o[m][n][1] = o[m][n][1] * mine[0] + other.y * theirs[0];
        o[m][n][2] = o[m][n][2] * mine[1] + other.z * theirs[1];
        o[m][n][3] = o[m][n][3] * mine[1] + other.w * theirs[1];
      }
    }
  }

  // Divides by the sums and stores; `out` is the group's first element in the sequence's first row. Rows that saw nothing are
  // zeros.
  __device__ __forceinline__ void store(bf16* out, int stride, const Entries& entries) const {
    const int lane = threadIdx.x & 31;
    CU_UNROLL
    for (int m = 0; m < 2; m++) {
      CU_UNROLL
      for (int h = 0; h < 2; h++) {
        float total = sum[m][h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float factor = total > 0.f ? 1.f / total : 0.f;
        const int entry = entries.first + (threadIdx.x >> 5) * 32 + m * 16 + h * 8 + (lane >> 2);
        if (entry >= entries.count) continue;
        bf16* row = out + (size_t)(entry / entries.group) * stride + (size_t)(entry % entries.group) * D;
        CU_UNROLL
        for (int n = 0; n < D / 8; n++)
          *reinterpret_cast<bf16x2*>(row + n * 8 + (lane & 3) * 2) = pack(o[m][n][2 * h] * factor, o[m][n][2 * h + 1] * factor);
      }
    }
  }
};

// Keys that the entries of a tile see: all see those of `every`, none sees others than those of `some`.
struct Visible {
  int some_begin, some_end, every_begin, every_end;

  __device__ __forceinline__ void add(int2 keys) {
    every_begin = max(every_begin, keys.x);
    every_end = min(every_end, keys.y);
    if (keys.x >= keys.y) return;
    some_begin = min(some_begin, keys.x);
    some_end = max(some_end, keys.y);
  }
  // Leaves what split `split` has of at most `most`, with keys in tiles of `keys`; gives how many splits have work. Shares are even
  // whatever the length is.
  __device__ __forceinline__ int take_share(int keys, int min_tiles, int split, int most) {
    const int first = some_begin / keys, tiles = max((some_end + keys - 1) / keys - first, 0);
    const int share = max((tiles + most - 1) / most, min_tiles);
    some_begin = max(some_begin, (first + split * share) * keys);
    some_end = min(some_end, (first + (split + 1) * share) * keys);
    return max((tiles + share - 1) / share, 1);
  }
  // Over the warp, in every lane.
  __device__ __forceinline__ void reduce() {
    CU_UNROLL
    for (int offset = 16; offset; offset >>= 1) {
      some_begin = min(some_begin, __shfl_xor_sync(0xffffffffu, some_begin, offset));
      some_end = max(some_end, __shfl_xor_sync(0xffffffffu, some_end, offset));
      every_begin = max(every_begin, __shfl_xor_sync(0xffffffffu, every_begin, offset));
      every_end = min(every_end, __shfl_xor_sync(0xffffffffu, every_end, offset));
    }
  }
};

// No context is longer: sums of a few lengths fit an int.
constexpr int MAX_LEN = 0x3fffffff;

// Tokens of a sequence that are in the cache, whatever `context_lens` holds.
__device__ __forceinline__ int context_len(int len, int table_width, int block_size, int num_slots) {
  const long long room = num_slots > 0 ? (long long)table_width * block_size : 0;
  const int limit = room < MAX_LEN ? (int)room : MAX_LEN;
  return min(max(len, 0), limit);
}

// The keys `x .. y` that a row at `position` sees.
__device__ __forceinline__ int2 causal_keys(int position, int len, int window) {
  const int end = min(max(position, -1), MAX_LEN) + 1;
  return make_int2(min(max(end - window, 0), len), min(end, len));
}

// Writes what each of the TILE entries of a tile sees to `seen`, nothing for those beyond the last. The caller synchronises.
template <int TILE = ROWS>
__device__ __forceinline__ Visible causal(int2* seen, const int* positions, int len, int window, const Entries& entries) {
  Visible all{len, 0, 0, len};
  const int lane = threadIdx.x & 31;
  for (int r = lane; r < TILE; r += 32) {
    const int entry = entries.first + r;
    if (entry >= entries.count) {
      seen[r] = make_int2(0, 0);
      continue;
    }
    const int2 keys = causal_keys(positions[entry / entries.group], len, window);
    seen[r] = keys;
    all.add(keys);
  }
  all.reduce();
  return all;
}

// What a block needs of its tile when the keys are done. It waits in shared memory: registers are short meanwhile.
struct Tile {
  int row;           // of the sequence's first query
  int first, count;  // as in Entries
  int index;         // of the tile among all of the launch
  int split, splits;
  int flag, unused;
};

// Where the splits of a launch meet: room for PARTIAL<D> floats of each of `count` splits of a tile, and a counter for each tile
// that is zero between launches.
struct Meeting {
  float* partials;
  int* arrived;
  int count;
};
template <int D>
constexpr int PARTIAL = THREADS * (D + 8);

// Counts a block that has written its part of a tile; true in the last of `splits`, which sees what the others wrote. `flag` is
// in shared memory that nobody needs any more.
__device__ __forceinline__ bool arrives_last(int* arrived, int splits, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = atomicAdd(arrived, 1) == splits - 1;
    if (*flag) *arrived = 0;
  }
  __syncthreads();
  if (!*flag) return false;
  __threadfence();
  return true;
}

// Puts the splits of a tile together; true in the block that has the result.
template <int D>
__device__ __forceinline__ bool join(Accumulator<D>& result, const Meeting& meeting, Tile& tile) {
  if (tile.splits == 1) return true;
  float* partials = meeting.partials + (size_t)tile.index * meeting.count * PARTIAL<D>;
  result.write(reinterpret_cast<float4*>(partials + (size_t)tile.split * PARTIAL<D>));
  if (!arrives_last(meeting.arrived + tile.index, tile.splits, &tile.flag)) return false;
  // What this block has too: in one order, the bits do not depend on which block is last.
  result = Accumulator<D>();
  for (int i = 0; i < tile.splits; i++) result.merge(reinterpret_cast<const float4*>(partials + (size_t)i * PARTIAL<D>));
  return true;
}

// Adds the visible keys, of which there are some, to the results of the tile's entries. The queries are on their way to
// `queries_at<D>(shared)`, uncommitted.
//
// `keys.prepare(t)` gets ready for `keys.copy(t, stage)`, which starts the copies of tile t (keys from t KEYS on; zeros for those
// that no entry sees); a barrier lies between them. `sees(row)` gives the keys x .. y that a row of the tile sees.
template <int D, class Keys, class Sees>
__device__ __forceinline__ void attend(Accumulator<D>& result, ptx::smem_t shared, Keys& keys, const Visible& visible, Sees sees,
                                       float scale) {
  using H = Head<D>;
  const int first = visible.some_begin / H::KEYS, end = (visible.some_end + H::KEYS - 1) / H::KEYS;
  keys.prepare(first);
  __syncthreads();
  keys.copy(first, shared);
  ptx::cp_async_commit();
  keys.prepare(first + 1);
  ptx::cp_async_wait<0>();
  __syncthreads();
  const Queries<D, H::Q_IN_REGISTERS> q(queries_at<D>(shared));
  for (int tile = first; tile < end; tile++) {
    // The tile has landed, and nobody needs the other stage.
    ptx::cp_async_wait<0>();
    __syncthreads();
    const ptx::smem_t stage = shared + ((tile - first) & 1) * H::STAGE;
    if (tile + 1 < end) {
      keys.copy(tile + 1, shared + (1 - ((tile - first) & 1)) * H::STAGE);
      keys.prepare(tile + 2);
    }
    ptx::cp_async_commit();
    CU_UNROLL
    for (int part = 0; part < H::KEYS; part += H::PART) {
      const int key = tile * H::KEYS + part;
      if (key >= visible.some_end) break;
      float s[2][H::PART / 8][4];
      multiply_keys<D>(s, q, stage + part * H::PITCH);
      if (key < visible.every_begin || key + H::PART > visible.every_end) {
        const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 32 + (lane >> 2);
        CU_UNROLL
        for (int m = 0; m < 2; m++) {
          CU_UNROLL
          for (int i = 0; i < 4; i++) {
            const auto seen = sees(row + m * 16 + (i >> 1) * 8);
            CU_UNROLL
            for (int n = 0; n < H::PART / 8; n++) {
              const int column = key + n * 8 + (lane & 3) * 2 + (i & 1);
              if (column < seen.x || column >= seen.y) s[m][n][i] = -INFINITY;
            }
          }
        }
      }
      result.exponentiate(s, scale);
      result.multiply_values(s, stage + (H::KEYS + part) * H::PITCH);
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace flash
