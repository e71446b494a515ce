// out = softmax(scale q k^T) v over blocks of keys, with a running maximum of the scores (online softmax).
// Source: Dao, "FlashAttention-2" (2023).
#include <cmath>

#include "attention.h"

namespace prfl::PRFL_ISA {
namespace {

template <class W>
struct Panel {
  alignas(64) float top[PANEL], total[PANEL], alpha[PANEL];

  Panel() {
    for (int l = 0; l < PANEL; l++) top[l] = -INFINITY, total[l] = 0;
  }

  // p = e^(scores - top) of n keys, as words, after top has risen to their maximum; alpha is what
  // that makes of the sums so far.
  void weigh(const float* scores, int64_t n, uint32_t* p) {
    vf high[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) high[v] = load(scores + v * LANES, Full{});
    for (int64_t j = 1; j < n; j++)
      for (int v = 0; v < VECTORS; v++) high[v] = max(load(scores + j * PANEL + v * LANES, Full{}), high[v]);
    for (int v = 0; v < VECTORS; v++) {
      vf old = load(top + v * LANES, Full{});
      high[v] = max(high[v], old);
      vf fall = weight(old, high[v]);
      sum[v] = load(total + v * LANES, Full{}) * fall;
      store(top + v * LANES, high[v], Full{});
      store(alpha + v * LANES, fall, Full{});
    }
    for (int64_t j = 0; j < n; j += 2)
      for (int v = 0; v < VECTORS; v++) {
        const float* s = scores + j * PANEL + v * LANES;
        vf first = weight(load(s, Full{}), high[v]);
        vf second = j + 1 < n ? weight(load(s + PANEL, Full{}), high[v]) : vf{};
        sum[v] += first + second;
        W::store_across(p + j / W::DEPTH * PANEL + v * LANES, first, second);
      }
    for (int v = 0; v < VECTORS; v++) store(total + v * LANES, sum[v], Full{});
  }
};

template <class W, class T>
struct Forward {
  const AttentionForward& a;
  Sizes<W> s{a.shape};
  int64_t tasks = s.heads * s.query_blocks, rooms = min(a.threads, tasks);
  Workspace memory;
  Store k{memory, s.heads, s.blocks, s.block_keys * s.depth}, v{memory, s.heads, s.blocks, s.key_words * s.rows};
  // Of every thread: a block of queries by panel, and one panel's scores and p.
  Store q{memory, rooms, PANELS, s.depth * PANEL}, out{memory, rooms, PANELS, s.rows * PANEL};
  Store scores{memory, rooms, 1, KEYS * PANEL}, p{memory, rooms, 1, KEYS * PANEL};

  void pack(int64_t head, int64_t j) {
    pack_rows<W>(Rows<T>(a.k, s, head, j * KEYS, KEYS, s.keys), k.words(head, j), s.depth);
    pack_transposed<W>(Rows<T>(a.v, s, head, j * KEYS, KEYS, s.keys), v.words(head, j), s.rows,
                       s.key_words);
  }

  // A block of queries, all keys.
  void block(int64_t head, int64_t i, int64_t room) {
    const int64_t first = i * PANELS, panels = min(PANELS, s.panels - first);
    Panel<W> panel[PANELS];
    for (int64_t x = 0; x < panels; x++)
      pack_panel<W>(Rows<T>(a.q, s, head, (first + x) * PANEL, PANEL, s.queries), q.words(room, x), s.depth);
    for (int64_t j = 0; j < s.blocks; j++)
      for (int64_t x = 0; x < panels; x++) step(panel[x], head, j, room, x);
    for (int64_t x = 0; x < panels; x++) write(panel[x], head, (first + x) * PANEL, out.floats(room, x));
  }

  // Block j of keys, panel x of the block of queries.
  void step(Panel<W>& panel, int64_t head, int64_t j, int64_t room, int64_t x) {
    const int64_t n = min(KEYS, s.keys - j * KEYS), depth = count(n, W::DEPTH);
    float* found = scores.floats(room, 0);
    product<W, Into::scaled>(k.words(head, j), s.depth, q.words(room, x), found, PANEL, whole(n, ROWS),
                             s.depth, &a.scale);
    if (j == s.blocks - 1) lift_last(found, n, a.last);
    panel.weigh(found, n, p.words(room, 0));
    auto values = j == 0 ? product<W, Into::set> : product<W, Into::rescaled>;
    values(v.words(head, j), s.key_words, p.words(room, 0), out.floats(room, x), PANEL, s.rows, depth,
           panel.alpha);
  }

  void write(Panel<W>& panel, int64_t head, int64_t first, const float* out) {
    const int64_t b = head / s.head_count, h = head % s.head_count, n = min(PANEL, s.queries - first);
    for (int64_t l = 0; l < n; l++) {
      a.lse.at<float>(b, h)[first + l] = panel.top[l] + std::log(panel.total[l]);
      panel.total[l] = 1.0f / panel.total[l];
    }
    unpack_panel(out, panel.total, n, s.dim, a.out.at<T>(b, first, h), a.out.stride[1]);
  }

  void operator()(Memory& room_for_all) {
    memory.allocate(room_for_all);
    parallel_for(0, s.heads * s.blocks, 1, a.threads, [&](int64_t t, int64_t last) {
      for (; t < last; t++) pack(t / s.blocks, t % s.blocks);
    });
    share(tasks, rooms, a.threads, [&](int64_t t, int64_t room) {
      block(t / s.query_blocks, t % s.query_blocks, room);
    });
  }
};

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_type(a.q.dtype, [&](auto type) {
    using T = decltype(type);
    by_samples<Forward<typename Words<T>::type, T>>(a);
  });
}

}  // namespace prfl::PRFL_ISA
