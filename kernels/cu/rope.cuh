// Rotation of pairs of elements by an angle: rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864). Element
// j of a head pairs with j + head_dim / 2, the layout of Hugging Face.
#pragma once
#include "common.cuh"

namespace rope {

// Every kernel rounds alike: which of the two products is not rounded is said here and not left to the compiler.
__device__ __forceinline__ float first(float a, float b, float cosine, float sine) { return fmaf(a, cosine, -(b * sine)); }
__device__ __forceinline__ float second(float a, float b, float cosine, float sine) { return fmaf(b, cosine, a * sine); }

// Two neighbouring pairs.
__device__ __forceinline__ void rotate(bf16x2& a, bf16x2& b, float cos_0, float cos_1, float sin_0, float sin_1) {
  const float a_0 = to_float(bf16{(u16)a}), a_1 = to_float(bf16{(u16)(a >> 16)});
  const float b_0 = to_float(bf16{(u16)b}), b_1 = to_float(bf16{(u16)(b >> 16)});
  a = pack(first(a_0, b_0, cos_0, sin_0), first(a_1, b_1, cos_1, sin_1));
  b = pack(second(a_0, b_0, cos_0, sin_0), second(a_1, b_1, cos_1, sin_1));
}

// Eight neighbouring pairs, whose cosines and sines lie at 16 bytes.
__device__ __forceinline__ void rotate(uint4& a, uint4& b, const float* cosines, const float* sines) {
  const float4 c[2] = {reinterpret_cast<const float4*>(cosines)[0], reinterpret_cast<const float4*>(cosines)[1]};
  const float4 s[2] = {reinterpret_cast<const float4*>(sines)[0], reinterpret_cast<const float4*>(sines)[1]};
  rotate(a.x, b.x, c[0].x, c[0].y, s[0].x, s[0].y);
  rotate(a.y, b.y, c[0].z, c[0].w, s[0].z, s[0].w);
  rotate(a.z, b.z, c[1].x, c[1].y, s[1].x, s[1].y);
  rotate(a.w, b.w, c[1].z, c[1].w, s[1].z, s[1].w);
}

}  // namespace rope
