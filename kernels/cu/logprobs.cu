// Log-probabilities of one token and of the most likely ones of each row, so that not the logits but a few numbers leave the card.
//
// out[row, 0] = log softmax(logits[row])[token_ids[row]], out[row, 1 + j] that of top_ids[row, j]. A block per row. Each thread
// remembers the best of its share of ids; the block's best is the next of the list, and its thread alone looks for another. Logits
// are read twice, the first time from memory: 4 * vocab bytes move a row.
#include "rank.cuh"

// logits [rows, cols], of which the first `vocab` columns count; top_ids [rows, top]; out [rows, 1 + top]. Everything of a row is NaN
// if it holds NaN or positive infinity; the token's own is if it is not an id.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    logprobs(const float* logits, const int* token_ids, int* top_ids, float* out, int cols, int vocab, int top) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  CU_SHARED(u64, partial);  // [WARPS]
  const float* row = logits + (size_t)blockIdx.x * cols;
  // The best of this thread's ids behind `bound`.
  auto best_behind = [&](u64 bound) {
    u64 best = 0;
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
      const u64 rank = rank_of(row[id], id);
      if (rank < bound) best = max(best, rank);
    }
    return best;
  };
  u64 mine = best_behind(~(u64)0);
  u64 next = block_max(mine, partial);
  const float highest = row[id_of(next)];

  // A thread's share is a few dozen terms of at most 1; the shares are added in double precision, always in the same order.
  float share = 0.f;
  for (int id = threadIdx.x; id < vocab; id += THREADS) share += expf(row[id] - highest);
  double sum = share;
  CU_UNROLL
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  double* sums = reinterpret_cast<double*>(partial);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0.;
  CU_UNROLL
  for (int i = 0; i < WARPS; i++) sum += sums[i];
  const double log_sum = log(sum);
  auto logprob = [&](float logit) { return (float)((double)(logit - highest) - log_sum); };

  float* values = out + (size_t)blockIdx.x * (1 + top);
  if (threadIdx.x == 0) {
    const int id = token_ids[blockIdx.x];
    values[0] = id >= 0 && id < vocab ? logprob(row[id]) : __int_as_float(0x7fffffff);
  }
  for (int j = 0; j < top; j++) {
    if (mine == next) {
      const int id = id_of(next);
      top_ids[(size_t)blockIdx.x * top + j] = id;
      values[1 + j] = logprob(row[id]);
      mine = best_behind(next);
    }
    if (j + 1 < top) next = block_max(mine, partial);
  }
}
CU_EXPORT(logprobs)
