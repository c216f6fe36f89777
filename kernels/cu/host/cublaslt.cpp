// A stand-in for libcublasLt.so beside driver.cpp: bf16 products in f64 on the host, queued on the stand-in's streams, so that they
// are captured into graphs. As much of the API as this project calls, with the numbers of CUDA 13's cublasLt.h.
//
// It takes no more than what the documentation of cublasLtMatmul() lists for these types, and answers the rest as the library does:
// INVALID_VALUE for arguments that contradict each other, NOT_SUPPORTED for combinations that it does not have. It is stricter
// where the library happens to be lenient: an algorithm is good for the problem and the alignments that it was asked for and for no
// others.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

// Of driver.cpp: runs the work, or records it if the stream is being captured.
extern "C" void cuemu_enqueue(void* stream, std::function<void()>* work);
extern "C" int cuemu_captures();

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
enum DataType { R_32F = 0, R_16BF = 14 };
enum { COMPUTE_32F = 68, OP_N = 0, OP_T = 1 };
enum Epilogue { DEFAULT = 1, BIAS = 4, GELU = 32, GELU_BIAS = 36 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8 };
enum { PREF_WORKSPACE = 1, PREF_REDUCTION = 3, PREF_ALIGNMENT_A = 5, PREF_ALIGNMENT_D = 8 };

// What an algorithm of this library wants to have as workspace, and overwrites. Split-k algorithms are like that.
constexpr size_t WORKSPACE_BYTES = 1 << 16;

struct Product {
  int32_t compute, scale, transa = OP_N, transb = OP_N;
  uint32_t epilogue = DEFAULT;
  void* bias = nullptr;
};

struct Layout {
  int32_t type;
  uint64_t rows, cols;
  int64_t ld;
  size_t element() const { return type == R_32F ? 4 : 2; }
  bool operator==(const Layout& other) const {
    return type == other.type && rows == other.rows && cols == other.cols && ld == other.ld;
  }
};

struct Preference {
  uint64_t workspace = 0;
  uint32_t reduction = 7, alignment[4] = {256, 256, 256, 256};
};

// What cublasLtMatmulAlgo_t holds here: all that the algorithm was chosen for.
struct Algorithm {
  uint64_t mark, m, n, k, kind;
  uint32_t alignment[4];
  uint64_t workspace;
};
static_assert(sizeof(Algorithm) == 64, "the size of cublasLtMatmulAlgo_t");
constexpr uint64_t MARK = 0x63754c745f737464;

struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
};

int handle_object;

// Types, transposition and sizes: what a pair of operands has, or why not.
Status problem_of(const Product& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d, Algorithm* problem) {
  for (const Layout* l : {&a, &b, &c, &d})
    if (!l->rows || !l->cols || l->ld < (int64_t)l->rows) return INVALID_VALUE;
  if (!(c == d)) return c.type == d.type ? INVALID_VALUE : NOT_SUPPORTED;
  if (p.transa == OP_N ? a.rows != d.rows : a.cols != d.rows) return INVALID_VALUE;
  if (p.transb == OP_N ? b.cols != d.cols : b.rows != d.cols) return INVALID_VALUE;
  const uint64_t k = p.transa == OP_N ? a.cols : a.rows;
  if (k != (p.transb == OP_N ? b.rows : b.cols)) return INVALID_VALUE;
  if (p.compute != COMPUTE_32F || p.scale != R_32F) return NOT_SUPPORTED;
  if (a.type != R_16BF || b.type != R_16BF || (d.type != R_16BF && d.type != R_32F)) return NOT_SUPPORTED;
  if (p.epilogue != DEFAULT && p.epilogue != BIAS && p.epilogue != GELU && p.epilogue != GELU_BIAS) return NOT_SUPPORTED;
  const uint64_t kind = (uint64_t)p.epilogue << 32 | d.type << 8 | p.transa << 1 | p.transb;
  *problem = {MARK, d.rows, d.cols, k, kind, {}, 0};
  return SUCCESS;
}

float load(const void* memory, int type, size_t i) {
  if (type == R_32F) return ((const float*)memory)[i];
  uint32_t bits = (uint32_t)((const uint16_t*)memory)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

void store(void* memory, int type, size_t i, double value) {
  float narrow = (float)value;
  if (type == R_32F) {
    ((float*)memory)[i] = narrow;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  ((uint16_t*)memory)[i] = narrow != narrow ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() { return 130000; }
// While a stream is captured by whatever thread, the library may fail at what it does for the first time, or for the last: here it does.
API cublasLtCreate(void** handle) { return cuemu_captures() ? INTERNAL_ERROR : (*handle = &handle_object, SUCCESS); }
API cublasLtDestroy(void* handle) {
  if (cuemu_captures()) {
    fputs("cublaslt: a handle is destroyed while a stream is captured\n", stderr);
    abort();
  }
  return handle == &handle_object ? SUCCESS : NOT_INITIALIZED;
}

API cublasLtMatmulDescCreate(void** descriptor, int compute, int scale) {
  auto* p = new Product;
  p->compute = compute;
  p->scale = scale;
  return *descriptor = p, SUCCESS;
}
API cublasLtMatmulDescDestroy(void* descriptor) { return delete (Product*)descriptor, SUCCESS; }
API cublasLtMatmulDescSetAttribute(void* descriptor, int attribute, const void* value, size_t bytes) {
  auto* p = (Product*)descriptor;
  auto set = [&](void* field, size_t size) { return bytes == size ? (memcpy(field, value, size), SUCCESS) : INVALID_VALUE; };
  if (!p || !value) return INVALID_VALUE;
  switch (attribute) {
    case DESC_TRANSA:
      return set(&p->transa, 4);
    case DESC_TRANSB:
      return set(&p->transb, 4);
    case DESC_EPILOGUE:
      return set(&p->epilogue, 4);
    case DESC_BIAS_POINTER:
      return set(&p->bias, 8);
    default:
      return INVALID_VALUE;
  }
}

API cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  return *layout = new Layout{type, rows, cols, ld}, SUCCESS;
}
API cublasLtMatrixLayoutDestroy(void* layout) { return delete (Layout*)layout, SUCCESS; }

API cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new Preference, SUCCESS; }
API cublasLtMatmulPreferenceDestroy(void* preference) { return delete (Preference*)preference, SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  auto* p = (Preference*)preference;
  auto set = [&](void* field, size_t size) { return bytes == size ? (memcpy(field, value, size), SUCCESS) : INVALID_VALUE; };
  if (!p || !value) return INVALID_VALUE;
  if (attribute == PREF_WORKSPACE) return set(&p->workspace, 8);
  if (attribute == PREF_REDUCTION) return set(&p->reduction, 4);
  if (attribute >= PREF_ALIGNMENT_A && attribute <= PREF_ALIGNMENT_D) return set(&p->alignment[attribute - PREF_ALIGNMENT_A], 4);
  return INVALID_VALUE;
}

API cublasLtMatmulAlgoGetHeuristic(void* handle, void* descriptor, void* a, void* b, void* c, void* d, void* preference,
                                   int requested, Heuristic* results, int* count) {
  if (handle != &handle_object) return NOT_INITIALIZED;
  // As cuBLASLt of CUDA 13.3 does ("could not obtain green context information"); others answer.
  if (cuemu_captures()) return INTERNAL_ERROR;
  if (!descriptor || !a || !b || !c || !d || !preference || requested < 1 || !results || !count) return INVALID_VALUE;
  auto& wish = *(Preference*)preference;
  Algorithm algorithm;
  *count = 0;
  Status status = problem_of(*(Product*)descriptor, *(Layout*)a, *(Layout*)b, *(Layout*)c, *(Layout*)d, &algorithm);
  if (status != SUCCESS) return status;
  const Layout* layouts[4] = {(Layout*)a, (Layout*)b, (Layout*)c, (Layout*)d};
  for (int i = 0; i < 4; i++) {
    if (wish.alignment[i] < layouts[i]->element()) return NOT_SUPPORTED;
    algorithm.alignment[i] = wish.alignment[i];
  }
  // So that a test can see what happens without an algorithm, which the library has for this.
  if (algorithm.m == 1) return NOT_SUPPORTED;
  algorithm.workspace = wish.workspace >= WORKSPACE_BYTES ? WORKSPACE_BYTES : 0;
  *results = {algorithm, algorithm.workspace, SUCCESS, 1.f, {}};
  return *count = 1, SUCCESS;
}

API cublasLtMatmul(void* handle, void* descriptor, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const float* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void* stream) {
  if (handle != &handle_object) return NOT_INITIALIZED;
  if (!descriptor || !a_layout || !b_layout || !c_layout || !d_layout || !algorithm || !alpha || !beta) return INVALID_VALUE;
  if (!a || !b || !d || (*beta != 0 && !c)) return INVALID_VALUE;
  const Product p = *(Product*)descriptor;
  const Layout la = *(Layout*)a_layout, lb = *(Layout*)b_layout, ld = *(Layout*)d_layout;
  Algorithm problem;
  Status status = problem_of(p, la, lb, *(Layout*)c_layout, ld, &problem);
  if (status != SUCCESS) return status;
  if (memcmp(&problem, algorithm, offsetof(Algorithm, alignment)) != 0) return NOT_SUPPORTED;
  const void* operands[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++)
    if ((uintptr_t)operands[i] % algorithm->alignment[i]) return NOT_SUPPORTED;
  if (algorithm->workspace > workspace_bytes || (algorithm->workspace && (!workspace || (uintptr_t)workspace % 256)))
    return INVALID_VALUE;
  const bool has_bias = p.epilogue == BIAS || p.epilogue == GELU_BIAS, has_gelu = p.epilogue == GELU || p.epilogue == GELU_BIAS;
  if (has_bias && !p.bias) return INVALID_VALUE;

  const size_t m = problem.m, n = problem.n, k = problem.k, scratch = algorithm->workspace;
  const double alpha_now = *alpha, beta_now = *beta;
  std::function<void()> work = [=] {
    if (scratch) memset(workspace, 0xab, scratch);
    for (size_t j = 0; j < n; j++)
      for (size_t i = 0; i < m; i++) {
        double sum = 0;
        for (size_t l = 0; l < k; l++)
          sum += (double)load(a, R_16BF, p.transa == OP_N ? l * la.ld + i : i * la.ld + l) *
                 load(b, R_16BF, p.transb == OP_N ? j * lb.ld + l : l * lb.ld + j);
        double value = alpha_now * sum;
        if (beta_now != 0) value += beta_now * load(c, ld.type, j * ld.ld + i);
        // The bias has the type of D.
        if (has_bias) value += load(p.bias, ld.type, i);
        store(d, ld.type, j * ld.ld + i, has_gelu ? gelu(value) : value);
      }
  };
  cuemu_enqueue(stream, &work);
  return SUCCESS;
}
