// The CUDA runtime as include/cuda_runtime_api.h declares it, over the stand-in for libcuda.so.1.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "libcuda.hpp"

namespace {

thread_local int device = 0;
thread_local int last_error = 0;

cudaError_t answer(int code) {
  if (code != 0) last_error = code;
  return static_cast<cudaError_t>(code);  // the numbers of the runtime's errors are the driver's
}

/// Make the context of this thread's GPU current, if it is not. The first call of a thread does it, and one after cudaSetDevice.
int enter() {
  thread_local int entered = -1;
  if (entered == device) return 0;
  static std::mutex mutex;
  static std::map<int, void*> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  void*& context = contexts[device];
  if (context == nullptr) {
    int handle = 0;
    int code = cuInit(0);
    if (code == 0) code = cuDeviceGet(&handle, device);
    if (code == 0) code = cuDevicePrimaryCtxRetain(&context, handle);
    if (code != 0) return code;
  }
  const int code = cuCtxSetCurrent(context);
  if (code == 0) entered = device;
  return code;
}

template <class Function, class... Arguments>
cudaError_t call(Function function, Arguments... arguments) {
  const int code = enter();
  return answer(code != 0 ? code : function(arguments...));
}

unsigned long long number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace

cudaError_t cudaGetLastError() {
  const int code = last_error;
  last_error = 0;
  return static_cast<cudaError_t>(code);
}

const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) return "cudaErrorInsufficientDriver";
  const char* name = nullptr;
  return cuGetErrorName(error, &name) == 0 && name != nullptr ? name : "an unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  return cuGetErrorString(error, &text) == 0 && text != nullptr ? text : "an unknown error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  int code = cuInit(0);
  if (code == 0) code = cuDeviceGetCount(count);
  return answer(code != 0 ? code : *count == 0 ? cudaErrorNoDevice : 0);
}

cudaError_t cudaGetDevice(int* found) {
  *found = device;
  return answer(standin_note("cudaGetDevice"));
}

cudaError_t cudaSetDevice(int wanted) {
  int count = 0;
  int code = cuDeviceGetCount(&count);
  if (code == 0 && (wanted < 0 || wanted >= count)) code = cudaErrorInvalidDevice;
  if (code == 0) device = wanted;
  return answer(code);
}

cudaError_t cudaMalloc(void** pointer, size_t size) {
  unsigned long long found = 0;
  const cudaError_t code = call(cuMemAlloc_v2, &found, size);
  if (code == cudaSuccess) *pointer = reinterpret_cast<void*>(static_cast<std::uintptr_t>(found));
  return code;
}

cudaError_t cudaFree(void* pointer) { return call(cuMemFree_v2, number(pointer)); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) { return call(cuMemHostAlloc, pointer, size, flags); }
cudaError_t cudaFreeHost(void* pointer) { return call(cuMemFreeHost, pointer); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) return call(cuMemcpyHtoDAsync_v2, number(to), from, size, stream);
  return call(cuMemcpyDtoHAsync_v2, to, number(from), size, stream);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  int type = 0, is_managed = 0, ordinal = 0;
  const int asked[] = {2, 8, 9};  // memory type, is managed, device ordinal
  void* answers[] = {&type, &is_managed, &ordinal};
  const cudaError_t code = call(cuPointerGetAttributes, 3u, asked, answers, number(pointer));
  attributes->type = is_managed != 0 ? cudaMemoryTypeManaged : static_cast<cudaMemoryType>(type);
  attributes->device = ordinal;
  return code;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return call(cuStreamCreate, reinterpret_cast<void**>(stream), flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return call(cuStreamDestroy_v2, stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return call(cuStreamSynchronize, stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return call(cuStreamWaitEvent, stream, event, flags);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call(cuStreamIsCapturing, stream, reinterpret_cast<int*>(status));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call(cuEventCreate, reinterpret_cast<void**>(event), flags);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return call(cuEventDestroy_v2, event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return call(cuEventRecord, event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return call(cuEventQuery, event); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return call(cuEventSynchronize, event); }
