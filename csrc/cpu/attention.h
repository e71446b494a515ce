// What the forward and the backward of attention share: packing, and the exponential.
//
// Scores are kept transposed, keys by queries: a vector holds the scores of one key with neighbouring
// queries. Maxima, sums, lse and delta are then plain vector operations, and all that has to be transposed
// is packed once. Keys come in blocks of KEYS, queries in panels of PANEL and blocks of PANELS panels.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace prfl::PRFL_ISA {

constexpr int64_t GROUP = 8;                            // rows that are transposed at a time
constexpr int64_t UNIT = LANES == 16 ? 16 : 24;         // of keys: whole ROWS, and whole GROUPs of their pairs
constexpr int64_t KEYS = LANES == 16 ? 256 : 240;
constexpr int64_t PANELS = 4;
constexpr int64_t QUERIES = PANELS * PANEL;
constexpr int64_t HEAD_DIM = 256;  // at most

inline int64_t work(const AttentionShape& a) { return a.batch * a.heads * a.queries * a.keys * a.dim; }

// How many of everything, in whole blocks: words of a head dim, its rows and columns in a product.
template <class W>
struct Sizes {
  int64_t heads, head_count, dim, queries, keys;
  int64_t depth = count(dim, W::DEPTH), rows = whole(dim, ROWS), columns = whole(dim, PANEL);
  int64_t blocks = count(keys, KEYS), panels = count(queries, PANEL), query_blocks = count(queries, QUERIES);
  // Of a block, smaller where there are few in all: 256 heads of 13 tokens took 40 MB of memory to work in, and
  // the system's work to give it was 4/5 of a backward.
  int64_t block_keys = min(KEYS, whole(keys, UNIT)), block_queries = min(QUERIES, panels * PANEL);
  int64_t key_words = block_keys / W::DEPTH, query_words = block_queries / W::DEPTH;

  explicit Sizes(const AttentionShape& a)
      : heads(a.batch * a.heads), head_count(a.heads), dim(a.dim), queries(a.queries), keys(a.keys) {}
};

// Memory that grows when more is asked for, on huge pages where there is enough of it: a backward at 1080 tokens
// took 37 ms where it took 43 on pages of 4 KiB.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(data_); }

  // Room for n floats, which what was asked for before loses.
  float* floats(int64_t n) {
    if (n <= count_) return data_;
    constexpr int64_t HUGE = 2 << 20;
    const bool huge = 4 * n >= 2 * HUGE;
    const int64_t page = huge ? HUGE : 64, bytes = whole(4 * n, page);
    free(data_);
    count_ = 0;
    data_ = static_cast<float*>(aligned_alloc(page, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (huge) advise_huge_pages(data_, bytes);
    count_ = n;
    return data_;
  }

 private:
  int64_t count_ = 0;
  float* data_ = nullptr;
};

// All that some samples are worked on in, in one piece of memory.
class Workspace {
 public:
  // The offset of n floats.
  int64_t reserve(int64_t n) {
    const int64_t at = size_;
    size_ += whole(n, 16);
    return at;
  }
  void allocate(Memory& memory) { data_ = memory.floats(size_); }
  float* at(int64_t offset) const { return data_ + offset; }
  int64_t bytes() const { return 4 * size_; }

 private:
  int64_t size_ = 0;
  float* data_ = nullptr;
};

// Runs a Pass, the Forward or Backward of a call, on as many samples at a time as have CACHE bytes of every thread
// to work in, at least one: memory that a core has at hand, and little of it.
template <class Pass, class Call>
void by_samples(Call call) {
  constexpr int64_t CACHE = 1 << 20;
  const int64_t batch = call.shape.batch;
  if (work(call.shape) <= 1 << 20) call.threads = 1;  // more are not worth waking
  call.shape.batch = 1;
  const int64_t most = min(batch, 1 + call.threads * CACHE / Pass{call}.memory.bytes());
  Memory memory;
  for (int64_t first = 0; first < batch; first += most) {
    Call part = call.from(first);
    part.shape.batch = min(most, batch - first);
    Pass{part}(memory);
  }
}

// `count` arrays of `size` words or floats for every head.
class Store {
 public:
  Store(Workspace& room, int64_t heads, int64_t count, int64_t size)
      : room_(room), size_(size), head_(count * size), offset_(room.reserve(heads * head_)) {}
  float* floats(int64_t head, int64_t i) const { return room_.at(offset_ + head * head_ + i * size_); }
  uint32_t* words(int64_t head, int64_t i) const { return reinterpret_cast<uint32_t*>(floats(head, i)); }
  int64_t size() const { return size_; }

 private:
  const Workspace& room_;
  int64_t size_, head_, offset_;
};

// f(t, room) for t < n, where room < rooms counts the threads that work: each has its own scratch. Tasks
// are begun in order.
template <class F>
inline void share(int64_t n, int64_t rooms, int threads, F&& f) {
  int64_t next = 0;
  parallel_for(0, rooms, 1, threads, [&](int64_t room, int64_t) {
    for (int64_t t; (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) f(t, room);
  });
}

// Some rows of one head of a [B, L, H, D] tensor.
template <class T>
struct Rows {
  const T* data;
  int64_t step, length, dim;

  // Rows from `first` on, at most `most` of `all` that there are; `head` counts heads of all samples.
  template <class W>
  Rows(const View& a, const Sizes<W>& s, int64_t head, int64_t first, int64_t most, int64_t all)
      : data(a.at<const T>(head / s.head_count, first, head % s.head_count)),
        step(a.stride[1]),
        length(min(most, all - first)),
        dim(s.dim) {}

  const T* at(int64_t l) const { return l < length ? data + l * step : nullptr; }
};

// Words of row l whose depth runs along the rows, and of rows DEPTH * l ... whose depth runs across them;
// zero where there is no row.
template <class W, class T>
inline void along(const Rows<T>& a, int64_t l, uint32_t* to) {
  if (l < a.length)
    W::along(a.at(l), a.dim, to);
  else
    memset(to, 0, count(a.dim, W::DEPTH) * sizeof *to);
}
template <class W, class T>
inline void across(const Rows<T>& a, int64_t l, uint32_t* to) {
  if (W::DEPTH * l < a.length)
    W::across(a.at(W::DEPTH * l), a.at(W::DEPTH * l + W::DEPTH - 1), a.dim, to);
  else
    memset(to, 0, a.dim * sizeof *to);
}

// to [width][step] = the transpose of rows of words, row(l, words) for l < n rounded up to whole 8.
template <class F>
inline void transpose(int64_t n, int64_t width, uint32_t* to, int64_t step, F&& row) {
  uint32_t words[GROUP][HEAD_DIM];
  for (int64_t first = 0; first < n; first += GROUP) {
    for (int64_t l = 0; l < GROUP; l++) row(first + l, words[l]);
    for (int64_t w = 0; w < width; w++)
      for (int64_t l = 0; l < GROUP; l++) to[w * step + first + l] = words[l][w];
  }
}

// to [rows][depth]: left operand of a product over the head dim.
template <class W, class T>
void pack_rows(const Rows<T>& a, uint32_t* to, int64_t depth) {
  for (int64_t l = 0; l < whole(a.length, ROWS); l++) along<W>(a, l, to + l * depth);
}

// to [depth][PANEL]: right operand of such a product.
template <class W, class T>
void pack_panel(const Rows<T>& a, uint32_t* to, int64_t depth) {
  transpose(PANEL, depth, to, PANEL, [&](int64_t l, uint32_t* words) { along<W>(a, l, words); });
}

// to [dim, in whole ROWS][step]: left operand of a product over the keys.
template <class W, class T>
void pack_transposed(const Rows<T>& a, uint32_t* to, int64_t rows, int64_t step) {
  transpose(count(a.length, W::DEPTH), a.dim, to, step, [&](int64_t l, uint32_t* words) {
    across<W>(a, l, words);
  });
  memset(to + a.dim * step, 0, (rows - a.dim) * step * sizeof *to);
}

// to [dim, in whole PANELs][step][PANEL]: right operands of a product over the queries.
template <class W, class T>
void pack_panels(const Rows<T>& a, uint32_t* to, int64_t columns, int64_t step) {
  uint32_t words[HEAD_DIM] = {};
  for (int64_t l = 0; l < whole(a.length, PANEL) / W::DEPTH; l++) {
    across<W>(a, l, words);
    for (int64_t c = 0; c < columns; c += PANEL)
      memcpy(to + c * step + l * PANEL, words + c, PANEL * sizeof *words);
  }
}

// to [n rows][dim] = scale [n] times the transpose of from [dim][PANEL].
template <class T>
void unpack_panel(const float* from, const float* scale, int64_t n, int64_t dim, T* to, int64_t step) {
  float rows[GROUP][HEAD_DIM];
  for (int64_t first = 0; first < n; first += GROUP) {
    for (int64_t d = 0; d < dim; d++)
      for (int64_t l = 0; l < GROUP; l++) rows[l][d] = from[d * PANEL + first + l] * scale[first + l];
    for (int64_t l = first; l < min(n, first + GROUP); l++)
      each(dim, [&](int64_t d, auto m, int) { store(to + l * step + d, load(rows[l - first] + d, m), m); });
  }
}

// Ask for n floats or words that are needed soon and not in the caches next to the core.
inline void prefetch(const void* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(static_cast<const float*>(p) + i, 0, 2);
}

inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// Add `more` to the scores of the last of n keys.
inline void lift_last(float* scores, int64_t n, float more) {
  float* row = scores + (n - 1) * PANEL;
  for (int v = 0; v < VECTORS; v++) store(row + v * LANES, load(row + v * LANES, Full{}) + more, Full{});
}

// e^(score - lse) for score - lse < 88; never less than 2^-126, which adds nothing. NaN stays NaN. The
// difference of large scores is exact, where one in base 2 would be off by the rounding of both. 2^r is
// the minimax polynomial of degree 6 on [-1/2, 1/2] that is 1 at 0, to 1 ULP.
inline vf weight(vf score, vf lse) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf a = max(all(-126.0f), (score - lse) * 1.4426950408889634f);
  vf shifted = a + magic;
  vf r = a - (shifted - magic);
  vf p = r * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e43p-1f;
  p = p * r + 1.0f;
  return as<vf>(as<vu>(p) + (as<vu>(shifted) << 23));
}

}  // namespace prfl::PRFL_ISA
