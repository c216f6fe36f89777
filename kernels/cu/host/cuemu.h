// Runs CUDA C++ kernels on the host, one fiber per CUDA thread. Included in front of a .cu file (g++ -include).
//
// The threads of a block are fibers of one OS thread; __syncthreads, shuffles, votes and the warp-wide instructions of
// common.cuh are where they meet. Blocks may be spread over OS threads. What it finds: barriers and collectives that not all
// reach, deadlocks, shared memory read before it was written (it is poisoned with NaN), copies that nobody waited for, addresses
// that are not aligned, races that show in another order of threads or blocks (CUEMU_SEED shuffles threads between barriers, and
// lets launches begin with any block), and, since some blocks start before the kernels ahead of them have run, what is read or
// written before griddepcontrol.wait. What it cannot find: weak memory order, bank conflicts, anything about time. x86-64 only;
// needs -fno-strict-aliasing.
#pragma once
#include <atomic>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>
#include <sys/mman.h>
#define CUEMU 1
#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ static thread_local  // static only; dynamic: CU_SHARED of common.cuh

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 {
  unsigned x, y, z;
};
#define CU_VEC2(N, T, A)                                 \
  struct alignas(A) N {                                  \
    T x, y;                                              \
  };                                                     \
  static inline N make_##N(T x, T y) { return N{x, y}; } \
  static_assert(sizeof(N) == A)
#define CU_VEC4(N, T, A)                                                 \
  struct alignas(A) N {                                                  \
    T x, y, z, w;                                                        \
  };                                                                     \
  static inline N make_##N(T x, T y, T z, T w) { return N{x, y, z, w}; } \
  static_assert(sizeof(N) == A)
CU_VEC2(float2, float, 8);
CU_VEC2(int2, int, 8);
CU_VEC2(uint2, unsigned, 8);
CU_VEC4(float4, float, 16);
CU_VEC4(int4, int, 16);
CU_VEC4(uint4, unsigned, 16);

namespace cuemu {
[[noreturn]] inline void die(const char* what);
struct Options {
  unsigned seed = 0;
  unsigned os_threads = 1;
  bool poison = true;
};
inline Options& options() {
  static Options o = [] {
    Options o;
    if (auto s = getenv("CUEMU_SEED")) o.seed = atoi(s);
    if (auto s = getenv("CUEMU_THREADS")) o.os_threads = std::max(1, atoi(s));
    return o;
  }();
  return o;
}

// ---- context switch: x86-64 System V, callee-saved registers only (~2 ns) ----
extern "C" void cuemu_switch(void** save_sp, void* load_sp);
#if defined(__x86_64__)
asm(R"(.pushsection .text.cuemu_switch,"axG",@progbits,cuemu_switch,comdat
.weak cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuemu_switch,.-cuemu_switch
.popsection)");
#else
#error "cuemu: add a context switch (or ucontext) for this architecture"
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#endif

constexpr size_t STACK = 128 << 10;
struct AsyncCopy {
  void* dst;
  const void* src;
  unsigned n, fill;
};
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;
  unsigned tid, lane, warp;
  uint3 tidx;
  bool done;
  bool waited;          // at griddepcontrol.wait
  const char* waiting;  // what it is blocked on, for deadlock reports
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> groups;  // cp.async
  std::vector<size_t> landed;                  // what it wrote since its last fence.proxy.async, in 16 bytes of shared memory
};
struct Rendezvous {
  unsigned arrived = 0, mask = 0;
  void* slot[32];
  const char* op = nullptr;
};
struct Barrier {
  unsigned count = 0;
  std::vector<unsigned> waiters;
};
struct Block {
  std::vector<Fiber> f;
  std::vector<unsigned> ready;
  size_t head = 0;
  std::vector<std::vector<Rendezvous>> rv;  // per warp
  Barrier bar[16];
  unsigned n = 0, live = 0, cur = 0;
  uint3 bidx;
  dim3 bdim, gdim;
  void* main_sp = nullptr;
  void* main_fake = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_n = 0;
  std::function<void()> body;
  bool must_wait = false;      // every thread, at griddepcontrol.wait
  bool early = false;          // earlier kernels have not run yet, so that whoever waits for them is held
  std::vector<unsigned> held;  // there
  std::vector<char> dyn_buf;
  char* dyn = nullptr;
  size_t dyn_n = 0;
  std::vector<unsigned> unfenced;  // for each 16 bytes: 1 + the thread whose copy is not known to the asynchronous proxy yet
  std::map<uintptr_t, std::vector<unsigned>> sleepers;  // by the address that they wait for
  std::shared_ptr<void> warpgroups;                     // products under way: wgmma.h
  void (*at_exit)() = nullptr;                          // what must hold when a thread ends
  unsigned rng = 1;

  Block() = default;
  Block(const Block&) = delete;
  // A thread that ends gives back the stacks of its blocks: a process may have 65,530 mappings, and each stack is two.
  ~Block() {
    for (Fiber& fiber : f)
      if (fiber.stack) munmap(fiber.stack, STACK);
  }
};
inline Block*& blk() {
  static thread_local Block* b = nullptr;
  return b;
}
inline Fiber& self() {
  Block* b = blk();
  return b->f[b->cur];
}
inline void die(const char* what) {
  if (Block* b = blk()) {
    fprintf(stderr, "cuemu: %s (block %u,%u,%u thread %u)\n", what, b->bidx.x, b->bidx.y, b->bidx.z, b->cur);
    std::map<std::string, unsigned> w;
    for (unsigned i = 0; i < b->n; i++)
      if (!b->f[i].done && b->f[i].waiting) w[b->f[i].waiting]++;
    for (auto& k : w) fprintf(stderr, "cuemu:   %u threads wait in %s\n", k.second, k.first.c_str());
  } else
    fprintf(stderr, "cuemu: %s\n", what);
  abort();
}
inline void push_ready(Block& b, unsigned i) {
  b.f[i].waiting = nullptr;
  b.ready.push_back(i);
}
inline void switch_to(Block& b, void** save, void** save_fake, unsigned next) {
  b.cur = next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save_fake, b.f[next].stack, STACK);
#endif
  cuemu_switch(save, b.f[next].sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(save_fake ? *save_fake : nullptr, nullptr, nullptr);
#endif
}
inline bool pop_ready(Block& b, unsigned& i) {
  if (b.head == b.ready.size()) {
    b.ready.clear();
    b.head = 0;
    return false;
  }
  if (options().seed) {
    b.rng = b.rng * 1664525u + 1013904223u;
    size_t k = b.head + (b.rng >> 8) % (b.ready.size() - b.head);
    std::swap(b.ready[b.head], b.ready[k]);
  }
  i = b.ready[b.head++];
  if (b.head > 4096) {
    b.ready.erase(b.ready.begin(), b.ready.begin() + b.head);
    b.head = 0;
  }
  return true;
}
// Goes back to who runs the block: all its threads have ended, or those that have not wait for earlier kernels.
inline void leave(Block& b, Fiber& me) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me.done ? nullptr : &me.fake, b.main_stack, b.main_stack_n);
#endif
  cuemu_switch(&me.sp, b.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake, nullptr, nullptr);
#endif
}
__attribute__((noinline)) inline void block_on(const char* what) {  // suspend the current fiber
  Block& b = *blk();
  Fiber& me = self();
  unsigned mine = b.cur, next;
  me.waiting = what;
  if (!pop_ready(b, next)) {
    if (b.held.empty()) die("deadlock: every live thread waits (divergent barrier or shuffle?)");
    leave(b, me);
  } else if (next != mine) {
    switch_to(b, &me.sp, &me.fake, next);
  }
}
inline void wait_for_earlier_kernels() {
  Block& b = *blk();
  self().waited = true;
  if (!b.early) return;
  b.held.push_back(b.cur);
  block_on("griddepcontrol.wait");
}
inline void barrier_check(Block& b, Barrier& r, unsigned need) {
  if (r.count && r.count == need) {
    r.count = 0;
    auto w = std::move(r.waiters);
    r.waiters.clear();
    for (unsigned i : w) push_ready(b, i);
  }
}
inline void barrier(unsigned id, unsigned need, const char* what) {
  Block& b = *blk();
  Barrier& r = b.bar[id];
  bool all = need == 0;
  r.count++;
  if (r.count == (all ? b.live : need)) {
    r.count = 0;
    auto w = std::move(r.waiters);
    r.waiters.clear();
    for (unsigned i : w) push_ready(b, i);
    return;
  }
  r.waiters.push_back(b.cur);
  block_on(what);
}
// bar.arrive: counts without waiting.
inline void barrier_arrive(unsigned id, unsigned need) {
  Block& b = *blk();
  b.bar[id].count++;
  barrier_check(b, b.bar[id], need);
}
// Waits for `wake` of an address.
inline void sleep(uintptr_t address, const char* what) {
  blk()->sleepers[address].push_back(blk()->cur);
  block_on(what);
}
inline void wake(uintptr_t address) {
  Block& b = *blk();
  for (unsigned i : std::exchange(b.sleepers[address], {})) push_ready(b, i);
}
// Warp rendezvous: the last lane to arrive runs f(slots) for the whole mask, then releases the rest.
template <class A, class F>
inline void warp_op(unsigned mask, A& mine, const char* op, F&& f) {
  Block& b = *blk();
  Fiber& me = self();
  unsigned bit = 1u << me.lane;
  if (!(mask & bit)) die("warp op: calling lane is not in its own mask");
  unsigned first = me.warp * 32, lanes = std::min(32u, b.n - first);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  auto& list = b.rv[me.warp];
  Rendezvous* r = nullptr;
  for (auto& c : list)
    if (c.arrived && c.mask == mask) {
      r = &c;
      break;
    }
  if (!r) {
    for (auto& c : list)
      if (!c.arrived) {
        r = &c;
        break;
      }
    if (!r) die("warp op: too many concurrent masks");
    r->mask = mask;
    r->op = op;
  }
  if (r->op != op) die("warp op: lanes of one mask are in different collective operations");
  r->slot[me.lane] = &mine;
  r->arrived |= bit;
  if (r->arrived != mask) {
    block_on(op);
    return;
  }
  f(reinterpret_cast<A**>(r->slot));
  r->arrived = 0;
  for (unsigned l = 0; l < 32; l++)
    if ((mask >> l & 1) && l != me.lane) push_ready(b, first + l);
}
inline void fiber_main() {
  Block& b = *blk();
#if defined(__SANITIZE_ADDRESS__)
  {
    const void* st;
    size_t n;
    __sanitizer_finish_switch_fiber(nullptr, &st, &n);
    if (!b.main_stack) {
      b.main_stack = st;
      b.main_stack_n = n;
    }
  }
#endif
  b.body();
  Fiber& me = self();
  me.done = true;
  b.live--;
  if (!me.open.empty() || !me.groups.empty()) die("thread exited with cp.async still in flight");
  if (b.must_wait && !me.waited) die("a thread of a kernel that may start early exited without griddepcontrol.wait");
  if (b.at_exit) b.at_exit();
  barrier_check(b, b.bar[0], b.live);
  unsigned next;
  if (pop_ready(b, next)) {
    switch_to(b, &me.sp, nullptr, next);
    __builtin_unreachable();
  }
  if (b.live && b.held.empty()) die("deadlock: the last running thread exited while others wait");
  leave(b, me);
  __builtin_unreachable();
}
// A launch as its blocks know it.
struct Grid {
  dim3 grid, block;
  size_t smem;
  std::function<void()> body;
  bool must_wait = false;  // see Block
  uint64_t blocks() const { return (uint64_t)grid.x * grid.y * grid.z; }
};
// Makes a block ready to run.
inline void prepare(Block& b, const Grid& launch, uint64_t index) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint3 bidx{unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
  const size_t smem = launch.smem;
  unsigned n = block.x * block.y * block.z;
  b.body = launch.body;
  b.must_wait = launch.must_wait;
  b.early = false;
  b.held.clear();
  b.n = b.live = n;
  b.bidx = bidx;
  b.bdim = block;
  b.gdim = grid;
  if (b.f.size() < n) b.f.resize(n);
  b.rv.assign((n + 31) / 32, std::vector<Rendezvous>(8));
  b.ready.clear();
  b.head = 0;
  for (auto& r : b.bar) r = Barrier();
  if (b.dyn_buf.size() < smem + 1024) b.dyn_buf.resize(smem + 1024);
  b.dyn = (char*)(((uintptr_t)b.dyn_buf.data() + 1023) & ~uintptr_t(1023));
  b.dyn_n = smem;
  if (options().poison) memset(b.dyn, 0xFF, smem);
  b.unfenced.assign((smem + 15) / 16, 0);
  b.sleepers.clear();
  b.warpgroups.reset();
  b.at_exit = nullptr;
  b.rng = options().seed * 2654435761u + bidx.x * 97 + bidx.y * 31 + bidx.z + 1;
  for (unsigned i = 0; i < n; i++) {
    Fiber& f = b.f[i];
    if (!f.stack) {
      void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) die("no memory for the stack of a thread");
      f.stack = (char*)stack;
      mprotect(f.stack, 4096, PROT_NONE);
    }
    f.tid = i;
    f.lane = i % 32;
    f.warp = i / 32;
    f.tidx = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    f.done = false;
    f.waited = false;
    f.waiting = nullptr;
    f.open.clear();
    f.groups.clear();
    f.landed.clear();
    void** sp = (void**)(f.stack + STACK - 64);
    *--sp = nullptr;
    *--sp = (void*)&fiber_main;
    sp -= 6;
    f.sp = sp;
    b.ready.push_back(i);
  }
}
// Runs a block until all its threads have ended or are held.
inline void resume(Block& b) {
  Block* outer = blk();
  blk() = &b;
  unsigned first;
  if (!pop_ready(b, first)) die("deadlock: no thread of a block can run");
  switch_to(b, &b.main_sp, &b.main_fake, first);
  for (auto& r : b.bar)
    if (r.count && !b.live) die("a barrier has arrivals that nobody waits for");
  blk() = outer;
}
// A block that started before the kernels ahead of its own had run. It ends on the OS thread on which it began.
class Early {
 public:
  Early() = default;
  // Runs block `index` until each of its threads has ended or waits for the kernels ahead.
  Early(const Grid& launch, uint64_t index) : index_(index) {
    if (spare().empty()) spare().push_back(std::make_unique<Block>());
    block_ = std::move(spare().back());
    spare().pop_back();
    prepare(*block_, launch, index);
    block_->early = true;
    resume(*block_);
  }
  explicit operator bool() const { return block_ != nullptr; }
  uint64_t index() const { return index_; }
  // The kernels ahead have run: ends the block.
  void finish() {
    block_->early = false;
    for (unsigned i : block_->held) push_ready(*block_, i);
    block_->held.clear();
    if (block_->live) resume(*block_);
    spare().push_back(std::move(block_));
  }

 private:
  // Blocks keep the stacks of their fibers.
  static std::vector<std::unique_ptr<Block>>& spare() {
    static thread_local std::vector<std::unique_ptr<Block>> blocks;
    return blocks;
  }
  std::unique_ptr<Block> block_;
  uint64_t index_ = 0;
};
// Runs all blocks; that of `early` goes on from where it is.
inline void launch(const Grid& grid, Early* early = nullptr) {
  if (grid.block.x * grid.block.y * grid.block.z > 1024) die("block has more than 1024 threads");
  if (grid.smem > 227 * 1024) die("dynamic shared memory above sm_90's 227 KiB");
  const uint64_t total = grid.blocks(), done = early && *early ? early->index() : total;
  if (done < total) early->finish();
  std::atomic<uint64_t> next{0};
  // Blocks begin in any order; with a seed it is another for each launch.
  static std::atomic<uint64_t> launches{0};
  const uint64_t begin = options().seed ? (launches++ * 2654435761u + options().seed) % std::max<uint64_t>(total, 1) : 0;
  auto worker = [&] {
    static thread_local Block b;
    for (uint64_t i; (i = next.fetch_add(1)) < total;) {
      i = (begin + i) % total;
      if (i == done) continue;
      prepare(b, grid, i);
      resume(b);
    }
  };
  unsigned nt = std::min<uint64_t>(options().os_threads, total);
  if (nt <= 1)
    worker();
  else {
    std::vector<std::thread> t;
    for (unsigned i = 0; i < nt; i++) t.emplace_back(worker);
    for (auto& x : t) x.join();
  }
}
// cuLaunchKernel-shaped entry: args[i] points at the i-th parameter.
template <class... P, size_t... I>
inline void call(void (*k)(P...), void** a, std::index_sequence<I...>) {
  k(*reinterpret_cast<std::remove_reference_t<P>*>(a[I])...);
}
template <class... P>
inline std::function<void(void**)> thunk(void (*k)(P...)) {
  return [k](void** a) { call(k, a, std::index_sequence_for<P...>{}); };
}
struct Kernel {
  std::function<void(void**)> call;
  std::vector<size_t> sizes;
};
template <class... P>
inline Kernel make_kernel(void (*k)(P...)) {
  return {thunk(k), {sizeof(P)...}};
}
inline std::map<std::string, Kernel>& registry() {
  static auto& r = *new std::map<std::string, Kernel>;  // never destroyed: threads may outlive the main function
  return r;
}
struct Register {
  template <class K>
  Register(const char* n, K k) {
    registry()[n] = make_kernel(k);
  }
};
#define CUEMU_CAT2(a, b) a##b
#define CUEMU_CAT(a, b) CUEMU_CAT2(a, b)
#define CU_EXPORT(kernel) static ::cuemu::Register CUEMU_CAT(cuemu_reg_, __COUNTER__)(#kernel, &kernel);
}  // namespace cuemu
#define threadIdx (::cuemu::self().tidx)
#define blockIdx (::cuemu::blk()->bidx)
#define blockDim (::cuemu::blk()->bdim)
#define gridDim (::cuemu::blk()->gdim)
#define warpSize 32
static inline void __syncthreads() { cuemu::barrier(0, 0, "__syncthreads"); }
static inline void __syncwarp(unsigned m = ~0u) {
  char c = 0;
  cuemu::warp_op(m, c, "__syncwarp", [](char**) {});
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
namespace cuemu {
template <class T>
struct Sh {
  T v, r;
  int src;
};
template <class T>
inline T shfl(unsigned m, T v, int src, const char* op) {
  if (!(m >> src & 1)) die("shuffle from a lane outside the mask");
  Sh<T> s{v, v, src};
  warp_op(m, s, op, [m](Sh<T>** a) {
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) a[l]->r = a[a[l]->src]->v;
  });
  return s.r;
}
struct Vote {
  bool p;
  unsigned r;
};
inline unsigned ballot(unsigned m, bool p, const char* op) {
  Vote v{p, 0};
  warp_op(m, v, op, [m](Vote** a) {
    unsigned r = 0;
    for (int l = 0; l < 32; l++)
      if ((m >> l & 1) && a[l]->p) r |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) a[l]->r = r;
  });
  return v.r;
}
}  // namespace cuemu
template <class T>
static inline T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  int l = cuemu::self().lane;
  return cuemu::shfl(m, v, (l & ~(w - 1)) + (s & (w - 1)), "__shfl_sync");
}
template <class T>
static inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  int l = cuemu::self().lane, s = l ^ x;
  return cuemu::shfl(m, v, (s / w) > (l / w) ? l : s, "__shfl_xor_sync");
}
template <class T>
static inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cuemu::self().lane, s = l + (int)d;
  return cuemu::shfl(m, v, s / w == l / w ? s : l, "__shfl_down_sync");
}
template <class T>
static inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cuemu::self().lane, s = l - (int)d;
  return cuemu::shfl(m, v, s >= 0 && s / w == l / w ? s : l, "__shfl_up_sync");
}
static inline unsigned __ballot_sync(unsigned m, bool p) { return cuemu::ballot(m, p, "__ballot_sync"); }
static inline int __any_sync(unsigned m, bool p) { return cuemu::ballot(m, p, "__any_sync") != 0; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __all_sync(unsigned m, bool p) { return cuemu::ballot(m, p, "__all_sync") == m; }
template <class T, class U>
static inline T atomicAdd(T* p, U v) {
  if constexpr (std::is_integral_v<T>)
    return __atomic_fetch_add(p, (T)v, __ATOMIC_RELAXED);
  else {
    T o, n;
    __atomic_load(p, &o, __ATOMIC_RELAXED);
    do n = o + (T)v;
    while (!__atomic_compare_exchange(p, &o, &n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return o;
  }
}
template <class T>
static inline T atomicMax(T* p, T v) {
  T o;
  __atomic_load(p, &o, __ATOMIC_RELAXED);
  while (o < v && !__atomic_compare_exchange(p, &o, &v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return o;
}
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define __expf expf  // glibc declares its own __expf/__logf/__powf
#define __logf logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __int_as_float(int i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
static inline int __float_as_int(float f) {
  int i;
  memcpy(&i, &f, 4);
  return i;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
static inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
