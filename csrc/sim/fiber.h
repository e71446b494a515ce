// A stack to run on, for cusim.cpp, and what the sanitizers have to be told about it.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUSIM_ASAN(call) call
#else
#define CUSIM_ASAN(call)
#endif

#ifdef CUSIM_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUSIM_TSAN_CALL(call) call
#else
#define CUSIM_TSAN_CALL(call)
#endif

#if defined(__x86_64__)
// swapcontext saves signal masks by a system call; this takes a few nanoseconds.
extern "C" void cusim_switch(void** from, void* to);
#endif

namespace cusim {
namespace {

inline void tsan_release(void* p) {
  (void)p;
  CUSIM_TSAN_CALL(__tsan_release(p));
}
inline void tsan_acquire(void* p) {
  (void)p;
  CUSIM_TSAN_CALL(__tsan_acquire(p));
}
inline void tsan_read(const void* p, size_t n) {
  (void)p, (void)n;
  CUSIM_TSAN_CALL(__tsan_read_range(const_cast<void*>(p), n));
}
inline void tsan_write(void* p, size_t n) {
  (void)p, (void)n;
  CUSIM_TSAN_CALL(__tsan_write_range(p, n));
}

// Accesses within are not the kernel's: the race detector is to leave them alone.
struct Quiet {
  Quiet() {
    CUSIM_TSAN_CALL(AnnotateIgnoreReadsBegin("", 0));
    CUSIM_TSAN_CALL(AnnotateIgnoreWritesBegin("", 0));
  }
  ~Quiet() {
    CUSIM_TSAN_CALL(AnnotateIgnoreWritesEnd("", 0));
    CUSIM_TSAN_CALL(AnnotateIgnoreReadsEnd("", 0));
  }
};

#if defined(__x86_64__)
asm(R"(.text
.globl cusim_switch
.hidden cusim_switch
.type cusim_switch,@function
cusim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cusim_switch,.-cusim_switch
)");
struct Context {
  void* pointer = nullptr;
  void make(char* memory, size_t size, void (*entry)()) {
    void** p = reinterpret_cast<void**>(uintptr_t(memory + size) & ~uintptr_t(15));
    *--p = nullptr;
    *--p = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--p = nullptr;
    pointer = p;
  }
  void swap(Context& to) { cusim_switch(&pointer, to.pointer); }
};
#else
struct Context {
  ucontext_t context;
  void make(char* memory, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory, context.uc_stack.ss_size = size, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void swap(Context& to) { swapcontext(&context, &to.context); }
};
#endif

constexpr size_t kStack = 256 << 10;

struct Stack {
  Context context;
  char* memory = nullptr;
  void *tsan = nullptr, *fake = nullptr;
  bool fresh = true;
};

Context scheduler;
[[maybe_unused]] void *scheduler_fake, *scheduler_tsan;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_size;

void start(Stack& s, void (*entry)()) {
  if (s.memory == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    s.memory = static_cast<char*>(p);
  }
  s.fake = nullptr;
  CUSIM_ASAN(__asan_unpoison_memory_region(s.memory, kStack));  // frames that never returned left marks
  s.context.make(s.memory, kStack, entry);
  CUSIM_TSAN_CALL(scheduler_tsan = __tsan_get_current_fiber());
  // Kept for the threads of later blocks, since it takes its time to make one.
  CUSIM_TSAN_CALL(if (s.tsan == nullptr) s.tsan = __tsan_create_fiber(0));
  s.fresh = true;
}

// From the scheduler into the fiber, until it leaves.
void resume(Stack& s) {
  CUSIM_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, s.memory, kStack));
  // What happened before the launch, and in earlier clusters, comes before all that a thread does.
  CUSIM_TSAN_CALL(__tsan_switch_to_fiber(s.tsan, s.fresh ? 0 : 1));
  s.fresh = false;
  scheduler.swap(s.context);
  CUSIM_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr));
}

// From the fiber to the scheduler; `last`: for good.
void leave(Stack& s, bool last) {
  (void)last;
  CUSIM_ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &s.fake, scheduler_stack, scheduler_size));
  CUSIM_TSAN_CALL(__tsan_switch_to_fiber(scheduler_tsan, 1));
  s.context.swap(scheduler);
  CUSIM_ASAN(__sanitizer_finish_switch_fiber(s.fake, &scheduler_stack, &scheduler_size));
}

// The first thing that a fiber does.
void begun(Stack& s) {
  (void)s;
  CUSIM_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size));
}

}  // namespace
}  // namespace cusim
