// c [rows, PANEL] = or += a b for the small products inside a fused kernel, on operands that are packed
// once and read often. One tile of c stays in registers for the whole depth.
//
// Operands are made of 32-bit words, each one step of the depth: a float32 (Singles), or two bf16 that are
// neighbours in depth (Pairs), where the processor multiplies those. a is [rows, depth] words, its rows at
// any distance, b is [depth, PANEL] words. rows are whole ROWS: what is packed has room for them.
#pragma once

#include "vec.h"

namespace prfl::PRFL_ISA {

// 16 accumulators of 32 registers, 12 of 16. On Zen 4, 16 reach 95 % of the peak, as 24 do.
constexpr int ROWS = LANES == 16 ? 8 : 6;
constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;

constexpr int64_t count(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
constexpr int64_t whole(int64_t n, int64_t unit) { return count(n, unit) * unit; }

struct Singles {
  static constexpr int DEPTH = 1;

  static vf dot(vf sum, uint32_t a, vu b) { return as<vf>(b) * as<float>(a) + sum; }

  // The words of a row whose depth runs along it.
  template <class T>
  static void along(const T* row, int64_t dim, uint32_t* to) {
    each(dim, [&](int64_t i, auto m, int) { store(reinterpret_cast<float*>(to) + i, load(row + i, m), m); });
  }
  // The words of DEPTH rows whose depth runs across them.
  template <class T>
  static void across(const T* row, const T*, int64_t dim, uint32_t* to) {
    along(row, dim, to);
  }
  // Two rows of results as words: those of the right operand of a product over these rows ...
  static void store_across(uint32_t* to, vf first, vf second) { store_along(to, PANEL, first, second); }
  // ... and those of the left operand of a product over the columns.
  static void store_along(uint32_t* to, int64_t step, vf first, vf second) {
    memcpy(to, &first, sizeof first);
    memcpy(to + step, &second, sizeof second);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int DEPTH = 2;

  static vf dot(vf sum, uint32_t a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }

  static void along(const bf16* row, int64_t dim, uint32_t* to) {
    if (dim % 2 != 0) to[dim / 2] = 0;
    memcpy(to, row, dim * sizeof *row);
  }
  static void across(const bf16* row, const bf16* next, int64_t dim, uint32_t* to) {
    if (next == nullptr)
      for (int64_t i = 0; i < dim; i++) to[i] = row[i].bits;
    else
      for (int64_t i = 0; i < dim; i++) to[i] = row[i].bits | static_cast<uint32_t>(next[i].bits) << 16;
  }
  static void store_across(uint32_t* to, vf first, vf second) {
    const vu zip = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                    0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16((__m512i)zip, both(first, second)));
  }
  static void store_along(uint32_t* to, int64_t step, vf first, vf second) {
    __m512i rows = both(first, second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rows));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + step), _mm512_extracti64x4_epi64(rows, 1));
  }

 private:
  static __m512i both(vf first, vf second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
};
#endif

// The words that inputs of type T are packed in.
template <class T>
struct Words {
  using type = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct Words<bf16> {
  using type = Pairs;
};
#endif

// c = a b,  c = x[0] a b,  c += a b,  or c = c x + a b with an x for every column.
enum class Into { set, scaled, add, rescaled };

template <class W, Into C>
inline void tile(const uint32_t* a, int64_t a_row, const uint32_t* b, float* c, int64_t c_row, int64_t depth,
                 const float* x) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      sum[r][v] = C == Into::set || C == Into::scaled ? vf{} : load(c + r * c_row + v * LANES, Full{});
      if (C == Into::rescaled) sum[r][v] *= load(x + v * LANES, Full{});
    }
  for (int64_t i = 0; i < depth; i++) {
    vu right[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) memcpy(&right[v], b + i * PANEL + v * LANES, sizeof right[v]);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sum[r][v] = W::dot(sum[r][v], a[r * a_row + i], right[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
      store(c + r * c_row + v * LANES, C == Into::scaled ? sum[r][v] * *x : sum[r][v], Full{});
}

template <class W, Into C>
inline void product(const uint32_t* a, int64_t a_row, const uint32_t* b, float* c, int64_t c_row,
                    int64_t rows, int64_t depth, const float* x = nullptr) {
  for (int64_t r = 0; r < rows; r += ROWS)
    tile<W, C>(a + r * a_row, a_row, b, c + r * c_row, c_row, depth, x);
}

template <class W>
inline void product(bool add, const uint32_t* a, int64_t a_row, const uint32_t* b, float* c, int64_t c_row,
                    int64_t rows, int64_t depth) {
  if (add)
    product<W, Into::add>(a, a_row, b, c, c_row, rows, depth);
  else
    product<W, Into::set>(a, a_row, b, c, c_row, rows, depth);
}

}  // namespace prfl::PRFL_ISA
