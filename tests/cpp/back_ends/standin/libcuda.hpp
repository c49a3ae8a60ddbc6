// The functions of the stand-in for libcuda.so.1 (tests/driver/libcuda) that the stand-ins here call.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

int cuInit(unsigned flags);
int cuGetErrorName(int code, const char** name);
int cuGetErrorString(int code, const char** text);
int cuDeviceGetCount(int* count);
int cuDeviceGet(int* device, int ordinal);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxSetCurrent(void* context);
int cuMemAlloc_v2(unsigned long long* pointer, std::size_t size);
int cuMemFree_v2(unsigned long long pointer);
int cuMemHostAlloc(void** pointer, std::size_t size, unsigned flags);
int cuMemFreeHost(void* pointer);
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, std::size_t size, const void* stream);
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, std::size_t size, const void* stream);
int cuPointerGetAttributes(unsigned count, const int* attributes, void** data, unsigned long long pointer);
int cuStreamCreate(void** stream, unsigned flags);
int cuStreamDestroy_v2(const void* stream);
int cuStreamSynchronize(const void* stream);
int cuStreamWaitEvent(const void* stream, const void* event, unsigned flags);
int cuStreamIsCapturing(const void* stream, int* status);
int cuStreamBeginCapture_v2(const void* stream, int mode);
int cuStreamEndCapture(const void* stream, void** graph);
int cuGraphDestroy(const void* graph);
int cuEventCreate(void** event, unsigned flags);
int cuEventDestroy_v2(const void* event);
int cuEventRecord(const void* event, const void* stream);
int cuEventQuery(const void* event);
int cuEventSynchronize(const void* event);

// What it has for tests.
int standin_note(const char* name);
void standin_reset(void);
void standin_fail_at(const char* name, long nth, int code);
const char* standin_failed(void);
std::size_t standin_calls(const char* name);
std::size_t standin_violations(void);
const char* standin_violation(std::size_t index);
std::size_t standin_live(const char* what);
int standin_kernel(const void* stream, void (*function)(void*), void* data);
int standin_range_is_known(unsigned long long address, std::size_t size);
std::size_t standin_pending(const void* stream);
void standin_set_memory(std::size_t bytes);

}
