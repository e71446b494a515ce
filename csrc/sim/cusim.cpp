// The scheduler of cusim. Under ThreadSanitizer it is compiled without -fsanitize=thread and with
// -DCUSIM_TSAN, so that the kernels' own accesses alone are seen.
#include "cusim.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace cusim {

namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxCluster = 8;
constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* file = nullptr;
  int line = 0;
};
struct Collective {
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* file = nullptr;
  int line = 0;
  char slots[2][kWarp * kSlot];
};
struct Block {
  uint3 index;
  char* shared = nullptr;
  unsigned done = 0;
  Barrier barriers[16];
  std::vector<std::map<unsigned, std::unique_ptr<Collective>>> warps;
};
struct Store {
  void* to;
  const void* from;
  size_t bytes;
};
struct Load {
  uint64_t* bar;
  int64_t bytes;
  std::function<void()> work;
};
struct Fiber {
  Thread thread;
  Stack stack;
  Block* block;
  bool done;
  // Blocked while (*word & mask) == value.
  const uint64_t* word;
  uint64_t mask, value;
  const char *what, *file;
  int line;
  uint64_t cluster_arrivals;
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};

Fiber* current;
std::vector<std::unique_ptr<Fiber>> fibers;  // reused by every launch
unsigned running;                            // of them in this cluster
uint64_t turn;                               // of the scheduler, in which every warp runs once
std::vector<Block> blocks;                   // of the cluster now running
Barrier cluster;
std::deque<Load> loads;
bool early;  // loads happen when they are issued: what overwrites a tile still in use shows
const std::function<void()>* body;
Launch now;
std::string error;
std::map<const void*, size_t> allowed;
char finished;  // what the end of a fiber releases

struct Watch {
  const char* base;
  size_t size;
  uint64_t read, written;
};
std::vector<Watch> watches;
std::vector<Launch> launched;

std::string place(const Fiber& f) {
  return "thread " + std::to_string(f.thread.thread.x) + " of block " + std::to_string(f.thread.block.x) +
         (f.done ? " has ended" : std::string(" at ") + f.what + " " + f.file + ":" + std::to_string(f.line));
}

void yield_to_scheduler() { leave(current->stack, false); }

void block_on(const uint64_t* word, uint64_t mask, uint64_t value) {
  Fiber* me = current;
  me->word = word, me->mask = mask, me->value = value;
  while ((*word & mask) == value) yield_to_scheduler();
  me->word = nullptr;
}

void at(const char* what, const char* file, int line) {
  current->what = what, current->file = file, current->line = line;
}

void enter_fiber() {
  begun(current->stack);
  (*body)();
  if (!current->open.empty() || !current->groups.empty())
    fail("bulk stores that the thread does not wait for");
  current->done = true;
  ++current->block->done;
  tsan_release(&finished);
  leave(current->stack, true);
}

bool inside(const void* p, size_t bytes, const char* base, size_t size) {
  const char* c = static_cast<const char*>(p);
  return base != nullptr && c >= base && c + bytes <= base + size;
}

bool in_shared(const void* p, size_t bytes) {
  for (const Block& b : blocks)
    if (inside(p, bytes, b.shared, now.shared)) return true;
  return false;
}

void deadlock() {
  std::string text = "deadlock:";
  unsigned shown = 0;
  for (unsigned i = 0; i < running && shown < 4; ++i) {
    const Fiber &f = *fibers[i], &before = *fibers[i ? i - 1 : 0];
    if (i == 0 || f.line != before.line || f.done != before.done) text += (shown++ ? "; " : " ") + place(f);
  }
  error = text;
}

// Runs the threads of a warp until each has ended or is blocked. Returns whether any moved.
bool run_warp(unsigned first, unsigned& left) {
  const unsigned last = std::min(first + kWarp, running);
  bool any = false;
  for (bool moved = true; moved && error.empty(); any |= moved) {
    moved = false;
    for (unsigned i = first; i < last && error.empty(); ++i) {
      Fiber& f = *fibers[i];
      if (f.done || (f.word && (*f.word & f.mask) == f.value)) continue;
      current = &f, self = &f.thread;
      resume(f.stack);
      moved = true;
      left -= f.done;
    }
  }
  return any;
}

// Runs all threads of the cluster to their ends, or to an error. Each warp goes as far as it can before
// another one runs, so that one that should have waited sees what the others have not yet written; every
// other cluster begins with the last warp, so that either side of a race comes first in one of them.
void schedule(bool backwards) {
  unsigned left = running;
  const unsigned warps = (running + kWarp - 1) / kWarp;
  for (; left && error.empty(); ++turn) {
    bool moved = false;
    for (unsigned w = 0; w < warps && error.empty(); ++w)
      moved |= run_warp((backwards ? warps - 1 - w : w) * kWarp, left);
    if (moved || !error.empty()) continue;
    if (loads.empty()) return deadlock();
    Quiet quiet;  // the race detector heard of the access when the copy was asked for
    Load load = std::move(loads.front());
    loads.pop_front();
    load.work();
    mbarrier_add(load.bar, 0, -load.bytes);
  }
}

void check(const Launch& l) {
  const unsigned threads = l.block.x * l.block.y * l.block.z, ranks = l.cluster.x;
  if (threads == 0 || threads > kMaxThreads) throw std::runtime_error("cusim: bad number of threads");
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.y > 65535 || l.grid.z > 65535)
    throw std::runtime_error("cusim: bad grid");
  if (ranks == 0 || ranks > kMaxCluster || l.grid.x % ranks || l.cluster.y != 1 || l.cluster.z != 1)
    throw std::runtime_error("cusim: clusters do not divide the grid, or are larger than 8 blocks");
  auto found = allowed.find(l.kernel);
  const size_t most = found == allowed.end() ? kDefaultShared : std::max(kDefaultShared, found->second);
  if (l.shared > most || l.shared > kMaxShared) throw std::runtime_error("cusim: too much shared memory");
}

void prepare(uint3 first, unsigned threads) {
  const unsigned ranks = now.cluster.x;
  blocks = std::vector<Block>(ranks);
  cluster = Barrier{};
  running = threads * ranks;
  while (fibers.size() < running) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < running; ++i) {
    Fiber& f = *fibers[i];
    const unsigned t = i % threads, rank = i / threads;
    Block& b = blocks[rank];
    if (t == 0) {
      b.index = make_uint3(first.x + rank, first.y, first.z);
      b.warps.resize((threads + kWarp - 1) / kWarp);
      // The exact size, so that AddressSanitizer's red zone begins right after it.
      if (now.shared && posix_memalign(reinterpret_cast<void**>(&b.shared), 1024, now.shared))
        throw std::runtime_error("cusim: no memory");
      if (b.shared) std::memset(b.shared, 0xff, now.shared);
    }
    const dim3 n = now.block;
    f.thread = {make_uint3(t % n.x, t / n.x % n.y, t / n.x / n.y), b.index, t % kWarp, rank, ranks, b.shared};
    f.block = &b, f.done = false, f.word = nullptr, f.cluster_arrivals = 0;
    f.what = "its start", f.file = "", f.line = 0;
    f.open.clear(), f.groups.clear();
    start(f.stack, enter_fiber);
  }
}

}  // namespace

Thread* self;

void fail(const char* what) {
  error = std::string(what) + ", " + place(*current);
  while (true) yield_to_scheduler();
}

void barrier(unsigned id, unsigned count, bool wait, const char* file, int line) {
  Quiet quiet;
  Block& block = *current->block;
  Barrier& b = block.barriers[id];
  at("a barrier", file, line);
  const unsigned all = now.block.x * now.block.y * now.block.z;
  if (b.arrived == 0) b.file = file, b.line = line;
  if (count == 0 && (b.file != file || b.line != line)) fail("divergent __syncthreads");
  tsan_release(&b);
  const uint64_t before = b.generation;
  if (++b.arrived == (count ? count : all)) b.arrived = 0, ++b.generation;
  if (!wait) return;
  block_on(&b.generation, ~0ull, before);
  tsan_acquire(&b);
}

void pause(const char* file, int line) {
  Quiet quiet;
  at("a pause", file, line);
  block_on(&turn, ~0ull, turn);
}

void cluster_arrive(const char* file, int line) {
  Quiet quiet;
  at("the arrival at a cluster barrier", file, line);
  if (current->cluster_arrivals > cluster.generation)
    fail("two arrivals at a cluster barrier without a wait");
  ++current->cluster_arrivals;
  tsan_release(&cluster);
  if (++cluster.arrived == running) cluster.arrived = 0, ++cluster.generation;
}

void cluster_wait(const char* file, int line) {
  Quiet quiet;
  at("a cluster barrier", file, line);
  if (current->cluster_arrivals == 0) fail("a cluster barrier waited for without arrival");
  block_on(&cluster.generation, ~0ull, current->cluster_arrivals - 1);
  tsan_acquire(&cluster);
}

void* at_rank(void* shared, unsigned rank) {
  if (rank >= blocks.size() || !inside(shared, 1, current->block->shared, now.shared))
    fail("a place in shared memory of no block of the cluster");
  if (blocks[rank].done) fail("shared memory of a block that has ended");
  return blocks[rank].shared + (static_cast<char*>(shared) - current->block->shared);
}

char* exchange(unsigned mask, const void* value, size_t n, bool fence, const char* file, int line) {
  Quiet quiet;
  const Thread& me = current->thread;
  at("a collective of a warp", file, line);
  if (!(mask >> me.lane & 1)) fail("a lane outside the mask of its own collective");
  if (n > kSlot) fail("a value too large for a collective");
  const unsigned thread = me.thread.x + now.block.x * (me.thread.y + now.block.y * me.thread.z);
  auto& held = current->block->warps[thread / kWarp][mask];
  if (!held) held = std::make_unique<Collective>();
  Collective& c = *held;
  if (c.arrived == 0) c.file = file, c.line = line;
  if (c.file != file || c.line != line) fail("lanes of one mask at two collectives");
  if (fence) tsan_release(&c);
  const uint64_t before = c.generation;
  char* slots = c.slots[before & 1];
  std::memcpy(slots + kSlot * me.lane, value, n);
  c.arrived |= 1u << me.lane;
  if (c.arrived == mask) c.arrived = 0, ++c.generation;
  block_on(&c.generation, ~0ull, before);
  if (fence) tsan_acquire(&c);
  return slots;
}

// An mbarrier is 64 bits: phase 1, arrivals expected 20, still pending 20, and bytes still to come 23,
// with an offset since they may be counted down before they are announced.
namespace {
constexpr int64_t kBytesZero = 1 << 22;
uint64_t packed(uint64_t phase, uint64_t expected, uint64_t pending, int64_t bytes) {
  return phase << 63 | expected << 43 | pending << 23 | uint64_t(bytes + kBytesZero);
}
}  // namespace

void mbarrier_init(uint64_t* bar, unsigned count) {
  Quiet quiet;
  if (!inside(bar, 8, current->block->shared, now.shared)) fail("an mbarrier outside shared memory");
  *bar = packed(0, count, count, 0);
  tsan_release(bar);
}

void mbarrier_add(uint64_t* bar, unsigned arrivals, int64_t bytes) {
  Quiet quiet;
  const uint64_t expected = *bar >> 43 & 0xfffff;
  uint64_t phase = *bar >> 63, pending = *bar >> 23 & 0xfffff;
  const int64_t left = int64_t(*bar & 0x7fffff) - kBytesZero + bytes;
  if (expected == 0 || expected > 2048) fail("an mbarrier that is not initialised");
  if (arrivals > pending) fail("more arrivals than the mbarrier expects");
  tsan_release(bar);
  pending -= arrivals;
  if (pending == 0 && left == 0) phase ^= 1, pending = expected;
  *bar = packed(phase, expected, pending, left);
}

void mbarrier_wait(uint64_t* bar, unsigned parity, const char* file, int line) {
  Quiet quiet;
  at("an mbarrier", file, line);
  block_on(bar, 1ull << 63, uint64_t(parity & 1) << 63);
  tsan_acquire(bar);
}

void later(uint64_t* bar, int64_t bytes, std::function<void()> work) {
  Quiet quiet;
  mbarrier_add(bar, 0, 0);  // fails here, not when the copy arrives
  tsan_release(bar);
  if (!early) return loads.push_back({bar, bytes, std::move(work)});
  work();
  mbarrier_add(bar, 0, -bytes);
}

void bulk_load(void* to, const void* from, size_t bytes, uint64_t* bar) {
  if (!in_shared(to, bytes)) fail("a bulk copy to a place outside shared memory");
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) fail("a bulk copy that is not of 16-byte units");
  touch(from, bytes, false);
  tsan_write(to, bytes);
  Quiet quiet;
  later(bar, int64_t(bytes), [=] { std::memcpy(to, from, bytes); });
}

void bulk_store(void* to, const void* from, size_t bytes) {
  if (!in_shared(from, bytes)) fail("a bulk copy from a place outside shared memory");
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16) fail("a bulk copy that is not of 16-byte units");
  touch(to, bytes, true);
  tsan_read(from, bytes);
  Quiet quiet;
  current->open.push_back({to, from, bytes});
}

void bulk_commit() {
  Quiet quiet;
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void bulk_wait(size_t groups) {
  Quiet quiet;
  for (auto& done = current->groups; done.size() > groups; done.pop_front())
    for (const Store& s : done.front()) std::memcpy(s.to, s.from, s.bytes);
}

void touch(const void* p, size_t bytes, bool write) {
  Quiet quiet;
  if (bytes <= 16 && uintptr_t(p) % bytes) fail("a misaligned access");
  if (in_shared(p, bytes) || watches.empty()) return;
  for (Watch& w : watches)
    if (inside(p, bytes, w.base, w.size)) {
      (write ? w.written : w.read) += bytes;
      return;
    }
  fail(write ? "a write outside every array" : "a read outside every array");
}

Unseen::Unseen() {
  CUSIM_TSAN_CALL(AnnotateIgnoreReadsBegin("", 0));
  CUSIM_TSAN_CALL(AnnotateIgnoreWritesBegin("", 0));
}
Unseen::~Unseen() {
  CUSIM_TSAN_CALL(AnnotateIgnoreWritesEnd("", 0));
  CUSIM_TSAN_CALL(AnnotateIgnoreReadsEnd("", 0));
}

void race_check(const void* p, size_t bytes, bool write) {
  if (write)
    tsan_write(const_cast<void*>(p), bytes);
  else
    tsan_read(p, bytes);
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) throw std::runtime_error("cusim: more than 227 KiB of shared memory");
  allowed[kernel] = bytes;
}

void launch(const Launch& l, const std::function<void()>& function) {
  check(l);
  now = l, body = &function;
  launched.push_back(l);
  gridDim = l.grid, blockDim = l.block;
  error.clear();
  const unsigned threads = l.block.x * l.block.y * l.block.z;
  unsigned order = 0;
  for (unsigned z = 0; z < l.grid.z; ++z)
    for (unsigned y = 0; y < l.grid.y; ++y)
      for (unsigned x = 0; x < l.grid.x; x += l.cluster.x) {
        loads.clear();
        prepare(make_uint3(x, y, z), threads);
        schedule(order++ % 2);
        if (error.empty() && !loads.empty()) error = "bulk loads that nobody waits for";
        tsan_acquire(&finished);
        for (Block& b : blocks) std::free(b.shared);
        blocks.clear();
        if (!error.empty()) throw std::runtime_error("cusim: " + error);
      }
}

void watch(const void* base, size_t bytes) {
  watches.push_back({static_cast<const char*>(base), bytes, 0, 0});
}

void load_early(bool on) { early = on; }

void unwatch() {
  watches.clear();
  launched.clear();
}

std::pair<uint64_t, uint64_t> traffic(const void* base) {
  for (const Watch& w : watches)
    if (w.base == base) return {w.read, w.written};
  return {0, 0};
}

const std::vector<Launch>& launches() { return launched; }

}  // namespace cusim
