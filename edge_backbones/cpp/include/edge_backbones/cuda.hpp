// What this library needs of the CUDA runtime: checked calls, and owners of memory, streams and events.
//
// Nothing here waits for the whole device on purpose. cudaFree and cudaFreeHost may: memory is freed only when a larger shape
// comes than before, and when a session ends.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "errors.hpp"

namespace edge_backbones::cuda {

/// TensorRT takes addresses that are multiples of this.
constexpr std::size_t kAlignment = 256;

/// Throw Code::inference, with CUDA's own words, if a call failed.
///
/// CUDA keeps the last error for whoever asks next: it is cleared here, so that the caller's next check does not find ours.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  std::string message = std::string(what) + " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")";
  if (status == cudaErrorMemoryAllocation) {
    message += ". Run smaller batches or fewer threads, or end what else uses this GPU";
  }
  throw Error(Code::inference, message);
}

/// Ignore the result of a call that cleans up: an earlier error is being reported, or nobody is there to be told.
inline void quietly(cudaError_t status) noexcept {
  if (status != cudaSuccess) (void)cudaGetLastError();
}

/// Make a GPU current in this thread, and the one before it again at the end.
class OnGpu {
 public:
  explicit OnGpu(int gpu) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    is_other_ = before_ != gpu;
    if (is_other_) check(cudaSetDevice(gpu), "cudaSetDevice");
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  ~OnGpu() {
    if (is_other_) quietly(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool is_other_ = false;
};

/// Return a size rounded up to the next multiple of kAlignment.
inline std::size_t rounded(std::size_t size) noexcept { return (size + kAlignment - 1) / kAlignment * kAlignment; }

/// Memory of the GPU, or page-locked memory of the host. It grows and never shrinks.
template <cudaError_t (*allocate)(void**, std::size_t), cudaError_t (*release)(void*)>
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(); }

  /// Make room for `size` bytes. What was there is lost. Nothing may be using the memory.
  void reserve(std::size_t size, const char* what) {
    if (size <= size_) return;
    free();
    check(allocate(&data_, size), what);
    size_ = size;
  }

  std::size_t size() const noexcept { return size_; }
  void* data() const noexcept { return data_; }
  char* bytes() const noexcept { return static_cast<char*>(data_); }

 private:
  void free() noexcept {
    if (data_ != nullptr) quietly(release(data_));
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

namespace detail {

// Functions of our own: some of CUDA's have overloads and default arguments in C++.
inline cudaError_t new_device_memory(void** data, std::size_t size) { return cudaMalloc(data, size); }
inline cudaError_t free_device_memory(void* data) { return cudaFree(data); }
inline cudaError_t new_host_memory(void** data, std::size_t size) { return cudaHostAlloc(data, size, cudaHostAllocDefault); }
inline cudaError_t free_host_memory(void* data) { return cudaFreeHost(data); }

}  // namespace detail

using DeviceMemory = Memory<detail::new_device_memory, detail::free_device_memory>;
using HostMemory = Memory<detail::new_host_memory, detail::free_host_memory>;

/// A stream of its own, which does not wait for the default stream.
class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { quietly(cudaStreamDestroy(handle_)); }

  cudaStream_t get() const noexcept { return handle_; }
  void wait() const { check(cudaStreamSynchronize(handle_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t handle_ = nullptr;
};

/// A mark in the work of a stream, which other streams and the host can wait for.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { quietly(cudaEventDestroy(handle_)); }

  void record(cudaStream_t stream) { check(cudaEventRecord(handle_, stream), "cudaEventRecord"); }
  /// Make a stream wait for the mark, without waiting here.
  void hold(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, handle_, 0), "cudaStreamWaitEvent"); }
  /// Wait for the mark on the host.
  void wait() const { check(cudaEventSynchronize(handle_), "cudaEventSynchronize"); }
  void wait_quietly() const noexcept { quietly(cudaEventSynchronize(handle_)); }

  /// Return whether the work before the mark is done. Throws Code::inference if that work failed.
  bool happened() const {
    const cudaError_t status = cudaEventQuery(handle_);
    if (status == cudaErrorNotReady) {
      quietly(status);
      return false;
    }
    check(status, "cudaEventQuery");
    return true;
  }

 private:
  cudaEvent_t handle_ = nullptr;
};

/// Return whether a handle stands for one of CUDA's two default streams.
inline bool is_default(cudaStream_t stream) noexcept {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

/// What CUDA knows about an address: the kind of memory, and the GPU that it belongs to.
inline cudaPointerAttributes described(const void* address) {
  cudaPointerAttributes found{};
  check(cudaPointerGetAttributes(&found, address), "cudaPointerGetAttributes");
  return found;
}

/// Return whether host memory is page-locked from its first byte to its last, so that the GPU reads and writes it itself.
inline bool is_page_locked(const void* data, std::size_t size) {
  if (size == 0) return false;
  const char* const first = static_cast<const char*>(data);
  return described(first).type == cudaMemoryTypeHost && described(first + size - 1).type == cudaMemoryTypeHost;
}

/// Return why memory is not on a GPU, as the end of "it is in ..."; empty if it is there.
inline std::string elsewhere(const void* data, int gpu) {
  const cudaPointerAttributes found = described(data);
  if (found.type == cudaMemoryTypeManaged) return "";
  if (found.type != cudaMemoryTypeDevice) return "the memory of the host";
  return found.device == gpu ? "" : "the memory of cuda:" + std::to_string(found.device);
}

}  // namespace edge_backbones::cuda
