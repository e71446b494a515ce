// Attention forward for sm_90a, head dim 128. No torch and no CUDA headers.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace prfl::cuda {

// [B, L, H, 128] with contiguous rows; strides of B, L and H in elements, multiples of 16 bytes.
struct Sequence {
  const void* data;
  int64_t length, strides[3];
};

// Keys of a tile in bfloat16: 128 or 144, whichever pads `keys` less, up to 1,024; 176 beyond.
int attention_hopper_tile(int64_t keys);

// out [B, Lq, H, 128] bfloat16 and lse [B, H, Lq] float32, both contiguous, of bfloat16 q, k and v. At least
// one query and one key; scale > 0. Throws std::runtime_error with the kernel's name and the launch's
// numbers.
void attention_hopper_forward(const Sequence& q, const Sequence& k, const Sequence& v, void* out, float* lse,
                              int64_t batch, int64_t heads, float scale, CUstream_st* stream);

// The same of e4m3 q and k with float32 scales of their rows, q_scale [B, Lq, H] and k_scale [B, H, padded],
// and e4m3 v [B, H, 128, padded] with scales [B, H, 128]; all contiguous but q and k. padded is the number of
// keys rounded up to 128; scales of padding are finite, and in every 16 keys of v 0 1 8 9 2 3 10 11 4 5 12 13
// 6 7 14 15 is the order. kernels/attention/fp8.py has the formulas.
void attention_hopper_fp8_forward(const Sequence& q, const float* q_scale, const Sequence& k,
                                  const float* k_scale, const void* v, const float* v_scale, void* out,
                                  float* lse, int64_t batch, int64_t heads, float scale, CUstream_st* stream);

}  // namespace prfl::cuda
