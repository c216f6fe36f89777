// A stand-in for libcuda.so.1 that runs the kernels on the host: device memory is host memory, work is done when it is queued,
// graphs are recorded closures. As much of the driver API as this project calls, under the names of CUDA 13.
//
// Fresh memory is poisoned, freed memory is given back at once, and copies into memory that was not allocated here end the process.
#include <chrono>
#include <mutex>
#include <set>

namespace {

using Result = int;
using Pointer = unsigned long long;

constexpr Result SUCCESS = 0, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900;

using Work = std::function<void()>;

struct Stream {
  bool capturing = false;
  std::vector<Work> captured;
};

struct Event {
  std::chrono::steady_clock::time_point time;
};

int context_object;
thread_local void* current_context = nullptr;
Stream null_stream;

// Handles 0 to 2 are the null stream, legacy and per thread.
Stream& stream_of(void* handle) { return (uintptr_t)handle < 3 ? null_stream : *(Stream*)handle; }

Result enqueue(void* stream, Work work) {
  Stream& s = stream_of(stream);
  if (s.capturing)
    s.captured.push_back(std::move(work));
  else
    work();
  return SUCCESS;
}

std::mutex memory_lock;
std::map<uintptr_t, size_t> allocations;
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

// Every copy and fill must stay within one allocation.
void check_device(Pointer pointer, size_t bytes, const char* what) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto after = allocations.upper_bound((uintptr_t)pointer);
  if (after == allocations.begin()) cuemu::die(what);
  --after;
  if ((uintptr_t)pointer + bytes > after->first + after->second) cuemu::die(what);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) Result

// For the tests of "no card".
API cuInit(unsigned) { return getenv("CUEMU_NO_DEVICE") ? NO_DEVICE : SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
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
      return *value = 9, SUCCESS;  // compute capability
    case 76:
      return *value = 0, SUCCESS;
    case 97:
      return *value = 232448, SUCCESS;  // shared memory of a block
    default:
      return *value = 0, SUCCESS;
  }
}

API cuDevicePrimaryCtxRetain(void** context, int) { return *context = &context_object, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* context) { return current_context = context, SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current_context, SUCCESS; }
API cuCtxSynchronize() { return SUCCESS; }

API cuStreamCreate(void** stream, unsigned) { return *stream = new Stream, SUCCESS; }
API cuStreamCreateWithPriority(void** stream, unsigned, int) { return *stream = new Stream, SUCCESS; }
API cuStreamDestroy_v2(void* stream) { return delete (Stream*)stream, SUCCESS; }
API cuStreamSynchronize(void* stream) { return stream_of(stream).capturing ? CAPTURE_UNSUPPORTED : SUCCESS; }
API cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }

API cuEventCreate(void** event, unsigned) { return *event = new Event, SUCCESS; }
API cuEventDestroy_v2(void* event) { return delete (Event*)event, SUCCESS; }
API cuEventRecord(void* event, void*) { return ((Event*)event)->time = std::chrono::steady_clock::now(), SUCCESS; }
API cuEventSynchronize(void*) { return SUCCESS; }
API cuEventQuery(void*) { return SUCCESS; }
API cuEventElapsedTime_v2(float* ms, void* from, void* to) {
  return *ms = std::chrono::duration<float, std::milli>(((Event*)to)->time - ((Event*)from)->time).count(), SUCCESS;
}

API cuMemAlloc_v2(Pointer* pointer, size_t bytes) { return allocate(pointer, bytes); }
API cuMemFree_v2(Pointer pointer) { return release(pointer); }
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~size_t(4095));
  return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API cuMemFreeHost(void* pointer) { return free(pointer), SUCCESS; }
API cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
  check_device(to, bytes, "a copy to the device leaves its allocation");
  return enqueue(stream, [=] { memcpy((void*)to, from, bytes); });
}
API cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
  check_device(from, bytes, "a copy from the device leaves its allocation");
  return enqueue(stream, [=] { memcpy(to, (void*)from, bytes); });
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

API cuModuleLoadData(void** module, const void*) { return *module = &context_object, SUCCESS; }
API cuModuleUnload(void*) { return SUCCESS; }
API cuModuleGetFunction(void** function, void*, const char* name) {
  auto found = cuemu::registry().find(name);
  if (found == cuemu::registry().end()) return NOT_FOUND;
  *function = &found->second;
  return SUCCESS;
}
API cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
API cuFuncGetAttribute(int* value, int, void*) { return *value = 0, SUCCESS; }
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void**) {
  auto* kernel = (cuemu::Kernel*)function;
  std::vector<std::vector<char>> values;
  for (size_t i = 0; i < kernel->sizes.size(); i++)
    values.emplace_back((char*)parameters[i], (char*)parameters[i] + kernel->sizes[i]);
  return enqueue(stream, [=]() mutable {
    std::vector<void*> pointers;
    for (auto& value : values) pointers.push_back(value.data());
    cuemu::launch({gx, gy, gz}, {bx, by, bz}, shared, [&] { kernel->call(pointers.data()); });
  });
}

API cuStreamBeginCapture_v2(void* stream, int) {
  Stream& s = stream_of(stream);
  s.capturing = true;
  s.captured.clear();
  return SUCCESS;
}
API cuStreamEndCapture(void* stream, void** graph) {
  Stream& s = stream_of(stream);
  s.capturing = false;
  *graph = new std::vector<Work>(std::move(s.captured));
  s.captured.clear();
  return SUCCESS;
}
API cuStreamIsCapturing(void* stream, int* status) { return *status = stream_of(stream).capturing, SUCCESS; }
API cuGraphInstantiateWithFlags(void** instance, void* graph, Pointer) {
  return *instance = new std::vector<Work>(*(std::vector<Work>*)graph), SUCCESS;
}
API cuGraphLaunch(void* instance, void* stream) {
  for (auto& work : *(std::vector<Work>*)instance) enqueue(stream, work);
  return SUCCESS;
}
API cuGraphDestroy(void* graph) { return delete (std::vector<Work>*)graph, SUCCESS; }
API cuGraphExecDestroy(void* instance) { return delete (std::vector<Work>*)instance, SUCCESS; }
API cuGraphUpload(void*, void*) { return SUCCESS; }

API cuGetErrorString(Result error, const char** text) {
  switch (error) {
    case OUT_OF_MEMORY:
      return *text = "out of memory", SUCCESS;
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

// cuBLASLt's stand-in queues its products on these streams too.
extern "C" __attribute__((visibility("default"))) void cuemu_enqueue(void* stream, std::function<void()>* work) {
  enqueue(stream, std::move(*work));
}
