// Runs plans of TensorRT 10.3 or newer, of TensorRT-RTX, and of TensorRT's lean runtime.
//
// Which of the three it is, the headers and the CMake target decide: a program has one of them, because all three have the
// same names. Nothing is compiled here, and no plugin is loaded.
//
// Every call borrows an execution context with a stream and memory of its own, so threads may share a session. No call waits
// for the whole device. A context is made when no idle one suits a call, and kept: the first calls, and the first call of a
// larger shape, allocate memory. Run the largest shape once per thread before it matters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "cuda.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "plans.hpp"
#include "session.hpp"
#include "tensorrt_contexts.hpp"
#include "tensorrt_engine.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones::tensorrt {

namespace detail {

/// Throw Code::engine_mismatch if this process sees no such GPU. Nothing of TensorRT is made before: without a driver, the lean
/// runtime ends the process.
inline void require_gpu(int gpu) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  const std::string needs = std::string("the ") + kFlavour + " engine needs an NVIDIA GPU: ";
  if (status != cudaSuccess) {
    cuda::quietly(status);
    throw Error(Code::engine_mismatch,
                needs + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + "); edge-backbones doctor says more");
  }
  if (count == 0) throw Error(Code::engine_mismatch, needs + "none is visible to this process (CUDA_VISIBLE_DEVICES?)");
  if (gpu < 0 || gpu >= count) {
    throw Error(Code::engine_mismatch, "there is no cuda:" + std::to_string(gpu) + " here, " + std::to_string(count) +
                                           " GPUs are visible: pass a smaller index");
  }
}

constexpr const char* kStripped =
    "was written without weights, and the C++ library takes none from a graph: compile it without --strip, or run it in Python";

/// Throw Code::engine_mismatch for a plan that this library does not run, whatever the machine.
inline void require_runnable(const EngineRecord& record, const std::vector<char>& plan) {
  std::vector<std::string> wrong = plans::reasons_in_plan(record.key, plan);
  if (record.key.gpu && record.key.gpu->stripped) {
    wrong.push_back(kStripped);
  }
  if (!wrong.empty()) throw Error(Code::engine_mismatch, record.name + ": " + joined(wrong, " and "));
}

}  // namespace detail

/// Runs a loaded plan on one GPU. Threads may share it.
class TensorRtSession final : public Session {
 public:
  TensorRtSession(const Manifest& manifest, const EngineRecord& record, const std::vector<char>& plan,
                  const LoadOptions& options)
      : gpu_(std::max(options.gpu, 0)), input_(manifest.input) {
    detail::require_gpu(gpu_);
    detail::require_runnable(record, plan);
    const cuda::OnGpu current(gpu_);
    try {
      engine_ = std::make_unique<detail::Engine>(detail::load_engine(manifest, record.key, plan, options.allow_host_code));
    } catch (const Error& error) {
      throw Error(error.code(), record.name + ": " + error.what());
    }
    slots_ = std::make_unique<detail::Slots>(*engine_);
  }

  /// Waits for the work that it has enqueued, then releases contexts, engine and runtime, in this order.
  ~TensorRtSession() override {
    int before = gpu_;
    cuda::quietly(cudaGetDevice(&before));
    cuda::quietly(cudaSetDevice(gpu_));
    slots_.reset();
    engine_.reset();
    cuda::quietly(cudaSetDevice(before));
  }

  /// Run one batch, on a stream of the session, and wait for that stream alone.
  ///
  /// Memory that is page-locked (cudaHostAlloc, cudaHostRegister) is read and written by the GPU itself; other memory is copied
  /// by way of page-locked memory of the session.
  void run(const ConstTensor& input, const std::vector<Tensor>& outputs) override {
    const plans::Profile& profile = plans::choose_profile(engine_->profiles, input.shape);
    const cuda::OnGpu current(gpu_);
    detail::Lent slot(*slots_, profile, input.shape, nullptr);
    (*slot).run(input, outputs);
    slot.is_well();
  }

  /// Enqueue one batch on `stream`, a cudaStream_t of this GPU, and return without waiting.
  ///
  /// All pointers are in the memory of this GPU, at multiples of 256 bytes. The input is read and the outputs are written in
  /// place: until `stream` is past this call, nothing may write to the input, and neither may be freed. The outputs must not
  /// overlap the input or each other. Work that is enqueued on `stream` afterwards sees the outputs; another stream has to
  /// wait for it with an event. Destroying the session waits for the call. On a default stream the work runs on a stream of
  /// the session, and the default stream waits for it.
  ///
  /// Throws Code::input for other memory, and while `stream` is being captured.
  void run_on_device(const ConstTensor& input, const std::vector<Tensor>& outputs, void* stream) override {
    const plans::Profile& profile = plans::choose_profile(engine_->profiles, input.shape);
    const cuda::OnGpu current(gpu_);
    auto* const queue = static_cast<cudaStream_t>(stream);
    require_on_gpu(input.data, input_.name);
    for (std::size_t i = 0; i < outputs.size(); ++i) require_on_gpu(outputs[i].data, engine_->outputs[i]);
    require_not_captured(queue);
    detail::Lent slot(*slots_, profile, input.shape, queue);
    (*slot).run_on_device(input, outputs, queue);
    slot.is_well();
  }

  Shape output_shape(std::size_t output, const Shape& input_shape) const override {
    if (output >= engine_->outputs.size()) {
      throw Error(Code::input, "there is no output " + std::to_string(output) + ": this engine has " +
                                   std::to_string(engine_->outputs.size()));
    }
    {
      const std::lock_guard<std::mutex> lock(known_mutex_);
      const auto known = known_.find(input_shape);
      if (known != known_.end()) return known->second[output];
    }
    const plans::Profile& profile = plans::choose_profile(engine_->profiles, input_shape);
    const cuda::OnGpu current(gpu_);
    detail::Lent slot(*slots_, profile, input_shape, nullptr);
    (*slot).set_shape(input_shape);
    std::vector<Shape> shapes = (*slot).outputs();
    slot.is_well();
    const std::lock_guard<std::mutex> lock(known_mutex_);
    if (known_.size() >= 1024) known_.clear();
    return known_.emplace(input_shape, std::move(shapes)).first->second[output];
  }

 private:
  void require_on_gpu(const void* data, const std::string& name) const {
    const std::string where = cuda::elsewhere(data, gpu_);
    const std::string here = "cuda:" + std::to_string(gpu_);
    if (!where.empty()) {
      throw Error(Code::input, name + " is in " + where + ", this engine runs on " + here + ": copy it there first");
    }
    if (reinterpret_cast<std::uintptr_t>(data) % cuda::kAlignment != 0) {
      throw Error(Code::input, name + " does not start at a multiple of " + std::to_string(cuda::kAlignment) +
                                   " bytes, which TensorRT needs: pass memory as cudaMalloc returns it");
    }
  }

  static void require_not_captured(cudaStream_t stream) {
    if (cuda::is_default(stream)) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    if (status != cudaStreamCaptureStatusNone) {
      throw Error(Code::input,
                  "the stream is being captured, and the memory of a call cannot be part of a CUDA graph: end the capture first");
    }
  }

  int gpu_;
  InputSpec input_;
  std::unique_ptr<detail::Engine> engine_;
  std::unique_ptr<detail::Slots> slots_;
  mutable std::mutex known_mutex_;
  mutable std::map<Shape, std::vector<Shape>> known_;  // shapes of all outputs, by that of the input
};

/// Return why a plan with this key cannot run on a host, one phrase with a fix each: the rules of compat.hpp, and one more.
///
/// Some packages of TensorRT name their release without the build number, so keys have 10.3.0 for the library 10.3.0.30.
inline std::vector<std::string> reasons_against(const EngineKey& key, const Host& host) {
  Host here = host;
  for (auto& version : here.versions) {
    const bool is_plan = version.first.compare(0, 8, "tensorrt") == 0;
    if (is_plan && plans::is_same_release(version.second, key.library_version)) version.second = key.library_version;
  }
  std::vector<std::string> reasons = compat::against_plan(key, here);
  if (reasons.empty() && key.gpu->stripped) reasons.push_back(detail::kStripped);
  return reasons;
}

inline BackEnd back_end() {
  BackEnd found;
  found.flavour = kFlavour;
  found.version = &version;
  found.load = [](const Manifest& manifest, const EngineRecord& engine, std::vector<char>&& bytes,
                  const LoadOptions& options) -> std::unique_ptr<Session> {
    return std::make_unique<TensorRtSession>(manifest, engine, bytes, options);
  };
  found.reasons_against = &reasons_against;
  return found;
}

}  // namespace edge_backbones::tensorrt

namespace edge_backbones {

#if defined(TRT_MAJOR_RTX)
/// Return the back end that runs plans of TensorRT-RTX.
inline BackEnd tensorrt_rtx_back_end() { return tensorrt::back_end(); }
#else
/// Return the back end that runs plans of TensorRT; with EDGE_BACKBONES_WITH_TENSORRT_LEAN, those that its lean runtime runs.
inline BackEnd tensorrt_back_end() { return tensorrt::back_end(); }
#endif

}  // namespace edge_backbones
