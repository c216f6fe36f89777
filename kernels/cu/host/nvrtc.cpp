// A stand-in for NVRTC beside driver.cpp: its kernels are compiled in already, so that "machine code" is only a mark.
#include <cstddef>
#include <cstring>

#define API extern "C" __attribute__((visibility("default"))) int

static const char MARK[] = "kernels of the host emulation";

API nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
API nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
  return *program = (void*)MARK, 0;
}
API nvrtcDestroyProgram(void**) { return 0; }
API nvrtcCompileProgram(void*, int, const char* const*) { return 0; }
API nvrtcGetProgramLogSize(void*, size_t* bytes) { return *bytes = 1, 0; }
API nvrtcGetProgramLog(void*, char* log) { return *log = 0, 0; }
API nvrtcGetCUBINSize(void*, size_t* bytes) { return *bytes = sizeof MARK, 0; }
API nvrtcGetCUBIN(void*, char* cubin) { return memcpy(cubin, MARK, sizeof MARK), 0; }
API nvrtcGetErrorString(int) { return 0; }
