// Chooses a token from each row of logits, so that only its id leaves the card: temperature, top-k, top-p, and a draw.
//
// A block per row. Logits are read some ten times, the first time from memory and then from the second-level cache: 4 * vocab bytes
// move a row. Nothing is sorted: the k-th largest logit and the border of top-p are found digit by digit (radix selection), and
// probabilities are summed as integers, so that neither the order of threads nor that of additions changes what is drawn.
#include "rank.cuh"

constexpr int DIGITS = 256;

// Shared memory of a block.
struct Shared {
  u32 low[DIGITS];     // what falls into each digit: the lower halves
  u32 high[DIGITS];    // and the upper ones
  u64 partial[WARPS];  // a value for each warp
  u64 found[2];        // what one thread tells all
};

// What a row is drawn from.
struct Row {
  const float* logits;
  const u32* banned;  // a bit for each id
  int vocab;

  // Whether `id` may be drawn at all: its logit is finite and it is not banned.
  __device__ __forceinline__ bool allows(int id, float logit) const {
    return logit - logit == 0.f && !(banned[id >> 5] >> (id & 31) & 1);
  }
};

// Sum over the block, in every thread. Integers, so that the order does not matter.
__device__ __forceinline__ u64 block_total(u64 v, Shared& shared) {
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared.partial[threadIdx.x >> 5] = v;
  __syncthreads();
  u64 total = 0;
  CU_UNROLL
  for (int i = 0; i < WARPS; i++) total += shared.partial[i];
  return total;
}

// Adds to a digit. Two halves, since shared memory adds 32 bits by itself but 64 only in a loop of compare-and-swap, in which all
// threads with one digit wait for each other. Every carry is one addition's own, so that the sum is exact in any order.
__device__ __forceinline__ void add(Shared& shared, u32 digit, u64 weight) {
  const u32 part = (u32)weight;
  const u32 upper = (u32)(weight >> 32) + (atomicAdd(&shared.low[digit], part) > 0xffffffffu - part);
  if (upper) atomicAdd(&shared.high[digit], upper);
}

// Finds the largest digit such that the weights of all digits from it upwards reach `wanted`, or 0 if they never do, and the sum of
// those above it. For the first warp. A lane has eight digits in a row, the first lane the largest: one sum over the warp, and then
// only the lane in whose digits the place lies walks them. Both halves of its digits come in four loads of 16 bytes.
__device__ __forceinline__ void find_digit(u64 wanted, Shared& shared) {
  constexpr int OWN = DIGITS / 32;
  const int lane = threadIdx.x, first = DIGITS - OWN * (lane + 1);
  union {
    uint4 loaded[OWN / 4];
    u32 values[OWN];
  } low, high;
  u64 own = 0;
  CU_UNROLL
  for (int i = 0; i < OWN / 4; i++) {
    low.loaded[i] = ((const uint4*)&shared.low[first])[i];
    high.loaded[i] = ((const uint4*)&shared.high[first])[i];
  }
  CU_UNROLL
  for (int i = 0; i < OWN; i++) own += (u64)high.values[i] << 32 | low.values[i];
  u64 upto = own;
  CU_UNROLL
  for (int offset = 1; offset < 32; offset <<= 1) {
    const u64 above = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += above;
  }
  u64 above = upto - own;
  if (above >= wanted || (upto < wanted && lane < 31)) return;
  int i = OWN - 1;
  CU_UNROLL
  for (; i > 0; i--) {
    const u64 here = (u64)high.values[i] << 32 | low.values[i];
    if (above + here >= wanted) break;
    above += here;
  }
  shared.found[0] = (u64)(first + i);
  shared.found[1] = above;
}

// The largest key such that the weights of all keys from it upwards reach `wanted`; 0 if they never do. visit(f) calls f(key,
// weight) for this thread's share of the candidates.
template <typename Visit>
__device__ __forceinline__ u32 select(u64 wanted, Shared& shared, Visit visit) {
  u32 prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
    visit([&](u32 key, u64 weight) {
      // Only keys that share the digits found so far; a shift by 32 is not defined.
      const bool is_here = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
      if (is_here && weight) add(shared, key >> shift & 255, weight);
    });
    __syncthreads();
    if (threadIdx.x < 32) find_digit(wanted, shared);
    __syncthreads();
    prefix |= (u32)shared.found[0] << shift;
    wanted -= min(wanted, shared.found[1]);
  }
  return prefix;
}

// out[row] is an id, or -1 if no logit of the row can be drawn. logits [rows, vocab]. temperature[row] of 0 takes the largest
// logit, the first of equals. top_k[row] of 0 keeps all, and equals of the k-th stay (TopKLogitsWarper of transformers). top_p[row]
// keeps the most likely tokens that reach this share of what top-k left, and equals of the last of them (TopPLogitsWarper).
// random[row] holds 64 uniform bits, the lower half first: the place in the distribution, by id, that is drawn.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(const float* logits, const float* temperature, const int* top_k, const float* top_p, const u32* random,
           const u32* banned, int* out, int vocab) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  CU_SHARED(Shared, all);
  Shared& shared = *all;
  const Row row{logits + (size_t)blockIdx.x * vocab, banned, vocab};
  const float heat = temperature[blockIdx.x];

  // The largest logit, and of equals the lowest id.
  u64 best = 0;
  for (int id = threadIdx.x; id < vocab; id += THREADS) {
    const float logit = row.logits[id];
    if (row.allows(id, logit)) best = max(best, rank_of(logit, id));
  }
  best = block_max(best, shared.partial);
  const int argmax = id_of(best);
  if (best == 0 || !(heat > 0.f)) {
    if (threadIdx.x == 0) out[blockIdx.x] = best == 0 ? -1 : argmax;
    return;
  }
  const float top = row.logits[argmax];
  u32 lowest = 0;  // candidates have keys from here upwards

  // A weight is a probability relative to the most likely token's, in units of 2^-40: the sum of 2^24 of them fits.
  auto weight = [&](float logit) { return (u64)(expf((logit - top) / heat) * 1099511627776.f); };
  auto candidates = [&](auto f) {
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
      const float logit = row.logits[id];
      const u32 key = order_of(logit);
      if (key >= lowest && row.allows(id, logit)) f(key, logit);
    }
  };

  const int k = top_k[blockIdx.x];
  if (k > 0 && k < vocab) {
    lowest = select((u64)k, shared, [&](auto f) { candidates([&](u32 key, float) { f(key, (u64)1); }); });
  }
  u64 mine = 0;
  candidates([&](u32, float logit) { mine += weight(logit); });
  u64 total = block_total(mine, shared);
  const float p = top_p[blockIdx.x];
  if (p < 1.f) {
    const u64 wanted = max((u64)((double)total * (double)p), (u64)1);
    lowest = max(lowest, select(wanted, shared, [&](auto f) { candidates([&](u32 key, float logit) { f(key, weight(logit)); }); }));
    mine = 0;
    candidates([&](u32, float logit) { mine += weight(logit); });
    total = block_total(mine, shared);
  }

  // Each thread has a stretch of ids; the one in whose stretch the place lies walks it.
  const u64 bits = (u64)random[2 * blockIdx.x] | (u64)random[2 * blockIdx.x + 1] << 32;
  const u64 place = __umul64hi(total, bits);
  const int stretch = (vocab + THREADS - 1) / THREADS, first = min((int)threadIdx.x * stretch, vocab),
            end = min(first + stretch, vocab);
  auto weight_of = [&](int id) {
    const float logit = row.logits[id];
    return order_of(logit) >= lowest && row.allows(id, logit) ? weight(logit) : (u64)0;
  };
  u64 own = 0;
  for (int id = first; id < end; id++) own += weight_of(id);
  u64 upto = own;  // inclusive sum over the warp, then over the warps before it
  CU_UNROLL
  for (int offset = 1; offset < 32; offset <<= 1) {
    const u64 before = __shfl_up_sync(0xffffffffu, upto, offset);
    if ((int)(threadIdx.x & 31) >= offset) upto += before;
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 31) shared.partial[threadIdx.x >> 5] = upto;
  __syncthreads();
  for (int i = 0; i < (int)(threadIdx.x >> 5); i++) upto += shared.partial[i];
  u64 before = upto - own;
  // `place` is below `total`, so that exactly one thread has it.
  if (place < before || place >= upto) return;
  for (int id = first; id < end; id++) {
    before += weight_of(id);
    if (place < before) {
      out[blockIdx.x] = id;
      return;
    }
  }
}
CU_EXPORT(sample)
