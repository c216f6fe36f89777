// That the emulation shows what a kernel does before griddepcontrol.wait: kernels with such mistakes, and what becomes of them.
#include "../common.cuh"

constexpr int BLOCKS = 8;

extern "C" __global__ void fill(int* to, int value) {
  ptx::wait_for_earlier_kernels();
  to[blockIdx.x] = value;
}
CU_EXPORT(fill)
extern "C" __global__ void copy(const int* from, int* to) {
  ptx::wait_for_earlier_kernels();
  to[blockIdx.x] = from[blockIdx.x];
}
CU_EXPORT(copy)
extern "C" __global__ void copy_early(const int* from, int* to) {
  const int value = from[blockIdx.x];
  ptx::wait_for_earlier_kernels();
  to[blockIdx.x] = value;
}
CU_EXPORT(copy_early)
extern "C" __global__ void fill_early(int* to, int value) {
  to[blockIdx.x] = value;
  ptx::wait_for_earlier_kernels();
}
CU_EXPORT(fill_early)
extern "C" __global__ void never_waits(int* to, int value) { to[blockIdx.x] = value; }
CU_EXPORT(never_waits)
// Threads of a block that meet before and behind the wait.
extern "C" __global__ void meets_around_the_wait(const int* from, int* to) {
  CU_SHARED(int, shared);
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int other = shared[blockDim.x - 1 - threadIdx.x];
  ptx::wait_for_earlier_kernels();
  __syncthreads();
  shared[threadIdx.x] = from[blockIdx.x] + other;
  __syncthreads();
  if (threadIdx.x == 0) to[blockIdx.x] = shared[blockDim.x - 1];
}
CU_EXPORT(meets_around_the_wait)

#include "driver.cpp"

#include <sys/wait.h>
#include <unistd.h>

namespace {

void* stream;
void* module;
int* a;
int* b;
int* c;

void expect(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "early start: expected %s\n", what);
  exit(1);
}

template <class... P>
void launch(const char* name, unsigned threads, P... parameters) {
  void *function, *pointers[] = {&parameters...};
  expect(cuModuleGetFunction(&function, module, name) == SUCCESS, name);
  LaunchAttribute attribute{PROGRAMMATIC_STREAM_SERIALIZATION, 0, {}};
  attribute.programmatic_stream_serialization = 1;
  const LaunchConfig config{{BLOCKS, 1, 1}, {threads, 1, 1}, 4 * threads, stream, &attribute, 1};
  expect(cuLaunchKernelEx(&config, function, pointers, nullptr) == SUCCESS, "a launch");
}

// How many elements are `value` when all is done.
int count(const int* of, int value) {
  cuStreamSynchronize(stream);
  return std::count(of, of + BLOCKS, value);
}

void clear() {
  cuStreamSynchronize(stream);
  std::fill(a, a + BLOCKS, 1);
  std::fill(b, b + BLOCKS, 1);
}

template <class F>
void replay(F record) {
  void *graph, *instance;
  cuStreamBeginCapture_v2(stream, 2);
  record();
  cuStreamEndCapture(stream, &graph);
  cuGraphInstantiateWithFlags(&instance, graph, 0);
  cuGraphDestroy(graph);
  cuGraphLaunch(instance, stream);
  cuStreamSynchronize(stream);
  cuGraphExecDestroy(instance);
}

bool dies(void (*work)()) {
  const pid_t child = fork();
  if (child == 0) {
    freopen("/dev/null", "w", stderr);
    work();
    cuStreamSynchronize(stream);
    _exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

}  // namespace

int main() {
  void* context;
  Pointer pointers[3];
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSetCurrent(context);
  cuStreamCreate(&stream, 1);
  cuModuleLoadData(&module, "");
  for (Pointer& pointer : pointers) cuMemAlloc_v2(&pointer, BLOCKS * sizeof(int));
  a = (int*)pointers[0];
  b = (int*)pointers[1];
  c = (int*)pointers[2];

  clear();
  launch("fill", 1, a, 2);
  launch("copy", 1, a, b);
  expect(count(b, 2) == BLOCKS, "a kernel that waits to read what the one ahead wrote");

  clear();
  launch("fill", 1, a, 2);
  launch("meets_around_the_wait", 64, a, b);
  expect(count(b, 2) == BLOCKS, "threads that meet before and behind the wait to be the same");

  clear();
  launch("fill", 1, a, 2);
  launch("copy_early", 1, a, b);
  expect(count(b, 1) == 1, "one block of a kernel that reads too early to read what was there before");

  clear();
  launch("fill", 1, a, 2);
  launch("fill", 1, c, 3);
  launch("copy_early", 1, a, b);
  expect(count(b, 1) == 1, "a kernel to start before the last but one has ended");

  clear();
  launch("copy", 1, a, b);
  launch("fill_early", 1, a, 2);
  expect(count(b, 2) == 1, "a write that is too early to be seen by the kernel ahead");

  clear();
  replay([] {
    launch("fill", 1, a, 2);
    launch("copy_early", 1, a, b);
  });
  expect(count(b, 1) == 1, "the same within a graph");

  clear();
  launch("fill", 1, a, 2);
  replay([] { launch("copy_early", 1, a, b); });
  expect(count(b, 2) == BLOCKS, "the first kernel of a graph to start behind all that is ahead of the graph");

  clear();
  cuMemsetD8Async((Pointer)a, 0, BLOCKS * sizeof(int), stream);
  launch("copy_early", 1, a, b);
  expect(count(b, 0) == BLOCKS, "a kernel behind a fill to start behind it");

  expect(dies([] { launch("never_waits", 1, a, 2); }), "the end, for a kernel that never waits");
  expect(!dies([] { launch("fill", 1, a, 2); }), "none for one that does");
}
