// What the CPU kernels take, and the table of them that every instruction set fills.
// To add one: its arguments and a line of PRFL_CPU_KERNELS here, a file that defines it inside
// namespace prfl::PRFL_ISA, a line in sources.txt, its fields in bind.cpp.
#pragma once

#include "view.h"

namespace prfl {

// Rows are [batch, length, width] with strides by sample and token; a parameter is [batch, width] with
// its stride by sample, 0 for one [width] shared by all. Absent views are optional parts not wanted.
struct Shape {
  int64_t batch, length, width;
};

// `count` runs of at most `tokens` of a sample; `before` of them lie before token `boundary`, none crosses it.
struct Runs {
  int64_t count, tokens, before, boundary;
};

// norm: total = x + gate y and n = LN(total) (scale + base) + shift, in x's and n's type. gate, scale and shift
// are [batch, 2, width]: tokens before `boundary` take the first of a pair, the others the second.
struct NormForward {
  View x, y, gate, scale, shift;
  View total, n;
  View mean, rstd;  // float [batch, length]
  Shape shape;
  int64_t boundary;
  float base, eps;
  int threads;
};
// dsum and dx have x's type, dy has y's.
struct NormBackward {
  View dn, dsum, x, y, gate, scale, mean, rstd;
  View dx, dy;
  // float [batch, runs, slots, width]: d scale, d shift if `wants_parameters`, d gate if y and gate
  View part;
  View sums;  // float [batch, sides, slots, width]: part summed over the runs, or those on each side
  Shape shape;
  Runs runs;
  int64_t sides;  // 1, or 2: before the boundary and behind it
  float base;
  bool wants_parameters;
  int threads;
};

// qk_norm_rope: RMSNorm over a row of heads * head_dim, then rotation of the pairs of every head.
// cos, sin: float [positions, head_dim] with every cosine twice and (-sine, sine); absent: no rotation.
// The first `frame_pairs` pairs of a head take the row of the token's frame, the next `row_pairs` that of its
// row in the frame, the others that of its column.
struct Rope {
  View cos, sin;
  int64_t heads, head_dim, frame_pairs, row_pairs, rows, columns, offset;
};
struct QkNormRopeForward {
  View x[2], weight[2];  // q and k; x[1] may be absent
  View out[2], rstd[2];
  Shape shape;
  Rope rope;
  float eps;
  int threads;
};
struct QkNormRopeBackward {
  View d[2];  // strides by sample, token and head
  View x[2], weight[2], rstd[2], dx[2];
  View part;     // float [batch, runs, 2, width]; absent if d weight is not wanted
  View dweight;  // float [2, width]
  Shape shape;
  Rope rope;
  int64_t runs;
  int threads;
};

// bias_gelu: g = gelu(h + bias), all of h's type.
struct BiasGeluForward {
  View h, bias, g;
  Shape shape;
  int threads;
};
struct BiasGeluBackward {
  View dg, h, bias, dh, g;
  View part;   // float [batch, runs, width]; absent if d bias is not wanted
  View dbias;  // float [width]
  Shape shape;
  int64_t runs;
  int threads;
};

// reward_pool: scores = x u^T, pooled = softmax over the tokens of the scores, times x. `queries` is a
// multiple of 8, `wanted` of them are written out.
struct RewardPoolForward {
  View x, u;                 // u: float [queries, width]
  View part, top, total;     // float [batch, runs, queries, width], [batch, runs, queries] twice
  View pooled, lse, scores;  // float [batch, wanted, width], [batch, wanted], [batch, length, wanted]
  Shape shape;
  int64_t queries, wanted, runs;
  int threads;
};
struct RewardPoolBackward {
  View x, u, dpooled, delta, scores, lse;  // dpooled: float [batch, queries, width]
  View dx, part, du;                       // part as above, or absent with du: float [wanted, width]
  Shape shape;
  int64_t queries, wanted, runs;
  int threads;
};

// attention: q, out, dout, dq [batch, queries, heads, dim]; k, v, dk, dv [batch, keys, heads, dim], all
// of one type, with strides by sample, token and head. lse, dlse: float [batch, heads, queries]. `last` is
// added to the scores of the last key: log n if that key stands for n equal keys, else 0.
struct AttentionShape {
  int64_t batch, queries, keys, heads, dim;
};
struct AttentionForward {
  View q, k, v, out, lse;
  AttentionShape shape;
  float scale, last;
  int threads;

  // Of the samples from `first` on.
  AttentionForward from(int64_t first) const {
    return {q.from(first), k.from(first), v.from(first), out.from(first), lse.from(first), shape, scale, last, threads};
  }
};
struct AttentionBackward {
  View dout, dlse, q, k, v, out, lse;  // dlse absent: zero
  View dq, dk, dv;                     // dq, or dk and dv, absent: not wanted
  AttentionShape shape;
  float scale, last;
  int threads;

  // Of the samples from `first` on.
  AttentionBackward from(int64_t first) const {
    return {dout.from(first), dlse.from(first), q.from(first), k.from(first), v.from(first), out.from(first),
            lse.from(first), dq.from(first), dk.from(first), dv.from(first), shape, scale, last, threads};
  }
};

#define PRFL_CPU_KERNELS(KERNEL)                    \
  KERNEL(attention_forward, AttentionForward)       \
  KERNEL(attention_backward, AttentionBackward)     \
  KERNEL(norm_forward, NormForward)                 \
  KERNEL(norm_backward, NormBackward)               \
  KERNEL(qk_norm_rope_forward, QkNormRopeForward)   \
  KERNEL(qk_norm_rope_backward, QkNormRopeBackward) \
  KERNEL(bias_gelu_forward, BiasGeluForward)        \
  KERNEL(bias_gelu_backward, BiasGeluBackward)      \
  KERNEL(reward_pool_forward, RewardPoolForward)    \
  KERNEL(reward_pool_backward, RewardPoolBackward)

struct Kernels {
#define PRFL_MEMBER(name, Arguments) void (*name)(const Arguments&);
  PRFL_CPU_KERNELS(PRFL_MEMBER)
#undef PRFL_MEMBER
};

}  // namespace prfl
