// With p = exp(scale q k^T - lse),  delta = rowsum(dout out) - dlse,  ds = p (dout v^T - delta):
//     dv = p^T dout,  dk = scale ds^T q,  dq = scale ds k
// five products in one pass, p computed once. A task has a block of keys and goes over all queries, so that
// dk and dv stay with it; into dq of a block of queries the blocks of keys add in turn, the first one
// first, whichever threads they are on: the same bits every time, with one float32 copy of dq.
// Source: Dao, "FlashAttention-2" (2023).
#include <sched.h>

#include "attention.h"

namespace prfl::PRFL_ISA {
namespace {

// What a task works in.
template <class W>
struct Room {
  static constexpr int64_t STEP = QUERIES / W::DEPTH;  // words of a row of p and ds, [KEYS][STEP]
  int64_t columns;
  float *scores, *dp = scores + KEYS * PANEL, *dk = dp + KEYS * PANEL, *dv = dk + KEYS * columns;
  uint32_t* p = reinterpret_cast<uint32_t*>(dv + KEYS * columns);
  uint32_t *ds = p + KEYS * STEP, *ds_panel = ds + KEYS * STEP;

  Room(float* memory, int64_t columns) : columns(columns), scores(memory) {}
  static int64_t size(int64_t columns) { return KEYS * (3 * PANEL + 2 * columns + 2 * STEP); }

  // p and ds of n keys and one panel from scores and dp: p and ds into the panel's columns, ds_panel.
  void differentiate(int64_t n, int64_t panel, const float* lse, const float* delta) const {
    for (int64_t j = 0; j < n; j += 2)
      for (int v = 0; v < VECTORS; v++) {
        const int64_t x = j * PANEL + v * LANES, at = j * STEP + (panel * PANEL + v * LANES) / W::DEPTH;
        vf high = load(lse + v * LANES, Full{}), less = load(delta + v * LANES, Full{});
        vf p0 = weight(load(scores + x, Full{}), high), p1 = {}, ds1 = {};
        vf ds0 = p0 * (load(dp + x, Full{}) - less);
        if (j + 1 < n) {
          p1 = weight(load(scores + x + PANEL, Full{}), high);
          ds1 = p1 * (load(dp + x + PANEL, Full{}) - less);
        }
        W::store_along(p + at, STEP, p0, p1);
        W::store_along(ds + at, STEP, ds0, ds1);
        W::store_across(ds_panel + j / W::DEPTH * PANEL + v * LANES, ds0, ds1);
      }
  }
};

template <class W, class T>
struct Backward {
  const AttentionBackward& a;
  Sizes<W> s{a.shape};
  bool wants_q = static_cast<bool>(a.dq), wants_kv = static_cast<bool>(a.dk);
  int64_t tasks = s.heads * s.blocks, rooms = min(a.threads, tasks);
  Workspace memory;
  // Keys by block: k and v as rows, k transposed.
  Store k{memory, s.heads, s.blocks, s.block_keys * s.depth}, v{memory, s.heads, s.blocks, s.block_keys * s.depth};
  Store kt{memory, wants_q ? s.heads : 0, s.blocks, s.key_words * s.rows};
  // Queries by panel: q and dout transposed, lse, delta, dq transposed; by block: q and dout.
  Store qt{memory, s.heads, s.panels, s.depth * PANEL}, dout_t{memory, s.heads, s.panels, s.depth * PANEL};
  Store lse{memory, s.heads, s.panels, PANEL}, delta{memory, s.heads, s.panels, PANEL};
  Store dq{memory, wants_q ? s.heads : 0, s.panels, s.rows * PANEL};
  Store q{memory, wants_kv ? s.heads : 0, s.query_blocks, s.query_words * s.columns};
  Store dout{memory, wants_kv ? s.heads : 0, s.query_blocks, s.query_words * s.columns};
  // Blocks of keys that have added to dq of a block of queries.
  Store added{memory, wants_q ? s.heads : 0, s.query_blocks, 1};
  Store room{memory, rooms, 1, Room<W>::size(s.columns)};

  Rows<T> keys(const View& x, int64_t head, int64_t j) const {
    return Rows<T>(x, s, head, j * KEYS, KEYS, s.keys);
  }
  Rows<T> queries(const View& x, int64_t head, int64_t first, int64_t most) const {
    return Rows<T>(x, s, head, first, most, s.queries);
  }

  void pack_keys(int64_t head, int64_t j) {
    pack_rows<W>(keys(a.k, head, j), k.words(head, j), s.depth);
    pack_rows<W>(keys(a.v, head, j), v.words(head, j), s.depth);
    if (wants_q) pack_transposed<W>(keys(a.k, head, j), kt.words(head, j), s.rows, s.key_words);
  }

  void pack_queries(int64_t head, int64_t i) {
    const int64_t end = min(s.panels, (i + 1) * PANELS);
    for (int64_t x = i * PANELS; x < end; x++) {
      pack_panel<W>(queries(a.q, head, x * PANEL, PANEL), qt.words(head, x), s.depth);
      pack_panel<W>(queries(a.dout, head, x * PANEL, PANEL), dout_t.words(head, x), s.depth);
      row_sums(head, x);
    }
    if (wants_kv) {
      pack_panels<W>(queries(a.q, head, i * QUERIES, QUERIES), q.words(head, i), s.columns, s.query_words);
      pack_panels<W>(queries(a.dout, head, i * QUERIES, QUERIES), dout.words(head, i), s.columns, s.query_words);
    }
    if (wants_q) *added.words(head, i) = 0;
  }

  // Past the last query lse is infinite: p is next to nothing there, ds and dout are 0.
  void row_sums(int64_t head, int64_t panel) {
    const int64_t b = head / s.head_count, h = head % s.head_count, first = panel * PANEL;
    const Rows<T> out_rows = queries(a.out, head, first, PANEL);
    const Rows<T> dout_rows = queries(a.dout, head, first, PANEL);
    for (int64_t l = 0; l < PANEL; l++) {
      float& high = lse.floats(head, panel)[l];
      float& total = delta.floats(head, panel)[l];
      high = __builtin_inff();
      total = 0;
      if (l >= out_rows.length) continue;
      vf products = {};
      each(s.dim, [&](int64_t d, auto m, int) {
        products += load(out_rows.at(l) + d, m) * load(dout_rows.at(l) + d, m);
      });
      high = a.lse.at<float>(b, h)[first + l];
      total = sum(products) - (a.dlse ? a.dlse.at<float>(b, h)[first + l] : 0.0f);
    }
  }

  // Block j of keys, block i of queries.
  void block(const Room<W>& r, int64_t head, int64_t j, int64_t i) {
    const int64_t n = min(KEYS, s.keys - j * KEYS), rows = whole(n, ROWS);
    const int64_t begin = i * PANELS, end = min(s.panels, begin + PANELS);
    uint32_t* turn = wants_q ? added.words(head, i) : nullptr;
    for (int64_t x = begin; x < end; x++) {
      if (wants_q) prefetch(dq.floats(head, x), dq.size());
      product<W, Into::scaled>(k.words(head, j), s.depth, qt.words(head, x), r.scores, PANEL, rows, s.depth,
                               &a.scale);
      if (j == s.blocks - 1) lift_last(r.scores, n, a.last);
      product<W, Into::set>(v.words(head, j), s.depth, dout_t.words(head, x), r.dp, PANEL, rows, s.depth);
      r.differentiate(n, x - begin, lse.floats(head, x), delta.floats(head, x));
      if (!wants_q) continue;
      while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != j) sched_yield();
      product<W>(j > 0, kt.words(head, j), s.key_words, r.ds_panel, dq.floats(head, x), PANEL, s.rows,
                 count(n, W::DEPTH));
      if (j == s.blocks - 1) write_dq(head, x);
    }
    if (wants_q) __atomic_store_n(turn, static_cast<uint32_t>(j + 1), __ATOMIC_RELEASE);
    if (!wants_kv) return;
    const int64_t depth = (end - begin) * PANEL / W::DEPTH;
    for (int64_t c = 0; c < s.columns; c += PANEL) {
      product<W>(i > 0, r.p, r.STEP, dout.words(head, i) + c * s.query_words, r.dv + c, s.columns, rows, depth);
      product<W>(i > 0, r.ds, r.STEP, q.words(head, i) + c * s.query_words, r.dk + c, s.columns, rows, depth);
    }
  }

  void write_dq(int64_t head, int64_t panel) {
    float scale[PANEL];
    for (float& x : scale) x = a.scale;
    const int64_t n = min(PANEL, s.queries - panel * PANEL);
    T* to = a.dq.at<T>(head / s.head_count, panel * PANEL, head % s.head_count);
    unpack_panel(dq.floats(head, panel), scale, n, s.dim, to, a.dq.stride[1]);
  }

  void write(const View& x, const float* from, float scale, int64_t head, int64_t j) {
    for (int64_t l = 0; l < min(KEYS, s.keys - j * KEYS); l++) {
      T* to = x.at<T>(head / s.head_count, j * KEYS + l, head % s.head_count);
      const float* row = from + l * s.columns;
      each(s.dim, [&](int64_t d, auto m, int) { store(to + d, load(row + d, m) * scale, m); });
    }
  }

  void operator()(Memory& room_for_all) {
    memory.allocate(room_for_all);
    parallel_for(0, s.heads * s.blocks, 1, a.threads, [&](int64_t t, int64_t last) {
      for (; t < last; t++) pack_keys(t / s.blocks, t % s.blocks);
    });
    parallel_for(0, s.heads * s.query_blocks, 1, a.threads, [&](int64_t t, int64_t last) {
      for (; t < last; t++) pack_queries(t / s.query_blocks, t % s.query_blocks);
    });
    // Tasks are begun in order, so the one that another waits for is done or under way; with as many heads
    // as threads hardly any waits.
    share(tasks, rooms, a.threads, [&](int64_t t, int64_t thread) {
      const int64_t head = t % s.heads, j = t / s.heads;
      const Room<W> r(room.floats(thread, 0), s.columns);
      for (int64_t i = 0; i < s.query_blocks; i++) block(r, head, j, i);
      if (!wants_kv) return;
      write(a.dv, r.dv, 1.0f, head, j);
      write(a.dk, r.dk, a.scale, head, j);
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackward& a) {
  with_type(a.q.dtype, [&](auto type) {
    using T = decltype(type);
    by_samples<Backward<typename Words<T>::type, T>>(a);
  });
}

}  // namespace prfl::PRFL_ISA
