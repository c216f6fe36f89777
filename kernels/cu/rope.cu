// Rotary position embedding of q and k, and the step's keys and values into the paged cache. One pass over qkv.
#include "common.cuh"
#include "rope.cuh"

// cos_sin [tokens, 2 half] f32: cosines of positions[token] * inv_freq[j], a product in f32 as in the reference, then sines. Once a
// step, for all layers. Blocks: tokens.
extern "C" __global__ void __launch_bounds__(128)
    rope_cos_sin(const int* positions, const float* inv_freq, float* cos_sin, int half) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  const float position = (float)positions[blockIdx.x];
  float* row = cos_sin + blockIdx.x * 2 * (size_t)half;
  for (int j = threadIdx.x; j < half; j += blockDim.x) sincosf(position * inv_freq[j], &row[half + j], &row[j]);
}
CU_EXPORT(rope_cos_sin)

// qkv [tokens, q_size + 2 kv_size]: heads of `head_dim`; cos_sin [tokens, head_dim] as above. q is rotated in place, k on its way
// into k_cache, v is copied. slots[token] is a row of the caches [num_slots, kv_size]; one outside of them stores nothing.
//
// Blocks: (tokens, parts of a token), so that a single token does not wait for one block; a thread takes pairs. Moves 2 * (q_size +
// 2 * kv_size) * 2 bytes a token.
extern "C" __global__ void __launch_bounds__(256)
    rope_and_store_kv(bf16* qkv, const float* cos_sin, const int* slots, bf16* k_cache, bf16* v_cache, int num_heads,
                      int num_kv_heads, int head_dim, int num_slots) {
  ptx::launch_dependents();
  ptx::wait_for_earlier_kernels();
  const int half = head_dim / 2;
  const size_t q_size = (size_t)num_heads * head_dim, kv_size = (size_t)num_kv_heads * head_dim;
  bf16* row = qkv + blockIdx.x * (q_size + 2 * kv_size);
  const float* cosines = cos_sin + (size_t)blockIdx.x * head_dim;
  const int slot = slots[blockIdx.x];
  const bool store = slot >= 0 && slot < num_slots;
  const int first_thread = blockIdx.y * blockDim.x + threadIdx.x, threads = gridDim.y * blockDim.x;
  for (int i = first_thread; i < (num_heads + num_kv_heads) * half; i += threads) {
    const int head = i / half, j = i % half;
    bf16* x = row + (size_t)head * head_dim + j;
    const float a = to_float(x[0]), b = to_float(x[half]), cosine = cosines[j], sine = cosines[half + j];
    const bf16 first = to_bf16(rope::first(a, b, cosine, sine)), second = to_bf16(rope::second(a, b, cosine, sine));
    if (head < num_heads) {
      x[0] = first;
      x[half] = second;
    } else if (store) {
      bf16* k = k_cache + (size_t)slot * kv_size + (size_t)(head - num_heads) * head_dim + j;
      k[0] = first;
      k[half] = second;
    }
  }
  if (!store) return;
  const bf16* v = row + q_size + kv_size;
  for (size_t i = first_thread; i < kv_size; i += threads) v_cache[(size_t)slot * kv_size + i] = v[i];
}
CU_EXPORT(rope_and_store_kv)
