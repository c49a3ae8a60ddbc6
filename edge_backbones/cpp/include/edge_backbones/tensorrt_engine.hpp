// A deserialised plan of TensorRT: its library, its log, and what it has in common with its manifest.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "plans.hpp"
#include "ports.hpp"
#include "text.hpp"
#include "types.hpp"

#if defined(EDGE_BACKBONES_WITH_TENSORRT_RTX) && !defined(TRT_MAJOR_RTX)
#error "edge_backbones::tensorrt_rtx needs the headers of TensorRT-RTX, and these are TensorRT's: set TensorRT_RTX_ROOT"
#endif
#if defined(EDGE_BACKBONES_WITH_TENSORRT) && defined(TRT_MAJOR_RTX)
#error "edge_backbones::tensorrt needs the headers of TensorRT, and these are of TensorRT-RTX: set TensorRT_ROOT"
#endif

namespace edge_backbones::tensorrt {

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

}  // namespace detail

}  // namespace edge_backbones::tensorrt
