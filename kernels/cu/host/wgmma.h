// Host bodies of ptx_sm90.cuh: products of warpgroups, mbarriers, barriers of a part of the block, the fence between proxies.
//
// Written from the PTX ISA ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", "mbarrier"), the layouts
// checked against the canonical ones in CUTLASS (cute/atom/mma_traits_sm90_gmma.hpp), and not from what the kernels happen to do.
//
// A product is as late as a card may be: accumulators hold poison until a wait covers them, and operands are read at that wait. It
// is strict: operands that differ at the wait from what they were when the product was issued end the process, and so does an
// accumulator that was touched meanwhile, a product without a wgmma.fence since the last wait, and shared memory that cp.async
// wrote and its writer did not hand to the asynchronous proxy.
#pragma once

namespace ptx {
namespace host {

// Where dynamic shared memory begins in the address space of a card: not at 0, the first bytes are the system's.
constexpr unsigned WINDOW = 1024;
constexpr unsigned ADDRESS_MASK = 0x3ffff;  // of what a descriptor can say

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format"): 14-bit fields in units of 16 bytes.
struct Matrix {
  unsigned start, leading, stride;  // bytes

  explicit Matrix(unsigned long long bits) {
    constexpr unsigned long long FIELD = 0x3fff;
    if (bits & ~(FIELD | FIELD << 16 | FIELD << 32 | 7ull << 49 | 3ull << 62))
      cuemu::die("wgmma: a descriptor has bits that mean nothing");
    if (bits >> 62) cuemu::die("wgmma: swizzled layouts are not emulated");
    if (bits >> 49 & 7) cuemu::die("wgmma: a layout without swizzle has no base offset");
    start = (bits & FIELD) << 4;
    leading = (bits >> 16 & FIELD) << 4;
    stride = (bits >> 32 & FIELD) << 4;
  }

  // Row `row` of core matrix (`mn`, `k`): 16 bytes. The rows of a core matrix follow each other. Without swizzle the stride leads
  // to the next core matrix in M or N and the leading offset to the next in K, whichever dimension is contiguous (PTX ISA, "Leading
  // Dimension Byte Offset" and "Stride Dimension Byte Offset"; CUTLASS, in units of 16 bytes: K-major ((8,n),2):((1,SBO),LBO),
  // MN-major ((1,n),(8,k)):((X,SBO),(1,LBO))).
  const u16* core_row(unsigned mn, unsigned k, unsigned row) const {
    cuemu::Block& block = *cuemu::blk();
    const unsigned address = (start + mn * stride + k * leading + row * 16) & ADDRESS_MASK;
    if (address < WINDOW || address + 16 > WINDOW + block.dyn_n) cuemu::die("wgmma: an operand leaves the dynamic window");
    if (block.unfenced[(address - WINDOW) / 16])
      cuemu::die("wgmma: cp.async wrote an operand, and its writer has executed no fence.proxy.async since");
    return (const u16*)(block.dyn + (address - WINDOW));
  }
};

// What every kind of product has: who takes part, and how to compute it.
struct Product {
  float* d[32];
  const u32* a[32];
  unsigned long long b;
  bool accumulate;
  void (*read_b)(u16*, const Matrix&);
  void (*multiply)(const Product&, float*);
  int n;
  u32 a_then[32][4];        // operands as they were when it was issued
  std::vector<u16> b_then;  // [16, n]
  struct Accumulator* into;
};

constexpr u32 IN_FLIGHT = 0xffffffff;  // NaN
struct Accumulator {
  float* registers[32];
  int len;                    // registers of a lane
  std::vector<float> values;  // [32, len]: what they will hold
  int users;                  // products that are not complete
};

// Products of a warp: its 16 rows depend on no other warp.
struct Products {
  bool fenced = false;
  size_t issued = 0;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
};

// What a product is, for the four warps of a warpgroup to agree about.
using Asked = std::tuple<int, void*, unsigned long long, bool>;
struct Warpgroups {
  std::vector<Products> warps;
  std::vector<std::vector<Asked>> asked;
};
static inline Warpgroups& warpgroups() {
  cuemu::Block& block = *cuemu::blk();
  if (!block.warpgroups) {
    auto made = std::make_shared<Warpgroups>();
    made->warps.resize((block.n + 31) / 32);
    made->asked.resize((block.n + 127) / 128);
    block.warpgroups = made;
    block.at_exit = [] {
      const Products& mine = warpgroups().warps[cuemu::self().warp];
      if (!mine.open.empty() || !mine.groups.empty()) cuemu::die("thread exited with wgmma.mma_async still in flight");
    };
  }
  return *static_cast<Warpgroups*>(block.warpgroups.get());
}
static inline Products& products() { return warpgroups().warps[cuemu::self().warp]; }

// Elements b[16][N] of the right operand. K-major: a row of a core matrix has one n and 8 k; N-major: one k and 8 n.
template <int N, bool TRANS_B>
static inline void read_b(u16* b, const Matrix& matrix) {
  for (int n = 0; n < N; n += 8)
    for (int k = 0; k < 16; k += 8)
      for (int row = 0; row < 8; row++) {
        const u16* elements = matrix.core_row(n / 8, k / 8, row);
        for (int i = 0; i < 8; i++) b[TRANS_B ? (k + row) * N + n + i : (k + i) * N + n + row] = elements[i];
      }
}

// values [32, N / 2] = (accumulate ? values : 0) + a b for the rows of a warp. PTX ISA, "Register Fragments for
// wgmma.mma_async.m64nNk16": lane 4 g + q has rows g and g + 8; of a the columns 2 q, 2 q + 1 and 8 more, of d 2 q and 2 q + 1 of
// each 8.
template <int N>
static inline void multiply(const Product& p, float* values) {
  alignas(64) static thread_local float A[16][16], B[16][N], C[16][N];
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++) B[k][n] = widen(p.b_then[k * N + n]);
  for (int l = 0; l < 32; l++) {
    const int g = l >> 2, q = (l & 3) * 2;
    for (int i = 0; i < 4; i++) {
      A[g + (i & 1) * 8][q + (i >> 1) * 8] = widen(p.a_then[l][i] & 0xffff);
      A[g + (i & 1) * 8][q + (i >> 1) * 8 + 1] = widen(p.a_then[l][i] >> 16);
    }
    for (int i = 0; i < N / 2; i++) C[g + (i >> 1 & 1) * 8][i / 4 * 8 + q + (i & 1)] = p.accumulate ? values[l * (N / 2) + i] : 0.f;
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < N; n++) C[row][n] += A[row][k] * B[k][n];
  for (int l = 0; l < 32; l++) {
    const int g = l >> 2, q = (l & 3) * 2;
    for (int i = 0; i < N / 2; i++) values[l * (N / 2) + i] = C[g + (i >> 1 & 1) * 8][i / 4 * 8 + q + (i & 1)];
  }
}

// The accumulator of a product: one in flight, or one that now leaves its registers.
static inline Accumulator* take(Products& mine, const Product& p) {
  const int len = p.n / 2;
  for (auto& other : mine.accumulators) {
    if (other->registers[0] == p.d[0] && other->len == len) return other.get();
    for (int l = 0; l < 32; l++)
      if (p.d[l] < other->registers[l] + other->len && other->registers[l] < p.d[l] + len)
        cuemu::die("wgmma: an accumulator is part of another in flight");
  }
  auto made = std::make_unique<Accumulator>();
  made->len = len;
  made->users = 0;
  for (int l = 0; l < 32; l++) {
    made->registers[l] = p.d[l];
    made->values.insert(made->values.end(), p.d[l], p.d[l] + len);
    memset(p.d[l], 0xff, len * sizeof(float));
  }
  mine.accumulators.push_back(std::move(made));
  return mine.accumulators.back().get();
}

static inline void issue(Product& p) {
  Products& mine = products();
  const unsigned warp = cuemu::self().warp;
  if ((warp / 4 + 1) * 128 > cuemu::blk()->n) cuemu::die("wgmma: a warpgroup has fewer than four warps");
  if (!mine.fenced) cuemu::die("wgmma.mma_async: no wgmma.fence since the kernel began or results were waited for");
  auto& asked = warpgroups().asked[warp / 4];
  const Asked what{p.n, (void*)p.read_b, p.b, p.accumulate};
  if (mine.issued == asked.size()) asked.push_back(what);
  if (asked[mine.issued++] != what) cuemu::die("wgmma: warps of one warpgroup ask for different products");
  p.b_then.resize(16 * p.n);
  p.read_b(p.b_then.data(), Matrix(p.b));
  for (int l = 0; l < 32; l++) memcpy(p.a_then[l], p.a[l], sizeof p.a_then[l]);
  p.into = take(mine, p);
  p.into->users++;
  mine.open.push_back(std::move(p));
}

static inline void complete(const Product& p) {
  for (int l = 0; l < 32; l++)
    if (memcmp(p.a_then[l], p.a[l], sizeof p.a_then[l])) cuemu::die("wgmma: registers of the left operand changed in flight");
  std::vector<u16> now(p.b_then.size());
  p.read_b(now.data(), Matrix(p.b));
  if (now != p.b_then) cuemu::die("wgmma: shared memory of the right operand changed in flight");
  p.multiply(p, p.into->values.data());
  p.into->users--;
}

static inline void wait(size_t pending) {
  Products& mine = products();
  while (mine.groups.size() > pending) {
    for (const Product& p : mine.groups.front()) complete(p);
    mine.groups.erase(mine.groups.begin());
  }
  for (size_t i = 0; i < mine.accumulators.size();) {
    Accumulator& done = *mine.accumulators[i];
    if (done.users) {
      i++;
      continue;
    }
    for (int l = 0; l < 32; l++) {
      for (int r = 0; r < done.len; r++)
        if ((u32)__float_as_int(done.registers[l][r]) != IN_FLIGHT) cuemu::die("wgmma: an accumulator was written in flight");
      memcpy(done.registers[l], &done.values[l * done.len], done.len * sizeof(float));
    }
    mine.accumulators.erase(mine.accumulators.begin() + i);
  }
  mine.fenced = false;
}

struct Wgmma {
  float* d;
  const u32* a;
  unsigned long long b;
  bool accumulate;
};

// An mbarrier in shared memory (PTX ISA, "Contents of the mbarrier object"): arrivals that a phase needs, those to come, its
// parity.
struct Mbarrier {
  u32 expected;
  u32 pending : 31, parity : 1;
};
static_assert(sizeof(Mbarrier) == 8);
static inline Mbarrier& mbarrier(smem_t address) {
  check(address, 8, "mbarrier: address is not 8-byte aligned");
  auto& object = *(Mbarrier*)address;
  if (object.expected == 0xffffffff) cuemu::die("mbarrier: not initialised");
  return object;
}
}  // namespace host

// A descriptor's matrix lies in the window, which a card has below 2^18.
static inline unsigned long long matrix_descriptor(smem_t start, unsigned leading, unsigned stride) {
  const unsigned address = unsigned(start - (smem_t)cuemu::blk()->dyn) + host::WINDOW;
  if (address % 16 || leading % 16 || stride % 16) cuemu::die("wgmma: an offset of a descriptor is not a multiple of 16 bytes");
  const auto field = [](unsigned bytes) { return (unsigned long long)((bytes & host::ADDRESS_MASK) >> 4); };
  return field(address) | field(leading) << 16 | field(stride) << 32;
}

static inline void wgmma_fence() {
  char none = 0;
  cuemu::warp_op(~0u, none, "wgmma.fence", [](char**) { host::products().fenced = true; });
}
static inline void wgmma_commit() {
  char none = 0;
  cuemu::warp_op(~0u, none, "wgmma.commit_group", [](char**) {
    auto& mine = host::products();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}
template <int N>
static inline void wgmma_wait() {
  char none = 0;
  cuemu::warp_op(~0u, none, "wgmma.wait_group", [](char**) { host::wait(N); });
}
template <int N, bool TRANS_B>
static inline void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], unsigned long long b, bool accumulate) {
  host::Wgmma mine{d, a, b, accumulate};
  cuemu::warp_op(~0u, mine, TRANS_B ? "wgmma.mma_async with b transposed" : "wgmma.mma_async", [](host::Wgmma** lanes) {
    host::Product p;
    p.b = lanes[0]->b, p.accumulate = lanes[0]->accumulate, p.n = N;
    p.read_b = host::read_b<N, TRANS_B>, p.multiply = host::multiply<N>;
    for (int l = 0; l < 32; l++) {
      if (lanes[l]->b != p.b || lanes[l]->accumulate != p.accumulate) cuemu::die("wgmma: lanes ask for different products");
      p.d[l] = lanes[l]->d, p.a[l] = lanes[l]->a;
    }
    host::issue(p);
  });
}
// What the instructions leave in registers on a card is there for the compiler only after this.
template <int N>
static inline void settle(float (&)[N]) {}
static inline void finish_before_wait(const float (&)[2]) {}

// Hands this thread's copies that have landed to the asynchronous proxy.
static inline void fence_proxy_async() {
  cuemu::Block& block = *cuemu::blk();
  for (size_t granule : cuemu::self().landed)
    if (block.unfenced[granule] == cuemu::self().tid + 1) block.unfenced[granule] = 0;
  cuemu::self().landed.clear();
}

static inline void mbarrier_init(smem_t address, unsigned count) {
  host::check(address, 8, "mbarrier: address is not 8-byte aligned");
  *(host::Mbarrier*)address = {count, count, 0};
}
static inline void mbarrier_arrive(smem_t address) {
  auto& barrier = host::mbarrier(address);
  if (--barrier.pending) return;
  barrier.pending = barrier.expected;
  barrier.parity ^= 1;
  cuemu::wake(address);
}
static inline void mbarrier_wait(smem_t address, unsigned parity) {
  while (host::mbarrier(address).parity == parity) cuemu::sleep(address, "mbarrier.try_wait");
}

static inline void barrier_sync(unsigned barrier, unsigned threads) { cuemu::barrier(barrier, threads, "barrier.sync"); }
static inline void barrier_arrive(unsigned barrier, unsigned threads) { cuemu::barrier_arrive(barrier, threads); }

}  // namespace ptx
