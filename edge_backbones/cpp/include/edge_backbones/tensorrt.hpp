// Runs plans of TensorRT 10.3 or newer, of TensorRT-RTX, and of TensorRT's lean runtime.
//
// Which of the three it is, the headers and the CMake target decide: a program has one of them, because all three have the
// same names. Nothing is compiled here, and no plugin is loaded.
//
// Every call borrows an execution context with a stream and memory of its own, so threads may share a session. No call waits
// for the whole device. A context is made when no idle one suits a call, and kept: the first calls, and the first call of a
// larger shape, allocate memory. Run the largest shape once per thread before it matters.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "cuda.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "plans.hpp"
#include "ports.hpp"
#include "session.hpp"
#include "text.hpp"
#include "types.hpp"

#if defined(EDGE_BACKBONES_WITH_TENSORRT_RTX) && !defined(TRT_MAJOR_RTX)
#error "edge_backbones::tensorrt_rtx needs the headers of TensorRT-RTX, and these are TensorRT's: set TensorRT_RTX_ROOT"
#endif
#if defined(EDGE_BACKBONES_WITH_TENSORRT) && defined(TRT_MAJOR_RTX)
#error "edge_backbones::tensorrt needs the headers of TensorRT, and these are of TensorRT-RTX: set TensorRT_ROOT"
#endif

namespace edge_backbones::tensorrt {

/// Most contexts of one session, and so the most calls that run at once; further threads wait for one.
constexpr std::size_t kMostContexts = 32;

/// Name of this library in the keys of engines.
#if defined(TRT_MAJOR_RTX)
constexpr const char* kFlavour = "tensorrt_rtx";
#elif defined(EDGE_BACKBONES_WITH_TENSORRT_LEAN)
constexpr const char* kFlavour = "tensorrt_lean";
#else
constexpr const char* kFlavour = "tensorrt";
#endif

/// Return the release of the library that is loaded, with its build number: "10.3.0.30".
inline std::string version() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

namespace detail {

/// Keeps TensorRT's latest errors: its calls return null or false, and only the log has the reason.
///
/// There is one in a process, because TensorRT keeps its first logger. It is never destroyed: TensorRT logs until the end.
class Log final : public nvinfer1::ILogger {
 public:
  static Log& get() {
    static Log* const log = new Log;
    return *log;
  }

  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR || message == nullptr) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      errors_.emplace_back(std::this_thread::get_id(), on_one_line(message));
      if (errors_.size() > 32) errors_.pop_front();
    } catch (...) {  // without memory the reason is lost, and nothing may leave a function of TensorRT
    }
  }

  /// Forget the errors of this thread, before a call whose failure is to be explained.
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto mine = std::this_thread::get_id();
    errors_.erase(std::remove_if(errors_.begin(), errors_.end(), [&](const auto& entry) { return entry.first == mine; }),
                  errors_.end());
  }

  /// Return the last error of this thread; if there is none, the last of any thread.
  std::string last_error() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = errors_.rbegin(); entry != errors_.rend(); ++entry) {
      if (entry->first == std::this_thread::get_id()) return entry->second;
    }
    return errors_.empty() ? std::string(kFlavour) + " logged no error" : errors_.back().second;
  }

 private:
  static std::string on_one_line(const char* message) {
    std::string line;
    for (const char* at = message; *at != '\0'; ++at) {
      const bool is_space = *at == ' ' || (*at >= '\t' && *at <= '\r');
      if (!is_space) {
        line += *at;
      } else if (!line.empty() && line.back() != ' ') {
        line += ' ';
      }
    }
    if (!line.empty() && line.back() == ' ') line.pop_back();
    return line;
  }

  std::mutex mutex_;
  std::deque<std::pair<std::thread::id, std::string>> errors_;
};

inline nvinfer1::Dims dims_of(const Shape& shape) {
  if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) {
    throw Error(Code::input, "TensorRT takes no shape of so many axes: " + text_of(shape));
  }
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

inline Shape shape_of(const nvinfer1::Dims& dims) {
  Shape shape;
  for (std::int32_t i = 0; i < dims.nbDims; ++i) shape.push_back(dims.d[i]);
  return shape;
}

/// Return a type's name in messages. Of those that a manifest cannot have, the number is enough.
inline std::string name_of(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kFLOAT) return "FLOAT";
  if (type == nvinfer1::DataType::kHALF) return "HALF";
  if (type == nvinfer1::DataType::kUINT8) return "UINT8";
  return "type " + std::to_string(static_cast<int>(type));
}

/// Return the error for a call of TensorRT that failed, with the reason in its log.
inline Error failure(const std::string& what) {
  const std::string log = Log::get().last_error();
  const bool is_memory = plans::says_out_of_memory(log);
  return Error(Code::inference,
               what + ": " + log + (is_memory ? ". Run smaller batches or fewer threads, or end what else uses this GPU" : ""));
}

inline void require(bool done, const std::string& what) {
  if (!done) throw failure("TensorRT refused " + what);
}

/// A deserialised plan. Every context must be gone before it.
struct Engine {
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> handle;  // after the runtime: it must be destroyed first
  std::string input;
  std::vector<std::string> outputs;
  std::vector<std::size_t> value_bytes;  ///< Bytes of one value, by output.
  std::vector<plans::Profile> profiles;

  std::unique_ptr<nvinfer1::IExecutionContext> new_context() const {
    Log::get().clear();
    constexpr auto strategy = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#if defined(TRT_MAJOR_RTX)
    // TensorRT-RTX would begin with kernels that nobody has measured, and replace them while it runs: it is to compile at once.
    const std::unique_ptr<nvinfer1::IRuntimeConfig> config(handle->createRuntimeConfig());
    if (!config) throw failure("TensorRT made no runtime configuration");
    config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    config->setExecutionContextAllocationStrategy(strategy);
    std::unique_ptr<nvinfer1::IExecutionContext> context(handle->createExecutionContext(config.get()));
#else
    std::unique_ptr<nvinfer1::IExecutionContext> context(handle->createExecutionContext(strategy));
#endif
    if (!context) throw failure("TensorRT made no execution context");
    return context;
  }
};

/// Return the optimisation profiles of a plan, one without bounds if its shape is fixed.
inline std::vector<plans::Profile> profiles_of(const nvinfer1::ICudaEngine& engine, const char* input) {
  const Shape shape = shape_of(engine.getTensorShape(input));
  if (std::find(shape.begin(), shape.end(), -1) == shape.end()) return {{0, shape, shape, shape}};
  using Which = nvinfer1::OptProfileSelector;
  std::vector<plans::Profile> found;
  for (std::int32_t i = 0; i < engine.getNbOptimizationProfiles(); ++i) {
    const auto bound = [&](Which which) { return shape_of(engine.getProfileShape(input, i, which)); };
    found.push_back({i, bound(Which::kMIN), bound(Which::kOPT), bound(Which::kMAX)});
  }
  return found;
}

/// Throw Code::engine_mismatch if a plan is not the one of its manifest; fill in the rest of the engine.
inline void agree(Engine& engine, const Manifest& manifest) {
  std::vector<Port> found;
  for (std::int32_t i = 0; i < engine.handle->getNbIOTensors(); ++i) {
    const char* const name = engine.handle->getIOTensorName(i);
    if (name == nullptr) throw Error(Code::engine_mismatch, "the plan has an input or output without a name: build it again");
    found.push_back({name, engine.handle->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT,
                     name_of(engine.handle->getTensorDataType(name)), shape_of(engine.handle->getTensorShape(name))});
  }
  const std::vector<std::string> wrong = mismatches(found, manifest.input, manifest.backbone);
  if (!wrong.empty()) {
    throw Error(Code::engine_mismatch, "the plan is not the one of this manifest: " + joined(wrong, "; ") + ". Build it again");
  }
  engine.input = manifest.input.name;
  engine.outputs = manifest.backbone.outputs();
  engine.value_bytes.assign(engine.outputs.size(), bytes_of(manifest.backbone.map_dtype));
  engine.profiles = profiles_of(*engine.handle, engine.input.c_str());
  const std::vector<Shape> missing = plans::uncovered(engine.profiles, manifest.input);
  if (missing.empty()) return;
  std::vector<std::string> shapes;
  for (const Shape& shape : missing) shapes.push_back(text_of(shape));
  throw Error(Code::engine_mismatch, "the plan has no optimisation profile for " + joined(shapes) +
                                         ", which the manifest promises (" + plans::text_of_profiles(engine.profiles) +
                                         "): compile it again");
}

/// Deserialise a plan and check its inputs, outputs and profiles against the manifest.
inline Engine load_engine(const Manifest& manifest, const EngineKey& key, const std::vector<char>& plan, bool allow_host_code) {
  Log& log = Log::get();
  log.clear();
  Engine engine;
  engine.runtime.reset(nvinfer1::createInferRuntime(log));
  if (!engine.runtime) throw Error(Code::engine_mismatch, std::string(kFlavour) + " cannot start: " + log.last_error());
  if (allow_host_code) engine.runtime->setEngineHostCodeAllowed(true);
  if (key.gpu && key.gpu->dla_core) {
    const std::int64_t core = *key.gpu->dla_core, cores = engine.runtime->getNbDLACores();
    if (core >= cores) {
      throw Error(Code::engine_mismatch, "this plan is for DLA core " + std::to_string(core) + ", and this machine has " +
                                             std::to_string(cores) + " DLA cores: run edge-backbones compile on this machine");
    }
    engine.runtime->setDLACore(static_cast<std::int32_t>(core));
  }
  engine.handle.reset(engine.runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine.handle) {
    const std::string said = log.last_error();
    if (plans::says_out_of_memory(said)) {
      throw Error(Code::inference, "the plan does not fit into the memory of this GPU: " + said);
    }
    std::string hint = "run edge-backbones compile on this machine";
    if (!allow_host_code && (std::string(kFlavour) == "tensorrt_lean" || plans::says_host_code(said))) {
      hint = "if the plan carries a lean runtime and you trust it, set allow_host_code; else " + hint;
    }
    throw Error(Code::engine_mismatch,
                std::string(kFlavour) + " " + version() + " does not load this plan (" + said + "): " + hint);
  }
  agree(engine, manifest);
  return engine;
}

/// One execution context, with a stream and memory of its own. One thread uses it at a time.
class Slot {
 public:
  Slot(const Engine& engine, const plans::Profile& profile)
      : engine_(engine), profile_(profile), context_(engine.new_context()) {
    if (engine_.profiles.size() < 2) return;
    require(context_->setOptimizationProfileAsync(profile_.index, stream_.get()),
            "optimisation profile " + std::to_string(profile_.index));
    stream_.wait();
  }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  /// Waits for the work that uses its memory.
  ~Slot() {
    if (busy_ != nullptr) cuda::quietly(cudaStreamSynchronize(busy_));  // a call failed behind work on this stream
    if (is_pending_) done_.wait_quietly();
    cuda::quietly(cudaStreamSynchronize(stream_.get()));
  }

  int profile() const noexcept { return profile_.index; }
  const Shape& shape() const noexcept { return shape_; }
  const std::vector<Shape>& outputs() const noexcept { return outputs_; }

  /// Return whether work on a stream hardly waits for earlier work of this context. `stream`: null for its own.
  bool is_free_for(cudaStream_t stream) {
    if (is_pending_ && done_.happened()) is_pending_ = false;
    return !is_pending_ || (stream != nullptr && last_ == stream);
  }

  /// Set the shape of the input, and read those of the outputs and the size of the scratch memory.
  void set_shape(const Shape& shape) {
    if (shape == shape_) return;
    shape_.clear();
    Log::get().clear();
    require(context_->setInputShape(engine_.input.c_str(), dims_of(shape)), "an input of shape " + text_of(shape));
    if (context_->inferShapes(0, nullptr) != 0) {
      throw failure("TensorRT does not know the shapes of its outputs for an input of shape " + text_of(shape));
    }
    outputs_.clear();
    for (const std::string& name : engine_.outputs) outputs_.push_back(shape_of(context_->getTensorShape(name.c_str())));
    for (const Shape& output : outputs_) {
      const bool is_known = !output.empty() && *std::min_element(output.begin(), output.end()) >= 1;
      if (!is_known || output[0] != shape[0]) {
        throw failure("TensorRT gives an output of shape " + text_of(output) + " for an input of shape " + text_of(shape));
      }
    }
    const std::size_t size = context_->updateDeviceMemorySizeForShapes();
    grow(scratch_, size, "allocating TensorRT's scratch memory on the GPU");
    if (size != 0) context_->setDeviceMemoryV2(scratch_.data(), static_cast<std::int64_t>(scratch_.size()));
    shape_ = shape;
  }

  /// Run one batch from and to memory of the host, and wait for it.
  void run(const ConstTensor& input, const std::vector<Tensor>& outputs) {
    set_shape(input.shape);
    cudaStream_t const stream = stream_.get();
    const std::size_t size = input.bytes();
    std::vector<std::size_t> offsets;
    std::size_t total = 0;
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      offsets.push_back(total);
      total += cuda::rounded(size_of(outputs_[i]) * engine_.value_bytes[i]);
    }
    grow(input_, size, "allocating the input on the GPU");
    grow(results_, total, "allocating the outputs on the GPU");
    const void* source = input.data;
    if (!cuda::is_page_locked(source, size)) {
      staged_input_.reserve(size, "allocating page-locked memory for the input");
      std::memcpy(staged_input_.data(), source, size);
      source = staged_input_.data();
    }
    if (is_pending_) done_.hold(stream);  // earlier work on another stream still uses the scratch memory
    cuda::check(cudaMemcpyAsync(input_.data(), source, size, cudaMemcpyHostToDevice, stream), "copying the input to the GPU");
    std::vector<void*> targets;
    for (const std::size_t offset : offsets) targets.push_back(results_.bytes() + offset);
    execute(input_.data(), targets, stream);
    std::vector<std::size_t> staged;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      void* target = outputs[i].data;
      if (!cuda::is_page_locked(target, outputs[i].bytes())) {
        staged_results_.reserve(total, "allocating page-locked memory for the outputs");  // once: all of them fit
        target = staged_results_.bytes() + offsets[i];
        staged.push_back(i);
      }
      cuda::check(cudaMemcpyAsync(target, targets[i], outputs[i].bytes(), cudaMemcpyDeviceToHost, stream),
                  "copying an output from the GPU");
    }
    stream_.wait();
    is_pending_ = false;
    for (const std::size_t i : staged) std::memcpy(outputs[i].data, staged_results_.bytes() + offsets[i], outputs[i].bytes());
  }

  /// Enqueue one batch in memory of the GPU on a stream, without waiting.
  void run_on_device(const ConstTensor& input, const std::vector<Tensor>& outputs, cudaStream_t stream) {
    set_shape(input.shape);
    // On a default stream TensorRT would wait for the device: the work runs on its own stream, between two events.
    const bool is_aside = cuda::is_default(stream);
    cudaStream_t const work = is_aside ? stream_.get() : stream;
    busy_ = work;
    if (is_aside) {
      order_.record(stream);
      order_.hold(work);
    }
    if (is_pending_) done_.hold(work);  // of the same handle too: it may be a new stream, which got the handle of an old one
    std::vector<void*> targets;
    for (const Tensor& output : outputs) targets.push_back(output.data);
    execute(input.data, targets, work);
    done_.record(work);
    is_pending_ = true;
    last_ = work;
    if (is_aside) done_.hold(stream);
    busy_ = nullptr;
  }

 private:
  /// Make room in memory that earlier work may still use.
  template <class Memory>
  void grow(Memory& memory, std::size_t size, const char* what) {
    if (size <= memory.size()) return;
    if (is_pending_) done_.wait();
    is_pending_ = false;
    memory.reserve(size, what);
  }

  void execute(const void* input, const std::vector<void*>& outputs, cudaStream_t stream) {
    Log::get().clear();
    require(context_->setInputTensorAddress(engine_.input.c_str(), input), "an address for " + engine_.input);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      require(context_->setTensorAddress(engine_.outputs[i].c_str(), outputs[i]), "an address for " + engine_.outputs[i]);
    }
    require(context_->enqueueV3(stream), "to run an input of shape " + text_of(shape_));
  }

  const Engine& engine_;
  const plans::Profile& profile_;
  cuda::Stream stream_;
  cuda::Event order_, done_;
  cuda::DeviceMemory scratch_, input_, results_;
  cuda::HostMemory staged_input_, staged_results_;
  bool is_pending_ = false;       // work before done_ may still run
  cudaStream_t last_ = nullptr;   // the stream of that work
  cudaStream_t busy_ = nullptr;   // the stream of a call that has not ended well
  Shape shape_;
  std::vector<Shape> outputs_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

/// Lends the contexts of one engine to calls. Threads may share it.
class Slots {
 public:
  explicit Slots(const Engine& engine) : engine_(engine) { idle_.reserve(kMostContexts); }

  /// Return a context for a shape, made if no idle one suits. `stream`: of the caller, null for the context's own.
  std::unique_ptr<Slot> take(const plans::Profile& profile, const Shape& shape, cudaStream_t stream) {
    std::unique_ptr<Slot> replaced;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (true) {
        const auto best = std::find_if(idle_.begin(), idle_.end(), [&](const auto& slot) {
          return slot->profile() == profile.index && slot->shape() == shape && slot->is_free_for(stream);
        });
        if (best != idle_.end()) return remove(best);
        const auto next = std::find_if(idle_.begin(), idle_.end(), [&](const auto& slot) {
          return slot->profile() == profile.index && (slot->is_free_for(stream) || alive_ >= kMostContexts);
        });
        if (next != idle_.end()) return remove(next);
        if (alive_ < kMostContexts) {
          ++alive_;
          break;
        }
        if (!idle_.empty()) {
          replaced = remove(idle_.begin());
          break;
        }
        returned_.wait(lock);
      }
    }
    try {
      replaced.reset();  // without the lock, because it waits for the GPU
      return std::make_unique<Slot>(engine_, profile);
    } catch (...) {
      forget();
      throw;
    }
  }

  /// Keep a context for the next call. There is room for it: it was made or taken from there.
  void give_back(std::unique_ptr<Slot> slot) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(slot));
    returned_.notify_one();
  }

  /// Release a context: after an error its state is unknown.
  void discard(std::unique_ptr<Slot> slot) noexcept {
    slot.reset();
    forget();
  }

 private:
  std::unique_ptr<Slot> remove(std::vector<std::unique_ptr<Slot>>::iterator which) {
    std::unique_ptr<Slot> slot = std::move(*which);
    idle_.erase(which);
    return slot;
  }

  void forget() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    --alive_;
    returned_.notify_one();
  }

  const Engine& engine_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<Slot>> idle_;
  std::size_t alive_ = 0;  // contexts, lent or idle
};

/// Borrows a context for one call. Unless `is_well`, it is released at the end.
class Lent {
 public:
  Lent(Slots& slots, const plans::Profile& profile, const Shape& shape, cudaStream_t stream)
      : slots_(slots), slot_(slots.take(profile, shape, stream)) {}
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  ~Lent() {
    if (slot_) slots_.discard(std::move(slot_));
  }

  Slot& operator*() const noexcept { return *slot_; }
  void is_well() noexcept { slots_.give_back(std::move(slot_)); }

 private:
  Slots& slots_;
  std::unique_ptr<Slot> slot_;
};

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
