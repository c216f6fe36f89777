// A stand-in for libcuda.so.1 that runs the kernels on the host: device memory is host memory, graphs are recorded closures. As
// much of the driver API as this project calls, under the names of CUDA 13.
//
// It is as late as a card may be: work is done when somebody waits for it and not before, so that host memory which is written or
// freed too early shows. And it is as early: of a stream of copies some are done at once, so that memory which other
// streams still read shows; of a kernel that is launched with programmatic stream serialization a block runs up to
// griddepcontrol.wait before the kernels ahead of it do, so that what touches memory too early shows. Fresh memory is poisoned,
// freed memory is given back at once. What a card forbids is an error here: calls that a capture does not allow, calls without a
// context, blocks with more shared memory than their kernel was given. What it may do anything about ends the process: copies that
// leave their allocation, code that is unloaded under its graphs, a context that is released while something made in it lives.
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <set>

namespace {

using Result = int;
using Pointer = unsigned long long;

constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
                 ILLEGAL_STATE = 401, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, WRONG_THREAD = 908;

// A kernel and its arguments.
struct Launch {
  cuemu::Grid grid;
  std::vector<std::vector<char>> parameters;
  std::vector<void*> pointers;  // to them
  std::shared_ptr<int> used;    // its module's
};

struct Work {
  std::function<void()> run;  // or
  std::shared_ptr<const Launch> launch;
  bool is_kernel;            // of ours or of cuBLASLt
  bool may_overlap = false;  // the kernels ahead
};

struct Queued {
  Work work;
  cuemu::Early early;
};

struct Stream : std::enable_shared_from_this<Stream> {
  std::deque<Queued> waiting;
  uint64_t queued = 0, done = 0;
  bool capturing = false, invalidated = false;
  bool has_kernels = false;  // or had
  uint64_t copies = 0;       // to the device
  std::thread::id capturer;
  std::vector<Work> captured;
};

struct Event {
  std::shared_ptr<Stream> stream;
  uint64_t place = 0;  // how much of the stream lies before it
  std::chrono::steady_clock::time_point time;
};

// What has a destructor is never destroyed: threads of the program may outlive its main function.
int context_object;
thread_local void* current_context = nullptr;
std::shared_ptr<Stream>& null_stream = *new std::shared_ptr<Stream>(new Stream);

// One for all streams, since work of one may do that of another first.
std::recursive_mutex& streams_lock = *new std::recursive_mutex;
using Guard = std::lock_guard<std::recursive_mutex>;

std::mutex objects_lock;
int retained = 0;
std::set<std::shared_ptr<Stream>>& streams = *new std::set<std::shared_ptr<Stream>>;
// Of everything else that is made in the context: how many there are.
std::atomic<int> modules{0}, events{0}, graphs{0}, graph_instances{0};

// For the report.
struct Most {
  unsigned threads = 0, shared_bytes = 0;
};
std::map<std::string, Most>& launched = *new std::map<std::string, Most>;
std::atomic<size_t> waits{0};

// Handles 0 to 2 are the null stream, legacy and per thread.
Stream& stream_of(void* handle) { return (uintptr_t)handle < 3 ? *null_stream : *(Stream*)handle; }

Result enqueue(void* stream, Work work) {
  if (!current_context) return INVALID_CONTEXT;
  Stream& s = stream_of(stream);
  Guard guard(streams_lock);
  if (s.capturing) {
    // What comes first in a graph waits for all that is ahead of the graph.
    if (s.captured.empty()) work.may_overlap = false;
    s.captured.push_back(std::move(work));
  } else {
    s.has_kernels |= work.is_kernel;
    s.waiting.push_back({std::move(work), {}});
    s.queued++;
  }
  return SUCCESS;
}
Result enqueue(void* stream, std::function<void()> copy) { return enqueue(stream, Work{std::move(copy), nullptr, false}); }

// How many kernels may have blocks on the card before those ahead of them are done. More than one, since a kernel may start when
// all blocks of the one ahead have started: that one's own wait may still last.
constexpr size_t MOST_EARLY = 4;

// Starts a block of each kernel behind the first in the queue that may overlap it; those behind a copy may not. At most `count` of
// the queue are looked at. A card starts them once the kernels ahead have called griddepcontrol.launch_dependents or ended; here it
// is at once, which no kernel may rely upon not to happen.
void start_early(Stream& s, size_t count) {
  for (size_t i = 1; i < std::min(count, MOST_EARLY + 1) && s.waiting[i - 1].work.is_kernel && s.waiting[i].work.may_overlap; i++) {
    auto& [work, early] = s.waiting[i];
    const uint64_t place = s.done + i + cuemu::options().seed;
    if (!early) early = cuemu::Early(work.launch->grid, place * 0x9e3779b97f4a7c15ull % work.launch->grid.blocks());
  }
}

// Does what was queued up to a place.
void run(Stream& s, uint64_t place) {
  Guard guard(streams_lock);
  for (; s.done < place; s.done++) {
    start_early(s, place - s.done);
    auto& [work, early] = s.waiting.front();
    if (work.launch)
      cuemu::launch(work.launch->grid, &early);
    else
      work.run();
    s.waiting.pop_front();
  }
}
void run(Stream& s) {
  Guard guard(streams_lock);
  run(s, s.queued);
}

// For calls that want a context and that a capture by the same thread (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) does not survive.
Result not_captured() {
  if (!current_context) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> guard(objects_lock);
  for (const auto& s : streams) {
    if (!s->capturing || s->capturer != std::this_thread::get_id()) continue;
    s->invalidated = true;
    return CAPTURE_UNSUPPORTED;
  }
  return SUCCESS;
}

std::mutex memory_lock;
std::map<uintptr_t, size_t>& allocations = *new std::map<uintptr_t, size_t>;
size_t allocated_bytes = 0;
constexpr size_t TOTAL_BYTES = 8ull << 30;

Result allocate(Pointer* pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(memory_lock);
  if (allocated_bytes + bytes > TOTAL_BYTES) return OUT_OF_MEMORY;
  void* memory = aligned_alloc(256, (bytes + 255) & ~size_t(255));
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, 0xFF, bytes);
  allocations[(uintptr_t)memory] = bytes;
  allocated_bytes += bytes;
  *pointer = (Pointer)memory;
  return SUCCESS;
}

Result release(Pointer pointer) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto found = allocations.find((uintptr_t)pointer);
  if (found == allocations.end()) cuemu::die("memory is freed that is not allocated");
  allocated_bytes -= found->second;
  allocations.erase(found);
  free((void*)pointer);
  return SUCCESS;
}

// Pinned memory of the host.
std::map<uintptr_t, size_t>& pinned = *new std::map<uintptr_t, size_t>;

void check_within(const std::map<uintptr_t, size_t>& ranges, uintptr_t start, size_t bytes, const char* what) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto after = ranges.upper_bound(start);
  if (after == ranges.begin()) cuemu::die(what);
  --after;
  if (start + bytes > after->first + after->second) cuemu::die(what);
}

// Every copy and fill must stay within one allocation.
void check_device(Pointer pointer, size_t bytes, const char* what) { check_within(allocations, (uintptr_t)pointer, bytes, what); }

// From pageable memory a card may copy at once or later. It is checked when the copy is done: by then it may have been given back.
void check_pinned(const void* pointer, size_t bytes) {
  check_within(pinned, (uintptr_t)pointer, bytes, "a copy reads or writes host memory that is not pinned, or not any more");
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) Result

// The compute capability times ten: 80, say, takes the kernels that such a card would.
static int capability() {
  const char* chosen = getenv("CUEMU_CAPABILITY");
  return chosen ? atoi(chosen) : 90;
}

// For the tests of "no card".
API cuInit(unsigned) { return getenv("CUEMU_NO_DEVICE") ? NO_DEVICE : SUCCESS; }
API cuDriverGetVersion(int* version) {
  const char* chosen = getenv("CUEMU_DRIVER");  // 12080, say
  return *version = chosen ? atoi(chosen) : 13000, SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
API cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
API cuDeviceGetName(char* name, int bytes, int) { return snprintf(name, bytes, "host emulation"), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL_BYTES, SUCCESS; }
API cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = TOTAL_BYTES - allocated_bytes, *total = TOTAL_BYTES, SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {  // numbers of CUdevice_attribute
    case 10:
      return *value = 32, SUCCESS;  // warp size
    case 16:
      return *value = 4, SUCCESS;  // multiprocessors: few, so that grid-stride loops and splits take more than one turn
    case 75:
      return *value = capability() / 10, SUCCESS;
    case 76:
      return *value = capability() % 10, SUCCESS;
    case 97:
      return *value = 232448, SUCCESS;  // shared memory of a block
    default:
      return *value = 0, SUCCESS;
  }
}

API cuDevicePrimaryCtxRetain(void** context, int) {
  std::lock_guard<std::mutex> guard(objects_lock);
  retained++;
  return *context = &context_object, SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  std::lock_guard<std::mutex> guard(objects_lock);
  if (--retained > 1) return SUCCESS;  // the process keeps the context once
  if (!streams.empty() || modules || events || graphs || graph_instances || !pinned.empty() || allocated_bytes) {
    fprintf(stderr, "cuemu: %zu streams, %d modules, %d events, %d graphs, %d instances, %zu pinned buffers, %zu bytes\n",
            streams.size(), modules.load(), events.load(), graphs.load(), graph_instances.load(), pinned.size(), allocated_bytes);
    cuemu::die("the context is released while something made in it lives");
  }
  return SUCCESS;
}
API cuCtxSetCurrent(void* context) { return current_context = context, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current_context, SUCCESS; }
API cuCtxSynchronize() { return SUCCESS; }

API cuStreamCreate(void** stream, unsigned) {
  if (!current_context) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> guard(objects_lock);
  auto made = std::make_shared<Stream>();
  streams.insert(made);
  return *stream = made.get(), SUCCESS;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(void* stream) {
  auto* s = (Stream*)stream;
  if (s->capturing) cuemu::die("a stream is destroyed while it is captured");
  run(*s);
  std::lock_guard<std::mutex> guard(objects_lock);
  streams.erase(s->shared_from_this());
  return SUCCESS;
}
API cuStreamSynchronize(void* stream) {
  waits++;
  Stream& s = stream_of(stream);
  if (s.capturing) return s.invalidated = true, CAPTURE_UNSUPPORTED;
  return run(s), SUCCESS;
}

API cuEventCreate(void** event, unsigned) {
  if (!current_context) return INVALID_CONTEXT;
  return events++, *event = new Event, SUCCESS;
}
API cuEventDestroy_v2(void* event) { return events--, delete (Event*)event, SUCCESS; }
API cuEventRecord(void* event, void* stream) {
  auto* e = (Event*)event;
  Stream& s = stream_of(stream);
  Guard guard(streams_lock);
  Result queued = enqueue(stream, [e] { e->time = std::chrono::steady_clock::now(); });
  return e->stream = s.shared_from_this(), e->place = s.queued, queued;
}
// For where the event stands now, wherever it is recorded later.
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  auto* e = (Event*)event;
  if (stream_of(stream).capturing) return stream_of(stream).invalidated = true, CAPTURE_UNSUPPORTED;
  if (!e->stream) return SUCCESS;
  return enqueue(stream, [other = e->stream, place = e->place] { run(*other, place); });
}
API cuEventSynchronize(void* event) {
  waits++;
  if (Result refused = not_captured()) return refused;
  auto* e = (Event*)event;
  if (e->stream) run(*e->stream, e->place);
  return SUCCESS;
}
API cuEventElapsedTime_v2(float* ms, void* from, void* to) {
  return *ms = std::chrono::duration<float, std::milli>(((Event*)to)->time - ((Event*)from)->time).count(), SUCCESS;
}

API cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
  Result refused = not_captured();
  return refused ? refused : allocate(pointer, bytes);
}
// Waits for the card.
API cuMemFree_v2(Pointer pointer) {
  if (Result refused = not_captured()) return refused;
  {
    std::lock_guard<std::mutex> guard(objects_lock);
    for (const auto& stream : streams) run(*stream);
  }
  return release(pointer);
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (Result refused = not_captured()) return refused;
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~size_t(4095));
  if (!*pointer) return OUT_OF_MEMORY;
  std::lock_guard<std::mutex> guard(memory_lock);
  return pinned[(uintptr_t)*pointer] = bytes, SUCCESS;
}
API cuMemFreeHost(void* pointer) {
  if (Result refused = not_captured()) return refused;
  std::lock_guard<std::mutex> guard(memory_lock);
  if (!pinned.erase((uintptr_t)pointer)) cuemu::die("pinned memory is given back that is not there");
  return free(pointer), SUCCESS;
}
// A graph would read whatever lies there when it is replayed.
API cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
  if (stream_of(stream).capturing) return not_captured();
  check_device(to, bytes, "a copy to the device leaves its allocation");
  Result queued = enqueue(stream, [=] {
    check_pinned(from, bytes);
    memcpy((void*)to, from, bytes);
  });
  Stream& s = stream_of(stream);
  Guard guard(streams_lock);
  if (queued == SUCCESS && !s.has_kernels && (s.copies++ + cuemu::options().seed) * 0x9e3779b97f4a7c15ull >> 63) run(s);
  return queued;
}
API cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
  if (stream_of(stream).capturing) return not_captured();
  check_device(from, bytes, "a copy from the device leaves its allocation");
  return enqueue(stream, [=] {
    check_pinned(to, bytes);
    memcpy(to, (void*)from, bytes);
  });
}
API cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
  check_device(to, bytes, "a copy on the device leaves its allocation");
  check_device(from, bytes, "a copy on the device leaves its allocation");
  return enqueue(stream, [=] { memmove((void*)to, (void*)from, bytes); });
}
API cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void* stream) {
  check_device(to, bytes, "a fill leaves its allocation");
  return enqueue(stream, [=] { memset((void*)to, value, bytes); });
}

// Code. Whoever will run it, waiting work or a graph, holds `used`.
struct Module;
struct Function {
  std::string name;
  cuemu::Kernel* kernel;
  Module* module;
  int shared_limit;  // dynamic shared memory of a block, in bytes
};
struct Module {
  std::shared_ptr<int> used = std::make_shared<int>();
  std::map<std::string, Function> functions;
};
constexpr int MAX_DYNAMIC_SHARED = 8, CARVEOUT = 9, MAX_SHARED_BYTES = 232448, DEFAULT_SHARED_BYTES = 48 << 10;

API cuModuleLoadData(void** module, const void*) {
  if (Result refused = not_captured()) return refused;
  return modules++, *module = new Module, SUCCESS;
}
API cuModuleUnload(void* module) {
  if (Result refused = not_captured()) return refused;
  auto* m = (Module*)module;
  if (m->used.use_count() > 1) cuemu::die("code is unloaded that waiting work or a graph needs");
  return modules--, delete m, SUCCESS;
}
// Every module has every kernel. Of one module it is called by one thread at a time.
API cuModuleGetFunction(void** function, void* module, const char* name) {
  auto found = cuemu::registry().find(name);
  if (found == cuemu::registry().end()) return NOT_FOUND;
  auto* m = (Module*)module;
  return *function = &m->functions.try_emplace(name, Function{name, &found->second, m, DEFAULT_SHARED_BYTES}).first->second, SUCCESS;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == CARVEOUT && value >= -1 && value <= 100) return SUCCESS;
  if (attribute != MAX_DYNAMIC_SHARED || value > MAX_SHARED_BYTES) return INVALID_VALUE;
  return ((Function*)function)->shared_limit = value, SUCCESS;
}
API cuFuncGetAttribute(int* value, int, void*) { return *value = 0, SUCCESS; }

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  int id, padding;
  union {
    char bytes[64];
    int programmatic_stream_serialization;
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned count;
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

API cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
  const auto& [name, kernel, module, shared_limit] = *(Function*)function;
  const auto [gx, gy, gz] = config->grid;
  const auto [bx, by, bz] = config->block;
  if (config->shared > (unsigned)shared_limit) return INVALID_VALUE;
  if (!gx || !gy || !gz || gx > INT32_MAX || gy > 65535 || gz > 65535 || !bx || !by || !bz || bx * by * bz > 1024)
    return INVALID_VALUE;
  bool is_programmatic = false;
  for (unsigned i = 0; i < config->count; i++) {
    if (config->attributes[i].id != PROGRAMMATIC_STREAM_SERIALIZATION) return INVALID_VALUE;
    is_programmatic = config->attributes[i].programmatic_stream_serialization != 0;
  }
  {
    std::lock_guard<std::mutex> guard(objects_lock);
    Most& most = launched[name];
    most = {std::max(most.threads, bx * by * bz), std::max(most.shared_bytes, config->shared)};
  }
  auto launch = std::make_shared<Launch>();
  launch->used = module->used;
  for (size_t i = 0; i < kernel->sizes.size(); i++)
    launch->parameters.emplace_back((char*)parameters[i], (char*)parameters[i] + kernel->sizes[i]);
  for (auto& parameter : launch->parameters) launch->pointers.push_back(parameter.data());
  auto body = [kernel = kernel, pointers = launch->pointers.data()] { kernel->call(pointers); };
  launch->grid = {{gx, gy, gz}, {bx, by, bz}, config->shared, body, is_programmatic};
  return enqueue(config->stream, Work{nullptr, launch, true, is_programmatic});
}

API cuStreamBeginCapture_v2(void* stream, int) {
  Stream& s = stream_of(stream);
  if (!current_context) return INVALID_CONTEXT;
  if (s.capturing) return ILLEGAL_STATE;
  s.capturing = true;
  s.invalidated = false;
  s.capturer = std::this_thread::get_id();
  s.captured.clear();
  return SUCCESS;
}
API cuStreamEndCapture(void* stream, void** graph) {
  Stream& s = stream_of(stream);
  *graph = nullptr;
  if (!s.capturing) return ILLEGAL_STATE;
  if (s.capturer != std::this_thread::get_id()) return WRONG_THREAD;
  s.capturing = false;
  auto captured = std::move(s.captured);
  s.captured.clear();
  if (s.invalidated) return CAPTURE_INVALIDATED;
  graphs++;
  *graph = new std::vector<Work>(std::move(captured));
  return SUCCESS;
}
API cuStreamIsCapturing(void* stream, int* status) { return *status = stream_of(stream).capturing, SUCCESS; }
API cuGraphInstantiateWithFlags(void** instance, void* graph, Pointer) {
  if (!current_context) return INVALID_CONTEXT;
  return graph_instances++, *instance = new std::vector<Work>(*(std::vector<Work>*)graph), SUCCESS;
}
API cuGraphLaunch(void* instance, void* stream) {
  for (auto& work : *(std::vector<Work>*)instance)
    if (Result failed = enqueue(stream, work)) return failed;
  return SUCCESS;
}
API cuGraphDestroy(void* graph) { return graphs--, delete (std::vector<Work>*)graph, SUCCESS; }
API cuGraphExecDestroy(void* instance) { return graph_instances--, delete (std::vector<Work>*)instance, SUCCESS; }
// CUEMU_GRAPHS: how many graphs the card has memory for.
API cuGraphUpload(void*, void*) {
  const char* most = getenv("CUEMU_GRAPHS");
  return most && graph_instances > atoi(most) ? OUT_OF_MEMORY : SUCCESS;
}

API cuGetErrorString(Result error, const char** text) {
  switch (error) {
    case OUT_OF_MEMORY:
      return *text = "out of memory", SUCCESS;
    case INVALID_VALUE:
      return *text = "invalid argument", SUCCESS;
    case INVALID_CONTEXT:
      return *text = "invalid device context", SUCCESS;
    case CAPTURE_INVALIDATED:
      return *text = "operation failed due to a previous error during capture", SUCCESS;
    case NO_DEVICE:
      return *text = "no CUDA-capable device is detected", SUCCESS;
    case INVALID_DEVICE:
      return *text = "invalid device ordinal", SUCCESS;
    case NOT_FOUND:
      return *text = "named symbol not found", SUCCESS;
    case CAPTURE_UNSUPPORTED:
      return *text = "operation not permitted when stream is capturing", SUCCESS;
    default:
      return *text = "error of the stand-in", SUCCESS;
  }
}
API cuGetErrorName(Result error, const char** text) { return cuGetErrorString(error, text); }

// CUEMU_REPORT: a file for what the process did: how often the host waited, and of each kernel the most threads and bytes of shared
// memory of a block.
__attribute__((destructor)) static void report() {
  const char* path = getenv("CUEMU_REPORT");
  FILE* file = path ? fopen(path, "w") : nullptr;
  if (!file) return;
  std::lock_guard<std::mutex> guard(objects_lock);
  fprintf(file, "waits\t%zu\n", waits.load());
  for (const auto& [name, most] : launched) fprintf(file, "%s\t%u\t%u\n", name.c_str(), most.threads, most.shared_bytes);
  fclose(file);
}

// Whether any stream is captured.
extern "C" __attribute__((visibility("default"))) int cuemu_captures() {
  std::lock_guard<std::mutex> guard(objects_lock);
  return std::any_of(streams.begin(), streams.end(), [](const auto& s) { return s->capturing; });
}

// cuBLASLt's stand-in queues its products on these streams too.
extern "C" __attribute__((visibility("default"))) void cuemu_enqueue(void* stream, std::function<void()>* work) {
  enqueue(stream, Work{std::move(*work), nullptr, true});
}
